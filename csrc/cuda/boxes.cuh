// What pages may weigh by the box of their keys: q.mid + radius * |q|.rad (Quest, algorithm 1, at radius 1).
//
// The bound is relu(q).k_max + min(q, 0).k_min and its mirror min(q, 0).k_max + relu(q).k_min bounds q.k from below;
// the tensor cores give both for the price of one, as rows 0-7 and 8-15 of operand A, exactly from 16-bit inputs. A
// smaller radius is a mix of the two. Bytes: 4 D a page and KV head.
#pragma once
#include "shared.cuh"
#include "staging.cuh"

namespace quest {

template <typename T, int D, int kHeadTiles>
class BoxEstimate {
 public:
  using Query = QueryFragment<D, kHeadTiles>;
  static constexpr bool kScaled = false;     // values are dot products
  static constexpr bool kKeepsQuery = true;  // in its registers
  static constexpr int kPageBytes = 2 * D;   // from a page to the next in the warp's window, which has rows

  __device__ __forceinline__ BoxEstimate(const DecodeParams& p, const Row&, const Query& query, uint4*)
      : p_(p), query_(query) {}

  // A page is copied in runs of 128 bytes, 16 a lane: where a run lies in memory, in bytes from the page's start, and where
  // this lane's part of it, the lane % 8-th, goes in the warp's window. k_min goes to rows 0-7, k_max to rows 8-15.
  __device__ __forceinline__ static int64_t source(const DecodeParams& p, int run) {
    return run / kRuns * p.summary_bound_stride * 2 + run % kRuns * 128;
  }
  __device__ __forceinline__ static char* place(const Staging<D>& staging, int half, int page, int run) {
    const int row = Staging<D>::template place<KeyLayout>(page, lane_id() % 8);
    return staging.half(half) + Staging<D>::template place_beyond<KeyLayout>(row, run / kRuns * 8, run % kRuns * 8);
  }

  // values[tile]: of head n for pages 2t and 2t + 1 of the eight in `half`.
  __device__ __forceinline__ void evaluate(const Staging<D>& staging, int half, int, float (&values)[kHeadTiles][2]) const {
    float sums[kHeadTiles][2][4] = {};  // two sums of each: half as long a chain of dependent products
#pragma unroll
    for (int j = 0; j < D / 32; ++j) {
      const uint4 low = staging.read_key(half, 0, j), high = staging.read_key(half, 1, j);
#pragma unroll
      for (int tile = 0; tile < kHeadTiles; ++tile) bound(sums[tile], query_.part[tile][j], low, high);
    }
#pragma unroll
    for (int tile = 0; tile < kHeadTiles; ++tile) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        values[tile][c] = mix(sums[tile][0][c] + sums[tile][1][c], sums[tile][0][c + 2] + sums[tile][1][c + 2]);
      }
    }
  }

 private:
  static constexpr int kRuns = D / 64;  // of a row

  // Rows 0-7 gather the upper bound, rows 8-15 the lower one.
  __device__ __forceinline__ static void bound(float (&sums)[2][4], uint4 q, uint4 low, uint4 high) {
    const uint32_t pos[4] = {positive_part(q.x), positive_part(q.y), positive_part(q.z), positive_part(q.w)};
    const uint32_t neg[4] = {negative_part(q.x), negative_part(q.y), negative_part(q.z), negative_part(q.w)};
    Half<T>::mma(sums[0], pos[0], neg[0], pos[1], neg[1], high.x, high.y);
    Half<T>::mma(sums[1], neg[0], pos[0], neg[1], pos[1], low.x, low.y);
    Half<T>::mma(sums[0], pos[2], neg[2], pos[3], neg[3], high.z, high.w);
    Half<T>::mma(sums[1], neg[2], pos[2], neg[3], pos[3], low.z, low.w);
  }

  __device__ __forceinline__ float mix(float upper, float lower) const {
    if (p_.bound_radius == 1.f) return upper;  // not upper + 0 * lower, which turns infinity into NaN
    return 0.5f * (1.f + p_.bound_radius) * upper + 0.5f * (1.f - p_.bound_radius) * lower;
  }

  const DecodeParams& p_;
  const Query& query_;
};

}  // namespace quest
