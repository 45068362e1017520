// Finds accesses to memory that a cluster's threads share, on chip or off it, that no barrier orders. The compiler marks every access of the kernels
// (-fsanitize=thread); instead of its runtime library, races.cpp is told of them, which knows a GPU's barriers. Without
// QUEST_RACES nothing is watched.
//
// A thread's epoch grows where it arrives at a barrier; a clock says of every thread up to which epoch its accesses are
// known to be over. Shuffles and matrix products bring a warp together without ordering its memory.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace races {

using Clock = std::vector<uint32_t>;  // [threads]
using Known = std::shared_ptr<const Clock>;

struct Race {
  uint64_t offset;          // in the memory that is watched
  uint32_t first, second;   // threads, counted over the cluster
  const void *first_code, *second_code;
};

#ifdef QUEST_RACES
// What has arrived at a barrier, and what it gives to those who wait.
struct Order {
  Clock arriving;
  Known last, given;  // `last` is in `arriving` already

  void arrive();
  void open();
  void wait() const;
};
void start(uint32_t threads);                // nothing is watched yet
void watch(const void* place, size_t bytes);
void stop();                                 // nothing is watched any more
void run(uint32_t thread);  // the thread whose accesses follow
void atomic(const void* place, size_t bytes);
#define QUEST_UNMARKED __attribute__((no_sanitize("thread")))
#else
struct Order {
  void arrive() {}
  void open() {}
  void wait() const {}
};
inline void start(uint32_t) {}
inline void watch(const void*, size_t) {}
inline void stop() {}
inline void run(uint32_t) {}
inline void atomic(const void*, size_t) {}
#define QUEST_UNMARKED
#endif

}  // namespace races
