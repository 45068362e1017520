// Page scores for every page of the CTA's share. What a page may weigh for one query head is an Estimate's to say: by the
// box of its keys (boxes.cuh) or their codes (codes.cuh). Here the summaries arrive, and the heads are put together.
#pragma once
#include "boxes.cuh"
#include "codes.cuh"
#include "join.cuh"

namespace quest {

// What a lane gathers of its bounds while it makes them. They are summed over the first of them, which nearly always is near
// enough to the greatest.
struct Gathered {
  float top = -INFINITY, sum = 0.f, least = INFINITY, from = 0.f;

  // Two of them, or the first alone.
  __device__ __forceinline__ void add(float first, float second, bool both) {
    from = top == -INFINITY ? first : from;
    const float other = both ? second : first;
    top = fmaxf(top, fmaxf(first, other));
    least = fminf(least, fminf(first, other));
    const float more = exp2_fast(second - from);
    sum += exp2_fast(first - from) + (both ? more : 0.f);
  }
  __device__ __forceinline__ bool sound() const { return sum < 0x1p100f; }
  __device__ __forceinline__ Mass mass() const { return top == -INFINITY ? Mass::none() : Mass{top, sum * exp2_fast(from - top), least}; }
  // One that is no number is its own page's matter.
  __device__ __forceinline__ float weight(float value) const { return value == value ? Mass::weight(value, top) : 0.f; }
};

template <typename T, int D, int kHeadTiles, typename Estimate>
class PageScorer {
 public:
  // buffer[plane * plane_stride + i] receives the score of the CTA's i-th page; for kMass a plane a query head.
  __device__ __forceinline__ PageScorer(const DecodeParams& p, const Row& row, void* window, float* buffer, int plane_stride)
      : p_(p), row_(row), staging_(window), buffer_(buffer), plane_stride_(plane_stride) {}

  // Scores the CTA's pages, a warp eight at a time, and meets the cluster. Returns a range that holds most of the row's
  // scores: what the warps saw in their first round.
  __device__ __forceinline__ float2 run(const QueryFragment<D, kHeadTiles>& query, Shared& shared, int early_block) {
    const int mine = row_.groups(), rounds = max(mine, 1);
    const bool guessed = row_.size == static_cast<int>(gridDim.x);
    uint32_t ahead = guessed ? place_of(row_.page(index_of(0)), early_block) : look_up(0), beyond = look_up(kLookUp);
    ahead = settle(0, ahead);
    fill(0, mine, ahead);
    fill(1, mine, ahead);
    const Estimate estimate(p_, row_, query, shared.query);  // meanwhile
#pragma unroll 1
    for (int k = 0; k < rounds; ++k) {
      if (k < mine) {
        Staging<D>::wait_all_but_one();
        score(estimate, k);
      }
      if (k == 0 && p_.reduction != kMass) offer_range(row_, shared, range_);
      if ((k + 2) % kLookUp == 0) {  // a look-up is asked for one round before its use
        ahead = settle(k + 2, beyond);
        beyond = look_up(k + 2 + kLookUp);
      }
      fill(k + 2, mine, ahead);
    }
    if (p_.reduction != kMass) {
      __syncwarp();  // other lanes of the warp go on to read what this one has stored
      return take_range(row_, shared);
    }
    Mass mass[kHeadTiles];
#pragma unroll
    for (int tile = 0; tile < kHeadTiles; ++tile) {
      const int head = tile * 8 + lane_id() / 4;
      mass[tile] = gathered_[tile].sound() ? gathered_[tile].mass() : sum_again(gathered_[tile], head);
    }
    return HeadJoiner(p_, row_, shared, buffer_, plane_stride_).join(mass);
  }

  // This lane's block of the first look-up, if the row turns out to be as guessed; it may be past the row's end.
  __device__ __forceinline__ static int guess_block(const DecodeParams& p, const Row& guess) {
    const int page = guess.page(index_of(0));
    return page < p.max_pages ? p.block_table[guess.req * p.table_req_stride + (page >> p.block_shift)] : 0;
  }

 private:
  static constexpr int kLookUp = 4;  // groups whose blocks the warp looks up at once, one page a lane

  // The page of this lane among the kLookUp groups from `group` on.
  __device__ __forceinline__ static int index_of(int group) { return Row::first_of(group + lane_id() / 8) + lane_id() % 8; }

  // Where the summary of this lane's page begins, in chunks of 16 bytes.
  __device__ __forceinline__ uint32_t look_up(int group) const {
    const int i = index_of(group);
    if (i >= row_.count) return 0;
    const int page = row_.page(i);
    return place_of(page, p_.block_table[row_.req * p_.table_req_stride + (page >> p_.block_shift)]);
  }
  // What was looked up for `group`: in a group that is not full, its first page stands for those that it lacks.
  __device__ __forceinline__ uint32_t settle(int group, uint32_t chunk) const {
    return __shfl_sync(0xFFFFFFFFu, chunk, index_of(group) < row_.count ? lane_id() : lane_id() / 8 * 8);
  }

  __device__ __forceinline__ uint32_t place_of(int page, int block) const {
    const int64_t in_block = row_.kv_head * p_.summary_head_stride + (page & ((1 << p_.block_shift) - 1)) * p_.summary_page_stride;
    return static_cast<uint32_t>((block * p_.summary_block_stride + in_block) >> 3);
  }

  __device__ __forceinline__ void fill(uint32_t group, int groups, uint32_t ahead) {
    if (static_cast<int>(group) < groups) {
#pragma unroll
      for (int first = 0; first < 8; first += 4) {  // a lane copies of page lane / 8 and of the fourth after it
        const uint32_t page = __shfl_sync(0xFFFFFFFFu, ahead, group % kLookUp * 8 + first + lane_id() / 8);
        const char* from = static_cast<const char*>(p_.summaries) + 16ull * (page + lane_id() % 8);
#pragma unroll
        for (int run = 0; run < D / 32; ++run) {
          char* to = Estimate::place(staging_, group % 2, lane_id() / 8, run) + first * Estimate::kPageBytes;
          Staging<D>::copy(to, from + Estimate::source(p_, run));
        }
      }
    }
    Staging<D>::commit();  // an empty group keeps the count
  }

  __device__ __forceinline__ void score(const Estimate& estimate, int group) {
    float values[kHeadTiles][2];
    estimate.evaluate(staging_, group & 1, Row::first_of(group), values);
    __syncwarp();  // everybody has read the half
    store(values, Row::first_of(group) + 2 * (lane_id() % 4));
  }

  // values: of head n (of each tile) for the CTA's pages i and i + 1.
  __device__ __forceinline__ void store(const float (&values)[kHeadTiles][2], int i) {
    const int n = lane_id() / 4;
    if (p_.reduction == kMass) return store_masses(values, i);
    float score[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      score[c] = p_.reduction == kMean ? 0.f : -INFINITY;
#pragma unroll
      for (int tile = 0; tile < kHeadTiles; ++tile) {
        if (tile * 8 + n >= p_.rows) continue;
        score[c] = p_.reduction == kMean ? score[c] + values[tile][c] : nan_max(score[c], values[tile][c]);
      }
    }
    const float weight = p_.reduction == kMean ? 1.f / p_.rows : 1.f;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
#pragma unroll
      for (int step = 4; step < 32; step *= 2) {
        const float other = __shfl_xor_sync(0xFFFFFFFFu, score[c], step);
        score[c] = p_.reduction == kMean ? score[c] + other : nan_max(score[c], other);
      }
      score[c] *= weight;
      if (n == 0 && i + c < row_.count && row_.competes(row_.page(i + c)) && fabsf(score[c]) < INFINITY) {
        range_ = make_float2(fminf(range_.x, score[c]), fmaxf(range_.y, score[c]));
      }
    }
    // there is room for the whole of the last group
    if (n == 0) *reinterpret_cast<float2*>(buffer_ + i) = make_float2(score[0], score[1]);
  }

  // The same for kMass, each head in its plane; a NaN is its own page's only. There is room for a page past the last.
  __device__ __forceinline__ void store_masses(const float (&values)[kHeadTiles][2], int i) {
    const float unit = (Estimate::kScaled ? 1.f : p_.scale) * kLog2e;
#pragma unroll
    for (int tile = 0; tile < kHeadTiles; ++tile) {
      const int head = tile * 8 + lane_id() / 4;
      if (head >= p_.rows || i >= row_.count) continue;
      const float first = unit * values[tile][0], second = unit * values[tile][1];
      *reinterpret_cast<float2*>(buffer_ + (head * plane_stride_ + i)) = make_float2(first, second);
      gathered_[tile].add(first, second, i + 1 < row_.count);
    }
  }

  // Sums again what this lane stored, now that the greatest is known.
  __device__ __forceinline__ Mass sum_again(const Gathered& gathered, int head) const {
    float sum = 0.f;
#pragma unroll 1
    for (int group = 0; group < row_.groups(); ++group) {
      const int i = Row::first_of(group) + 2 * (lane_id() % 4);
      if (i >= row_.count) continue;
      const float* two = buffer_ + head * plane_stride_ + i;
      sum += gathered.weight(two[0]) + (i + 1 < row_.count ? gathered.weight(two[1]) : 0.f);
    }
    return Mass{gathered.top, sum, gathered.least};
  }

  const DecodeParams& p_;
  const Row& row_;
  Staging<D> staging_;
  float* buffer_;
  int plane_stride_;
  Gathered gathered_[kHeadTiles];
  float2 range_ = make_float2(INFINITY, -INFINITY);
};

}  // namespace quest
