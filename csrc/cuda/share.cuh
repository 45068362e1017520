// top_p: of the pages that a row's budget takes, as few as hold that share of their estimated mass, the best first; see
// select_pages in quest_vllm/ops/reference.py.
//
// Masses are summed as integers, so that no order of threads or CTAs changes a choice. The last page that is needed is
// found eight bits of its rank key at a time, from the top, until it is alone in its bin: mostly after two or three.
#pragma once
#include "select.cuh"

namespace quest {

constexpr float kUnitMass = 1099511627776.f;  // 2^40, of the greatest page: 2^20 pages do not overflow

// Exclusive prefix sum over the block's threads; `total`: over all of them.
__device__ __forceinline__ MassSum block_exclusive_scan(MassSum value, MassSum* shared, MassSum& total) {
  MassSum inclusive = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const MassSum up = __shfl_up_sync(0xFFFFFFFFu, inclusive, step);
    if (lane_id() >= step) inclusive += up;
  }
  if (lane_id() == 31) shared[warp_id()] = inclusive;
  __syncthreads();
  MassSum before = 0;
  total = 0;
#pragma unroll 1
  for (int w = 0; w < kWarps; ++w) {
    before += w < warp_id() ? shared[w] : 0;
    total += shared[w];
  }
  __syncthreads();
  return before + inclusive - value;
}

class ShareSelector {
 public:
  // scores[i]: of the CTA's i-th page, NaN allowed; `unit` makes them log2 of masses.
  __device__ __forceinline__ ShareSelector(const Row& row, Shared& shared, const float* scores, float unit)
      : row_(row), s_(shared), scores_(scores), unit_(unit) {}

  // `taken(i)`: whether the budget takes the CTA's i-th page. All threads of the row's CTAs call it, once.
  template <typename F>
  __device__ __forceinline__ void find(float top_p, F taken) {
    cluster_sync();  // the ranges of the scores, the histograms and the candidates have been read
    float2 mine = make_float2(INFINITY, -INFINITY);
    row_.each_page([&](int i) {
      if (taken(i)) mine = make_float2(fminf(mine.x, log_mass(i)), fmaxf(mine.y, log_mass(i)));
    });
    offer_range(row_, s_, mine);
    const float peak = take_range(row_, s_).y;
    if (!(fabsf(peak) < INFINITY)) return;  // the budget is spent
    Key prefix = 0;
    MassSum above = 0, wanted = 0;
#pragma unroll 1
    for (int shift = 56;; shift -= 8) {
      clear(shift == 56);
      __syncthreads();
      row_.each_page([&](int i) {
        if (!taken(i)) return;
        const MassSum mass = static_cast<MassSum>(exp2_fast(log_mass(i) - peak) * kUnitMass);
        const Key key = rank_key(score(i), row_.page(i));
        if (!row_.competes(row_.page(i))) {
          if (shift == 56) atomicAdd(&s_.forced_mass, mass);
        } else if (shift == 56 || key >> (shift + 8) == prefix) {
          atomicAdd(&s_.candidates[key >> shift & (kBins - 1)], mass);
          atomicAdd(&s_.histogram[key >> shift & (kBins - 1)], 1);
        }
      });
      cluster_sync();
      // thread t sums bin 255 - t, so that a prefix sum counts from the top
      const int bin = kBins - 1 - static_cast<int>(threadIdx.x);
      MassSum mass = 0, forced = 0, total;
      int count = 0;
#pragma unroll 1
      for (int c = 0; c < row_.size; ++c) {
        if (shift == 56) forced += get(&s_.forced_mass, row_.peer(c));
        if (bin < 0) continue;
        mass += get(&s_.candidates[bin], row_.peer(c));
        count += get(&s_.histogram[bin], row_.peer(c));
      }
      const MassSum before = block_exclusive_scan(mass, s_.mass_scan, total);
      if (shift == 56) {
        above = forced;
        wanted = static_cast<MassSum>(ceil(static_cast<double>(top_p) * static_cast<double>(forced + total)));
        if (wanted <= forced) {
          least_ = ~Key{0};
          return;
        }
      }
      if (above + before < wanted && wanted <= above + before + mass) {
        s_.threshold_bin = bin;
        s_.in_bin = count;
        s_.mass_above = above + before;
      }
      __syncthreads();
      prefix = prefix << 8 | static_cast<Key>(s_.threshold_bin);
      above = s_.mass_above;
      if (s_.in_bin == 1 || shift == 0) {
        least_ = prefix << shift;
        return;
      }
      cluster_sync();  // every CTA has read the bins
    }
  }

  // Whether the CTA's i-th page, which the budget takes, is needed.
  __device__ __forceinline__ bool needs(int i) const {
    return least_ == 0 || !row_.competes(row_.page(i)) || rank_key(score(i), row_.page(i)) >= least_;
  }

 private:
  __device__ __forceinline__ float score(int i) const {
    const float score = scores_[i];
    return score != score ? INFINITY : score + 0.f;
  }
  // Rounded, not fused with a subtraction: the peak less itself is zero, however large.
  __device__ __forceinline__ float log_mass(int i) const { return __fmul_rn(score(i), unit_); }

  __device__ __forceinline__ void clear(bool forced) {
    if (threadIdx.x < kBins) {
      s_.candidates[threadIdx.x] = 0;
      s_.histogram[threadIdx.x] = 0;
    }
    if (forced && threadIdx.x == 0) s_.forced_mass = 0;
  }

  const Row& row_;
  Shared& s_;
  const float* scores_;
  float unit_;
  Key least_ = 0;
};

}  // namespace quest
