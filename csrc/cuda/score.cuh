// Page scores: q.mid + radius * |q|.rad for every page of the CTA's share (Quest, algorithm 1, at radius 1).
//
// The bound is relu(q).k_max + min(q, 0).k_min and its mirror min(q, 0).k_max + relu(q).k_min bounds q.k from below;
// the tensor cores give both for the price of one, as rows 0-7 and 8-15 of operand A, exactly from 16-bit inputs. A
// smaller radius is a mix of the two. Bytes: 4 D a page and KV head.
#pragma once
#include "shared.cuh"
#include "staging.cuh"

namespace quest {

// (max, sum of exp) of two disjoint sets joined.
__device__ __forceinline__ float2 join_mass(float2 a, float2 b) {
  const float top = fmaxf(a.x, b.x);
  if (top == -INFINITY) return make_float2(-INFINITY, 0.f);
  return make_float2(top, a.y * __expf(a.x - top) + b.y * __expf(b.x - top));
}

template <typename T, int D, int kHeadTiles>
class PageScorer {
 public:
  // buffer[plane * plane_stride + page - row.begin] receives the scores; for kMass a plane a query head.
  __device__ __forceinline__ PageScorer(const DecodeParams& p, const Row& row, void* window, float* buffer,
                                        int64_t plane_stride)
      : p_(p), row_(row), staging_(window), buffer_(buffer), plane_stride_(plane_stride) {}

  // Scores pages [row.begin, row.end): a warp takes eight at a time. For kMass also shares the CTA's mass.
  __device__ __forceinline__ void run(const QueryFragment<D, kHeadTiles>& query, Shared& shared) {
#pragma unroll
    for (int tile = 0; tile < kHeadTiles; ++tile) mass_[tile] = make_float2(-INFINITY, 0.f);
    const int groups = div_up(row_.end - row_.begin, 8);
    const int mine = groups > warp_id() ? div_up(groups - warp_id(), kWarps) : 0;  // groups of this warp
    int64_t ahead = look_up(0);
    for (int k = 0; k < 2; ++k) fill(k, mine, ahead);
    for (int k = 0; k < mine; ++k) {
      Staging<D>::wait_all_but_one();
      score(query, k);
      if ((k + 2) % kLookUp == 0) ahead = look_up(k + 2);
      fill(k + 2, mine, ahead);
    }
    if (p_.reduction == kMass) share_mass(shared);
  }

 private:
  static constexpr int kLookUp = 4;  // groups whose blocks the warp looks up at once, one page a lane

  __device__ __forceinline__ int page_of(int group) const { return row_.begin + (group * kWarps + warp_id()) * 8; }

  // Where the summary of this lane's page begins.
  __device__ __forceinline__ int64_t look_up(int group) const {
    const int page = page_of(group + lane_id() / 8) + lane_id() % 8;
    if (page >= row_.end) return 0;
    const int64_t block = p_.block_table[row_.req * p_.table_req_stride + page / p_.pages_per_block];
    return block * p_.summary_block_stride + page % p_.pages_per_block * p_.summary_page_stride;
  }

  // k_min of the group's pages goes to rows 0-7, k_max to rows 8-15.
  __device__ __forceinline__ void fill(int group, int groups, int64_t ahead) {
    if (group < groups) {
      const T* base = static_cast<const T*>(p_.summaries) + row_.kv_head * p_.summary_head_stride;
#pragma unroll
      for (int i = 0; i < Staging<D>::kCopies; ++i) {
        const int index = i * 32 + lane_id(), chunk = index % Staging<D>::kChunks;
        const int in_group = index / Staging<D>::kChunks / 2, bound = index / Staging<D>::kChunks % 2;
        const int64_t offset = __shfl_sync(0xFFFFFFFFu, ahead, group % kLookUp * 8 + in_group);
        Staging<D>::copy(staging_.template place<KeyLayout>(group % 2, bound * 8 + in_group, chunk),
                         base + offset + bound * p_.summary_bound_stride + chunk * 8,
                         page_of(group) + in_group < row_.end);
      }
    }
    Staging<D>::commit();  // an empty group keeps the count
  }

  __device__ __forceinline__ void score(const QueryFragment<D, kHeadTiles>& query, int group) {
    const int n = lane_id() / 4, t = lane_id() % 4;
    float sums[kHeadTiles][4] = {};
#pragma unroll
    for (int j = 0; j < D / 32; ++j) {
      const uint4 low = Staging<D>::read(staging_.template place<KeyLayout>(group % 2, n, 4 * j + t));
      const uint4 high = Staging<D>::read(staging_.template place<KeyLayout>(group % 2, 8 + n, 4 * j + t));
#pragma unroll
      for (int tile = 0; tile < kHeadTiles; ++tile) bound(sums[tile], query.part[tile][j], low, high);
    }
    __syncwarp();  // everybody has read the half
    store(sums, page_of(group) + 2 * t);
  }

  // Rows 0-7 gather the upper bound, rows 8-15 the lower one.
  __device__ __forceinline__ static void bound(float (&sum)[4], uint4 q, uint4 low, uint4 high) {
    const uint32_t pos[4] = {positive_part(q.x), positive_part(q.y), positive_part(q.z), positive_part(q.w)};
    const uint32_t neg[4] = {negative_part(q.x), negative_part(q.y), negative_part(q.z), negative_part(q.w)};
    Half<T>::mma(sum, pos[0], neg[0], pos[1], neg[1], high.x, high.y);
    Half<T>::mma(sum, neg[0], pos[0], neg[1], pos[1], low.x, low.y);
    Half<T>::mma(sum, pos[2], neg[2], pos[3], neg[3], high.z, high.w);
    Half<T>::mma(sum, neg[2], pos[2], neg[3], pos[3], low.z, low.w);
  }

  __device__ __forceinline__ float mix(float upper, float lower) const {
    if (p_.bound_radius == 1.f) return upper;  // not upper + 0 * lower, which turns infinity into NaN
    return 0.5f * (1.f + p_.bound_radius) * upper + 0.5f * (1.f - p_.bound_radius) * lower;
  }

  // sums: bounds of head n (of each tile) for pages `page` and `page + 1`.
  __device__ __forceinline__ void store(const float (&sums)[kHeadTiles][4], int page) {
    const int n = lane_id() / 4;
    float score[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const bool valid = page + c < row_.end;
      score[c] = p_.reduction == kMean ? 0.f : -INFINITY;
#pragma unroll
      for (int tile = 0; tile < kHeadTiles; ++tile) {
        const bool used = tile * 8 + n < p_.rows;
        const float value = mix(sums[tile][c], sums[tile][c + 2]);
        if (p_.reduction == kMass) {
          if (used && valid) {
            buffer_[(tile * 8 + n) * plane_stride_ + page + c - row_.begin] = p_.scale * value;
            mass_[tile] = join_mass(mass_[tile], make_float2(p_.scale * value, 1.f));
          }
        } else if (used) {
          score[c] = p_.reduction == kMean ? score[c] + value : nan_max(score[c], value);
        }
      }
    }
    if (p_.reduction == kMass) return;
#pragma unroll
    for (int step = 4; step < 32; step *= 2) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float other = __shfl_xor_sync(0xFFFFFFFFu, score[c], step);
        score[c] = p_.reduction == kMean ? score[c] + other : nan_max(score[c], other);
      }
    }
    if (n == 0) {
      const float weight = p_.reduction == kMean ? 1.f / p_.rows : 1.f;
      for (int c = 0; c < 2; ++c) {
        if (page + c < row_.end) buffer_[page + c - row_.begin] = score[c] * weight;
      }
    }
  }

  __device__ __forceinline__ static float nan_max(float a, float b) { return a != a ? a : b != b ? b : fmaxf(a, b); }

  // Joins the lanes' and warps' masses, and sends the CTA's to every CTA of the cluster.
  __device__ __forceinline__ void share_mass(Shared& shared) {
#pragma unroll
    for (int tile = 0; tile < kHeadTiles; ++tile) {
#pragma unroll
      for (int step = 1; step < 4; step *= 2) {
        const float2 other = make_float2(__shfl_xor_sync(0xFFFFFFFFu, mass_[tile].x, step),
                                         __shfl_xor_sync(0xFFFFFFFFu, mass_[tile].y, step));
        mass_[tile] = join_mass(mass_[tile], other);
      }
      if (lane_id() % 4 == 0) shared.warp_mass[warp_id()][tile * 8 + lane_id() / 4] = mass_[tile];
    }
    __syncthreads();
    const int head = threadIdx.x % kMaxRows, peer = threadIdx.x / kMaxRows;
    if (head < p_.rows && peer < row_.size) {
      float2 mass = make_float2(-INFINITY, 0.f);
      for (int w = 0; w < kWarps; ++w) mass = join_mass(mass, shared.warp_mass[w][head]);
      *cg::this_cluster().map_shared_rank(&shared.mass_inbox[row_.rank][head], peer) = mass;
    }
  }

  const DecodeParams& p_;
  const Row& row_;
  Staging<D> staging_;
  float* buffer_;
  int64_t plane_stride_;
  float2 mass_[kHeadTiles];
};

// After the masses were exchanged: score = log(sum over heads of exp(s - lse)), the page's normalised mass.
__device__ __forceinline__ void normalise_mass(const DecodeParams& p, const Row& row, Shared& shared, float* buffer,
                                               int64_t plane_stride) {
  if (threadIdx.x < p.rows) {
    float2 mass = make_float2(-INFINITY, 0.f);
    for (int c = 0; c < row.size; ++c) mass = join_mass(mass, shared.mass_inbox[c][threadIdx.x]);
    shared.softmax[threadIdx.x].x = mass.x + __logf(mass.y);
  }
  __syncthreads();
  for (int page = threadIdx.x; page < row.end - row.begin; page += kThreads) {
    float2 sum = make_float2(-INFINITY, 0.f);
    for (int head = 0; head < p.rows; ++head) {
      sum = join_mass(sum, make_float2(buffer[head * plane_stride + page] - shared.softmax[head].x, 1.f));
    }
    buffer[page] = sum.x + __logf(sum.y);
  }
  __syncthreads();
}

}  // namespace quest
