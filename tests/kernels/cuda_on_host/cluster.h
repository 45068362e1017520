// A cluster of CTAs on a CPU: every thread has a stack, and they take turns in one thread, each as far as the next place
// where it has to wait for others. A warp, and then a CTA, goes on for as long as it can before another has its turn: who
// relies on a barrier that is not there, fails. Barriers count the threads that have not left, as a GPU's do.
#pragma once
#include <optional>

#include "emulate.h"
#include "races.h"

inline Index gridDim;

struct Barrier {
  unsigned members, arrived = 0, phase = 0;
  races::Order order = {};
};

class Cluster {
 public:
  static inline void (*watch_more)() = [] {};  // what else the races are looked for in

  // Runs `program` in `ctas` CTAs of `threads` threads, the last first if `backwards`. `shared` is where the CTAs' shared
  // memories lie, `shared_bytes` apart. False: they wait for one another for ever.
  static bool run(void (*program)(), unsigned ctas, unsigned threads, char* shared, size_t shared_bytes, bool backwards) {
    static std::vector<char> stacks;
    const unsigned all = ctas * threads;
    stacks.resize(std::max(stacks.size(), all * kStackBytes));
    fibers_.assign(all, Fiber{});
    meetings_.assign(all / 32, Barrier{32});
    warps_.assign(all / 32, Barrier{32});
    slots_.assign(all, 0);
    blocks_.assign(ctas, Barrier{threads});
    cluster_ = Barrier{all};
    program_ = program, threads_ = threads, shared_ = shared, shared_bytes_ = shared_bytes;
    races::start(all);
    races::watch(shared, ctas * shared_bytes);
    watch_more();
    meet_warp = [] { wait(meetings_[current_ / 32], arrive(meetings_[current_ / 32])); };
    order_warp = [] { meet(warps_[current_ / 32]); };
    left_ = all;
    const auto from = [backwards](unsigned i, unsigned count) { return backwards ? count - 1 - i : i; };
    const auto run_warp = [&](unsigned warp) {
      for (unsigned i = 0; i < 32; ++i) give_turn(warp * 32 + from(i, 32), stacks.data());
    };
    const auto run_block = [&](unsigned block) {
      for (unsigned i = 0; i < threads / 32; ++i) {
        exhaust([&] { run_warp(block * threads / 32 + from(i, threads / 32)); });
      }
    };
    exhaust([&] {
      for (unsigned i = 0; i < ctas; ++i) exhaust([&] { run_block(from(i, ctas)); });
    });
    races::stop();
    return left_ == 0;
  }

  static void meet_block() { meet(blocks_[blockIdx.x]); }
  static void arrive_cluster(bool ordered = true) {
    if (ordered) cluster_.order.arrive();
    fibers_[current_].awaited = arrive(cluster_);
  }
  static void wait_cluster() {
    wait(cluster_, *fibers_[current_].awaited);
    fibers_[current_].awaited.reset();
    cluster_.order.wait();
  }

  template <typename T>
  static T* at_peer(const T* mine, int rank) {
    const ptrdiff_t apart = (rank - static_cast<ptrdiff_t>(blockIdx.x)) * static_cast<ptrdiff_t>(shared_bytes_);
    return reinterpret_cast<T*>(const_cast<char*>(reinterpret_cast<const char*>(mine)) + apart);
  }
  static char* shared() { return shared_ + blockIdx.x * shared_bytes_; }

 private:
  static constexpr size_t kStackBytes = 32 * 1024;
  struct Fiber {
    jmp_buf at;
    bool started = false, done = false;
    const Barrier* waits_for = nullptr;
    unsigned phase = 0;  // that has to end before it goes on
    std::optional<unsigned> awaited;  // of the cluster's barrier: the phase in which it arrived, until it has waited
  };

  static inline std::vector<Fiber> fibers_;
  static inline std::vector<Barrier> meetings_, warps_, blocks_;
  static inline std::vector<uint64_t> slots_;
  static inline Barrier cluster_{0};
  static inline jmp_buf scheduler_;
  static inline unsigned current_, threads_, left_;
  static inline unsigned progress_;  // barriers that opened and threads that left
  static inline void (*program_)();
  static inline char* shared_;
  static inline size_t shared_bytes_;

  // Again and again, until a round changes nothing.
  template <typename F>
  static void exhaust(F round) {
    for (unsigned before = ~progress_; before != progress_;) {
      before = progress_;
      round();
    }
  }

  static void open_if_full(Barrier& barrier) {
    if (barrier.arrived < barrier.members) return;
    barrier.arrived = 0;
    barrier.order.open();
    ++barrier.phase;
    ++progress_;
  }
  static unsigned arrive(Barrier& barrier) {
    const unsigned phase = barrier.phase;
    ++barrier.arrived;
    open_if_full(barrier);
    return phase;
  }
  static void wait(Barrier& barrier, unsigned phase) {
    if (barrier.phase != phase) return;
    fibers_[current_].waits_for = &barrier;
    fibers_[current_].phase = phase;
    if (_setjmp(fibers_[current_].at) == 0) _longjmp(scheduler_, 1);
  }
  static void meet(Barrier& barrier) {
    barrier.order.arrive();
    wait(barrier, arrive(barrier));
    barrier.order.wait();
  }
  static void leave(Barrier& barrier) {
    --barrier.members;
    if (barrier.arrived > 0) open_if_full(barrier);
  }

  static void give_turn(unsigned thread, char* stacks) {
    Fiber& fiber = fibers_[thread];
    if (fiber.done || (fiber.waits_for != nullptr && fiber.waits_for->phase == fiber.phase)) return;
    fiber.waits_for = nullptr;
    current_ = thread;
    races::run(thread);
    threadIdx.x = thread % threads_, blockIdx.x = thread / threads_;
    exchange_slots = &slots_[thread / 32 * 32];
    if (_setjmp(scheduler_) == 0) {
      if (fiber.started) _longjmp(fiber.at, 1);
      fiber.started = true;
      start_on(stacks + thread * kStackBytes, kStackBytes, enter);
    }
  }

  static void enter() {
    program_();
    fibers_[current_].done = true;
    ++progress_, --left_;
    leave(meetings_[current_ / 32]);
    leave(warps_[current_ / 32]);
    leave(blocks_[blockIdx.x]);
    // who leaves between the two steps has arrived once, and is not counted twice
    if (fibers_[current_].awaited == cluster_.phase) --cluster_.arrived;
    leave(cluster_);
    _longjmp(scheduler_, 1);
  }
};

inline void __syncthreads() { Cluster::meet_block(); }

inline uint32_t __reduce_min_sync(unsigned, uint32_t value) {
  for (int step = 16; step > 0; step /= 2) value = min(value, __shfl_xor_sync(0u, value, step));
  return value;
}
inline uint32_t __reduce_max_sync(unsigned, uint32_t value) {
  for (int step = 16; step > 0; step /= 2) value = max(value, __shfl_xor_sync(0u, value, step));
  return value;
}
inline uint32_t __ballot_sync(unsigned, bool vote) {
  uint32_t votes = static_cast<uint32_t>(vote) << threadIdx.x % 32;
  for (int step = 16; step > 0; step /= 2) votes |= __shfl_xor_sync(0u, votes, step);
  return votes;
}
inline int __popc(uint32_t bits) { return std::popcount(bits); }
inline int __clz(int bits) { return std::countl_zero(static_cast<uint32_t>(bits)); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) * b >> 32; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline int64_t clock64() { return 0; }
template <typename T>
QUEST_UNMARKED T atomicAdd(T* place, T value) {
  races::atomic(place, sizeof(T));
  const T before = *place;
  *place += value;
  return before;
}

namespace quest {

inline void cluster_arrive() {
  __syncwarp();
  Cluster::arrive_cluster();
}
inline void cluster_arrive_early() { Cluster::arrive_cluster(false); }
inline void cluster_wait() { Cluster::wait_cluster(); }
inline void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
template <typename T>
void put(const T* place, int rank, T value) {
  *Cluster::at_peer(place, rank) = value;
}
template <typename T>
T get(const T* place, int rank) {
  return *Cluster::at_peer(place, rank);
}
inline float exp2_fast(float x) { return std::exp2(x); }
inline float log2_fast(float x) { return std::log2(x); }

}  // namespace quest
