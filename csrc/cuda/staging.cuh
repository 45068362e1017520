// A warp's window on memory: two halves of shared memory that asynchronous copies fill while the other is read.
//
// A half holds 16 rows of D elements, in chunks of 16 bytes. Chunks are permuted within their row so that the reads
// below meet no bank twice: KeyLayout for rows read as operand B (a lane reads row n, chunk 4j + t), ValueLayout for
// rows read as operand A (a lane reads rows 2t and 2t + 1, chunk 8j + n).
#pragma once
#include "common.cuh"

namespace quest {

// What a chunk's number is changed by (exclusive or) in a row.
struct KeyLayout {
  static constexpr __device__ __forceinline__ int swap(int row) { return (row & 1) << 2; }
};
struct ValueLayout {
  static constexpr __device__ __forceinline__ int swap(int row) { return (row >> 1 & 3) << 1; }
};

template <int D>
struct Staging {
  static constexpr int kChunks = D / 8;           // chunks of a row
  static constexpr int kRowBytes = D * 2;
  static constexpr int kHalfBytes = 16 * kRowBytes;
  static constexpr int kWarpBytes = 2 * kHalfBytes;
  static constexpr int kCopies = 16 * kChunks / 32;  // copies that a lane makes to fill a half

  char* base;  // the warp's window

  __device__ __forceinline__ explicit Staging(void* window) : base(static_cast<char*>(window) + warp_id() * kWarpBytes) {}

  // Where a chunk of a row is in a half.
  template <typename Layout>
  __device__ __forceinline__ static int place(int row, int chunk) {
    return row * kRowBytes + (chunk ^ Layout::swap(row)) * 16;
  }
  // The same, `rows` down and `chunks` along, of which no bit is set that is set in the row or the chunk: with constants,
  // a constant away.
  template <typename Layout>
  __device__ __forceinline__ static int place_beyond(int place, int rows, int chunks) {
    return (place ^ (chunks % 8 ^ Layout::swap(rows)) * 16) + rows * kRowBytes + chunks / 8 * 128;
  }
  __device__ __forceinline__ char* half(int which) const { return base + which * kHalfBytes; }

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
  __device__ __forceinline__ void fill(int which, const T* rows, int64_t row_stride, int valid) const {
    constexpr int kAtOnce = 32 / kChunks;  // rows: a lane keeps its chunk, and goes down by as many
    const int first = lane_id() / kChunks, chunk = lane_id() % kChunks;
    const T* from = rows + first * row_stride + chunk * 8;
    const int to = place<Layout>(first, chunk);
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int down = i * kAtOnce;
      copy(half(which) + place_beyond<Layout>(to, down, 0), from, down + first < valid);
      from += kAtOnce * row_stride;
    }
  }

  // Of this lane, (n, t): the 16 bytes of row 8 i + n, chunk 4 j + t, and of row 2t + i % 2 + i / 2 * 8, chunk 8 j + n.
  __device__ __forceinline__ uint4 read_key(int which, int i, int j) const {
    return read(half(which) + place_beyond<KeyLayout>(place<KeyLayout>(lane_id() / 4, lane_id() % 4), 8 * i, 4 * j));
  }
  __device__ __forceinline__ uint4 read_value(int which, int i, int j) const {
    const int lane = place<ValueLayout>(lane_id() % 4 * 2, lane_id() / 4);
    return read(half(which) + place_beyond<ValueLayout>(lane, i % 2 + i / 2 * 8, 8 * j));
  }
  __device__ __forceinline__ static uint4 read(const char* place) { return *reinterpret_cast<const uint4*>(place); }
};

}  // namespace quest
