// Page selection: the exact Top-K of a row, whose scores lie spread over the CTAs of a cluster.
//
// Each level cuts the scores' range into equal bins, counts them over the cluster, and keeps the bin that holds the K-th
// score. One level is nearly always enough: the bin's few pages are then ranked against one another. Equal scores go to
// the lower page; NaN ranks as +inf. A CTA that has gathered all scores of its row does this alone, without the three
// cluster barriers that it costs otherwise.
//
// Code that runs once is fetched cold, so loops here stay rolled.
#pragma once
#include "shared.cuh"

namespace quest {

__device__ __forceinline__ float ranked_value(float score) { return score != score ? INFINITY : score + 0.f; }

// Sorts like (score, then lower page first).
__device__ __forceinline__ unsigned long long rank_key(float score, int page) {
  const uint32_t bits = __float_as_uint(score);
  const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return (static_cast<unsigned long long>(ordered) << 32) | (0xFFFFFFFFu - static_cast<uint32_t>(page));
}

// Where the chosen pages go: the row's list in memory, of which a CTA that chooses alone writes only what it attends to,
// and keeps it at hand where there is room.
struct Chosen {
  int32_t* row;     // the row's list
  int32_t* listed;  // this CTA's part of it, or null
  int begin, end;   // the places of that part

  __device__ __forceinline__ void put(int place, int page) const {
    if (place < begin || place >= end) return;
    row[place] = page;
    if (listed != nullptr) listed[place - begin] = page;
  }
};

class PageSelector {
 public:
  // scores[page - row.begin]: the CTA's share, NaN allowed.
  __device__ __forceinline__ PageSelector(const Row& row, Shared& shared, const float* scores)
      : row_(row), s_(shared), scores_(scores) {}

  // Hands the row's chosen pages, with their places in ascending order, to `chosen`. `range` holds most of the scores,
  // best all of them, and is the same in all CTAs. All threads of the row's CTAs call it, and meet afterwards.
  __device__ __forceinline__ void run(float2 range, const Chosen& chosen) {
    write_forced(chosen);
    if (row_.ranked == row_.last - row_.first) {
      each_page([&](int page, float) { chosen.put(page, page); });
    } else if (row_.ranked > 0) {
      write_ranked(chosen, row_.first + find_threshold(range));
    }
    meet();
  }

 private:
  __device__ __forceinline__ float score_of(int page) const { return ranked_value(scores_[page - row_.begin]); }

  // Calls `visit(page, score)` for the competing pages of this thread.
  template <typename F>
  __device__ __forceinline__ void each_page(F visit) const {
    const int end = min(row_.end, row_.last);
#pragma unroll 2
    for (int page = max(row_.begin, row_.first) + threadIdx.x; page < end; page += kThreads) visit(page, score_of(page));
  }

  // Returns how many pages the CTAs before this one choose; shared.threshold is the least key that this one chooses.
  __device__ __forceinline__ int find_threshold(float2 range) {
    int need = row_.ranked;
    float2 members = make_float2(-INFINITY, INFINITY);  // scores still in question
#pragma unroll 1
    while (true) {
      count_bins(members, range, need);
      need -= s_.above;
      if (s_.in_bin <= kCandidates) return rank_candidates(members, range, need);
      if (s_.threshold_bin == 0) return settle_ties(-INFINITY, need);
      if (s_.threshold_bin == kBins - 1) return settle_ties(INFINITY, need);
      members = range = range_of_bin(members, range);
      if (range.x == range.y) return settle_ties(range.x, need);
    }
  }

  // Monotone in the score; the infinities have bins of their own.
  __device__ __forceinline__ static int bin_of(float score, float2 range) {
    if (score == -INFINITY) return 0;
    if (score == INFINITY) return kBins - 1;
    const float width = 0.5f * range.y - 0.5f * range.x;  // halves: the width itself may overflow
    if (!(width > 1e-36f)) return score > range.x ? kBins - 2 : 1;
    const float place = (0.5f * score - 0.5f * range.x) * __fdividef(kBins - 2.f, width);
    return 1 + static_cast<int>(fminf(fmaxf(place, 0.f), kBins - 3.f));
  }

  __device__ __forceinline__ static bool is_member(float score, float2 members) {
    return score >= members.x && score <= members.y;
  }

  // Finds the bin that holds the need-th greatest member: threshold_bin, how many lie above it and in it.
  __device__ __forceinline__ void count_bins(float2 members, float2 range, int need) {
    s_.histogram[threadIdx.x] = 0;
    if (threadIdx.x == 0) s_.num_candidates = s_.num_above = s_.num_ties = 0;
    __syncthreads();
    each_page([&](int, float score) {
      if (is_member(score, members)) atomicAdd(&s_.histogram[bin_of(score, range)], 1);
    });
    meet();
    // thread t sums bin 255 - t, so that a prefix sum counts from the top
    const int bin = kBins - 1 - static_cast<int>(threadIdx.x);
    int count = row_.size == 1 ? s_.histogram[bin] : 0, before = 0;
#pragma unroll 1
    for (int first = 0; first < row_.size && row_.size > 1; first += 4) {
#pragma unroll  // four reads of remote memory in flight
      for (int c = first; c < first + 4; ++c) {
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
  __device__ __forceinline__ int rank_candidates(float2 members, float2 range, int need) {
    const int bin = s_.threshold_bin;
    int above = 0;
    each_page([&](int page, float score) {
      const int mine = is_member(score, members) ? bin_of(score, range) : score > members.y ? kBins : -1;
      above += mine > bin;
      if (mine == bin) {
        const int place = s_.in_bin_before + atomicAdd(&s_.num_candidates, 1);
#pragma unroll 1
        for (int c = 0; c < row_.size; ++c) put(&s_.candidates[place], row_.peer(c), rank_key(score, page));
      }
    });
    share_counts(above, 0);
    const bool candidate = threadIdx.x < s_.in_bin;
    const unsigned long long key = candidate ? s_.candidates[threadIdx.x] : 0;
    int greater = 0;
#pragma unroll 4
    for (int i = 0; i < s_.in_bin; ++i) greater += s_.candidates[i] > key;
    if (candidate && greater == need - 1) s_.threshold = key;
    // keys hold 2^32 - 1 - page: winners on lower pages than this CTA's lie in the CTAs before it
    const bool wins = candidate && greater < need && 0xFFFFFFFFu - static_cast<uint32_t>(key) < row_.begin;
    return __syncthreads_count(wins) + counts_before().x;
  }

  // More equal scores than a level can hold: the first `need` of them in page order, CTA by CTA.
  __device__ __forceinline__ int settle_ties(float score, int need) {
    int above = 0, tied = 0;
    each_page([&](int, float other) {
      above += other > score;
      tied += other == score;
    });
    share_counts(above, tied);
    const int2 before = counts_before();
    const int left = max(need - before.y, 0);  // ties that this CTA may choose
    if (threadIdx.x == 0) s_.threshold = rank_key(score, 0) + 1;  // none of them
    __syncthreads();
    // the last of the chosen ties is the threshold
    const auto tie = [&](int page) { return score_of(page) == score; };
    const int last = min(left, s_.count_inbox[row_.rank].y);
    each_chosen(count_before_warp(tie), tie, [&](int page, int place) {
      if (place + 1 == last) s_.threshold = rank_key(score, page);
    });
    __syncthreads();
    return before.x + min(before.y, need);
  }

  // Sends this CTA's counts to all, and meets them.
  __device__ __forceinline__ void share_counts(int above, int tied) {
    above = __reduce_add_sync(0xFFFFFFFFu, above);
    tied = __reduce_add_sync(0xFFFFFFFFu, tied);
    if (lane_id() == 0) {
      atomicAdd(&s_.num_above, above);
      atomicAdd(&s_.num_ties, tied);
    }
    __syncthreads();
    if (threadIdx.x < row_.size) put(&s_.count_inbox[row_.rank], row_.peer(threadIdx.x), make_int2(s_.num_above, s_.num_ties));
    meet();
  }

  __device__ __forceinline__ int2 counts_before() const {
    int2 sum = make_int2(0, 0);
#pragma unroll 4
    for (int c = 0; c < row_.rank; ++c) sum = make_int2(sum.x + s_.count_inbox[c].x, sum.y + s_.count_inbox[c].y);
    return sum;
  }

  // The score interval of the threshold bin's members, over the cluster.
  __device__ __forceinline__ float2 range_of_bin(float2 members, float2 range) {
    float2 mine = make_float2(INFINITY, -INFINITY);
    const int bin = s_.threshold_bin;
    each_page([&](int, float score) {
      if (is_member(score, members) && bin_of(score, range) == bin) {
        mine = make_float2(fminf(mine.x, score), fmaxf(mine.y, score));
      }
    });
    meet();  // every CTA has read the histograms, which are cleared next
    return share_range(row_, s_, mine);
  }

  // Counts, for this warp, the pages that `choose(page)` picks of its part of the share, whose pages neighbour one
  // another; returns how many the warps before it picked.
  template <typename F>
  __device__ __forceinline__ int count_before_warp(F choose) const {
    int begin, end, count = 0;
    warp_part(begin, end);
#pragma unroll 2
    for (int page = begin + lane_id(); page < end; page += 32) count += choose(page);
    count = __reduce_add_sync(0xFFFFFFFFu, count);
    if (lane_id() == 0) s_.scan[warp_id()] = count;
    __syncthreads();
    int before = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) before += w < warp_id() ? s_.scan[w] : 0;
    return before;
  }

  // Calls `visit(page, place)` in page order for the pages that `choose(page)` picks; `place` counts from `before`.
  template <typename F, typename G>
  __device__ __forceinline__ void each_chosen(int before, F choose, G visit) const {
    int begin, end;
    warp_part(begin, end);
#pragma unroll 2
    for (int first = begin; first < end; first += 32) {
      const int page = first + lane_id();
      const bool chosen = page < end && choose(page);
      const uint32_t all = __ballot_sync(0xFFFFFFFFu, chosen);
      if (chosen) visit(page, before + __popc(all & ((1u << lane_id()) - 1)));
      before += __popc(all);
    }
  }

  __device__ __forceinline__ void warp_part(int& begin, int& end) const {
    const int first = max(row_.begin, row_.first), last = min(row_.end, row_.last);
    const int part = div_up(max(last - first, 0), kWarps * 32) * 32;
    begin = min(first + warp_id() * part, last);
    end = min(begin + part, last);
  }

  __device__ __forceinline__ void write_ranked(const Chosen& chosen, int first) const {
    const unsigned long long threshold = s_.threshold;
    const auto choose = [&](int page) { return rank_key(score_of(page), page) >= threshold; };
    each_chosen(first + count_before_warp(choose), choose, [&](int page, int place) { chosen.put(place, page); });
  }

  __device__ __forceinline__ void write_forced(const Chosen& chosen) const {
    if (row_.rank != 0) return;
    const int recent = row_.total - row_.last;
#pragma unroll 1
    for (int i = threadIdx.x; i < row_.first + recent; i += kThreads) {
      const bool sink = i < row_.first;
      chosen.put(sink ? i : i + row_.ranked, sink ? i : row_.last + i - row_.first);
    }
  }

  // Waits for the CTAs that choose together.
  __device__ __forceinline__ void meet() const {
    if (row_.size == 1) {
      __syncthreads();
    } else {
      cluster_sync();
    }
  }

  const Row& row_;
  Shared& s_;
  const float* scores_;
};

}  // namespace quest
