// What pages weigh by the codes of their keys: log2 of the attention mass that the estimates promise a page's tokens.
// quest_vllm/ops/key_codes.py says what the bytes mean. Bytes: 4 D a page and KV head.
//
// A page's sixteen tokens are the rows of one product, K being its pairs: operand A is the codes, B the heads' queries
// times the page's steps in float16. A code is used where it stands in its word, as a subnormal float16: 2^(2 i - 24)
// times itself in place i, for which the query makes up. What all tokens of a page share is a second product, exact in
// bfloat16, whose columns are the eight pages.
//
// Of a product's eight columns four do where four heads share a selection: columns 4-7 then are the same heads with the
// steps of the next page, so that weighing queries and summing masses serve two pages at a time.
#pragma once
#include <cuda_fp8.h>

#include "shared.cuh"
#include "staging.cuh"

namespace quest {

template <typename T, int D, int kHeadTiles, bool kPaired>
class CodeEstimate {
  static_assert(kHeadTiles == 1, "a product has eight columns");
  static_assert(sizeof(T) == 2 && Half<T>::kInfinity == 0x7F80, "bfloat16");

 public:
  using Query = QueryFragment<D, kHeadTiles>;
  static constexpr bool kScaled = true;       // values are natural logarithms of a mass
  static constexpr bool kKeepsQuery = false;  // its registers are better used
  static constexpr int kPageBytes = 4 * D;

  // `operands`: room in shared memory, kQueryOperands of them, for what all warps multiply by. All threads of the CTA call it.
  __device__ __forceinline__ CodeEstimate(const DecodeParams& p, const Row& row, const Query& query, uint4* operands)
      : p_(p), operands_(operands) {
    if (warp_id() == 0) leave_operands(query, operands);
    __syncthreads();
    const float largest = load();
    // 2^shift times the largest channel is between 2^5 and 2^6, and 448 times that still a float16
    const int shift = 5 - max(-90, min(90, static_cast<int>(__float_as_uint(largest) >> 23) - 127));
    unit_ = p.scale * kLog2e * power_of_two(24 - shift);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const float2 first = unpack(sum_[i]), second = unpack(difference_[i]);
      const float factor = 0.5f * power_of_two(shift - 2 * (i % 4));
      sum_[i] = Half<__half>::pack((first.x + second.x) * factor, (first.y + second.y) * factor);
      difference_[i] = Half<__half>::pack((first.x - second.x) * factor, (first.y - second.y) * factor);
    }
    const int t = lane_id() % 4, pairs = first_pair();
    steps_at_ = kept_in_register(lane_id() / 4 * kPageBytes + permuted(lane_id() / 4, kStep + pairs));
    base_at_ = kept_in_register(lane_id() / 4 * kPageBytes + permuted(lane_id() / 4, 2 * pairs));
    column_at_ = kept_in_register(column_page() * kPageBytes + permuted(column_page(), kStep + pairs));
    const int eight = lane_id() / 4 * 8;
    codes_at_ = kept_in_register(kCodes + t / 2 * 64 + (kEights == 1 ? eight : t % 2 * 128 + (eight ^ t % 2 * 32)));
    const int last = row.total - 1;
    if (row.page(row.per_cta(last)) == last) {
      last_ = row.per_cta(last);
      last_tokens_ = row.seq_len - last * kTokens;
    }
  }

  // As in BoxEstimate.
  __device__ __forceinline__ static int64_t source(const DecodeParams&, int run) { return run * 128; }
  __device__ __forceinline__ static char* place(const Staging<D>& staging, int half, int page, int run) {
    const int lane = lane_id() % 8 * 16;
    const int swapped = 128 * run < kCodes ? permuted(page, lane) : lane ^ (128 * run - kCodes) / 128 % 2 * 32;
    return page_of(staging, half, page) + 128 * run + swapped;
  }

  // values[0]: of head n for pages 2t and 2t + 1 of the eight in `half`, the CTA's pages from `first` on.
  __device__ __forceinline__ void evaluate(const Staging<D>& staging, int half, int first, float (&values)[1][2]) const {
    float shared[4] = {};
    share(staging, half, shared);
    const int partial = last_tokens_ < kTokens ? last_ - first : -1;
    float own[2] = {};
#pragma unroll 1
    for (int page = 0; page < 8; page += kTogether) {
      float logit[kProducts][2][2];  // of a head, tokens 2n and 2n + 1
      logits(staging, half, page, logit);
      if (partial >= page && partial < page + kTogether) mask(logit, partial - page);  // at most once a row
      keep_masses(logit, page, own);
    }
#pragma unroll
    for (int c = 0; c < 2; ++c) values[0][c] = kept(own, c) * kLn2 + shared[c] * p_.scale;
  }

 private:
  static constexpr int kTokens = 16;
  static constexpr int kPages = kPaired ? 2 : 1;  // that share a product's columns
  static constexpr int kProducts = 4;             // whose masses are summed side by side
  static constexpr int kTogether = kProducts * kPages;
  static constexpr int kStep = D, kRest = D * 3 / 2, kCodes = 2 * D;  // bytes into a page
  // Of every 64 pairs a lane takes 16, whose codes are two bytes of each half of a word; of 32, where there are no more, 8.
  static constexpr int kEights = D == 64 ? 1 : 2;
  static constexpr int kBlocks = D / 64 / kEights;
  static constexpr int kPairs = D / 16;  // words of two pairs a lane

  // What a shuffle gives is not computed anew at every use, as ptxas does otherwise: even a spill takes less long.
  __device__ __forceinline__ static int kept_in_register(int value) { return __shfl_sync(0xFFFFFFFFu, value, lane_id()); }

  // The first of this lane's pairs in the first block; 64 on from there in the next.
  __device__ __forceinline__ static int first_pair() {
    const int t = lane_id() % 4;
    return kEights == 1 ? 8 * t : t % 2 * 32 + t / 2 * 16;
  }

  // Of a product's pages, the one whose steps this lane's column has, and the one whose masses the lane sums.
  __device__ __forceinline__ static int column_page() { return kPaired ? lane_id() / 16 : 0; }
  __device__ __forceinline__ static int summed_page() { return kPaired ? lane_id() % 4 / 2 : 0; }

  // What was kept of head n and page 2t + c.
  __device__ __forceinline__ static float kept(const float (&own)[2], int c) {
    const int n = lane_id() / 4, t = lane_id() % 4;
    if (kPaired) return __shfl_sync(0xFFFFFFFFu, own[0], (t + n % 2 * 4) * 4 + n / 2 % 2 + 2 * c);
    const int from = (t % 2 * 2 + c + n % 2 * 4) * 4 + n / 2;
    const float early = __shfl_sync(0xFFFFFFFFu, own[0], from), late = __shfl_sync(0xFFFFFFFFu, own[1], from);
    return t < 2 ? early : late;
  }

  __device__ __forceinline__ static float power_of_two(int exponent) {
    return __uint_as_float(static_cast<uint32_t>(exponent + 127) << 23);
  }

  // Operand A of `share`, as its lanes take it: the heads are rows 0-7. What lane (n, t) has of the query is a run's pairs
  // from 32 run + 8 t on.
  __device__ __forceinline__ static void leave_operands(const Query& query, uint4* operands) {
    const int t = lane_id() % 4;
#pragma unroll
    for (int run = 0; run < D / 64; ++run) {
      const uint4 first = channels<0>(query, run), second = channels<1>(query, run);
      const int eight = kEights == 1 ? 0 : run / 2 * 2 + t % 2;
      const int lane = kEights == 1 ? lane_id() : lane_id() / 2 * 2 + run % 2;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        operands[(4 * eight + i) * 32 + lane] = make_uint4((&first.x)[i], 0, (&second.x)[i], 0);
      }
    }
  }

  // Both channels of the pairs of this lane's column, as they are; returns the heads' largest magnitude.
  __device__ __forceinline__ float load() {
    float largest = 0.f;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const uint4 two = operands_[32 * i + (kPaired ? lane_id() % 16 : lane_id())];
      sum_[i] = two.x, difference_[i] = two.z;
    }
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const float2 a = unpack(sum_[i]), b = unpack(difference_[i]);
      largest = fmaxf(largest, fmaxf(fmaxf(fabsf(a.x), fabsf(a.y)), fmaxf(fabsf(b.x), fabsf(b.y))));
    }
    return __uint_as_float(__reduce_max_sync(0xFFFFFFFFu, __float_as_uint(largest)));
  }

  // The first or second channels of a run's eight pairs: QueryFragment has them in this lane, unless D is 64.
  template <int kWhich>
  __device__ __forceinline__ static uint4 channels(const Query& query, int run) {
    if constexpr (D >= 128) {
      constexpr int kQuarter = D / 128;  // in parts of 32 channels
      return query.part[0][(run < kQuarter ? run : run + kQuarter) + kWhich * kQuarter];
    } else {
      const int n = lane_id() / 4, t = lane_id() % 4, from = (t < 2 ? t : t + 2) + kWhich * 2;  // in eights of channels
      uint4 found;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t low = __shfl_sync(0xFFFFFFFFu, (&query.part[0][0].x)[i], n * 4 + from % 4);
        const uint32_t high = __shfl_sync(0xFFFFFFFFu, (&query.part[0][1].x)[i], n * 4 + from % 4);
        (&found.x)[i] = from < 4 ? low : high;
      }
      return found;
    }
  }

  __device__ __forceinline__ static float2 unpack(uint32_t two) {
    return make_float2(__uint_as_float(two << 16), __uint_as_float(two & 0xFFFF0000u));
  }

  __device__ __forceinline__ static char* page_of(const Staging<D>& staging, int half, int page) {
    return staging.half(half) + page * kPageBytes;
  }
  // Bytes before the codes. Chunks of 16 are permuted so that those that four lanes read of a page, neighbours or every
  // other one, and four more of the next page, do not meet in a bank.
  __device__ __forceinline__ static int permuted(int page, int byte) { return byte ^ (page & 1) * 0x50; }

  // Two of float8_e4m3 to float16, exactly.
  template <int kUpper>
  __device__ __forceinline__ static __half2 widen(uint32_t four) {
    return __half2(__nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(four >> 16 * kUpper), __NV_E4M3));
  }
  // All ones in each half whose byte has its sign set.
  template <int kUpper>
  __device__ __forceinline__ static uint32_t signs(uint32_t four) {
#ifdef QUEST_ON_HOST
    const uint32_t two = four >> 16 * kUpper;
    return (two & 0x80 ? 0xFFFFu : 0u) | (two & 0x8000 ? 0xFFFF0000u : 0u);
#else
    uint32_t mask;
    asm("prmt.b32 %0, %1, %1, %2;" : "=r"(mask) : "r"(four), "n"(kUpper ? 0xBBAA : 0x9988));
    return mask;
#endif
  }
  __device__ __forceinline__ static uint32_t choose(uint32_t mask, uint32_t yes, uint32_t no) {
    return (mask & yes) | (~mask & no);
  }

  // Queries times steps of the coded channels, two pairs. A step's sign says which channel is coded: for a positive one
  // |s| (a + b) / 2 + s (a - b) / 2 is s a, for a negative one |s| b.
  template <int kUpper>
  __device__ __forceinline__ uint32_t weigh(uint32_t steps, int i) const {
    const __half2 step = widen<kUpper>(steps);
    const __half2 sum = *reinterpret_cast<const __half2*>(&sum_[i]);
    const __half2 difference = *reinterpret_cast<const __half2*>(&difference_[i]);
    const __half2 product = __hfma2(step, difference, __hmul2(__habs2(step), sum));
    return *reinterpret_cast<const uint32_t*>(&product);
  }

  // Takes the tokens out that the `partial`-th of these pages lacks.
  __device__ __forceinline__ void mask(float (&logit)[kProducts][2][2], int partial) const {
    const int token = lane_id() / 4 * 2;
#pragma unroll
    for (int i = 0; i < 2 * kProducts; ++i) {
      const int tokens = i / 2 * kPages + summed_page() == partial ? last_tokens_ : kTokens;
      float(&two)[2] = logit[i / 2][i % 2];
      two[0] = token < tokens ? two[0] : -INFINITY;
      two[1] = token + 1 < tokens ? two[1] : -INFINITY;
    }
  }

  // A page's mass is log2 of the sum, over its tokens, of 2^(what each adds to what all share). All lanes of equal t have
  // tokens of pages `page` + i kPages + summed_page() and two heads: 2 t + c, t counting from 0 again in the second page of a
  // pair. Of these eight masses, lane (n, t) keeps the one of the n % 4-th product and head n / 4.
  __device__ __forceinline__ void keep_masses(const float (&logit)[kProducts][2][2], int page, float (&own)[2]) const {
    const float none[kProducts][2] = {};
    const float mass = sum_tokens(logit, none);
    float log = log2_fast(mass);
    const bool sound = mass > 0x1p-100f && mass < 0x1p120f;
    if (__any_sync(0xFFFFFFFFu, !sound)) {
      const float again = by_greatest(logit);  // by all lanes
      log = sound ? log : again;
    }
    (kPaired || page == 0 ? own[0] : own[1]) = log;
  }

  // Sums over n, of which three bits say what a lane keeps: each step leaves half as many sums.
  __device__ __forceinline__ float sum_tokens(const float (&logit)[kProducts][2][2], const float (&peak)[kProducts][2]) const {
    float mass[kProducts][2];
#pragma unroll
    for (int i = 0; i < 2 * kProducts; ++i) {
      const float(&two)[2] = logit[i / 2][i % 2];
      const float shift = peak[i / 2][i % 2];
      mass[i / 2][i % 2] = exp2_fast(two[0] * unit_ - shift) + exp2_fast(two[1] * unit_ - shift);
    }
    float left[kProducts];
#pragma unroll
    for (int i = 0; i < kProducts; ++i) left[i] = halved<16>(mass[i][0], mass[i][1]);
    return halved<4>(halved<8>(left[0], left[2]), halved<8>(left[1], left[3]));
  }
  // Of two sums this lane's and its partner's part of one, the second where `kBit` of the lane's number is set.
  template <int kBit>
  __device__ __forceinline__ static float halved(float first, float second) {
    const bool set = (lane_id() & kBit) != 0;
    return (set ? second : first) + __shfl_xor_sync(0xFFFFFFFFu, set ? first : second, kBit);
  }

  // The mass that this lane keeps, where powers of two do not hold it: over the greatest of its tokens.
  __device__ __forceinline__ float by_greatest(const float (&logit)[kProducts][2][2]) const {
    float greatest[kProducts][2];
#pragma unroll
    for (int i = 0; i < 2 * kProducts; ++i) {
      float& most = greatest[i / 2][i % 2];
      most = fmaxf(logit[i / 2][i % 2][0], logit[i / 2][i % 2][1]);
#pragma unroll
      for (int step = 4; step < 32; step *= 2) most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFu, most, step));
      most = fminf(most * unit_, 1e38f);  // infinity less itself is no number
    }
    const float mass = sum_tokens(logit, greatest);
    // not by a subscript: the array would leave the registers
    float own[kProducts];
#pragma unroll
    for (int i = 0; i < kProducts; ++i) own[i] = lane_id() & 16 ? greatest[i][1] : greatest[i][0];
    const float even = lane_id() & 8 ? own[2] : own[0], odd = lane_id() & 8 ? own[3] : own[1];
    return (lane_id() & 4 ? odd : even) + log2_fast(mass);
  }

  struct Steps {
    uint32_t of[2 * kEights];  // four steps each
  };
  __device__ __forceinline__ static Steps read_steps(const char* place) {
    Steps steps;
    if constexpr (kEights == 1) {
      const uint2 two = *reinterpret_cast<const uint2*>(place);
      steps.of[0] = two.x, steps.of[1] = two.y;
    } else {
      const uint4 four = *reinterpret_cast<const uint4*>(place);
      steps.of[0] = four.x, steps.of[1] = four.y, steps.of[2] = four.z, steps.of[3] = four.w;
    }
    return steps;
  }

  // Products of kTogether pages, two of them side by side: a chain of dependent ones alone would be waited for.
  __device__ __forceinline__ void logits(const Staging<D>& staging, int half, int page, float (&logit)[kProducts][2][2]) const {
    const char* from = page_of(staging, half, page);
#pragma unroll
    for (int product = 0; product < kProducts; product += 2) {
      float sums[2][kPages][4] = {};  // row n, token 2n: columns 2t and 2t + 1; row n + 8, token 2n + 1: the same
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        uint32_t weights[2][4 * kEights];
        uint2 words[2][kPages];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int first = (product + i) * kPages;  // of the product's pages
          const Steps steps = read_steps(from + first * kPageBytes + (column_at_ ^ permuted(first, 64 * block)));
#pragma unroll
          for (int w = 0; w < 2 * kEights; ++w) {
            const int pairs = 4 * kEights * block + 2 * w;
            weights[i][2 * w] = weigh<0>(steps.of[w], pairs), weights[i][2 * w + 1] = weigh<1>(steps.of[w], pairs + 1);
          }
#pragma unroll
          for (int k = 0; k < kPages; ++k) {
            words[i][k] = *reinterpret_cast<const uint2*>(from + (first + k) * kPageBytes + codes_at_ + 256 * block);
            if (kEights == 1) words[i][k].x >>= lane_id() % 2 * 8, words[i][k].y >>= lane_id() % 2 * 8;
          }
        }
#pragma unroll
        for (int m = 0; m < 4 * kEights; m += 2) {
          const uint32_t low = 0x00030003u << m % 4 * 2, high = 0x000C000Cu << m % 4 * 2;
#pragma unroll
          for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int k = 0; k < kPages; ++k) {
              const uint32_t x = words[i][k].x >> m / 4 * 8, y = words[i][k].y >> m / 4 * 8;
              Half<__half>::mma(sums[i][k], x & low, y & low, x & high, y & high, weights[i][m], weights[i][m + 1]);
            }
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          float& value = logit[product + i][c % 2][c / 2];
          value = sums[i][0][c];
          if (kPaired && summed_page() == 1) value = sums[i][kPages - 1][c];
        }
      }
    }
  }

  // The products with what each page's tokens share: rows the heads, columns the pages.
  __device__ __forceinline__ void share(const Staging<D>& staging, int half, float (&sums)[4]) const {
    const char* from = staging.half(half);
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const Steps steps = read_steps(from + (steps_at_ ^ 64 * block));
      const Steps rest = read_steps(from + (steps_at_ ^ kStep ^ kRest ^ 64 * block));
#pragma unroll
      for (int eight = 0; eight < kEights; ++eight) {
        const uint4 base = Staging<D>::read(from + 128 * block + (base_at_ ^ 16 * eight));
        const uint4* query = operands_ + 4 * (block * kEights + eight) * 32 + lane_id();
        share_pairs<0>(sums, query[0], steps.of[2 * eight], base.x, rest.of[2 * eight]);
        share_pairs<1>(sums, query[32], steps.of[2 * eight], base.y, rest.of[2 * eight]);
        share_pairs<0>(sums, query[64], steps.of[2 * eight + 1], base.z, rest.of[2 * eight + 1]);
        share_pairs<1>(sums, query[96], steps.of[2 * eight + 1], base.w, rest.of[2 * eight + 1]);
      }
    }
  }
  template <int kUpper>
  __device__ __forceinline__ static void share_pairs(float (&sums)[4], const uint4& query, uint32_t steps, uint32_t base,
                                                     uint32_t rest) {
    const uint32_t swap = signs<kUpper>(steps);
    const float2 wide = __half22float2(widen<kUpper>(rest));
    const uint32_t other = Half<__nv_bfloat16>::pack(wide.x, wide.y);
    Half<__nv_bfloat16>::mma(sums, query.x, query.y, query.z, query.w, choose(swap, other, base), choose(swap, base, other));
  }

  const DecodeParams& p_;
  const uint4* operands_;
  uint32_t sum_[kPairs], difference_[kPairs];  // of a pair's channels of the query, float16: times a power of two
  int steps_at_, base_at_, column_at_, codes_at_;  // where this lane reads, no bit set that is changed with a constant
  float unit_;                                 // of a product, in log2 of a mass
  int last_ = -1, last_tokens_ = kTokens;      // the row's last page, if it is this CTA's, and its tokens
};

template <typename T, int D, int kHeadTiles>
using SingleCodes = CodeEstimate<T, D, kHeadTiles, false>;
template <typename T, int D, int kHeadTiles>
using PairedCodes = CodeEstimate<T, D, kHeadTiles, true>;

}  // namespace quest
