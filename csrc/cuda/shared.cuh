// A CTA's shared memory and its view of the row that its cluster serves.
#pragma once
#include "common.cuh"

namespace quest {

// Score groups and attention tiles that are worth a CTA. A CTA then scores at most 144 pages or its part of the longest
// context over the whole cluster: cuda.py sizes the buffer so.
constexpr int kMinimumWork = 16;
constexpr int kListed = 256;  // chosen pages of a CTA that it lists in shared memory

// Aligned, so that the staging windows behind it are: a copy of 32 bytes must not straddle two lines.
struct alignas(128) Shared {
  float4 mass_inbox[kMaxCluster][kMaxRows];  // each CTA's (max, sum of exp2, min) of a head's bounds
  float4 warp_mass[kWarps][kMaxRows];
  unsigned long long candidates[kCandidates];
  unsigned long long threshold;
  int histogram[kBins];
  float2 range_inbox[kMaxCluster];           // each CTA's least and greatest score
  float2 warp_range[kWarps];
  int2 count_inbox[kMaxCluster];             // each CTA's pages above the threshold bin, and tied ones
  float2 softmax_inbox[kMaxCluster][kMaxRows];  // each CTA's (max, sum) of its part of the attention
  float2 warp_softmax[kWarps][kMaxRows];
  float log_sum[kMaxRows];                   // log2 of a head's sum of exp2 over all pages
  int scan[kWarps];
  int32_t listed[kListed];
  int threshold_bin, above, in_bin, in_bin_before;
  int num_candidates, num_above, num_ties;
};

// One row: a request and a selection head. All CTAs of a cluster see the same one.
struct Row {
  int req, head, kv_head;
  int seq_len, total;       // tokens; pages
  int take;                 // pages to attend to
  int first, last, ranked;  // pages [first, last) compete for `ranked` places; the others are forced
  int rank, size;           // this CTA in its row, and how many CTAs have work; rank 0 is not always the cluster's first
  int turn;                 // the cluster's CTA that has rank 0
  int begin, end;           // pages that this CTA scores
  bool dense;               // the budget covers the context
  bool gather;              // every CTA gets all scores and chooses alone

  __device__ __forceinline__ static Row make(const DecodeParams& p) {
    Row row;
    row.head = static_cast<int>(blockIdx.y);
    row.req = static_cast<int>(blockIdx.z);
    // clusters begin on the same few SMs: taking turns spreads those CTAs that stay
    row.turn = static_cast<int>((blockIdx.y + blockIdx.z) & (gridDim.x - 1));
    row.rank = static_cast<int>((blockIdx.x - row.turn) & (gridDim.x - 1));
    row.kv_head = row.head * p.rows / p.heads_per_kv;
    row.seq_len = max(p.seq_lens[row.req], 0);
    const int budget = p.page_budgets[row.req];
    row.total = min((row.seq_len + (1 << p.page_shift) - 1) >> p.page_shift, p.max_pages);
    row.take = max(min(budget, row.total), 0);
    // not `take == total`: ptxas 13.0.88 compiles that to a wrong answer after the clamp above
    row.dense = budget >= row.total && p.stages == (kScore | kSelect | kAttend);
    if (p.stages & kSelect) row.take = min(row.take, p.selected_width);
    const int recent = min(p.recent_pages, row.take);
    const int sink = min(min(p.sink_pages, max(row.total - p.recent_pages, 0)), row.take - recent);
    row.first = sink;
    row.last = row.total - recent;
    row.ranked = row.take - recent - sink;
    // CTAs without work leave at once
    const int scored = row.dense ? 0 : row.total / 8;
    const int work = scored + (row.take << (p.page_shift - kTileShift));
    row.size = max(1, min(static_cast<int>(gridDim.x), div_up(work, kMinimumWork)));
    const int share = div_up(div_up(row.total, row.size), 16) * 16;
    row.begin = min(row.rank * share, row.total);
    row.end = min(row.begin + share, row.total);
    row.gather = row.total <= p.gather_pages && p.stages == (kScore | kSelect | kAttend);
    return row;
  }

  // The same row for a CTA that holds all of its scores.
  __device__ __forceinline__ Row alone() const {
    Row row = *this;
    row.turn = static_cast<int>(blockIdx.x);  // its only peer is itself
    row.rank = row.begin = 0;
    row.size = 1;
    row.end = total;
    return row;
  }

  // Chosen pages that a CTA attends to; this one's begin at `rank` times as many.
  __device__ __forceinline__ int entries() const { return div_up(take, size); }

  // The cluster's CTA that has `other` as its rank.
  __device__ __forceinline__ int peer(int other) const { return (other + turn) & (static_cast<int>(gridDim.x) - 1); }

  __device__ __forceinline__ bool competes(int page) const { return page >= first && page < last; }
};

// The range over the cluster of what its threads found. A call, not inlined: it is needed in three places.
__device__ __noinline__ float2 share_range(const Row row, Shared& shared, float2 range) {
  range = warp_range(range);
  if (lane_id() == 0) shared.warp_range[warp_id()] = range;
  __syncthreads();
  if (warp_id() == 0) {
    range = warp_range(lane_id() < kWarps ? shared.warp_range[lane_id()] : make_float2(INFINITY, -INFINITY));
    if (lane_id() < row.size) put(&shared.range_inbox[row.rank], row.peer(lane_id()), range);
  }
  if (row.size == 1) {
    __syncthreads();
  } else {
    cluster_sync();
  }
  return warp_range(lane_id() < row.size ? shared.range_inbox[lane_id()] : make_float2(INFINITY, -INFINITY));
}

// Notes the CTA's clock for whoever measures the stages.
__device__ __forceinline__ void mark(const DecodeParams& p, int which) {
  if (p.timeline != nullptr && threadIdx.x == 0) {
    const int64_t cta = (static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    p.timeline[cta * kMarks + which] = clock64();
  }
}

}  // namespace quest
