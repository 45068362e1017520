// Key codes: a page summary of two bits a token for half the channels. quest_vllm/ops/key_codes.py says what its bytes
// mean; a page is sixteen tokens, one lane each. Included by kernels_impl.h.

typedef uint8_t VecB __attribute__((vector_size(16)));

constexpr float kFp8Max = 448.0f;
constexpr uint32_t kFp8Bias = 120u << 3;  // between the exponents of float and of float8_e4m3fn

// To float8_e4m3fn, nearest and ties to even, saturated; every NaN is 0x7f.
QUEST_INLINE VecU to_fp8(Vec x) {
  const VecU sign = ((VecU)x & 0x80000000u) >> 24;
  Vec magnitude = (Vec)((VecU)x & 0x7fffffffu);
  magnitude = magnitude > kFp8Max ? splat(kFp8Max) : magnitude;
  const VecU bits = (VecU)magnitude;
  const VecU normal = ((bits + 0x7ffffu + ((bits >> 20) & 1u)) >> 20) - kFp8Bias;
  const VecU subnormal = (VecU)(magnitude + splat(16384.0f)) & 0xfu;  // 2^14: one unit in the last place is 2^-9
  const VecU code = magnitude < 0.015625f ? subnormal : normal;
  return x == x ? code | sign : VecU{} + 0x7fu;
}

// From the lower seven bits of float8_e4m3fn: its magnitude.
QUEST_INLINE Vec fp8_magnitude(VecU code) {
  const Vec normal = (Vec)((code + kFp8Bias) << 20);
  const Vec subnormal = __builtin_convertvector((VecI)code, Vec) * 0.001953125f;
  const Vec value = code < 8u ? subnormal : normal;
  return code == 0x7fu ? splat(__builtin_nanf("")) : value;
}

QUEST_INLINE VecU load_bytes(const uint8_t* from) { return __builtin_convertvector(load_as<VecB>(from), VecU); }
QUEST_INLINE void store_bytes(uint8_t* to, VecU value) {
  const VecB narrow = __builtin_convertvector(value, VecB);
  __builtin_memcpy(to, &narrow, sizeof(VecB));
}

// From float8_e4m3fn, sign and all.
QUEST_INLINE Vec from_fp8(const uint8_t* from) {
#if defined(__AVX512F__)
  // A half has the same fields, a longer mantissa and 2^8 times the bias; its subnormals are as exact.
  const __m256i code = _mm256_cvtepu8_epi16(load_as<__m128i>(from));
  const __m256i magnitude = _mm256_and_si256(code, _mm256_set1_epi16(0x7f));
  const __m256i sign = _mm256_slli_epi16(_mm256_andnot_si256(_mm256_set1_epi16(0x7f), code), 8);
  const __m256i nan = _mm256_and_si256(_mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x7f)), _mm256_set1_epi16(0x7c00));
  const __m256i half = _mm256_or_si256(_mm256_or_si256(_mm256_slli_epi16(magnitude, 7), sign), nan);
  return (Vec)_mm512_cvtph_ps(half) * 256.0f;
#else
  const VecU code = load_bytes(from);
  return (Vec)((VecU)fp8_magnitude(code & 0x7fu) | ((code & 0x80u) << 24));
#endif
}

// 0 to 3, nearest and ties to even; a NaN is 0.
QUEST_INLINE VecU to_code(Vec level) {
  level = level > 0.0f ? level : Vec{};
  level = level < 3.0f ? level : splat(3.0f);
  return (VecU)(level + splat(8388608.0f)) & 3u;  // 2^23: one unit in the last place is 1
}

// Where the code of a word's j-th pair begins.
QUEST_INLINE constexpr uint32_t field_shift(int j) { return uint32_t(j / 2 * 2 + j % 2 * 16); }

// Pair p of channels, head_dim / 4 apart: its first.
QUEST_INLINE int64_t first_of_pair(int64_t pair, int64_t quarter) { return pair < quarter ? pair : pair + quarter; }

// Codes `written` tokens of a page; keys[d] holds channel d, a lane a token, lanes past `written` equal to the first.
__attribute__((noinline)) void encode_page(const Vec* keys, int64_t dim, int64_t written, uint8_t* out) {
  const int64_t half = dim / 2, quarter = dim / 4;
  const VecI hidden = lane_index() >= int32_t(written);
  for (int64_t pair = 0; pair < half; pair += kLanes) {
    const Vec* first = keys + first_of_pair(pair, quarter);
    const Vec* second = first + quarter;
    const Vec low_a = reduce_rows(first, NanMin{}), high_a = reduce_rows(first, NanMax{});
    const Vec low_b = reduce_rows(second, NanMin{}), high_b = reduce_rows(second, NanMax{});
    const VecI swap = high_b - low_b > high_a - low_a;
    const Vec low = swap ? low_b : low_a;
    const VecU step_code = to_fp8(((swap ? high_b : high_a) - low) * 0.25f);
    const VecU rest = to_fp8(((swap ? low_a : low_b) + (swap ? high_a : high_b)) * 0.5f + splat(0.0f));  // no -0
    const Vec step = fp8_magnitude(step_code & 0x7fu);
    uint16_t rounded[kLanes];
    store(reinterpret_cast<BFloat16*>(rounded), low + step * 0.5f);
    __builtin_memcpy(out + 2 * pair, rounded, sizeof(rounded));
    store_bytes(out + dim + pair, (step_code & 0x7fu) | ((VecU)swap & 0x80u));
    store_bytes(out + dim + half + pair, rest);
    VecU words = {};
    for (int j = 0; j < kLanes; ++j) {
      if (!(step[j] > 0.0f)) continue;  // no range, or NaN
      const Vec base = splat(load(reinterpret_cast<const BFloat16*>(rounded))[j]);
      const VecU code = to_code(((swap[j] ? second[j] : first[j]) - base) / step[j]);
      words |= (hidden ? VecU{} : code) << field_shift(j);
    }
    __builtin_memcpy(out + 2 * dim + 4 * pair, &words, sizeof(words));
  }
}

// Gathers a page's keys channel by channel, and codes them.
template <typename LoadChannel>
QUEST_INLINE void code_page(const SummaryTask& task, LoadChannel load_channel) {
  Vec keys[kMaxHeadDim];
  for (int64_t d = 0; d < task.head_dim; ++d) {
    const Vec key = load_channel(d);
    keys[d] = lane_index() < int32_t(task.written) ? key : splat(key[0]);
  }
  encode_page(keys, task.head_dim, task.written, static_cast<uint8_t*>(task.summary));
}

template <typename T>
void code_rows(const SummaryTask& task) {
  const T* rows = static_cast<const T*>(task.keys) + task.first_row * task.head_dim;
  alignas(64) float columns[kMaxHeadDim][kLanes];
  for (int64_t d = 0; d < task.head_dim; d += kLanes)
    for (int64_t token = 0; token < kLanes; ++token) {
      const Vec key = load(rows + token * task.head_dim + d);
      for (int i = 0; i < kLanes; ++i) columns[d + i][token] = key[i];
    }
  code_page(task, [&](int64_t d) { return load(columns[d]); });
}

template <typename T>
void code_transposed(const SummaryTask& task) {
  const T* columns = static_cast<const T*>(task.keys) + task.first_row;
  code_page(task, [&](int64_t d) { return load(columns + d * task.block_size); });
}

void code_amx(const SummaryTask& task) {
  const BFloat16* lines = static_cast<const BFloat16*>(task.keys) + task.first_row * task.head_dim;
  code_page(task, [&](int64_t d) {
    Vec pair[2];
    load_pairs(lines + d / 2 * 2 * kLanes, pair[0], pair[1]);
    return pair[d % 2];
  });
}

// sums[set][g] += w[g][j] * code of pair j, for the sixteen pairs of `word`, in turn to each of kSets sums, so that no
// addition waits for the one before.
template <int G, int kSets>
QUEST_INLINE void add_codes(VecU word, const float (*weights)[kLanes], Vec (*sums)[G]) {
#if defined(__AVX512F__)
  const __m512 table = _mm512_setr4_ps(0.0f, 1.0f, 2.0f, 3.0f);
  const auto level = [&](int j) {
    return (Vec)_mm512_permutevar_ps(table, _mm512_srli_epi32((__m512i)word, field_shift(j)));
  };
#else
  const auto level = [&](int j) {
    return __builtin_convertvector((VecI)((word >> field_shift(j)) & 3u), Vec);
  };
#endif
#pragma GCC unroll 16
  for (int j = 0; j < kLanes; ++j) {
    const Vec code = level(j);
    for (int g = 0; g < G; ++g) sums[j % kSets][g] += code * weights[g][j];
  }
}

// own[g] += the tokens' terms, shared[g] += the page's (a term a lane), for a page's `coded` bytes and queries of dim
// floats each.
template <int G>
QUEST_INLINE void estimate_page(const uint8_t* coded, const float* queries, int64_t dim, Vec* own, Vec* shared) {
  constexpr int kSets = G <= 2 ? 4 : G <= 4 ? 2 : 1;  // eight sums and more keep both multipliers busy
  const int64_t half = dim / 2, quarter = dim / 4;
  alignas(64) float weights[G][kLanes];
  Vec sums[kSets][G] = {};
  for (int64_t pair = 0; pair < half; pair += kLanes) {
    const Vec signed_step = from_fp8(coded + dim + pair), rest = from_fp8(coded + dim + half + pair);
    const VecI swap = (VecI)signed_step < 0;
    const Vec step = (Vec)((VecU)signed_step & 0x7fffffffu);
    const Vec base = load(reinterpret_cast<const BFloat16*>(coded) + pair);
    const Vec of_first = swap ? rest : base, of_second = swap ? base : rest;
    for (int g = 0; g < G; ++g) {
      const float* query = queries + g * dim + first_of_pair(pair, quarter);
      const Vec first = load(query), second = load(query + quarter);
      shared[g] += first * of_first;
      shared[g] += second * of_second;
      store(weights[g], (swap ? second : first) * step);
    }
    add_codes<G, kSets>(load_as<VecU>(coded + 2 * dim + 4 * pair), weights, sums);
  }
  for (int set = 0; set < kSets; ++set)
    for (int g = 0; g < G; ++g) own[g] += sums[set][g];
}

// bounds[head][page], for G heads: the log of the mass that the codes of each page promise.
template <int G>
void code_pages(const ScoreTask& task, const uint8_t* const* rows, const float* queries, float (*bounds)[kScoreChunk]) {
  constexpr int kAhead = 4;  // pages between a prefetch and its use
  const int64_t dim = task.head_dim, count = task.end_page - task.first_page;
  Vec own[G][kLanes] = {}, shared[G][kLanes] = {};
  for (int64_t start = 0; start < count; start += kLanes) {
    const int64_t width = count - start < kLanes ? count - start : kLanes;
    for (int64_t i = 0; i < width; ++i) {
      if (start + i + kAhead < count) prefetch(rows[start + i + kAhead], 4 * dim);
      Vec page_own[G] = {}, page_shared[G] = {};
      estimate_page<G>(rows[start + i], queries, dim, page_own, page_shared);
      const int64_t tokens = task.length - (task.first_page + start + i) * kLanes;
      for (int g = 0; g < G; ++g) {
        const Vec logits = page_own[g] * task.scale;
        own[g][i] = lane_index() < int32_t(tokens < kLanes ? tokens : kLanes) ? logits : splat(-kInfinity);
        shared[g][i] = page_shared[g];
      }
    }
    for (int g = 0; g < G; ++g) {
      const Vec top = reduce_rows(own[g], Max{});
      Vec masses[kLanes];
      for (int i = 0; i < kLanes; ++i) masses[i] = exp_nonpositive(own[g][i] - top[i]);
      const Vec mass = top + log_positive(reduce_rows(masses, Add{}));
      store(bounds[g] + start, mass + reduce_rows(shared[g], Add{}) * task.scale);
    }
  }
}
