// Just enough of CUDA to run a warp's program on a CPU: 32 threads that meet wherever the warp does.
#pragma once
#include <barrier>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
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
inline thread_local Index threadIdx, blockIdx;
inline std::barrier<> warp_barrier(32);
inline uint32_t exchange_slots[32];

inline void __syncwarp() { warp_barrier.arrive_and_wait(); }

template <typename T>
T exchange(T value, int from) {
  static_assert(sizeof(T) == 4);
  std::memcpy(&exchange_slots[threadIdx.x % 32], &value, 4);
  __syncwarp();
  T theirs;
  std::memcpy(&theirs, &exchange_slots[from], 4);
  __syncwarp();
  return theirs;
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int step) {
  return exchange(value, static_cast<int>(threadIdx.x % 32) ^ step);
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

// Named in headers, and never called here.
size_t __cvta_generic_to_shared(const void*);
void __syncthreads();
template <typename T>
T __shfl_up_sync(unsigned, T, int);
