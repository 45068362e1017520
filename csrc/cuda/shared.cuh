// A CTA's shared memory and its view of the row that its cluster serves.
#pragma once
#include "common.cuh"

namespace quest {

// Score groups and attention tiles that are worth a CTA. A CTA then scores at most 144 pages, or its share of the
// longest context over the whole cluster: cuda.py sizes the buffer so.
constexpr int kMinimumWork = 2 * kWarps;

struct Shared {
  int histogram[kBins];
  unsigned long long candidates[kCandidates];
  float2 range_inbox[kMaxCluster];            // each CTA's least and greatest score
  float2 mass_inbox[kMaxCluster][kMaxRows];   // each CTA's (max, sum of exp) of a head's bounds
  int count_inbox[kMaxCluster];               // pages that each CTA chose
  float2 warp_range[kWarps];
  float2 warp_mass[kWarps][kMaxRows];
  float2 warp_softmax[kWarps][kMaxRows];      // (max, sum) of a warp's partial result
  float2 softmax[kMaxRows];                   // (max, sum) of the CTA's
  int scan[kWarps];
  int threshold_bin, above, in_bin, in_bin_before;
  int num_candidates;
  unsigned long long threshold;
};

// One row: a request and a selection head. All CTAs of a cluster see the same one.
struct Row {
  int req, head, kv_head;
  int seq_len, total;      // tokens; pages
  int take;                // pages to attend to
  int first, last, ranked; // pages [first, last) compete for `ranked` places; the others are forced
  int rank, size;          // this CTA in its cluster, and how many of its CTAs have work
  int begin, end;          // pages that this CTA scores
  bool dense;              // the budget covers the context

  __device__ __forceinline__ static Row make(const DecodeParams& p) {
    Row row;
    row.rank = static_cast<int>(blockIdx.x);
    row.head = static_cast<int>(blockIdx.y);
    row.req = static_cast<int>(blockIdx.z);
    row.kv_head = row.head * p.rows / p.heads_per_kv;
    row.seq_len = max(p.seq_lens[row.req], 0);
    row.total = min(div_up(row.seq_len, p.page_size), p.max_pages);
    const int budget = p.page_budgets[row.req];
    row.take = max(min(budget, row.total), 0);
    // not `take == total`: ptxas 13.0.88 compiles that to a wrong answer after the clamp above
    row.dense = budget >= row.total && p.stages == (kScore | kSelect | kAttend);
    if (p.stages & kSelect) row.take = min(row.take, p.selected_width);
    const int recent = min(p.recent_pages, row.take);
    const int sink = min(min(p.sink_pages, max(row.total - p.recent_pages, 0)), row.take - recent);
    row.first = sink;
    row.last = row.total - recent;
    row.ranked = row.take - recent - sink;
    // a short row needs few CTAs: the others leave at once
    const int scored = row.dense ? 0 : row.total / 8;
    const int work = scored + row.take * (p.page_size / kTileTokens);
    row.size = max(1, min(static_cast<int>(gridDim.x), div_up(work, kMinimumWork)));
    const int share = div_up(div_up(row.total, row.size), 16) * 16;
    row.begin = min(row.rank * share, row.total);
    row.end = min(row.begin + share, row.total);
    return row;
  }
};

}  // namespace quest
