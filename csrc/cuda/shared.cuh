// A CTA's shared memory and its view of the row that its cluster serves.
#pragma once
#include "common.cuh"

namespace quest {

// Score groups and attention tiles that are worth a CTA. A CTA then scores at most 144 pages or its part of the longest
// context over the whole cluster: cuda.py sizes the buffer so.
constexpr int kMinimumWork = 16;
using MassSum = unsigned long long;  // estimated masses in fixed point
constexpr int kListed = 512;  // chosen pages of a CTA that it lists in shared memory
constexpr int kQueryOperands = QUEST_HEAD_DIM / 16 * 32;

// Aligned, so that the staging windows behind it are: a copy of 32 bytes must not straddle two lines.
struct alignas(128) Shared {
  float4 mass_inbox[kMaxCluster][kMaxRows];  // each CTA's (max, sum of exp2, min) of a head's bounds
  float4 warp_mass[kWarps][kMaxRows];
  union {
    uint4 query[kQueryOperands];  // while pages are scored; see codes.cuh
    struct {
      unsigned long long candidates[kCandidates];
      int32_t listed[kListed];
    };
  };
  unsigned long long threshold;
  float2 range_inbox[kMaxCluster][kWarps];      // each warp's least and greatest score
  float2 softmax_inbox[kMaxCluster][kMaxRows];  // each CTA's (max, sum) of its part of the attention
  float2 warp_softmax[kWarps][kMaxRows];
  float2 head_range[kMaxRows];  // least and greatest weight of a page, the least as log2
  MassSum mass_scan[kWarps], mass_above, forced_mass;  // see share.cuh
  float log_sum[kMaxRows];                      // log2 of a head's sum of exp2 over all pages
  int histogram[kBins];
  int scan[kWarps];
  int threshold_bin, above, in_bin, in_bin_before;
  int num_candidates;
  int taken_inbox[kMaxCluster];  // pages that each CTA attends to
};

// Share of its budget's mass that is enough for a request; 1: the budget is spent. Asked for again where it is needed: kept
// in a register, it made the scoring spill.
__device__ __forceinline__ float top_p_of(const DecodeParams& p, int req) { return p.top_p == nullptr ? 1.f : p.top_p[req]; }

// How a request's pages are chosen. Read anew where it is needed, as above.
__device__ __forceinline__ int32_t policy_of(const DecodeParams& p, int req) { return p.policies == nullptr ? p.reduction : p.policies[req]; }

// One row: a request and a selection head. All CTAs of a cluster see the same one. Of every `size` neighbouring pages a
// CTA owns one, in an order that a hash shuffles, so that no pattern in the text makes one CTA's part of the chosen pages
// much longer than another's. It scores its own pages and attends to those of them that are chosen.
struct Row {
  int req, head, kv_head;
  int seq_len, total;       // tokens; pages
  int take;                 // pages to attend to
  int first, last, ranked;  // pages [first, last) compete for `ranked` places; the others are forced
  int rank, size;           // this CTA in its row, and how many CTAs have work
  uint32_t inverse;         // 2^31 over `size`, rounded up
  int turn;                 // the cluster's CTA that has rank 0: not always the cluster's first
  int count;                // pages that this CTA owns
  bool dense;               // the budget covers the context, and all of it is wanted

  // What is known before the row's length is, as if all CTAs had work.
  __device__ __forceinline__ static Row guess(const DecodeParams& p) {
    Row row;
    row.size = static_cast<int>(gridDim.x);
    row.inverse = p.cluster_inverse;
    row.head = static_cast<int>(blockIdx.y);
    row.req = static_cast<int>(blockIdx.z);
    // clusters begin on the same few SMs: taking turns spreads those CTAs that stay
    const int place = static_cast<int>(blockIdx.y + blockIdx.z);
    row.turn = place - row.per_cta(place) * row.size;
    row.rank = static_cast<int>(blockIdx.x) - row.turn;
    if (row.rank < 0) row.rank += row.size;
    return row;
  }

  __device__ __forceinline__ static Row make(const DecodeParams& p) {
    Row row = guess(p);
    row.kv_head = row.head * p.rows / p.heads_per_kv;
    row.seq_len = max(p.seq_lens[row.req], 0);
    const int budget = p.page_budgets[row.req];
    row.total = min((row.seq_len + (1 << p.page_shift) - 1) >> p.page_shift, p.max_pages);
    row.take = max(min(budget, row.total), 0);
    // not `take == total`: ptxas 13.0.88 compiles that to a wrong answer after the clamp above
    row.dense = budget >= row.total && p.stages == (kScore | kSelect | kAttend) && !(top_p_of(p, row.req) < 1.f);
    int recent = min(p.recent_pages, row.take);
    if (policy_of(p, row.req) == kWindow) recent = max(recent, row.take - p.sink_pages);
    const int sink = min(min(p.sink_pages, max(row.total - p.recent_pages, 0)), row.take - recent);
    row.first = sink;
    row.last = row.total - recent;
    row.ranked = row.take - recent - sink;
    // CTAs without work leave at once
    const int scored = row.dense ? 0 : row.total / 8;
    const int read = policy_of(p, row.req) == kTwoStage ? row.take + row.take / 2 : row.take;
    const int work = scored + (read << (p.page_shift - kTileShift));
    const int worth = max(1, div_up(work, kMinimumWork));
    const int bits = 32 - __clz(worth - 1);
    if (1 << bits < row.size) {
      row.size = 1 << bits;
      row.inverse = 1u << (31 - bits);
    }
    const int whole = row.per_cta(row.total);
    row.count = whole + (row.place_in(whole) < row.total - whole * row.size);
    return row;
  }

  // n / size, for n below 2^27.
  __device__ __forceinline__ int per_cta(int n) const {
    return static_cast<int>(__umulhi(2u * static_cast<uint32_t>(n), inverse));
  }

  // Which of the `size` pages from size * i on this CTA owns. The hash: i times the golden ratio, from its ninth bit on.
  __device__ __forceinline__ int place_in(int i) const {
    const int place = rank + static_cast<int>(__umulhi(static_cast<uint32_t>(i) * 0x3779B100u, size));
    return place < size ? place : place - size;
  }
  __device__ __forceinline__ int page(int i) const { return i * size + place_in(i); }

  // The cluster's CTA that has `other` as its rank.
  __device__ __forceinline__ int peer(int other) const {
    const int place = other + turn, all = static_cast<int>(gridDim.x);
    return place < all ? place : place - all;
  }

  __device__ __forceinline__ int most_owned() const { return per_cta(total) + 1; }  // pages of a CTA, at most

  // Of kTwoStage: how many of the pages that compete are better than its shortlist, and how many not worse than it.
  __device__ __forceinline__ int certain() const { return max(take / 2 - (take - ranked), 0); }
  __device__ __forceinline__ int possible() const { return min(take + (take + 1) / 2, total) - (take - ranked); }

  __device__ __forceinline__ bool competes(int page) const { return page >= first && page < last; }

  // Groups of eight own pages that this warp serves: every kWarps-th.
  __device__ __forceinline__ int groups() const {
    const int all = div_up(count, 8);
    return all > warp_id() ? div_up(all - warp_id(), kWarps) : 0;
  }
  __device__ __forceinline__ static int first_of(int group) { return (group * kWarps + warp_id()) * 8; }

  // How many pages all CTAs attend to, once each has told the one of rank 0.
  __device__ __forceinline__ int taken(const Shared& shared) const {
    int all = 0;
#pragma unroll 1
    for (int c = 0; c < size; ++c) all += shared.taken_inbox[c];
    return all;
  }

  // Calls `visit(i)` for the pages of this warp, one a lane, in lockstep; i >= count where a lane has none.
  template <typename F>
  __device__ __forceinline__ void each_page(F visit) const {
    const int mine = groups();
#pragma unroll 1
    for (int group = lane_id() / 8; group - lane_id() / 8 < mine; group += 4) visit(first_of(group) + lane_id() % 8);
  }
};

// Sorts as the float does, NaN aside.
__device__ __forceinline__ uint32_t ordered_bits(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float from_ordered_bits(uint32_t bits) {
  return __uint_as_float(bits & 0x80000000u ? bits & 0x7FFFFFFFu : ~bits);
}

// Least and greatest over the warp.
__device__ __forceinline__ float2 warp_range(float2 range) {
  return make_float2(from_ordered_bits(__reduce_min_sync(0xFFFFFFFFu, ordered_bits(range.x))),
                     from_ordered_bits(__reduce_max_sync(0xFFFFFFFFu, ordered_bits(range.y))));
}

// The range over the cluster of what its threads find, in two steps, between which a warp may go on with its work. A
// cluster barrier lies between the steps. `offer`: this warp's part of the range, at least.
__device__ __forceinline__ void offer_range(const Row& row, Shared& shared, float2 range) {
  range = warp_range(range);
#pragma unroll 1
  for (int c = lane_id(); c < row.size; c += 32) put(&shared.range_inbox[row.rank][warp_id()], row.peer(c), range);
  cluster_arrive();
}
__device__ __forceinline__ float2 take_range(const Row& row, const Shared& shared) {
  cluster_wait();
  float2 range = make_float2(INFINITY, -INFINITY);
#pragma unroll 1
  for (int i = lane_id(); i < row.size * kWarps; i += 32) {
    const float2 other = shared.range_inbox[i / kWarps][i % kWarps];
    range = make_float2(fminf(range.x, other.x), fmaxf(range.y, other.y));
  }
  return warp_range(range);
}

// Notes the CTA's clock for whoever measures the stages.
__device__ __forceinline__ void mark(const DecodeParams& p, int which) {
  if (p.timeline != nullptr && threadIdx.x == 0) {
    const int64_t cta = (static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    p.timeline[cta * kMarks + which] = clock64();
  }
}

}  // namespace quest
