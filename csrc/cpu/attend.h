// sparse_paged_attention: one split of the selected pages, and the merge of the splits. Included by kernels_impl.h.
//
// A layout says how to read a group of sixteen tokens: `Element`; `dot<G>` (q.k of the sixteen tokens for G heads);
// `weigh<G>` (adds p.v of `tokens` tokens, channels d .. d + 15); `touch_keys`, `touch_values` (prefetch a page).

// Values as rows, shared by the two layouts below.
template <typename T>
struct RowValues {
  using Element = T;

  template <int G>
  static QUEST_INLINE void weigh(const T* chunk, int64_t row, int64_t tokens, int64_t d, const KeyTask& task,
                                 const float* weights, int64_t weight_stride, Vec* sums) {
    const T* rows = chunk + row * task.head_dim + d;
    Vec other[G] = {};
    int64_t t = 0;
    for (; t + 1 < tokens; t += 2) {
      const Vec even = load(rows + t * task.head_dim), odd = load(rows + (t + 1) * task.head_dim);
      for (int g = 0; g < G; ++g) {
        sums[g] += even * weights[g * weight_stride + t];
        other[g] += odd * weights[g * weight_stride + t + 1];
      }
    }
    if (t < tokens) {
      const Vec even = load(rows + t * task.head_dim);
      for (int g = 0; g < G; ++g) sums[g] += even * weights[g * weight_stride + t];
    }
    for (int g = 0; g < G; ++g) sums[g] += other[g];
  }

  static QUEST_INLINE void touch_values(const T* chunk, int64_t row, const KeyTask& task) {
    prefetch(chunk + row * task.head_dim, task.page_size * task.head_dim * sizeof(T));
  }
};

template <typename T>
struct RowLayout : RowValues<T> {
  template <int G>
  static QUEST_INLINE void dot(const T* chunk, int64_t row, const KeyTask& task, const float* query, Vec* logits) {
    Vec sums[G][kLanes];
    for (int t = 0; t < kLanes; ++t) {
      const T* key = chunk + (row + t) * task.head_dim;
      Vec sum[G] = {};
      for (int64_t d = 0; d < task.head_dim; d += kLanes) {
        const Vec k = load(key + d);
        for (int g = 0; g < G; ++g) sum[g] += k * load(query + g * task.head_dim + d);
      }
      for (int g = 0; g < G; ++g) sums[g][t] = sum[g];
    }
    for (int g = 0; g < G; ++g) logits[g] = reduce_rows(sums[g], Add{});
  }

  static QUEST_INLINE void touch_keys(const T* chunk, int64_t row, const KeyTask& task) {
    prefetch(chunk + row * task.head_dim, task.page_size * task.head_dim * sizeof(T));
  }
};

// logits[g] += even[d]-channel and odd-channel products, on separate chains.
template <int G, typename LoadPair>
QUEST_INLINE void dot_pairs(int64_t dim, const float* query, Vec* logits, LoadPair load_pair) {
  Vec first[G] = {}, second[G] = {};
  for (int64_t d = 0; d < dim; d += 2) {
    Vec even, odd;
    load_pair(d, even, odd);
    for (int g = 0; g < G; ++g) {
      first[g] += even * query[g * dim + d];
      second[g] += odd * query[g * dim + d + 1];
    }
  }
  for (int g = 0; g < G; ++g) logits[g] = first[g] + second[g];
}

template <typename T>
struct TransposedLayout : RowValues<T> {
  template <int G>
  static QUEST_INLINE void dot(const T* chunk, int64_t row, const KeyTask& task, const float* query, Vec* logits) {
    dot_pairs<G>(task.head_dim, query, logits, [&](int64_t d, Vec& even, Vec& odd) {
      even = load(chunk + d * task.block_size + row);
      odd = load(chunk + (d + 1) * task.block_size + row);
    });
  }

  static QUEST_INLINE void touch_keys(const T* chunk, int64_t row, const KeyTask& task) {
    for (int64_t d = 0; d < task.head_dim; ++d)
      prefetch(chunk + d * task.block_size + row, task.page_size * sizeof(T));
  }
};

struct AmxLayout {
  using Element = BFloat16;

  template <int G>
  static QUEST_INLINE void dot(const BFloat16* chunk, int64_t row, const KeyTask& task, const float* query,
                               Vec* logits) {
    const BFloat16* lines = chunk + row * task.head_dim;
    dot_pairs<G>(task.head_dim, query, logits,
                 [&](int64_t d, Vec& even, Vec& odd) { load_pairs(lines + d * kLanes, even, odd); });
  }

  template <int G>
  static QUEST_INLINE void weigh(const BFloat16* chunk, int64_t row, int64_t tokens, int64_t d, const KeyTask& task,
                                 const float* weights, int64_t weight_stride, Vec* sums) {
    const BFloat16* lines = chunk + d * task.block_size + row * kLanes;
    Vec other[G] = {};
    int64_t t = 0;
    for (; t + 1 < tokens; t += 2) {
      Vec even, odd;
      load_pairs(lines + t * kLanes, even, odd);
      for (int g = 0; g < G; ++g) {
        sums[g] += even * weights[g * weight_stride + t];
        other[g] += odd * weights[g * weight_stride + t + 1];
      }
    }
    if (t < tokens) {  // the pair's second token was never written: don't multiply what lies there
      Vec even, odd;
      load_pairs(lines + t * kLanes, even, odd);
      for (int g = 0; g < G; ++g) sums[g] += even * weights[g * weight_stride + t];
    }
    for (int g = 0; g < G; ++g) sums[g] += other[g];
  }

  static QUEST_INLINE void touch_keys(const BFloat16* chunk, int64_t row, const KeyTask& task) {
    prefetch(chunk + row * task.head_dim, task.page_size * task.head_dim * sizeof(BFloat16));
  }

  static QUEST_INLINE void touch_values(const BFloat16* chunk, int64_t row, const KeyTask& task) {
    for (int64_t d = 0; d < task.head_dim; d += kLanes)
      prefetch(chunk + d * task.block_size + row * kLanes, task.page_size * kLanes * sizeof(BFloat16));
  }
};

// Where a page lies: element offset of its chunk, and its first row there.
struct Place {
  int64_t chunk, row, tokens;
};

QUEST_INLINE Place place_of(const KeyTask& task, int64_t i) {
  const int64_t first = int64_t(task.pages[i]) * task.page_size;
  const int64_t block = task.block_ids[(first / task.block_size) * task.block_ids_stride];
  const int64_t left = task.seq_len - first;
  return {block * task.block_stride, first % task.block_size, left < task.page_size ? left : task.page_size};
}

constexpr int64_t kSplitStride = kSplitTokens > kMaxPageSize ? kSplitTokens : kMaxPageSize;

// The queries of G heads from `first` on, of which `heads` exist, in float; the rest zeros.
template <typename T, int G>
QUEST_INLINE void widen_queries(const KeyTask& task, int64_t first, int64_t heads, float* query) {
  for (int64_t g = 0; g < G; ++g) {
    const T* source = g < heads ? static_cast<const T*>(task.query) + (first + g) * task.query_stride : nullptr;
    widen_query(source, task.head_dim, query + g * task.head_dim);
  }
}

// Logits of every token of the split, heads kSplitStride apart; masked lanes get -inf. Returns each head's maximum.
// `values`, where they are wanted next: block 0 of this kv head. Not inlined: its callers share it.
template <typename Layout, int G>
__attribute__((noinline)) void split_logits(const KeyTask& task, const void* values, const float* query, float* logits,
                                            float* row_max) {
  using T = typename Layout::Element;
  const T* keys = static_cast<const T*>(task.keys);
  const Vec masked = splat(-__builtin_inff());
  Vec maxima[G];
  for (int g = 0; g < G; ++g) maxima[g] = masked;
  for (int64_t i = 0; i < task.num_pages; ++i) {
    const Place place = place_of(task, i);
    if (i + 1 < task.num_pages) {
      const Place next = place_of(task, i + 1);
      Layout::touch_keys(keys + next.chunk, next.row, task);
    } else if (values) {
      const Place next = place_of(task, 0);
      Layout::touch_values(static_cast<const T*>(values) + next.chunk, next.row, task);
    }
    for (int64_t t = 0; t < task.page_size; t += kLanes) {
      Vec scores[G];
      if (t < place.tokens) {
        Layout::template dot<G>(keys + place.chunk, place.row + t, task, query, scores);
        for (int g = 0; g < G; ++g) {
          scores[g] *= task.scale;
          if (task.softcap > 0.0f) scores[g] = tanh(scores[g] / task.softcap) * task.softcap;
        }
      }
      for (int g = 0; g < G; ++g) {
        if (t + kLanes > place.tokens)
          scores[g] = lane_index() < int32_t(place.tokens - t) ? (t < place.tokens ? scores[g] : masked) : masked;
        maxima[g] = vmax(maxima[g], scores[g]);
        store(logits + g * kSplitStride + i * task.page_size + t, scores[g]);
      }
    }
  }
  for (int g = 0; g < G; ++g) row_max[g] = reduce(maxima[g], Max{});
}

// Logits to weights, in place; masked lanes become exactly zero. Returns the sum of the weights.
QUEST_INLINE float exponentiate(float* logits, int64_t count, float maximum) {
  Vec total = {};
  const Vec lowest = splat(-__builtin_inff());
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec logit = load(logits + i);
    const Vec weight = logit == lowest ? Vec{} : exp_nonpositive(logit - maximum);
    total += weight;
    store(logits + i, weight);
  }
  return reduce(total, Add{});
}

template <typename Layout, int G>
void split_output(const AttendTask& task, const float* weights, float* output) {
  using T = typename Layout::Element;
  const T* values = static_cast<const T*>(task.values);
  for (int64_t i = 0; i < G * task.head_dim; ++i) output[i] = 0.0f;
  for (int64_t i = 0; i < task.num_pages; ++i) {
    const Place place = place_of(task, i);
    if (i + 1 < task.num_pages) {
      const Place next = place_of(task, i + 1);
      Layout::touch_values(values + next.chunk, next.row, task);
    }
    for (int64_t d = 0; d < task.head_dim; d += kLanes) {
      Vec sums[G];
      for (int g = 0; g < G; ++g) sums[g] = load(output + g * task.head_dim + d);
      Layout::template weigh<G>(values + place.chunk, place.row, place.tokens, d, task,
                                weights + i * task.page_size, kSplitStride, sums);
      for (int g = 0; g < G; ++g) store(output + g * task.head_dim + d, sums[g]);
    }
  }
}

// `heads` <= G real heads, the rest zero queries.
template <typename Layout, int G>
void attend_heads(const AttendTask& task, int64_t first, int64_t heads) {
  using T = typename Layout::Element;
  alignas(64) float query[G * kMaxHeadDim];
  alignas(64) float output[G * kMaxHeadDim];
  alignas(64) float logits[G * kSplitStride];
  float row_max[G];
  widen_queries<T, G>(task, first, heads, query);
  split_logits<Layout, G>(task, task.values, query, logits, row_max);
  for (int64_t g = 0; g < G; ++g) {
    const float sum = exponentiate(logits + g * kSplitStride, task.num_pages * task.page_size, row_max[g]);
    if (g >= heads) continue;
    task.row_max[first + g] = row_max[g];
    task.row_sum[first + g] = sum;
  }
  split_output<Layout, G>(task, logits, output);
  float* partial = task.partial + first * task.head_dim;
  for (int64_t i = 0; i < heads * task.head_dim; i += kLanes) store(partial + i, load(output + i));
}

// Calls fn<G>(first, heads) for a group's heads, `heads` <= G of them at a time.
template <typename Fn>
QUEST_INLINE void for_head_batches(int64_t group, Fn fn) {
  for (int64_t first = 0; first < group; first += kHeadBatch) {
    const int64_t heads = group - first < kHeadBatch ? group - first : kHeadBatch;
    if (heads == 1) fn.template operator()<1>(first, heads);
    else if (heads == 2) fn.template operator()<2>(first, heads);
    else if (heads == 3) fn.template operator()<3>(first, heads);
    else if (heads == 4) fn.template operator()<4>(first, heads);
    else fn.template operator()<8>(first, heads);
  }
}

template <typename Layout>
void attend_batches(const AttendTask& task) {
  for_head_batches(task.group, [&]<int G>(int64_t first, int64_t heads) { attend_heads<Layout, G>(task, first, heads); });
}

template <typename T>
void merge_splits(const MergeTask& task) {
  for (int64_t g = 0; g < task.group; ++g) {
    float maximum = -__builtin_inff(), total = 0.0f;
    for (int64_t s = 0; s < task.splits; ++s) {
      const float candidate = task.row_max[s * task.group + g];
      maximum = candidate > maximum ? candidate : maximum;
    }
    Vec sums[kMaxHeadDim / kLanes];
    const int64_t vectors = task.head_dim / kLanes;
    for (int64_t i = 0; i < vectors; ++i) sums[i] = Vec{};
    for (int64_t s = 0; s < task.splits; ++s) {
      const int64_t row = s * task.group + g;
      if (task.row_max[row] == -__builtin_inff()) continue;  // every logit -inf
      const float factor = task.splits == 1 ? 1.0f : exp_nonpositive(splat(task.row_max[row] - maximum))[0];
      total += factor * task.row_sum[row];
      for (int64_t i = 0; i < vectors; ++i)
        sums[i] += load(task.partial + row * task.head_dim + i * kLanes) * factor;
    }
    T* output = static_cast<T*>(task.output) + g * task.output_stride;
    const bool any = total > 0.0f || total != total;  // NaN stays
    for (int64_t i = 0; i < vectors; ++i) store(output + i * kLanes, any ? sums[i] / total : Vec{});
  }
}
