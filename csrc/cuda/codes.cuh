// What pages weigh by the codes of their keys: log2 of the attention mass that the estimates promise a page's tokens.
// quest_vllm/ops/key_codes.py says what the bytes mean. Bytes: 4 D a page and KV head.
//
// Lane (n, t) holds the pairs 32 r + 8 t .. + 7 of head n, for every run r; a run is 32 pairs. A page's tokens are the
// columns of one product, K being its pairs: operand A is the head's query times the page's steps in float16, B the
// codes. A code is used where it stands in its word, as a subnormal float16: 2^(2 i - 24) times itself in place i, for
// which the query makes up. What all tokens of a page share is a second product, exact in bfloat16, whose columns are
// the eight pages.
#pragma once
#include <cuda_fp8.h>

#include "shared.cuh"
#include "staging.cuh"

namespace quest {

template <typename T, int D, int kHeadTiles>
class CodeEstimate {
  static_assert(kHeadTiles == 1, "rows 8-15 of operand A stay empty");
  static_assert(sizeof(T) == 2 && Half<T>::kInfinity == 0x7F80, "bfloat16");

 public:
  using Query = QueryFragment<D, kHeadTiles>;
  static constexpr bool kScaled = true;  // values are natural logarithms of a mass

  __device__ __forceinline__ CodeEstimate(const DecodeParams& p, const Row& row, const Query& query)
      : p_(p), row_(row), query_(query) {
    const float largest = load();
    // 2^shift times the largest channel is between 2^5 and 2^6, and 448 times that still a float16
    const int shift = 5 - max(-90, min(90, static_cast<int>(__float_as_uint(largest) >> 23) - 127));
    unit_ = p.scale * kLog2e * power_of_two(24 - shift);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const float factor = power_of_two(shift - 2 * (i % 4));
      first_[i] = scaled(first_[i], factor);
      second_[i] = scaled(second_[i], -factor);  // a step of the second channel carries a sign
    }
    const int last = row.total - 1;
    if (row.page(last >> row.shift) == last) {
      last_ = last >> row.shift;
      last_tokens_ = row.seq_len - last * kTokens;
    }
  }

  __device__ __forceinline__ static int64_t source(int index) { return index * 8; }
  __device__ __forceinline__ static char* place(const Staging<D>& staging, int half, int page, int index) {
    return at(staging, half, page, index * 16);
  }

  // values[0]: of head n for pages 2t and 2t + 1 of the eight in `half`, the CTA's pages from `first` on.
  __device__ __forceinline__ void evaluate(const Staging<D>& staging, int half, int first, float (&values)[1][2]) const {
    const int t = lane_id() % 4;
#pragma unroll 2
    for (int page = 0; page < 8; page += 2) {
      const float even = own_mass(staging, half, page, first), odd = own_mass(staging, half, page + 1, first);
      if (page / 2 == t) values[0][0] = even, values[0][1] = odd;
    }
    float shared[4] = {};
    share(staging, half, shared);
#pragma unroll
    for (int c = 0; c < 2; ++c) values[0][c] = values[0][c] * kLn2 + shared[c] * p_.scale;
  }

 private:
  static constexpr int kTokens = 16;
  static constexpr int kRuns = D / 64;        // of eight pairs a lane
  static constexpr int kPairs = kRuns * 4;    // words of two pairs a lane
  static constexpr int kStep = D, kRest = D * 3 / 2, kCodes = 2 * D;  // bytes into a page

  __device__ __forceinline__ static float power_of_two(int exponent) { return __uint_as_float(static_cast<uint32_t>(exponent + 127) << 23); }

  // Both channels of this lane's pairs, as they are; returns the head's largest magnitude.
  __device__ __forceinline__ float load() {
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      const uint4 first = channels<0>(run), second = channels<1>(run);
#pragma unroll
      for (int i = 0; i < 4; ++i) first_[4 * run + i] = (&first.x)[i], second_[4 * run + i] = (&second.x)[i];
    }
    float largest = 0.f;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const float2 a = unpack(first_[i]), b = unpack(second_[i]);
      largest = fmaxf(largest, fmaxf(fmaxf(fabsf(a.x), fabsf(a.y)), fmaxf(fabsf(b.x), fabsf(b.y))));
    }
    largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, 1));
    return fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, 2));
  }

  // The first or second channels of a run's eight pairs: QueryFragment has them in this lane, unless D is 64.
  template <int kWhich>
  __device__ __forceinline__ uint4 channels(int run) const {
    if constexpr (D >= 128) {
      constexpr int kQuarter = D / 128;  // in parts of 32 channels
      const int part = (run < kQuarter ? run : run + kQuarter) + kWhich * kQuarter;
      return query_.part[0][part];
    } else {
      const int n = lane_id() / 4, t = lane_id() % 4, from = (t < 2 ? t : t + 2) + kWhich * 2;  // in eights of channels
      uint4 found;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t low = __shfl_sync(0xFFFFFFFFu, (&query_.part[0][0].x)[i], n * 4 + from % 4);
        const uint32_t high = __shfl_sync(0xFFFFFFFFu, (&query_.part[0][1].x)[i], n * 4 + from % 4);
        (&found.x)[i] = from < 4 ? low : high;
      }
      return found;
    }
  }

  __device__ __forceinline__ static float2 unpack(uint32_t two) {
    return make_float2(__uint_as_float(two << 16), __uint_as_float(two & 0xFFFF0000u));
  }
  __device__ __forceinline__ static uint32_t scaled(uint32_t two, float factor) {
    const float2 x = unpack(two);
    return Half<__half>::pack(x.x * factor, x.y * factor);
  }

  // Chunks of 16 bytes are permuted so that neither eight lanes' chunks nor sixteen lanes' halves of one, of as many
  // pages, meet in a bank.
  __device__ __forceinline__ static char* at(const Staging<D>& staging, int half, int page, int byte) {
    return staging.base + half * Staging<D>::kHalfBytes + page * 4 * D + (byte ^ ((page & 1) << 6 | (page & 2) << 4));
  }

  // Two of float8_e4m3 to float16, exactly.
  template <int kUpper>
  __device__ __forceinline__ static uint32_t widen(uint32_t four) {
    const __half2_raw two = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(four >> 16 * kUpper), __NV_E4M3);
    return two.x | static_cast<uint32_t>(two.y) << 16;
  }
  // All ones in each half whose byte has its sign set.
  template <int kUpper>
  __device__ __forceinline__ static uint32_t signs(uint32_t four) {
    uint32_t mask;
    asm("prmt.b32 %0, %1, %1, %2;" : "=r"(mask) : "r"(four), "n"(kUpper ? 0xBBAA : 0x9988));
    return mask;
  }
  __device__ __forceinline__ static uint32_t choose(uint32_t mask, uint32_t yes, uint32_t no) { return (mask & yes) | (~mask & no); }

  // Queries times steps of the coded channels, two pairs.
  template <int kUpper>
  __device__ __forceinline__ uint32_t weigh(uint32_t steps, int i) const {
    const uint32_t query = choose(signs<kUpper>(steps), second_[i], first_[i]), step = widen<kUpper>(steps);
    const __half2 product = __hmul2(*reinterpret_cast<const __half2*>(&query), *reinterpret_cast<const __half2*>(&step));
    return *reinterpret_cast<const uint32_t*>(&product);
  }

  // log2 of the sum over the page's tokens of 2^(what each adds to what all share).
  __device__ __forceinline__ float own_mass(const Staging<D>& staging, int half, int page, int first) const {
    const int n = lane_id() / 4, t = lane_id() % 4;
    float sums[2][4] = {};  // tokens 4t and 4t + 2; 4t + 1 and 4t + 3
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      const uint2 steps = *reinterpret_cast<const uint2*>(at(staging, half, page, kStep + 32 * run + 8 * t));
      const uint32_t a[4] = {weigh<0>(steps.x, 4 * run), weigh<1>(steps.x, 4 * run + 1), weigh<0>(steps.y, 4 * run + 2),
                             weigh<1>(steps.y, 4 * run + 3)};
      uint2 words = *reinterpret_cast<const uint2*>(at(staging, half, page, kCodes + 128 * run + 64 * (t / 2) + 8 * n));
      words.x >>= 8 * (t % 2), words.y >>= 8 * (t % 2);
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const uint32_t low = 0x00030003u << 2 * i, high = 0x000C000Cu << 2 * i;
        Half<__half>::mma(sums[0], a[i], 0, a[i + 1], 0, words.x & low, words.x & high);
        Half<__half>::mma(sums[1], a[i], 0, a[i + 1], 0, words.y & low, words.y & high);
      }
    }
    float logit[4] = {sums[0][0], sums[1][0], sums[0][1], sums[1][1]};
    if (first + page == last_) {
#pragma unroll
      for (int c = 0; c < 4; ++c) logit[c] = 4 * t + c < last_tokens_ ? logit[c] : -INFINITY;
    }
    float top = fmaxf(fmaxf(logit[0], logit[1]), fmaxf(logit[2], logit[3]));
    top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, 1));
    top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, 2)) * unit_;
    if (fabsf(top) == INFINITY) top = 0.f;  // infinity less itself is no number
    float mass = 0.f;
#pragma unroll
    for (int c = 0; c < 4; ++c) mass += exp2_fast(logit[c] * unit_ - top);
    mass += __shfl_xor_sync(0xFFFFFFFFu, mass, 1);
    mass += __shfl_xor_sync(0xFFFFFFFFu, mass, 2);
    return top + log2_fast(mass);
  }

  // The products with what each page's tokens share: rows the heads, columns the pages.
  __device__ __forceinline__ void share(const Staging<D>& staging, int half, float (&sums)[4]) const {
    const int page = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      const uint4 base = Staging<D>::read(at(staging, half, page, 64 * run + 16 * t));
      const uint2 steps = *reinterpret_cast<const uint2*>(at(staging, half, page, kStep + 32 * run + 8 * t));
      const uint2 rest = *reinterpret_cast<const uint2*>(at(staging, half, page, kRest + 32 * run + 8 * t));
      const uint4 first = channels<0>(run), second = channels<1>(run);
      share_pairs<0>(sums, first.x, second.x, steps.x, base.x, rest.x);
      share_pairs<1>(sums, first.y, second.y, steps.x, base.y, rest.x);
      share_pairs<0>(sums, first.z, second.z, steps.y, base.z, rest.y);
      share_pairs<1>(sums, first.w, second.w, steps.y, base.w, rest.y);
    }
  }
  template <int kUpper>
  __device__ __forceinline__ static void share_pairs(float (&sums)[4], uint32_t first, uint32_t second, uint32_t steps,
                                                     uint32_t base, uint32_t rest) {
    const uint32_t swap = signs<kUpper>(steps), narrow = widen<kUpper>(rest);
    const float2 wide = __half22float2(*reinterpret_cast<const __half2*>(&narrow));
    const uint32_t other = Half<__nv_bfloat16>::pack(wide.x, wide.y);
    Half<__nv_bfloat16>::mma(sums, first, 0, second, 0, choose(swap, other, base), choose(swap, base, other));
  }

  const DecodeParams& p_;
  const Row& row_;
  const Query& query_;
  uint32_t first_[kPairs], second_[kPairs];  // queries, float16: times a power of two, the second's sign turned
  float unit_;                               // of a product, in log2 of a mass
  int last_ = -1, last_tokens_ = 0;          // the row's last page, if it is this CTA's, and its tokens
};

}  // namespace quest
