// A CTA's shared memory and its view of the row that its cluster serves.
#pragma once
#include "common.cuh"

namespace quest {

// Work of a CTA in score groups and attention tiles: less is not worth one, more is shared with another, if the cluster
// has one left. A CTA scores at most 144 pages or its fair share of the longest context: cuda.py sizes the buffer so.
constexpr int kMinimumWork = 2 * kWarps;
constexpr int kMaximumWork = 1024;

struct Shared {
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
  int threshold_bin, above, in_bin, in_bin_before;
  int num_candidates, num_above, num_ties;
};

// One row: a request and a selection head. All CTAs of a cluster see the same one.
struct Row {
  int req, head, kv_head;
  int seq_len, total;       // tokens; pages
  int take;                 // pages to attend to
  int first, last, ranked;  // pages [first, last) compete for `ranked` places; the others are forced
  int rank, size;           // this CTA in its cluster, and how many of its CTAs have work
  int begin, end;           // pages that this CTA scores
  bool dense;               // the budget covers the context

  __device__ __forceinline__ static Row make(const DecodeParams& p) {
    Row row;
    row.rank = static_cast<int>(blockIdx.x);
    row.head = static_cast<int>(blockIdx.y);
    row.req = static_cast<int>(blockIdx.z);
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
    row.size = min(max(p.fair_size, div_up(work, kMaximumWork)), div_up(work, kMinimumWork));
    row.size = max(1, min(row.size, static_cast<int>(gridDim.x)));
    const int share = div_up(div_up(row.total, row.size), 16) * 16;
    row.begin = min(row.rank * share, row.total);
    row.end = min(row.begin + share, row.total);
    return row;
  }

  __device__ __forceinline__ bool competes(int page) const { return page >= first && page < last; }
};

// The range over the cluster of what its threads found. A call, not inlined: it is needed in three places.
__device__ __noinline__ float2 share_range(int rank, int size, Shared& shared, float2 range) {
  range = warp_range(range);
  if (lane_id() == 0) shared.warp_range[warp_id()] = range;
  __syncthreads();
  if (warp_id() == 0) {
    range = warp_range(lane_id() < kWarps ? shared.warp_range[lane_id()] : make_float2(INFINITY, -INFINITY));
    if (lane_id() < size) put(&shared.range_inbox[rank], lane_id(), range);
  }
  cluster_sync();
  return warp_range(lane_id() < size ? shared.range_inbox[lane_id()] : make_float2(INFINITY, -INFINITY));
}

// Notes the CTA's clock for whoever measures the stages.
__device__ __forceinline__ void mark(const DecodeParams& p, int which) {
  if (p.timeline != nullptr && threadIdx.x == 0) {
    const int64_t cta = (static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    p.timeline[cta * kMarks + which] = clock64();
  }
}

}  // namespace quest
