// What the query heads that share a selection make of their pages' scores: one score a page.
#pragma once
#include "shared.cuh"

namespace quest {

// (max, sum of exp2, min) of a set of bounds.
struct Mass {
  float top, sum, least;

  __device__ __forceinline__ static Mass none() { return Mass{-INFINITY, 0.f, INFINITY}; }
  __device__ __forceinline__ void join(float other_top, float other_sum, float other_least) {
    const float next = fmaxf(top, other_top);
    sum = sum * weight(top, next) + other_sum * weight(other_top, next);
    top = next;
    least = fminf(least, other_least);
  }
  // One for the greatest itself, which may be infinite; nothing for an empty set.
  __device__ __forceinline__ static float weight(float part, float greatest) {
    return part == greatest ? 1.f : exp2_fast(part - greatest);
  }
  // Over each kLanes neighbouring lanes.
  template <int kLanes>
  __device__ __forceinline__ void join_lanes() {
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) {
      join(__shfl_xor_sync(0xFFFFFFFFu, top, step), __shfl_xor_sync(0xFFFFFFFFu, sum, step), __shfl_xor_sync(0xFFFFFFFFu, least, step));
    }
  }
  __device__ __forceinline__ float4 of_lane(int lane) const {
    return make_float4(__shfl_sync(0xFFFFFFFFu, top, lane), __shfl_sync(0xFFFFFFFFu, sum, lane), __shfl_sync(0xFFFFFFFFu, least, lane), 0.f);
  }
  __device__ __forceinline__ float log2_sum() const { return top == -INFINITY ? 0.f : top + log2_fast(sum); }
  __device__ __forceinline__ void join(const float4& other) { join(other.x, other.y, other.z); }
};

__device__ __forceinline__ float nan_max(float a, float b) { return a != a ? a : b != b ? b : fmaxf(a, b); }

// Joins the planes of a buffer, one a head, with log2 of a mass for each of the CTA's pages.
class HeadJoiner {
 public:
  __device__ __forceinline__ HeadJoiner(const DecodeParams& p, const Row& row, Shared& shared, float* buffer, int plane_stride)
      : p_(p), row_(row), s_(shared), buffer_(buffer), plane_stride_(plane_stride) {}

  // masses[tile]: what this lane has summed of head lane / 4 of a tile; every lane of four may have a part. Leaves the
  // scores in the first plane, and returns a range that holds most of the row's. Meets the cluster.
  template <int kHeadTiles>
  __device__ __forceinline__ float2 join(Mass (&masses)[kHeadTiles]) const {
    share_mass(masses);
    cluster_sync();
    return combine();
  }

 private:
  // Joins the lanes' and warps' masses, and sends the CTA's to every CTA of the cluster.
  template <int kHeadTiles>
  __device__ __forceinline__ void share_mass(Mass (&masses)[kHeadTiles]) const {
#pragma unroll
    for (int tile = 0; tile < kHeadTiles; ++tile) {
      Mass& mass = masses[tile];
      mass.template join_lanes<4>();
      const float4 all = make_float4(mass.top, mass.sum, mass.least, 0.f);
      if (lane_id() % 4 == 0) s_.warp_mass[warp_id()][tile * 8 + lane_id() / 4] = all;
    }
    __syncthreads();
#pragma unroll 1
    for (int head = warp_id(); head < p_.rows; head += kWarps) {
      Mass mass = Mass::none();
      if (lane_id() < kWarps) mass.join(s_.warp_mass[lane_id()][head]);
      mass.join_lanes<kWarps>();
      const float4 all = mass.of_lane(0);  // lanes round apart, and all CTAs must get the same
      if (lane_id() < row_.size) put(&s_.mass_inbox[row_.rank][head], row_.peer(lane_id()), all);
    }
  }

  // Turns the heads' planes into one, as the row's policy has it.
  __device__ __forceinline__ float2 combine() const {
    const int32_t policy = policy_of(p_, row_.req);
    return policy == kMax || policy == kMean ? unweighed(policy == kMean) : normalise();
  }

  // score = the mean over heads, or the greatest.
  __device__ __forceinline__ float2 unweighed(bool mean) const {
    const float weight = mean ? 1.f / p_.rows : 1.f;
#pragma unroll 1
    for (int i = threadIdx.x; i < row_.count; i += kThreads) {
      float score = buffer_[i];
#pragma unroll 1
      for (int head = 1; head < p_.rows; ++head) {
        const float other = buffer_[head * plane_stride_ + i];
        score = mean ? score + other : nan_max(score, other);
      }
      buffer_[i] = weight * score;
    }
    float2 range = make_float2(INFINITY, -INFINITY);
#pragma unroll 1
    for (int k = lane_id(); k < row_.size * p_.rows; k += 32) {
      const float4 mass = s_.mass_inbox[k / p_.rows][k % p_.rows];
      range = make_float2(fminf(range.x, mass.z), fmaxf(range.y, mass.x));
    }
    __syncthreads();
    return finite(warp_range(range));
  }

  // score = log2(sum over heads of exp2(s - log_sum)), the page's normalised mass.
  __device__ __forceinline__ float2 normalise() const {
#pragma unroll 1
    for (int head = warp_id(); head < p_.rows; head += kWarps) {
      Mass mass = Mass::none();
      if (lane_id() < row_.size) mass.join(s_.mass_inbox[lane_id()][head]);
      mass.join_lanes<kMaxCluster>();
      if (lane_id() == 0) {
        const float log_sum = s_.log_sum[head] = mass.log2_sum();
        s_.head_range[head] = make_float2(mass.least - log_sum, exp2_fast(mass.top - log_sum));
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < row_.count; i += kThreads) {
      float shift = -INFINITY, sum = 0.f;
#pragma unroll 1
      for (int first = 0; first < p_.rows; first += 4) {  // four at a time: their reads are in flight together
        float share[4], top = shift;
#pragma unroll
        for (int h = 0; h < 4; ++h) {
          const int head = first + h;
          share[h] = head < p_.rows ? buffer_[head * plane_stride_ + i] - s_.log_sum[head] : -INFINITY;
          top = fmaxf(top, share[h]);
        }
        top = top == -INFINITY ? 0.f : top;
        sum *= exp2_fast(shift - top);
        shift = top;
#pragma unroll
        for (int h = 0; h < 4; ++h) sum += exp2_fast(share[h] - shift);
      }
      buffer_[i] = shift + log2_fast(sum);
    }
    // a page weighs at least what its heads' least bounds weigh, and at most what their greatest do
    float low = -INFINITY, high = 0.f;
#pragma unroll 4
    for (int head = 0; head < p_.rows; ++head) {
      low = fmaxf(low, s_.head_range[head].x);
      high += s_.head_range[head].y;
    }
    high = log2_fast(high);
    __syncthreads();
    return finite(make_float2(low, high));
  }
  __device__ __forceinline__ static float2 finite(float2 range) {
    return range.x > -1e30f && range.y < 1e30f ? range : make_float2(-100.f, 10.f);
  }

  const DecodeParams& p_;
  const Row& row_;
  Shared& s_;
  float* buffer_;
  int plane_stride_;
};

}  // namespace quest
