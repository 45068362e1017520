// Page selection: the exact Top-K of a row, whose scores lie spread over the CTAs of a cluster and their warps.
//
// Each level cuts the scores' range into equal bins, counts them over the cluster, and keeps the bin that holds the K-th
// score. One level is nearly always enough: the bin's few pages are then ranked against one another, which gives the
// least key that is chosen. The cost is two cluster barriers, not a pass over memory. Equal scores go to the lower page;
// NaN ranks as +inf.
//
// Code that runs once is fetched cold, so loops here stay rolled.
#pragma once
#include "shared.cuh"

namespace quest {

using Key = unsigned long long;

// Sorts like (score, then lower page first).
__device__ __forceinline__ Key rank_key(float score, int page) {
  return (static_cast<Key>(ordered_bits(score)) << 32) | (0xFFFFFFFFu - static_cast<uint32_t>(page));
}

class PageSelector {
 public:
  // scores[i]: of the CTA's i-th page, NaN allowed.
  __device__ __forceinline__ PageSelector(const Row& row, Shared& shared, const float* scores)
      : row_(row), s_(shared), scores_(scores) {}

  // Before the barrier in front of `find_threshold`.
  __device__ __forceinline__ static void clear(Shared& shared) {
    if (threadIdx.x < kBins) shared.histogram[threadIdx.x] = 0;
    if (threadIdx.x == 0) shared.num_candidates = 0;
  }

  // Between two of them, the first of which ended behind a barrier that every CTA met after its last look at the histograms.
  __device__ __forceinline__ static void clear_again(Shared& shared) {
    clear(shared);
    __syncthreads();
  }

  // Finds what `chooses` compares with, so that it takes `ranked` of the pages that compete. `range` holds most of the
  // scores, best all of them, and is the same in all CTAs. All threads of the row's CTAs call it.
  __device__ __forceinline__ void find_threshold(float2 range, int ranked) {
    ties_ = false;
    if (ranked == 0 || ranked == row_.last - row_.first) {
      threshold_ = ranked == 0 ? ~Key{0} : 0;
      return;
    }
    int need = ranked;
    float2 members = make_float2(-INFINITY, INFINITY);  // values still in question
#pragma unroll 1
    while (true) {
      count_bins(members, range, need);
      const int left = need - s_.above;
      if (s_.in_bin <= kCandidates) return rank_candidates(members, range, left);
      const float edge = s_.threshold_bin == 0 ? -INFINITY : INFINITY;
      const bool infinite = s_.threshold_bin == 0 || s_.threshold_bin == kBins - 1;
      members = range = infinite ? make_float2(edge, edge) : range_of_bin(members, range);
      start_level();
      if (range.x != range.y) {
        need = left;
        continue;
      }
      // more equal scores than a level can hold: now the pages compete, the lower the better
      ties_ = true;
      tie_ = range.x;
      need = ranked;
      members = make_float2(-INFINITY, INFINITY);
      range = make_float2(-static_cast<float>(row_.last), -static_cast<float>(row_.first));
    }
  }

  // Whether the CTA's i-th page is chosen, forced pages included.
  __device__ __forceinline__ bool chooses(int i) const {
    const int page = row_.page(i);
    return i < row_.count && (!row_.competes(page) || rank_key(value(i, page), page) >= threshold_);
  }

 private:
  // What the pages are ranked by.
  __device__ __forceinline__ float value(int i, int page) const {
    float score = scores_[i];
    score = score != score ? INFINITY : score + 0.f;
    if (!ties_) return score;
    return score == tie_ ? -static_cast<float>(page) : score > tie_ ? INFINITY : -INFINITY;
  }

  // Calls `visit(page, value)` for this warp's competing pages.
  template <typename F>
  __device__ __forceinline__ void each_value(F visit) const {
    row_.each_page([&](int i) {
      const int page = row_.page(i);
      if (i < row_.count && row_.competes(page)) visit(page, value(i, page));
    });
  }

  // Monotone in the value; the infinities have bins of their own.
  __device__ __forceinline__ static int bin_of(float value, float2 range) {
    if (value == -INFINITY) return 0;
    if (value == INFINITY) return kBins - 1;
    const float width = 0.5f * range.y - 0.5f * range.x;  // halves: the width itself may overflow
    if (!(width > 1e-36f)) return value > range.x ? kBins - 2 : 1;
    const float place = (0.5f * value - 0.5f * range.x) * __fdividef(kBins - 2.f, width);
    return 1 + static_cast<int>(fminf(fmaxf(place, 0.f), kBins - 3.f));
  }

  __device__ __forceinline__ static bool is_member(float value, float2 members) {
    return value >= members.x && value <= members.y;
  }

  // Finds the bin that holds the need-th greatest member: threshold_bin, how many lie above it and in it.
  __device__ __forceinline__ void count_bins(float2 members, float2 range, int need) {
    each_value([&](int, float value) {
      if (is_member(value, members)) atomicAdd(&s_.histogram[bin_of(value, range)], 1);
    });
    cluster_sync();
    // thread t sums bin 255 - t, so that a prefix sum counts from the top
    const int bin = kBins - 1 - static_cast<int>(threadIdx.x);
    int count = 0, before = 0;
#pragma unroll 1
    for (int first = 0; bin >= 0 && first < row_.size; first += 8) {
#pragma unroll  // eight reads of remote memory in flight
      for (int c = first; c < first + 8; ++c) {
        const int theirs = c < row_.size ? get(&s_.histogram[bin], row_.peer(c)) : 0;
        before += c < row_.rank ? theirs : 0;
        count += theirs;
      }
    }
    const int above = block_exclusive_scan(count, s_.scan);
    if (above < need && need <= above + count) {
      s_.threshold_bin = bin;
      s_.above = above;
      s_.in_bin = count;
      s_.in_bin_before = before;
    }
    __syncthreads();
  }

  // Every CTA gets the threshold bin's pages; the need-th greatest key among them is the threshold.
  __device__ __forceinline__ void rank_candidates(float2 members, float2 range, int need) {
    const int bin = s_.threshold_bin;
    each_value([&](int page, float value) {
      if (!is_member(value, members) || bin_of(value, range) != bin) return;
      const int place = s_.in_bin_before + atomicAdd(&s_.num_candidates, 1);
#pragma unroll 1
      for (int c = 0; c < row_.size; ++c) put(&s_.candidates[place], row_.peer(c), rank_key(value, page));
    });
    cluster_sync();
    if (threadIdx.x < s_.in_bin) {
      const Key key = s_.candidates[threadIdx.x];
      int greater = 0;
#pragma unroll 4
      for (int i = 0; i < s_.in_bin; ++i) greater += s_.candidates[i] > key;
      if (greater == need - 1) s_.threshold = key;
    }
    __syncthreads();
    threshold_ = s_.threshold;
  }

  // The interval of the threshold bin's members, over the cluster.
  __device__ __forceinline__ float2 range_of_bin(float2 members, float2 range) {
    float2 mine = make_float2(INFINITY, -INFINITY);
    const int bin = s_.threshold_bin;
    each_value([&](int, float value) {
      if (is_member(value, members) && bin_of(value, range) == bin) {
        mine = make_float2(fminf(mine.x, value), fmaxf(mine.y, value));
      }
    });
    offer_range(row_, s_, mine);
    return take_range(row_, s_);
  }

  __device__ __forceinline__ void start_level() const {
    cluster_sync();  // every CTA has read the histograms
    clear(s_);
    __syncthreads();
  }

  const Row& row_;
  Shared& s_;
  const float* scores_;
  Key threshold_ = 0;
  float tie_ = 0.f;
  bool ties_ = false;  // whether pages whose score is `tie_` compete by their number
};

// The selection stage by itself: returns the scores' range.
__device__ __forceinline__ float2 load_scores(const Row& row, Shared& shared, const float* global, float* buffer) {
  float2 range = make_float2(INFINITY, -INFINITY);
  row.each_page([&](int i) {
    if (i >= row.count) return;
    const int page = row.page(i);
    const float score = buffer[i] = global[page];
    if (row.competes(page) && fabsf(score) < INFINITY) range = make_float2(fminf(range.x, score), fmaxf(range.y, score));
  });
  offer_range(row, shared, range);
  return take_range(row, shared);
}

// Lists this CTA's pages for which `chooses(i)` holds, warp after warp, in `listed` or, where there is no room, in
// `spare`; returns how many there are. All threads of the CTA call it; the list is theirs afterwards.
template <typename F>
__device__ __forceinline__ int list_pages(const Row& row, Shared& shared, int32_t* spare, const int32_t*& list, F chooses) {
  int mine = 0;
  row.each_page([&](int i) { mine += __popc(__ballot_sync(0xFFFFFFFFu, chooses(i))); });
  if (lane_id() == 0) shared.scan[warp_id()] = mine;
  __syncthreads();
  int place = 0, all = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    place += w < warp_id() ? shared.scan[w] : 0;
    all += shared.scan[w];
  }
  int32_t* to = all <= kListed ? shared.listed : spare;
  row.each_page([&](int i) {
    const bool chosen = chooses(i);
    const uint32_t among = __ballot_sync(0xFFFFFFFFu, chosen);
    if (chosen) to[place + __popc(among & ((1u << lane_id()) - 1))] = row.page(i);
    place += __popc(among);
  });
  __syncthreads();
  list = to;
  return all;
}

}  // namespace quest
