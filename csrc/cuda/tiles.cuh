// The keys and values of a list of pages, which a CTA's warps read 16 tokens at a time.
//
// S = q K^T reads K as operand B with D permuted as in QueryFragment.
#pragma once
#include "shared.cuh"
#include "staging.cuh"

namespace quest {

struct Tile {
  int block, row, tokens;  // physical block, first row in it, tokens that exist
};

// kWholePages: a warp reads all tiles of a page, one after the other; else warps take turns at the tiles.
template <typename T, int D, bool kWholePages>
class TileReader {
 public:
  // Of pages list[0] .. list[entries - 1], or of all of the CTA's pages where `list` is null.
  __device__ __forceinline__ TileReader(const DecodeParams& p, const Row& row, void* window, const int32_t* list, int entries)
      : staging(window), p_(p), row_(row), list_(list), tiles_(entries << page_tiles()) {}

  // How many tiles this warp reads.
  __device__ __forceinline__ int count() const {
    const int units = kWholePages ? tiles_ >> page_tiles() : tiles_;
    const int mine = units > warp_id() ? div_up(units - warp_id(), kWarps) : 0;
    return kWholePages ? mine << page_tiles() : mine;
  }
  // The warp's k-th tile: to be asked for in order, from the first.
  __device__ __forceinline__ Tile next(int k) {
    if (k % 32 == 0) ahead_ = look_up(k);
    return Tile{__shfl_sync(0xFFFFFFFFu, ahead_.block, k % 32), __shfl_sync(0xFFFFFFFFu, ahead_.row, k % 32),
                __shfl_sync(0xFFFFFFFFu, ahead_.tokens, k % 32)};
  }
  // Which entry of the list the warp's k-th tile belongs to, and whether it is the page's last.
  __device__ __forceinline__ int entry(int k) const { return place(k) >> page_tiles(); }
  __device__ __forceinline__ bool ends_page(int k) const { return ((k + 1) & ((1 << page_tiles()) - 1)) == 0; }

  // Start to fill a half of the warp's window; an empty group keeps the count.
  __device__ __forceinline__ void fill_keys(int half, const Tile& tile, bool more) const {
    const T* rows = static_cast<const T*>(p_.keys) + wide(tile.block, p_.key_block_stride) +
                    wide(row_.kv_head, p_.key_head_stride) + wide(tile.row, p_.key_row_stride);
    if (more) staging.template fill<KeyLayout>(half, rows, p_.key_row_stride, tile.tokens);
    Staging<D>::commit();
  }
  __device__ __forceinline__ void fill_values(int half, const Tile& tile, bool more) const {
    const T* rows = static_cast<const T*>(p_.values) + wide(tile.block, p_.value_block_stride) +
                    wide(row_.kv_head, p_.value_head_stride) + wide(tile.row, p_.value_row_stride);
    if (more) staging.template fill<ValueLayout>(half, rows, p_.value_row_stride, tile.tokens);
    Staging<D>::commit();
  }

  // logits[token group][head n: tokens 2t, 2t + 1; head n + 8: the same] += q K^T of the keys in a half.
  template <int kHeadTiles>
  __device__ __forceinline__ void multiply_keys(int half, const QueryFragment<D, kHeadTiles>& query, float (&logits)[2][4]) const {
#pragma unroll
    for (int j = 0; j < D / 32; ++j) {
      const uint4 q = query.part[0][j];
      const uint4 q8 = kHeadTiles > 1 ? query.part[kHeadTiles - 1][j] : make_uint4(0, 0, 0, 0);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint4 key = staging.read_key(half, i, j);
        Half<T>::mma(logits[i], q.x, q8.x, q.y, q8.y, key.x, key.y);
        Half<T>::mma(logits[i], q.z, q8.z, q.w, q8.w, key.z, key.w);
      }
    }
    __syncwarp();  // everybody has read the half
  }

  // One head tile's logits as powers of two; -inf for tokens that do not exist.
  __device__ __forceinline__ void scaled(const float (&logits)[2][4], int head_tile, int tokens, float (&x)[2][2]) const {
    const int t = lane_id() % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int c = 0; c < 2; ++c) x[i][c] = logits[i][2 * head_tile + c] * (p_.scale * kLog2e);
    }
    if (p_.softcap > 0.f) cap(x);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int c = 0; c < 2; ++c) x[i][c] = 8 * i + 2 * t + c < tokens ? x[i][c] : -INFINITY;
    }
  }

  Staging<D> staging;

 private:
  __device__ __forceinline__ int page_tiles() const { return p_.page_shift - kTileShift; }  // log2 of a page's

  __device__ __forceinline__ int place(int k) const {
    if (!kWholePages) return k * kWarps + warp_id();
    const int part = k & ((1 << page_tiles()) - 1);
    return ((k >> page_tiles()) * kWarps + warp_id()) << page_tiles() | part;
  }

  // Each lane looks up one of the warp's next 32 tiles, so that the look-ups' latency is paid once.
  __device__ __forceinline__ Tile look_up(int k) const {
    const int tile = place(k + lane_id());
    if (tile >= tiles_) return Tile{0, 0, 0};
    const int entry = tile >> page_tiles();
    const int page = list_ == nullptr ? row_.page(entry) : list_[entry];
    const int offset = (tile << kTileShift) & ((1 << p_.page_shift) - 1);
    const int block = p_.block_table[row_.req * p_.table_req_stride + (page >> p_.block_shift)];
    return Tile{block, ((page & ((1 << p_.block_shift) - 1)) << p_.page_shift) + offset,
                max(0, min(kTileTokens, row_.seq_len - (page << p_.page_shift) - offset))};
  }

  // One instruction: no stride of a cache is beyond 32 bits.
  __device__ __forceinline__ static uint64_t wide(int count, int64_t stride) {
    return static_cast<uint64_t>(static_cast<uint32_t>(count)) * static_cast<uint32_t>(stride);
  }

  // softcap * tanh(logit / softcap), in powers of two: tanh(x) = 1 - 2 / (exp(2x) + 1), finite for every x.
  __device__ __forceinline__ void cap(float (&logits)[2][2]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& logit = logits[i / 2][i % 2];
      logit = p_.softcap * kLog2e * (1.f - __fdividef(2.f, exp2_fast(__fdividef(2.f * logit, p_.softcap)) + 1.f));
    }
  }

  const DecodeParams& p_;
  const Row& row_;
  const int32_t* list_;
  int tiles_;
  Tile ahead_;
};

}  // namespace quest
