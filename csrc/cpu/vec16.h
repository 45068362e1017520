// Sixteen floats at a time, through the compiler's vector extension: one zmm register, two ymm or four xmm, by the
// flags the including file is compiled with. Included inside the ISA's own namespace by kernels_impl.h.

typedef float Vec __attribute__((vector_size(64)));
typedef int32_t VecI __attribute__((vector_size(64)));
typedef uint32_t VecU __attribute__((vector_size(64)));
typedef uint16_t VecH __attribute__((vector_size(32)));

#define QUEST_INLINE inline __attribute__((always_inline))

struct BFloat16 { uint16_t bits; };
struct Half { uint16_t bits; };

template <typename V>
QUEST_INLINE V load_as(const void* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof(V));
  return value;
}

QUEST_INLINE void store(float* to, Vec value) { __builtin_memcpy(to, &value, sizeof(Vec)); }
QUEST_INLINE Vec splat(float value) { return Vec{} + value; }
QUEST_INLINE Vec vmin(Vec a, Vec b) { return a < b ? a : b; }
QUEST_INLINE Vec vmax(Vec a, Vec b) { return a > b ? a : b; }
QUEST_INLINE VecI lane_index() { return VecI{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

QUEST_INLINE Vec load(const float* from) { return load_as<Vec>(from); }
QUEST_INLINE Vec load(const BFloat16* from) {
#if defined(__AVX512F__)  // GCC does poorly on the conversion below
  return (Vec)((VecU)_mm512_cvtepu16_epi32(load_as<__m256i>(from)) << 16);
#elif defined(__AVX2__)
  Vec value;
  const __m256i low = _mm256_slli_epi32(_mm256_cvtepu16_epi32(load_as<__m128i>(from)), 16);
  const __m256i high = _mm256_slli_epi32(_mm256_cvtepu16_epi32(load_as<__m128i>(from + 8)), 16);
  __builtin_memcpy(&value, &low, 32);
  __builtin_memcpy(reinterpret_cast<char*>(&value) + 32, &high, 32);
  return value;
#else
  return (Vec)(__builtin_convertvector(load_as<VecH>(from), VecU) << 16);
#endif
}
QUEST_INLINE Vec load(const Half* from) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(load_as<__m256i>(from));
#elif defined(__F16C__)
  Vec value;
  const __m256 low = _mm256_cvtph_ps(load_as<__m128i>(from));
  const __m256 high = _mm256_cvtph_ps(load_as<__m128i>(from + 8));
  __builtin_memcpy(&value, &low, 32);
  __builtin_memcpy(reinterpret_cast<char*>(&value) + 32, &high, 32);
  return value;
#else
  const VecU half = __builtin_convertvector(load_as<VecH>(from), VecU);
  const VecU sign = (half & 0x8000u) << 16;
  VecU magnitude = (VecU)((Vec)((half & 0x7fffu) << 13) * 0x1p112f);  // rebias the exponent; exact for subnormals too
  magnitude |= (VecU)((half & 0x7c00u) == 0x7c00u) & 0x7f800000u;     // inf and NaN
  return (Vec)(magnitude | sign);
#endif
}

// Thirty-two channels as two vectors, in whichever order is cheapest: the same for queries and summaries.
template <typename T>
QUEST_INLINE void load_two(const T* from, Vec& first, Vec& second) {
  first = load(from);
  second = load(from + kLanes);
}
QUEST_INLINE void load_pairs(const BFloat16* from, Vec& first, Vec& second);
QUEST_INLINE void load_two(const BFloat16* from, Vec& first, Vec& second) { load_pairs(from, first, second); }

// A line of sixteen bfloat16 pairs: the first and the second of each pair.
QUEST_INLINE void load_pairs(const BFloat16* from, Vec& first, Vec& second) {
  const VecU line = load_as<VecU>(from);
  first = (Vec)(line << 16);
  second = (Vec)(line & 0xffff0000u);
}

QUEST_INLINE void store(BFloat16* to, Vec value) {
  const VecU bits = (VecU)value;
  const VecU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const VecU quiet_nan = VecU{} + 0x7fc0u;
  const VecH narrow = __builtin_convertvector(value == value ? rounded : quiet_nan, VecH);
  __builtin_memcpy(to, &narrow, sizeof(VecH));
}

#if !defined(__F16C__) && !defined(__AVX512F__)
inline uint16_t half_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (bits >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // rounds to infinity
  if (bits < 0x38800000u) {                                  // subnormal: let a float addition round it
    float shifted;
    __builtin_memcpy(&shifted, &bits, 4);
    shifted += 0.5f;
    __builtin_memcpy(&bits, &shifted, 4);
    return uint16_t(sign | (bits - 0x3f000000u));
  }
  return uint16_t(sign | ((bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13));
}
#endif

QUEST_INLINE void store(Half* to, Vec value) {
#if defined(__AVX512F__)
  const __m256i narrow = _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT);
  __builtin_memcpy(to, &narrow, 32);
#elif defined(__F16C__)
  __m256 halves[2];
  __builtin_memcpy(halves, &value, 64);
  const __m128i low = _mm256_cvtps_ph(halves[0], _MM_FROUND_TO_NEAREST_INT);
  const __m128i high = _mm256_cvtps_ph(halves[1], _MM_FROUND_TO_NEAREST_INT);
  __builtin_memcpy(to, &low, 16);
  __builtin_memcpy(to + 8, &high, 16);
#else
  for (int i = 0; i < kLanes; ++i) to[i].bits = half_bits(value[i]);
#endif
}

QUEST_INLINE Vec evens(Vec a, Vec b) {
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}
QUEST_INLINE Vec odds(Vec a, Vec b) {
  return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

struct Add { QUEST_INLINE Vec operator()(Vec a, Vec b) const { return a + b; } };
struct Min { QUEST_INLINE Vec operator()(Vec a, Vec b) const { return vmin(a, b); } };
struct Max { QUEST_INLINE Vec operator()(Vec a, Vec b) const { return vmax(a, b); } };
// A NaN on either side stays.
struct NanMin { QUEST_INLINE Vec operator()(Vec a, Vec b) const { return a != a ? a : b > a ? a : b; } };
struct NanMax { QUEST_INLINE Vec operator()(Vec a, Vec b) const { return a != a ? a : b < a ? a : b; } };

// Lane i of the result is the reduction of rows[i]; 15 steps for all sixteen.
template <typename Op>
QUEST_INLINE Vec reduce_rows(const Vec* rows, Op op) {
  Vec level[8];
  for (int i = 0; i < 8; ++i) level[i] = op(evens(rows[2 * i], rows[2 * i + 1]), odds(rows[2 * i], rows[2 * i + 1]));
  for (int width = 4; width > 0; width /= 2)
    for (int i = 0; i < width; ++i)
      level[i] = op(evens(level[2 * i], level[2 * i + 1]), odds(level[2 * i], level[2 * i + 1]));
  return level[0];
}

template <typename Op>
QUEST_INLINE float reduce(Vec value, Op op) {
  for (int step = 0; step < 4; ++step) value = op(evens(value, value), odds(value, value));
  return value[0];
}

// e^x for x <= 0 (Cephes' polynomial, below 2 ulp); underflows to the smallest normal number, never to a subnormal.
QUEST_INLINE Vec exp_nonpositive(Vec x) {
  x = vmax(splat(-87.0f), x);  // in this order a NaN stays one
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: the addition rounds to an integer
  const Vec shifted = x * 1.44269504088896341f + magic;
  const Vec n = shifted - magic;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return (Vec)((VecU)p + ((VecU)shifted << 23));
}

QUEST_INLINE Vec tanh(Vec x) {
  const Vec magnitude = x < 0.0f ? -x : x;
  const Vec e = exp_nonpositive(magnitude * -2.0f);
  const Vec y = (1.0f - e) / (1.0f + e);
  return x < 0.0f ? -y : y;
}

QUEST_INLINE void prefetch(const void* from, int64_t bytes) {
  const char* line = static_cast<const char*>(from);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(line + i);
}
