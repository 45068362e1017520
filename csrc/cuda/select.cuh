// Page selection: the exact Top-K of a row, whose scores lie spread over the CTAs of a cluster.
//
// Each level cuts the scores' range into 256 equal bins, counts them over the cluster, and keeps the bin that holds the
// K-th score. One level is nearly always enough: the bin's few pages are then ranked against one another. The cost is
// four cluster barriers, not a pass over memory. Equal scores go to the lower page; NaN ranks as +inf.
#pragma once
#include "shared.cuh"

namespace quest {

__device__ __forceinline__ float ranked_value(float score) { return score != score ? INFINITY : score + 0.f; }

// Sorts like (score, then lower page first).
__device__ __forceinline__ unsigned long long rank_key(float score, int page) {
  const uint32_t bits = __float_as_uint(ranked_value(score));
  const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return (static_cast<unsigned long long>(ordered) << 32) | (0xFFFFFFFFu - static_cast<uint32_t>(page));
}

class PageSelector {
 public:
  __device__ __forceinline__ PageSelector(const DecodeParams& p, const Row& row, Shared& shared, const float* scores)
      : p_(p), row_(row), s_(shared), scores_(scores), cluster_(cg::this_cluster()) {}

  // Writes the row's chosen pages, ascending, to `selected`. All threads of the cluster call it.
  __device__ __forceinline__ void run(int32_t* selected) {
    find_threshold();
    write(selected);
  }

 private:
  __device__ __forceinline__ bool competes(int page) const { return page >= row_.first && page < row_.last; }
  __device__ __forceinline__ float score_of(int page) const { return ranked_value(scores_[page - row_.begin]); }

  // Leaves shared.threshold such that a competing page is chosen when its key is at least that, or, where ties_ is
  // set, when its key's score is above it or it is among this CTA's first `ties_` pages of just that score.
  __device__ __forceinline__ void find_threshold() {
    if (row_.ranked == 0 || row_.ranked == row_.last - row_.first) {
      if (threadIdx.x == 0) s_.threshold = row_.ranked == 0 ? ~0ull : 0ull;
      __syncthreads();
      return;
    }
    int need = row_.ranked;
    float2 members = make_float2(-INFINITY, INFINITY);  // scores still in question
    float2 finite = finite_range();
    while (true) {
      count_bins(members, finite, need);
      need -= s_.above;
      if (s_.in_bin <= kCandidates) return rank_candidates(members, finite, need);
      if (s_.threshold_bin == 0) return settle_ties(-INFINITY, need);
      if (s_.threshold_bin == kBins - 1) return settle_ties(INFINITY, need);
      members = finite = range_of_bin(members, finite);
      if (finite.x == finite.y) return settle_ties(finite.x, need);
    }
  }

  // Least and greatest finite score over the cluster.
  __device__ __forceinline__ float2 finite_range() {
    float low = INFINITY, high = -INFINITY;
    for (int page = row_.begin + threadIdx.x; page < row_.end; page += kThreads) {
      const float score = score_of(page);
      if (competes(page) && fabsf(score) < INFINITY) {
        low = fminf(low, score);
        high = fmaxf(high, score);
      }
    }
    return share_range(low, high);
  }

  // The range over the cluster of what the threads found; clears the histogram for the next count.
  __device__ __forceinline__ float2 share_range(float low, float high) {
    low = warp_reduce(low, MinOp());
    high = warp_reduce(high, MaxOp());
    if (lane_id() == 0) s_.warp_range[warp_id()] = make_float2(low, high);
    s_.histogram[threadIdx.x] = 0;
    __syncthreads();
    if (threadIdx.x < row_.size) {
      float2 range = s_.warp_range[0];
      for (int w = 1; w < kWarps; ++w) {
        range = make_float2(fminf(range.x, s_.warp_range[w].x), fmaxf(range.y, s_.warp_range[w].y));
      }
      *cluster_.map_shared_rank(&s_.range_inbox[row_.rank], threadIdx.x) = range;
    }
    cluster_.sync();
    float2 range = s_.range_inbox[0];
    for (int c = 1; c < row_.size; ++c) {
      range = make_float2(fminf(range.x, s_.range_inbox[c].x), fmaxf(range.y, s_.range_inbox[c].y));
    }
    return range;
  }

  // Monotone in the score; the infinities have bins of their own.
  __device__ __forceinline__ static int bin_of(float score, float2 range) {
    if (score == -INFINITY) return 0;
    if (score == INFINITY) return kBins - 1;
    const float width = 0.5f * range.y - 0.5f * range.x;  // halves: the width itself may overflow
    if (width <= 0.f) return 1 + (score > range.x ? kBins - 3 : 0);
    const float place = __fdiv_rn(0.5f * score - 0.5f * range.x, width);
    return 1 + min(static_cast<int>(place * (kBins - 2)), kBins - 3);
  }

  __device__ __forceinline__ bool is_member(int page, float score, float2 members) const {
    return competes(page) && score >= members.x && score <= members.y;
  }

  // Finds the bin that holds the need-th greatest member: threshold_bin, how many lie above it and in it.
  __device__ __forceinline__ void count_bins(float2 members, float2 finite, int need) {
    for (int page = row_.begin + threadIdx.x; page < row_.end; page += kThreads) {
      const float score = score_of(page);
      if (is_member(page, score, members)) atomicAdd(&s_.histogram[bin_of(score, finite)], 1);
    }
    if (threadIdx.x == 0) s_.num_candidates = 0;
    cluster_.sync();
    // thread t sums bin 255 - t, so that a prefix sum counts from the top
    const int bin = kBins - 1 - static_cast<int>(threadIdx.x);
    int count = 0, before = 0;
    for (int c = 0; c < row_.size; ++c) {
      const int theirs = *cluster_.map_shared_rank(&s_.histogram[bin], c);
      before += c < row_.rank ? theirs : 0;
      count += theirs;
    }
    int total;
    const int above = block_exclusive_scan(count, s_.scan, total);
    if (above < need && need <= above + count) {
      s_.threshold_bin = bin;
      s_.above = above;
      s_.in_bin = count;
      s_.in_bin_before = before;
    }
    __syncthreads();
  }

  // The score interval of the threshold bin's members, over the cluster.
  __device__ __forceinline__ float2 range_of_bin(float2 members, float2 finite) {
    float low = INFINITY, high = -INFINITY;
    const int bin = s_.threshold_bin;
    for (int page = row_.begin + threadIdx.x; page < row_.end; page += kThreads) {
      const float score = score_of(page);
      if (is_member(page, score, members) && bin_of(score, finite) == bin) {
        low = fminf(low, score);
        high = fmaxf(high, score);
      }
    }
    cluster_.sync();  // every CTA has read the histograms, which share_range clears
    return share_range(low, high);
  }

  // Every CTA gets the threshold bin's pages; the need-th greatest key among them is the threshold.
  __device__ __forceinline__ void rank_candidates(float2 members, float2 finite, int need) {
    const int bin = s_.threshold_bin;
    for (int page = row_.begin + threadIdx.x; page < row_.end; page += kThreads) {
      const float score = score_of(page);
      if (is_member(page, score, members) && bin_of(score, finite) == bin) {
        const int place = s_.in_bin_before + atomicAdd(&s_.num_candidates, 1);
        const unsigned long long key = rank_key(score, page);
        for (int c = 0; c < row_.size; ++c) *cluster_.map_shared_rank(&s_.candidates[place], c) = key;
      }
    }
    cluster_.sync();
    if (threadIdx.x < s_.in_bin) {
      const unsigned long long key = s_.candidates[threadIdx.x];
      int greater = 0;
      for (int i = 0; i < s_.in_bin; ++i) greater += s_.candidates[i] > key;
      if (greater == need - 1) s_.threshold = key;
    }
    __syncthreads();
  }

  // More equal scores than a level can hold: the first `need` of them in page order, CTA by CTA.
  __device__ __forceinline__ void settle_ties(float score, int need) {
    int mine = 0;
    for (int page = row_.begin + threadIdx.x; page < row_.end; page += kThreads) {
      mine += competes(page) && score_of(page) == score;
    }
    int total;
    block_exclusive_scan(mine, s_.scan, total);
    cluster_.sync();
    if (threadIdx.x < row_.size) *cluster_.map_shared_rank(&s_.count_inbox[row_.rank], threadIdx.x) = total;
    cluster_.sync();
    int before = 0;
    for (int c = 0; c < row_.rank; ++c) before += s_.count_inbox[c];
    ties_ = max(min(need - before, total), 0);
    tied_ = true;
    if (threadIdx.x == 0) s_.threshold = rank_key(score, 0);
    cluster_.sync();  // the inbox is used again
  }

  __device__ __forceinline__ bool above_threshold(int page) const {
    const unsigned long long key = rank_key(scores_[page - row_.begin], page);
    return tied_ ? (key >> 32) > (s_.threshold >> 32) : key >= s_.threshold;
  }
  __device__ __forceinline__ bool is_tied(int page) const {
    return tied_ && competes(page) && (rank_key(scores_[page - row_.begin], page) >> 32) == (s_.threshold >> 32);
  }

  // Each thread takes neighbouring pages, so that one prefix sum orders the whole share.
  __device__ __forceinline__ void write(int32_t* selected) {
    const int each = div_up(row_.end - row_.begin, kThreads);
    const int begin = min(row_.begin + static_cast<int>(threadIdx.x) * each, row_.end);
    const int end = min(begin + each, row_.end);
    int tie = 0, ties_total = 0;
    if (tied_) {
      int mine = 0;
      for (int page = begin; page < end; ++page) mine += is_tied(page);
      tie = block_exclusive_scan(mine, s_.scan, ties_total);
    }
    int chosen = 0, seen = tie;
    for (int page = begin; page < end; ++page) chosen += is_chosen(page, seen);
    int total;
    int place = block_exclusive_scan(chosen, s_.scan, total);
    if (threadIdx.x < row_.size) *cluster_.map_shared_rank(&s_.count_inbox[row_.rank], threadIdx.x) = total;
    cluster_.sync();
    for (int c = 0; c < row_.rank; ++c) place += s_.count_inbox[c];
    seen = tie;
    for (int page = begin; page < end; ++page) {
      if (is_chosen(page, seen)) selected[place++] = page;
    }
  }

  // `seen` counts the tied pages up to here.
  __device__ __forceinline__ bool is_chosen(int page, int& seen) const {
    if (page < row_.first || page >= row_.last) return true;
    if (row_.ranked == 0) return false;
    if (row_.ranked == row_.last - row_.first || above_threshold(page)) return true;
    return is_tied(page) && seen++ < ties_;
  }

  const DecodeParams& p_;
  const Row& row_;
  Shared& s_;
  const float* scores_;
  cg::cluster_group cluster_;
  int ties_ = 0;
  bool tied_ = false;
};

}  // namespace quest
