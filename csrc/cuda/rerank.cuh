// The second stage of rows with the policy "two_stage": the mass that the keys of some pages hold takes the place of what
// their summaries promise; see rerank_pages in quest_vllm/ops/reference.py. Bytes: 2 D a listed token and KV head.
#pragma once
#include "join.cuh"
#include "tiles.cuh"

namespace quest {

template <typename T, int D, int kHeadTiles>
class PageReranker {
 public:
  // Of the CTA's pages list[0] .. list[entries - 1].
  __device__ __forceinline__ PageReranker(const DecodeParams& p, const Row& row, void* window, const int32_t* list, int entries)
      : p_(p), row_(row), tiles_(p, row, window, list, entries), list_(list) {}

  // buffer[i]: the score of the CTA's i-th page, as HeadJoiner has left it, and the heads' sums.
  __device__ __forceinline__ void run(const QueryFragment<D, kHeadTiles>& query, const Shared& shared, float* buffer) {
    const int mine = tiles_.count();
    Tile now = tiles_.next(0);
    tiles_.fill_keys(0, now, 0 < mine);
    Tile after = tiles_.next(1);
    tiles_.fill_keys(1, after, 1 < mine);
    Mass page[kHeadTiles];
#pragma unroll
    for (int tile = 0; tile < kHeadTiles; ++tile) page[tile] = Mass::none();
#pragma unroll 1
    for (int k = 0; k < mine; ++k) {
      const int tokens = now.tokens;
      float logits[2][4] = {};
      Staging<D>::wait_all_but_one();
      tiles_.multiply_keys(k & 1, query, logits);
      now = after;
      after = tiles_.next(k + 2);
      tiles_.fill_keys(k & 1, after, k + 2 < mine);
#pragma unroll
      for (int tile = 0; tile < kHeadTiles; ++tile) add(logits, tile, tokens, page[tile]);
      if (!tiles_.ends_page(k)) continue;
      const float score = joined(shared, page);
      if (lane_id() == 0) buffer[row_.per_cta(list_[tiles_.entry(k)])] = score;
    }
  }

 private:
  // Adds a tile's tokens to a page's mass, of which each of four lanes keeps its part.
  __device__ __forceinline__ void add(const float (&logits)[2][4], int tile, int tokens, Mass& page) const {
    float x[2][2];
    tiles_.scaled(logits, tile, tokens, x);
    const float top = fmaxf(fmaxf(x[0][0], x[0][1]), fmaxf(x[1][0], x[1][1]));
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i) sum += Mass::weight(x[i / 2][i % 2], top);
    page.join(top, sum, top);
  }

  // What a page weighs, its heads' normalised masses together; begins the next page.
  __device__ __forceinline__ float joined(const Shared& shared, Mass (&page)[kHeadTiles]) const {
    Mass all = Mass::none();
#pragma unroll
    for (int tile = 0; tile < kHeadTiles; ++tile) {
      page[tile].template join_lanes<4>();
      const int head = tile * 8 + lane_id() / 4;
      const float share = page[tile].top + log2_fast(page[tile].sum) - (head < p_.rows ? shared.log_sum[head] : 0.f);
      if (head < p_.rows) all.join(share, 1.f, share);
      page[tile] = Mass::none();
    }
#pragma unroll
    for (int step = 4; step < 32; step *= 2) {
      all.join(__shfl_xor_sync(0xFFFFFFFFu, all.top, step), __shfl_xor_sync(0xFFFFFFFFu, all.sum, step), 0.f);
    }
    return all.top + log2_fast(all.sum);
  }

  const DecodeParams& p_;
  const Row& row_;
  TileReader<T, D, true> tiles_;
  const int32_t* list_;
};

}  // namespace quest
