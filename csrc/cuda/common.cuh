// Device helpers shared by the stages: 16-bit arithmetic, tensor-core fragments, block and cluster reductions.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "params.h"

namespace quest {

#ifndef QUEST_WARPS
#define QUEST_WARPS 8
#endif
constexpr int kWarps = QUEST_WARPS;  // 8, two CTAs to an SM; or 16, for grids that give an SM only one
constexpr int kThreads = 32 * kWarps;
constexpr int kMaxCluster = 16;
constexpr int kMaxRows = 16;       // query heads that share a selection
constexpr int kTileShift = 4;
constexpr int kTileTokens = 1 << kTileShift;  // tokens that a warp attends to at a time
constexpr int kBins = 256;         // histogram bins of one selection level, at most one a thread
constexpr int kCandidates = 256;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

__host__ __device__ __forceinline__ constexpr int div_up(int a, int b) { return (a + b - 1) / b; }
__device__ __forceinline__ int lane_id() { return threadIdx.x & 31; }
__device__ __forceinline__ int warp_id() { return threadIdx.x >> 5; }

// Waits for the kernel before, when this one was launched early; else costs nothing.
#ifdef QUEST_ON_HOST  // tests/kernels/cuda_on_host has the rest of what is asm here
inline void wait_for_previous_kernel() {}
inline void let_next_kernel_start() {}
template <typename T>
void mma_on_host(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1);
#else
__device__ __forceinline__ void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;"); }
#endif

template <typename T>
struct Half;

template <>
struct Half<__nv_bfloat16> {
  static constexpr uint32_t kInfinity = 0x7F80;
  static __device__ __forceinline__ float to_float(uint32_t low) { return __uint_as_float(low << 16); }
  static __device__ __forceinline__ uint32_t min2(uint32_t a, uint32_t b) {
    __nv_bfloat162 v = __hmin2_nan(*reinterpret_cast<__nv_bfloat162*>(&a), *reinterpret_cast<__nv_bfloat162*>(&b));
    return *reinterpret_cast<uint32_t*>(&v);
  }
  static __device__ __forceinline__ uint32_t max2(uint32_t a, uint32_t b) {
    __nv_bfloat162 v = __hmax2_nan(*reinterpret_cast<__nv_bfloat162*>(&a), *reinterpret_cast<__nv_bfloat162*>(&b));
    return *reinterpret_cast<uint32_t*>(&v);
  }
  static __device__ __forceinline__ uint32_t pack(float lo, float hi) {
    __nv_bfloat162 v = __floats2bfloat162_rn(lo, hi);
    return *reinterpret_cast<uint32_t*>(&v);
  }
  // d = a (16x16, row) * b (16x8, col) + d
  static __device__ __forceinline__ void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                             uint32_t b0, uint32_t b1) {
#ifdef QUEST_ON_HOST
    mma_on_host<__nv_bfloat16>(d, a0, a1, a2, a3, b0, b1);
#else
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#endif
  }
};

template <>
struct Half<__half> {
  static constexpr uint32_t kInfinity = 0x7C00;
  static __device__ __forceinline__ float to_float(uint32_t low) {
    const uint16_t bits = static_cast<uint16_t>(low);
    return __half2float(*reinterpret_cast<const __half*>(&bits));
  }
  static __device__ __forceinline__ uint32_t min2(uint32_t a, uint32_t b) {
    __half2 v = __hmin2_nan(*reinterpret_cast<__half2*>(&a), *reinterpret_cast<__half2*>(&b));
    return *reinterpret_cast<uint32_t*>(&v);
  }
  static __device__ __forceinline__ uint32_t max2(uint32_t a, uint32_t b) {
    __half2 v = __hmax2_nan(*reinterpret_cast<__half2*>(&a), *reinterpret_cast<__half2*>(&b));
    return *reinterpret_cast<uint32_t*>(&v);
  }
  static __device__ __forceinline__ uint32_t pack(float lo, float hi) {
    __half2 v = __floats2half2_rn(lo, hi);
    return *reinterpret_cast<uint32_t*>(&v);
  }
  static __device__ __forceinline__ void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                             uint32_t b0, uint32_t b1) {
#ifdef QUEST_ON_HOST
    mma_on_host<__half>(d, a0, a1, a2, a3, b0, b1);
#else
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#endif
  }
};

// The same two 16-bit floats with the negative (or the positive) ones made zero.
__device__ __forceinline__ uint32_t negative_mask(uint32_t x) { return ((x >> 15) & 0x00010001u) * 0xFFFFu; }
__device__ __forceinline__ uint32_t positive_part(uint32_t x) { return x & ~negative_mask(x); }
__device__ __forceinline__ uint32_t negative_part(uint32_t x) { return x & negative_mask(x); }

// The query heads of one selection as operand A of the tensor cores, D permuted so that a lane's share is 16 bytes.
// Lane (n, t) = (lane / 4, lane % 4) holds elements 32j + 8t .. + 7 of head n (and n + 8 in the second tile).
template <int D, int kHeadTiles>
struct QueryFragment {
  uint4 part[kHeadTiles][D / 32];

  __device__ __forceinline__ void load(const DecodeParams& p, int req, int select_head) {
    const int n = lane_id() / 4, t = lane_id() % 4;
    const uint16_t* query = static_cast<const uint16_t*>(p.query) + req * p.query_req_stride +
                            static_cast<int64_t>(select_head) * p.rows * p.query_head_stride;
#pragma unroll
    for (int tile = 0; tile < kHeadTiles; ++tile) {
      const int head = tile * 8 + n;
#pragma unroll
      for (int j = 0; j < D / 32; ++j) {
        part[tile][j] = make_uint4(0, 0, 0, 0);
        if (head < p.rows) part[tile][j] = *reinterpret_cast<const uint4*>(query + head * p.query_head_stride + j * 32 + t * 8);
      }
    }
  }
};

#ifndef QUEST_ON_HOST
// A cluster's shared memory. A CTA writes into its peers' inboxes and then meets them at a barrier.
__device__ __forceinline__ void cluster_arrive() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
// The first meeting, which says no more than that the peers run.
__device__ __forceinline__ void cluster_arrive_early() { asm volatile("barrier.cluster.arrive.relaxed.aligned;"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

__device__ __forceinline__ uint32_t peer_address(const void* mine, int rank) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(address)
      : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(mine))), "r"(rank));
  return address;
}

__device__ __forceinline__ void put(const unsigned long long* place, int rank, unsigned long long value) {
  asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(peer_address(place, rank)), "l"(value) : "memory");
}
__device__ __forceinline__ void put(const float2* place, int rank, float2 value) {
  asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(peer_address(place, rank)), "f"(value.x), "f"(value.y) : "memory");
}
__device__ __forceinline__ void put(const float4* place, int rank, float4 value) {
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(peer_address(place, rank)), "f"(value.x),
               "f"(value.y), "f"(value.z), "f"(value.w)
               : "memory");
}
__device__ __forceinline__ void put(const int* place, int rank, int value) {
  asm volatile("st.shared::cluster.s32 [%0], %1;" ::"r"(peer_address(place, rank)), "r"(value) : "memory");
}
__device__ __forceinline__ int get(const int* place, int rank) {
  int value;
  asm volatile("ld.shared::cluster.s32 %0, [%1];" : "=r"(value) : "r"(peer_address(place, rank)) : "memory");
  return value;
}

__device__ __forceinline__ unsigned long long get(const unsigned long long* place, int rank) {
  unsigned long long value;
  asm volatile("ld.shared::cluster.u64 %0, [%1];" : "=l"(value) : "r"(peer_address(place, rank)) : "memory");
  return value;
}

// Approximate to two units in the last place; both take and give infinities.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#endif

// Exclusive prefix sum over the block's threads, by way of kWarps ints of shared memory.
__device__ __forceinline__ int block_exclusive_scan(int value, int* shared) {
  int inclusive = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int up = __shfl_up_sync(0xFFFFFFFFu, inclusive, step);
    if (lane_id() >= step) inclusive += up;
  }
  if (lane_id() == 31) shared[warp_id()] = inclusive;
  __syncthreads();
  int before = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) before += w < warp_id() ? shared[w] : 0;
  __syncthreads();
  return before + inclusive - value;
}

}  // namespace quest
