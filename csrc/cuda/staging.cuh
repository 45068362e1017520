// A warp's window on memory: two halves of shared memory that asynchronous copies fill while the other is read.
//
// A half holds 16 rows of D elements, in chunks of 16 bytes. Chunks are permuted within their row so that the reads
// below meet no bank twice: KeyLayout for rows read as operand B (a lane reads row n, chunk 4j + t), ValueLayout for
// rows read as operand A (a lane reads rows 2t and 2t + 1, chunk 8j + n).
#pragma once
#include "common.cuh"

namespace quest {

struct KeyLayout {
  static __device__ __forceinline__ int chunk(int row, int chunk) { return chunk ^ ((row & 1) << 2); }
};
struct ValueLayout {
  static __device__ __forceinline__ int chunk(int row, int chunk) { return chunk ^ (((row >> 1) & 3) << 1); }
};

template <int D>
struct Staging {
  static constexpr int kChunks = D / 8;           // chunks of a row
  static constexpr int kHalfBytes = 16 * D * 2;
  static constexpr int kWarpBytes = 2 * kHalfBytes;
  static constexpr int kCopies = 16 * kChunks / 32;  // copies that a lane makes to fill a half

  char* base;  // the warp's window

  __device__ __forceinline__ explicit Staging(void* window) : base(static_cast<char*>(window) + warp_id() * kWarpBytes) {}

  template <typename Layout>
  __device__ __forceinline__ char* place(int half, int row, int chunk) const {
    return base + half * kHalfBytes + (row * kChunks + Layout::chunk(row, chunk)) * 16;
  }

#ifdef QUEST_ON_HOST
  static void copy(char* to, const void* from) { std::memcpy(to, from, 16); }
  static void copy(char* to, const void* from, bool valid) { valid ? std::memcpy(to, from, 16) : std::memset(to, 0, 16); }
  static void commit() {}
  static void wait_all_but_one() { __syncwarp(); }
#else
  // Starts to copy 16 bytes.
  __device__ __forceinline__ static void copy(char* to, const void* from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))), "l"(from) : "memory");
  }
  // The same; what is not `valid` becomes zero, and is not read.
  __device__ __forceinline__ static void copy(char* to, const void* from, bool valid) {
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))), "l"(from), "r"(bytes) : "memory");
  }
  __device__ __forceinline__ static void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

  // Waits until at most one half is still being filled, for the whole warp.
  __device__ __forceinline__ static void wait_all_but_one() {
    asm volatile("cp.async.wait_group 1;" ::: "memory");
    __syncwarp();
  }
#endif

  // Starts to fill a half with 16 rows of D elements, `row_stride` apart. Those from the `valid`-th on become zeros, and are
  // not read: what lies there may be no number.
  template <typename Layout, typename T>
  __device__ __forceinline__ void fill(int half, const T* rows, int64_t row_stride, int valid) const {
    constexpr int kAtOnce = 32 / kChunks;  // rows: a lane keeps its chunk, and goes down by as many
    const int first = lane_id() / kChunks, chunk = lane_id() % kChunks;
    const T* from = rows + first * row_stride + chunk * 8;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int row = i * kAtOnce + first;
      copy(place<Layout>(half, row, chunk), from, row < valid);
      from += kAtOnce * row_stride;
    }
  }

  __device__ __forceinline__ static uint4 read(const char* place) { return *reinterpret_cast<const uint4*>(place); }
};

}  // namespace quest
