// Codes a page's keys: quest_vllm/ops/key_codes.py says what the bytes mean, csrc/cpu/codes.h is the twin.
//
// Conversions are integer arithmetic, and a code is found by comparisons, which give what the rounded quotient gives:
// (key - base) / step lies beyond 0.5, 1.5 or 2.5 when key - base lies beyond that many steps, since both are float32,
// a step has four significant bits, and a quotient just beyond never rounds back.
#pragma once
#include "common.cuh"

namespace quest {

// To float8_e4m3fn, nearest and ties to even, saturated at 448; every NaN is 0x7f.
__device__ __forceinline__ uint32_t to_fp8(float x) {
  constexpr uint32_t kBias = 120u << 3;  // between the exponents of the two formats
  const float magnitude = fabsf(x) > 448.f ? 448.f : fabsf(x);
  const uint32_t bits = __float_as_uint(magnitude);
  const uint32_t normal = ((bits + 0x7FFFFu + ((bits >> 20) & 1u)) >> 20) - kBias;
  const uint32_t subnormal = __float_as_uint(magnitude + 16384.f) & 0xFu;  // 2^14: its last place is worth 2^-9
  const uint32_t code = magnitude < 0.015625f ? subnormal : normal;
  return x == x ? code | ((__float_as_uint(x) >> 24) & 0x80u) : 0x7Fu;
}

// The lower seven bits of float8_e4m3fn.
__device__ __forceinline__ float fp8_magnitude(uint32_t code) {
  constexpr uint32_t kBias = 120u << 3;
  if (code == 0x7F) return NAN;
  return code < 8 ? static_cast<float>(code) * 0.001953125f : __uint_as_float((code + kBias) << 20);
}

// The bits of bfloat16, nearest and ties to even; every NaN is 0x7fc0.
__device__ __forceinline__ uint32_t to_bfloat16(float x) {
  const uint32_t bits = __float_as_uint(x);
  return x == x ? (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16 : 0x7FC0u;
}

// A lane's eight neighbouring channels of a page, and how those of them that are coded are coded.
template <typename T, int D>
class PageEncoder {
 public:
  static constexpr int kLanes = D / 8;  // lanes to a row of keys
  static constexpr int kApart = kLanes / 4;  // lanes from a pair's first channel to its second

  // `low` and `high`: of this lane's channels over all of the page's keys.
  __device__ __forceinline__ PageEncoder(const uint4& low, const uint4& high) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float mine_low = channel(low, i), mine_high = channel(high, i);
      const float other_low = __shfl_xor_sync(0xFFFFFFFFu, mine_low, kApart);
      const float other_high = __shfl_xor_sync(0xFFFFFFFFu, mine_high, kApart);
      const float range = mine_high - mine_low, other_range = other_high - other_low;
      const bool second = is_first() ? other_range > range : range > other_range;  // of the pair is coded
      const bool coded = second != is_first();
      const float least = coded ? mine_low : other_low;
      const uint32_t step_code = to_fp8(((coded ? mine_high : other_high) - least) * 0.25f) & 0x7Fu;
      const float step = fp8_magnitude(step_code);
      const uint32_t base = to_bfloat16(least + step * 0.5f);
      const uint32_t rest = to_fp8((coded ? other_low + other_high : mine_low + mine_high) * 0.5f + 0.f);  // no -0
      base_[i] = __uint_as_float(base << 16);
      step_[i] = coded && step > 0.f ? step : NAN;  // compares as nothing
      (&bases_.x)[i / 2] |= base << 16 * (i % 2);
      (&steps_.x)[i / 4] |= (step_code | (second ? 0x80u : 0u)) << 8 * (i % 4);
      (&rests_.x)[i / 4] |= rest << 8 * (i % 4);
    }
  }

  // What the page's tokens share, by the lanes of a row's first channels.
  __device__ __forceinline__ void store_shared(uint8_t* page) const {
    if (!is_first()) return;
    *reinterpret_cast<uint4*>(page + 2 * first_pair()) = bases_;
    *reinterpret_cast<uint2*>(page + D + first_pair()) = steps_;
    *reinterpret_cast<uint2*>(page + D * 3 / 2 + first_pair()) = rests_;
  }

  // A token's words, once every lane of its row has called this; 0 for a row that is not `written`.
  __device__ __forceinline__ void store_token(uint8_t* page, int token, const uint4& key, bool written) const {
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float offset = channel(key, i) - base_[i];
      const uint32_t code = (offset > 0.5f * step_[i]) + (offset >= 1.5f * step_[i]) + (offset > 2.5f * step_[i]);
      word |= code << (i / 2 * 2 + i % 2 * 16);
    }
    word = written ? word << 8 * (lane_id() % 2) : 0;
    word |= __shfl_xor_sync(0xFFFFFFFFu, word, kApart);
    word |= __shfl_xor_sync(0xFFFFFFFFu, word, 1);
    if (is_first() && lane_id() % 2 == 0) {
      *reinterpret_cast<uint32_t*>(page + 2 * D + 4 * (first_pair() + token)) = word;
    }
  }

 private:
  __device__ __forceinline__ static bool is_first() { return (lane_id() & kApart) == 0; }
  __device__ __forceinline__ static int first_pair() {
    const int eight = lane_id() % kLanes;
    return (eight / (2 * kApart) * kApart + eight % kApart) * 8;
  }
  __device__ __forceinline__ static float channel(const uint4& eight, int i) {
    return Half<T>::to_float((&eight.x)[i / 2] >> 16 * (i % 2));
  }

  float base_[8], step_[8];
  uint4 bases_ = make_uint4(0, 0, 0, 0);
  uint2 steps_ = make_uint2(0, 0), rests_ = make_uint2(0, 0);
};

}  // namespace quest
