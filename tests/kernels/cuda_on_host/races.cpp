// The other half of races.h, which the compiler does not mark.
#include "races.h"

#include <algorithm>
#include <utility>

namespace races {

enum class Kind { kRead, kWrite, kAtomic };

struct Access {
  uint32_t thread, epoch;
  const void* code;
};

// Four bytes: the accesses that no later write covers.
struct Cell {
  std::vector<Access> writes, reads, atomics;
};

struct Region {
  uintptr_t begin, end;
  std::vector<Cell> cells;
};

// Null but while a cluster runs: constructors and destructors of what is marked call as well, at any time.
static std::vector<Region>* regions = nullptr;
static std::vector<Race> found;
static std::vector<Known> known;      // of each thread, itself apart
static std::vector<uint32_t> epochs;  // of each thread
static uint32_t running;
static constexpr size_t kReportedAtMost = 64;

void start(uint32_t threads) {
  regions = new std::vector<Region>;
  known.assign(threads, std::make_shared<const Clock>(threads, 0));
  epochs.assign(threads, 1);
}
void watch(const void* place, size_t bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(place);
  regions->push_back(Region{begin, begin + bytes, std::vector<Cell>((bytes + 3) / 4)});
}
void stop() {
  delete regions;
  regions = nullptr;
}
void run(uint32_t thread) { running = thread; }

static void check(const std::vector<Access>& others, uint64_t offset, const void* code) {
  for (const Access& other : others) {
    const bool over = other.thread == running || (*known[running])[other.thread] >= other.epoch;
    if (!over && found.size() < kReportedAtMost) found.push_back(Race{offset, other.thread, running, other.code, code});
  }
}

static void note(std::vector<Access>& accesses, const void* code) {
  const Access own{running, epochs[running], code};
  const auto mine = std::find_if(accesses.begin(), accesses.end(), [](const Access& a) { return a.thread == running; });
  mine == accesses.end() ? accesses.push_back(own) : void(*mine = own);
}

static void access(const void* place, size_t bytes, Kind kind, const void* code) {
  if (regions == nullptr) return;
  const uintptr_t from = reinterpret_cast<uintptr_t>(place);
  const auto of = std::find_if(regions->begin(), regions->end(), [&](const Region& r) { return from >= r.begin && from < r.end; });
  if (of == regions->end()) return;
  for (uint64_t at = (from - of->begin) / 4 * 4; at < from - of->begin + bytes; at += 4) {
    Cell& cell = of->cells[at / 4];
    check(cell.writes, at, code);
    if (kind != Kind::kAtomic) check(cell.atomics, at, code);
    if (kind != Kind::kRead) check(cell.reads, at, code);
    if (kind == Kind::kWrite) {
      cell.reads.clear(), cell.atomics.clear();
      cell.writes.assign(1, Access{running, epochs[running], code});
    } else {
      note(kind == Kind::kRead ? cell.reads : cell.atomics, code);
    }
  }
}

void atomic(const void* place, size_t bytes) { access(place, bytes, Kind::kAtomic, __builtin_return_address(0)); }

static void join(Clock& into, const Clock& other) {
  for (size_t i = 0; i < into.size(); ++i) into[i] = std::max(into[i], other[i]);
}

void Order::arrive() {
  if (arriving.empty()) arriving.assign(epochs.size(), 0);
  if (last != known[running]) join(arriving, *known[running]);
  last = known[running];
  arriving[running] = epochs[running]++;
}

void Order::open() {
  if (!arriving.empty()) given = std::make_shared<const Clock>(arriving);
}

void Order::wait() const {
  static std::pair<Known, Known> before;  // a warp's threads know the same
  static Known joined;
  if (given == nullptr || known[running] == given) return;
  if (before != std::pair(known[running], given)) {
    auto both = std::make_shared<Clock>(*given);
    join(*both, *known[running]);
    before = {known[running], given};
    joined = *both == *given ? given : both;
  }
  known[running] = joined;
}

}  // namespace races

// What the compiler calls.
extern "C" {
#define QUEST_ACCESS(name, kind, bytes) \
  void __tsan_##name##bytes(void* place) { races::access(place, bytes, races::Kind::kind, __builtin_return_address(0)); }
#define QUEST_ACCESSES(bytes)                     \
  QUEST_ACCESS(read, kRead, bytes)                \
  QUEST_ACCESS(write, kWrite, bytes)              \
  QUEST_ACCESS(unaligned_read, kRead, bytes)      \
  QUEST_ACCESS(unaligned_write, kWrite, bytes)
QUEST_ACCESSES(1)
QUEST_ACCESSES(2)
QUEST_ACCESSES(4)
QUEST_ACCESSES(8)
QUEST_ACCESSES(16)
void __tsan_read_range(void* place, size_t bytes) {
  races::access(place, bytes, races::Kind::kRead, __builtin_return_address(0));
}
void __tsan_write_range(void* place, size_t bytes) {
  races::access(place, bytes, races::Kind::kWrite, __builtin_return_address(0));
}
int __tsan_atomic32_fetch_add(volatile int* place, int value, int) {  // counts of the shared pointers in Order
  return __atomic_fetch_add(place, value, __ATOMIC_SEQ_CST);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

// Races found since the last call: up to `most` of them in `into`; returns how many.
int quest_take_races(races::Race* into, int most) {
  const int count = std::min<int>(most, static_cast<int>(races::found.size()));
  std::copy_n(races::found.begin(), count, into);
  races::found.clear();
  return count;
}
}
