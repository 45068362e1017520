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

// Eight neighbouring pairs of a page's channels are a warp's work. Lane r of its first half holds the pairs' first
// channels of row r, lane 16 + r the second ones; rows past the page's last repeat it.

// The first of the calling lane's eight channels.
template <int D>
__device__ __forceinline__ unsigned first_channel(unsigned eight) {
  constexpr unsigned kApart = D / 4;  // from a pair's first channel to its second
  return 8 * eight / kApart * 2 * kApart + 8 * eight % kApart + lane_id() / 16 * kApart;
}

// Of two lanes `distance` apart, the lower gets the least of both lanes' `a`, the upper that of their `b`.
template <typename T>
__device__ __forceinline__ uint32_t fold(uint32_t a, uint32_t b, int distance) {
  const bool upper = lane_id() & distance;
  return Half<T>::min2(upper ? b : a, __shfl_xor_sync(0xFFFFFFFFu, upper ? a : b, distance));
}

// A bound over the rows of channel lane % 8 of this half of the warp: its least key, or minus the greatest in the upper
// eight lanes.
template <typename T>
__device__ __forceinline__ float bound_of_rows(const uint4& key) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = fold<T>((&key.x)[i], (&key.x)[i] ^ 0x80008000u, 8);
#pragma unroll
  for (int i = 0; i < 2; ++i) words[i] = fold<T>(words[i], words[i + 2], 4);
  const uint32_t word = fold<T>(words[0], words[1], 2);
  return Half<T>::to_float(fold<T>(word, word, 1) >> 16 * (lane_id() % 2));
}

// Stores what the page's tokens share. Lanes 0 to 7 return how their pair's tokens are coded: the base's bits above
// those of a bfloat16 step, NaN where every code is 0, negative where the second channel is coded.
template <typename T, int D>
__device__ __forceinline__ uint32_t store_shared(uint8_t* page, unsigned eight, float bound) {
  const unsigned pair = 8 * eight + lane_id() % 8;
  const bool is_high = lane_id() & 8;
  const float opposite = __shfl_xor_sync(0xFFFFFFFFu, bound, 8);
  const float low = is_high ? opposite : bound, high = is_high ? -bound : -opposite;
  const float second_low = __shfl_xor_sync(0xFFFFFFFFu, low, 16), second_high = __shfl_xor_sync(0xFFFFFFFFu, high, 16);
  if (lane_id() >= 16) return 0;
  const bool second = second_high - second_low > high - low;  // of the pair is coded
  const float least = second ? second_low : low;
  const float range = (second ? second_high : high) - least;
  const float middle = (second ? low + high : second_low + second_high) * 0.5f + 0.f;  // no -0
  const uint32_t code = to_fp8(is_high ? middle : range * 0.25f);  // one conversion for both
  if (is_high) {
    page[D * 3 / 2 + pair] = code;
    return 0;
  }
  const float step = fp8_magnitude(code & 0x7Fu);
  const uint32_t base = to_bfloat16(least + step * 0.5f);
  page[D + pair] = (code & 0x7Fu) | (second ? 0x80u : 0u);
  reinterpret_cast<uint16_t*>(page)[pair] = base;
  return base << 16 | (second ? 0x8000u : 0u) | (step > 0.f ? __float_as_uint(step) >> 16 : 0x7FC0u);
}

// Stores the codes of the page's `count` tokens, and 0 for those to come. `shared`: from store_shared.
template <typename T, int D>
__device__ __forceinline__ void store_codes(uint8_t* page, unsigned eight, const uint4& keys, uint32_t shared, int count) {
  const int row = lane_id() % 16;
  const bool upper = lane_id() & 16;  // codes the last four pairs, its neighbour in the other half the first four
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t front = (&keys.x)[i], back = (&keys.x)[i + 2];
    const uint32_t mine = upper ? back : front;
    const uint32_t theirs = __shfl_xor_sync(0xFFFFFFFFu, upper ? front : back, 16);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint32_t how = __shfl_sync(0xFFFFFFFFu, shared, (upper ? 4 : 0) + 2 * i + j);
      const bool second = how & 0x8000u;
      const float step = __uint_as_float((how & 0x7FFFu) << 16);
      const float key = Half<T>::to_float((second == upper ? mine : theirs) >> 16 * j);
      const float offset = key - __uint_as_float(how & 0xFFFF0000u);
      const uint32_t code = (offset > 0.5f * step) + (offset >= 1.5f * step) + (offset > 2.5f * step);
      word |= code << (2 * i + 16 * j);
    }
  }
  word <<= upper ? 4 : 0;
  word |= __shfl_xor_sync(0xFFFFFFFFu, word, 16);
  uint8_t* bytes = page + 2 * D + 4 * (eight / 2 * 16 + row) + eight % 2;  // of the token's word: this one, and two further
  bytes[upper ? 2 : 0] = row < count ? word >> (upper ? 16 : 0) : 0;
}

}  // namespace quest
