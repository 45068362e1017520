// Just enough of CUDA to run a warp's program on a CPU: 32 lanes that take turns in one thread, each as far as the next
// place where the warp meets.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#undef __shared__
#undef __launch_bounds__
#undef __grid_constant__
#undef __global__
#undef __forceinline__
#undef __noinline__
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define QUEST_ON_HOST 1

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
inline Index threadIdx, blockIdx;
inline uint64_t warp_slots[32];
inline uint64_t* exchange_slots = warp_slots;  // of the warp that runs

// Goes on in `enter`, on a stack of its own.
inline void start_on(char* stack, size_t bytes, void (*enter)()) {
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  context.uc_link = nullptr;
  makecontext(&context, enter, 0);
  setcontext(&context);
}

// The lanes of one warp, each on a stack of its own.
class Warp {
 public:
  static constexpr unsigned kLanes = 32;

  // Runs `program` in every lane, whose number is its argument; from the last lane to the first if `backwards`. False:
  // some lanes met once more often than others, which would hang a GPU.
  static bool run(void (*program)(unsigned lane), bool backwards) {
    static std::vector<char> stacks(kLanes * kStackBytes);
    program_ = program;
    for (bool first = true;; first = false) {
      unsigned left = 0;
      for (unsigned turn = 0; turn < kLanes; ++turn) {
        lane_ = backwards ? kLanes - 1 - turn : turn;
        running_ = true;
        if (_setjmp(scheduler_) == 0) {
          if (first) start_on(stacks.data() + lane_ * kStackBytes, kStackBytes, enter);
          _longjmp(lanes_[lane_], 1);
        }
        left += running_;
      }
      if (left == 0) return true;
      if (left < kLanes) return false;
    }
  }

  // The calling lane waits here for its next turn.
  static void meet() {
    const Index thread = threadIdx, block = blockIdx;
    if (_setjmp(lanes_[lane_]) == 0) _longjmp(scheduler_, 1);
    threadIdx = thread;
    blockIdx = block;
  }

 private:
  static constexpr size_t kStackBytes = 128 * 1024;
  static inline jmp_buf scheduler_, lanes_[kLanes];
  static inline bool running_;
  static inline unsigned lane_;
  static inline void (*program_)(unsigned);

  static void enter() {
    program_(lane_);
    running_ = false;
    _longjmp(scheduler_, 1);
  }
};

// A warp's lanes meet; their memory is ordered by __syncwarp alone.
inline void (*meet_warp)() = Warp::meet;
inline void (*order_warp)() = Warp::meet;
inline void __syncwarp() { order_warp(); }

template <typename T>
T exchange(T value, int from) {
  static_assert(sizeof(T) <= 8);
  std::memcpy(&exchange_slots[threadIdx.x % 32], &value, sizeof(T));
  meet_warp();
  T theirs;
  std::memcpy(&theirs, &exchange_slots[from], sizeof(T));
  meet_warp();
  return theirs;
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int step) {
  return exchange(value, static_cast<int>(threadIdx.x % 32) ^ step);
}
template <typename T>
T __shfl_sync(unsigned, T value, int from) {
  return exchange(value, from);
}
inline int __any_sync(unsigned, bool vote) {
  int any = vote;
  for (int step = 16; step > 0; step /= 2) any |= __shfl_xor_sync(0u, any, step);
  return any;
}
inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t __float_as_uint(float value) { return std::bit_cast<uint32_t>(value); }
template <typename T>
T min(T a, T b) { return b < a ? b : a; }
template <typename T>
T max(T a, T b) { return a < b ? b : a; }

template <typename T>
T __shfl_up_sync(unsigned, T value, int step) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  return exchange(value, lane < step ? lane : lane - step);
}

void __syncthreads();  // cluster.h has it; never called by what runs a warp at a time
