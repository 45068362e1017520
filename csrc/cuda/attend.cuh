// Attention over a row's chosen pages, split over the CTAs of its cluster and their warps, merged on chip.
//
// A warp takes 16 tokens at a time: while it works on K, the V of the same tokens arrives, and the other way round.
// O^T = V^T P^T reads V as operand A, whose rows (D) may come in any order and whose token pairs are put together by byte
// permutes. The accumulator of S (tiles.cuh) is operand B of the second product as it stands. Bytes: 4 D a token and KV head.
#pragma once
#include "tiles.cuh"

namespace quest {

// A row of a warp's partial output, padded so that its writers meet no bank twice.
template <int D>
constexpr int kPartialStride = D + 2;

template <int D>
__host__ __device__ constexpr int partial_floats(int rows) {
  return kWarps * rows * kPartialStride<D>;
}

template <typename T, int D, int kHeadTiles>
class PageAttention {
 public:
  // Serves pages list[0] .. list[entries - 1], or all of the CTA's pages where `list` is null.
  __device__ __forceinline__ PageAttention(const DecodeParams& p, const Row& row, void* window, const int32_t* list, int entries)
      : p_(p), row_(row), tiles_(p, row, window, list, entries) {
#pragma unroll
    for (int tile = 0; tile < kHeadTiles; ++tile) {
      top_[tile] = -INFINITY;
      mass_[tile] = 0.f;
#pragma unroll
      for (int m = 0; m < D / 16; ++m) {
#pragma unroll
        for (int c = 0; c < 4; ++c) acc_[tile][m][c] = 0.f;
      }
    }
  }

  // Attends, and leaves the row's output in p.out. In shared memory: `partial`, partial_floats<D>(rows), which may be the
  // window itself; `inbox`, rows * D floats that nothing else uses.
  __device__ __forceinline__ void run(const QueryFragment<D, kHeadTiles>& query, Shared& shared, float* partial, float* inbox) {
    const int mine = tiles_.count();
    Tile next = tiles_.next(0);
    tiles_.fill_keys(0, next, 0 < mine);
    tiles_.fill_values(1, next, 0 < mine);
#pragma unroll 1
    for (int k = 0; k < mine; ++k) {
      const int tokens = next.tokens;
      next = tiles_.next(k + 1);
      float logits[2][4] = {};
      Staging<D>::wait_all_but_one();
      tiles_.multiply_keys(0, query, logits);
      tiles_.fill_keys(0, next, k + 1 < mine);
      uint32_t weights[kHeadTiles][2];
#pragma unroll
      for (int head_tile = 0; head_tile < kHeadTiles; ++head_tile) soften(logits, head_tile, tokens, weights[head_tile]);
      Staging<D>::wait_all_but_one();
      multiply_values(weights);
      tiles_.fill_values(1, next, k + 1 < mine);
    }
    __syncthreads();  // the window is free for the merge
    mark(p_, 4);
    leave_partial(shared, partial);
    send(shared, partial, reinterpret_cast<float2*>(inbox));
    cluster_sync();
    receive(shared, reinterpret_cast<const float2*>(inbox));
  }

 private:
  // Online softmax, in powers of two: turns logits into weights and rescales what was gathered so far.
  __device__ __forceinline__ void soften(const float (&logits)[2][4], int head_tile, int tokens, uint32_t (&weights)[2]) {
    float x[2][2];
    tiles_.scaled(logits, head_tile, tokens, x);
    float top = top_[head_tile];
#pragma unroll
    for (int i = 0; i < 4; ++i) top = fmaxf(top, x[i / 2][i % 2]);
    top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, 1));
    top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, 2));
    const float shift = top == -INFINITY ? 0.f : top;
    const float decay = exp2_fast(top_[head_tile] - shift);
    top_[head_tile] = top;
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float w0 = exp2_fast(x[i][0] - shift), w1 = exp2_fast(x[i][1] - shift);
      sum += w0 + w1;
      weights[i] = Half<T>::pack(w0, w1);
    }
    mass_[head_tile] = mass_[head_tile] * decay + sum;
    if (__any_sync(0xFFFFFFFFu, decay != 1.f)) rescale(head_tile, decay);
  }

  // The accumulator's columns are heads 2t and 2t + 1, whose statistics lie in lanes 8t and 8t + 4.
  __device__ __forceinline__ void rescale(int head_tile, float decay) {
    const int t = lane_id() % 4;
    const float even = __shfl_sync(0xFFFFFFFFu, decay, 8 * t), odd = __shfl_sync(0xFFFFFFFFu, decay, 8 * t + 4);
#pragma unroll
    for (int m = 0; m < D / 16; ++m) {
      acc_[head_tile][m][0] *= even;
      acc_[head_tile][m][1] *= odd;
      acc_[head_tile][m][2] *= even;
      acc_[head_tile][m][3] *= odd;
    }
  }

  __device__ __forceinline__ void multiply_values(const uint32_t (&weights)[kHeadTiles][2]) {
#pragma unroll
    for (int j = 0; j < D / 64; ++j) {
      uint4 value[4];  // tokens 2t, 2t + 1, 2t + 8, 2t + 9; dims 64j + 8n .. + 7
#pragma unroll
      for (int i = 0; i < 4; ++i) value[i] = tiles_.staging.read_value(1, i, j);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const uint32_t v0 = word(value[0], k), v1 = word(value[1], k), v2 = word(value[2], k), v3 = word(value[3], k);
        const uint32_t a0 = __byte_perm(v0, v1, 0x5410), a1 = __byte_perm(v0, v1, 0x7632);
        const uint32_t a2 = __byte_perm(v2, v3, 0x5410), a3 = __byte_perm(v2, v3, 0x7632);
#pragma unroll
        for (int tile = 0; tile < kHeadTiles; ++tile) {
          Half<T>::mma(acc_[tile][4 * j + k], a0, a1, a2, a3, weights[tile][0], weights[tile][1]);
        }
      }
    }
    __syncwarp();  // everybody has read the half
  }

  __device__ __forceinline__ static uint32_t word(const uint4& v, int i) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
  }

  __device__ __forceinline__ void leave_partial(Shared& shared, float* partial) {
    const int n = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
    for (int tile = 0; tile < kHeadTiles; ++tile) {
      float mass = mass_[tile];
      mass += __shfl_xor_sync(0xFFFFFFFFu, mass, 1);
      mass += __shfl_xor_sync(0xFFFFFFFFu, mass, 2);
      if (t == 0) shared.warp_softmax[warp_id()][tile * 8 + n] = make_float2(top_[tile], mass);
#pragma unroll
      for (int m = 0; m < D / 16; ++m) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int head = tile * 8 + 2 * t + c;
          const int dim = 64 * (m / 4) + 8 * n + 2 * (m % 4);
          if (head < p_.rows) {
            float2* place = reinterpret_cast<float2*>(partial + (warp_id() * p_.rows + head) * kPartialStride<D> + dim);
            *place = make_float2(acc_[tile][m][c], acc_[tile][m][c + 2]);
          }
        }
      }
    }
    __syncthreads();
  }

  __device__ __forceinline__ static float share_of(float part_top, float top) {
    return part_top == -INFINITY ? 0.f : exp2_fast(part_top - top);
  }

  // Joins the warps' results, and sends each of them to the CTA that finishes it: pairs of dims take turns.
  __device__ __forceinline__ void send(Shared& shared, const float* partial, float2* inbox) {
    const int pairs = p_.rows * D / 2, share = row_.per_cta(pairs + row_.size - 1);
#pragma unroll 1
    for (int i = threadIdx.x; i < pairs; i += kThreads) {
      const int head = i / (D / 2), pair = i % (D / 2);
      float2 stats[kWarps];
      float top = -INFINITY;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        stats[w] = shared.warp_softmax[w][head];
        top = fmaxf(top, stats[w].x);
      }
      float mass = 0.f;
      float2 sum = make_float2(0.f, 0.f);
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float2 part = *reinterpret_cast<const float2*>(partial + (w * p_.rows + head) * kPartialStride<D> + 2 * pair);
        const float weight = share_of(stats[w].x, top);
        mass += weight * stats[w].y;
        sum = make_float2(sum.x + weight * part.x, sum.y + weight * part.y);
      }
      const int turn = row_.per_cta(i), owner = i - turn * row_.size;
      put(&inbox[row_.rank * share + turn], row_.peer(owner), sum);
      if (pair < row_.size) put(&shared.softmax_inbox[row_.rank][head], row_.peer(pair), make_float2(top, mass));
    }
  }

  __device__ __forceinline__ void receive(Shared& shared, const float2* inbox) {
    const int pairs = p_.rows * D / 2, share = row_.per_cta(pairs + row_.size - 1);
    T* out = static_cast<T*>(p_.out) + row_.req * p_.out_req_stride + row_.head * p_.rows * p_.out_head_stride;
#pragma unroll 1
    for (int k = threadIdx.x; k < share; k += kThreads) {
      const int i = k * row_.size + row_.rank, head = i / (D / 2), pair = i % (D / 2);
      if (i >= pairs) break;
      float top = -INFINITY, mass = 0.f;
      float2 sum = make_float2(0.f, 0.f);
#pragma unroll 8
      for (int c = 0; c < row_.size; ++c) top = fmaxf(top, shared.softmax_inbox[c][head].x);
#pragma unroll 8
      for (int c = 0; c < row_.size; ++c) {
        const float2 part = inbox[c * share + k], stats = shared.softmax_inbox[c][head];
        const float weight = share_of(stats.x, top);
        mass += weight * stats.y;
        sum = make_float2(sum.x + weight * part.x, sum.y + weight * part.y);
      }
      const float norm = mass == 0.f ? 0.f : 1.f / mass;
      *reinterpret_cast<uint32_t*>(out + head * p_.out_head_stride + 2 * pair) =
          Half<T>::pack(mass == 0.f ? 0.f : sum.x * norm, mass == 0.f ? 0.f : sum.y * norm);
    }
  }

  const DecodeParams& p_;
  const Row& row_;
  TileReader<T, D, false> tiles_;
  float acc_[kHeadTiles][D / 16][4];  // [D tile][(d, head 2t), (d, head 2t + 1), (d + 1, 2t), (d + 1, 2t + 1)]
  float top_[kHeadTiles], mass_[kHeadTiles];
};

}  // namespace quest
