// score_pages: lo.k_min + hi.k_max, or the mass that codes promise, for the heads of a GQA group; each summary is read
// once. Included by kernels_impl.h.

// The summaries of the task's pages, found without a division a page.
template <typename T>
QUEST_INLINE void find_summaries(const ScoreTask& task, const T** rows) {
  int64_t index = task.first_page / task.pages_per_block, sub_page = task.first_page % task.pages_per_block;
  for (int64_t i = 0; i < task.end_page - task.first_page; ++index, sub_page = 0) {
    const int64_t block = task.block_ids[index * task.block_ids_stride];
    const T* chunk = static_cast<const T*>(task.summaries) + block * task.block_stride;
    for (; sub_page < task.pages_per_block && i < task.end_page - task.first_page; ++sub_page, ++i)
      rows[i] = chunk + sub_page * task.page_stride;
  }
}

// sums[g][i] and sums[g][i + 1] += the terms of kWidth channels of a pair of pages.
template <int G, int kWidth, typename Load>
QUEST_INLINE void add_terms(int64_t dim, int64_t d, const float* split, Load load_rows, Vec* a, Vec* b) {
  Vec low_a[kWidth], high_a[kWidth], low_b[kWidth], high_b[kWidth];
  load_rows(low_a, high_a, low_b, high_b);
  for (int g = 0; g < G; ++g) {
    for (int w = 0; w < kWidth; ++w) {
      const Vec negative = load(split + (2 * g) * dim + d + w * kLanes);
      const Vec positive = load(split + (2 * g + 1) * dim + d + w * kLanes);
      a[g] += negative * low_a[w];
      b[g] += negative * low_b[w];
      a[g] += positive * high_a[w];
      b[g] += positive * high_b[w];
    }
  }
}

// bounds[head][page] for G heads; `split` is [G][2][head_dim]: lo, hi, in load_two's order.
template <typename T, int G>
void bound_pages(const ScoreTask& task, const T* const* rows, const float* split, float (*bounds)[kScoreChunk]) {
  constexpr int kAhead = 8;  // pages between a prefetch and its use
  const int64_t dim = task.head_dim, count = task.end_page - task.first_page;
  Vec sums[G][kLanes] = {};
  for (int64_t start = 0; start < count; start += kLanes) {
    const int64_t width = count - start < kLanes ? count - start : kLanes;
    for (int64_t i = 0; i < width; i += 2) {
      const T* first = rows[start + i];
      const T* second = i + 1 < width ? rows[start + i + 1] : first;
      for (int64_t ahead = start + i + kAhead; ahead < start + i + kAhead + 2 && ahead < count; ++ahead)
        prefetch(rows[ahead], 2 * dim * sizeof(T));
      Vec a[G] = {}, b[G] = {};
      int64_t d = 0;
      for (; d + 2 * kLanes <= dim; d += 2 * kLanes)
        add_terms<G, 2>(dim, d, split, [&](Vec* low_a, Vec* high_a, Vec* low_b, Vec* high_b) {
          load_two(first + d, low_a[0], low_a[1]);
          load_two(first + dim + d, high_a[0], high_a[1]);
          load_two(second + d, low_b[0], low_b[1]);
          load_two(second + dim + d, high_b[0], high_b[1]);
        }, a, b);
      if (d < dim)
        add_terms<G, 1>(dim, d, split, [&](Vec* low_a, Vec* high_a, Vec* low_b, Vec* high_b) {
          low_a[0] = load(first + d);
          high_a[0] = load(first + dim + d);
          low_b[0] = load(second + d);
          high_b[0] = load(second + dim + d);
        }, a, b);
      for (int g = 0; g < G; ++g) {
        sums[g][i] = a[g];
        sums[g][i + 1] = b[g];
      }
    }
    for (int g = 0; g < G; ++g) store(bounds[g] + start, reduce_rows(sums[g], Add{}));
  }
}

// One head's query as the two rows that bound_pages takes, (q - a|q|) / 2 and (q + a|q|) / 2; zeros for a null `query`.
template <typename T>
QUEST_INLINE void split_query(const T* query, int64_t dim, float near, float far, float* low, float* high) {
  const auto put = [&](int64_t d, Vec q) {
    const Vec negative = vmin(q, Vec{}), positive = vmax(q, Vec{});
    // the full radius adds no product: 0 * inf
    store(low + d, far == 0.0f ? negative : negative * near + positive * far);
    store(high + d, far == 0.0f ? positive : negative * far + positive * near);
  };
  int64_t d = 0;
  for (; d + 2 * kLanes <= dim; d += 2 * kLanes) {
    Vec first = {}, second = {};
    if (query) load_two(query + d, first, second);
    put(d, first);
    put(d + kLanes, second);
  }
  if (d < dim) put(d, query ? load(query + d) : Vec{});
}

// One head's query in float; zeros for a null `query`.
template <typename T>
QUEST_INLINE void widen_query(const T* query, int64_t dim, float* wide) {
  for (int64_t d = 0; d < dim; d += kLanes) store(wide + d, query ? load(query + d) : Vec{});
}

// bounds[head][page] of G heads from `first` on, of which `heads` exist.
template <typename T, int G>
QUEST_INLINE void summary_bounds(const ScoreTask& task, const T* const* rows, int64_t first, int64_t heads,
                                 float* queries, float (*bounds)[kScoreChunk]) {
  const int64_t dim = task.head_dim;
  for (int64_t g = 0; g < G; ++g) {
    const T* query = g < heads ? static_cast<const T*>(task.query) + (first + g) * task.query_stride : nullptr;
    if (task.kind == Summary::kKeyCodes) widen_query(query, dim, queries + g * dim);
    else split_query(query, dim, task.near, task.far, queries + (2 * g) * dim, queries + (2 * g + 1) * dim);
  }
  if (task.kind == Summary::kKeyCodes) code_pages<G>(task, reinterpret_cast<const uint8_t* const*>(rows), queries, bounds);
  else bound_pages<T, G>(task, rows, queries, bounds);
}

template <typename T>
void score_chunk(const ScoreTask& task) {
  alignas(64) float queries[kHeadBatch * 2 * kMaxHeadDim];
  alignas(64) float bounds[kHeadBatch][kScoreChunk];
  alignas(64) float reduced[kScoreChunk];
  const int64_t count = task.end_page - task.first_page;
  const T* rows[kScoreChunk];
  find_summaries(task, rows);
  const float scale = task.kind == Summary::kKeyCodes ? 1.0f : task.scale;  // codes have it inside
  for (int64_t first = 0; first < task.group; first += kHeadBatch) {
    const int64_t heads = task.group - first < kHeadBatch ? task.group - first : kHeadBatch;
    if (heads == 1) summary_bounds<T, 1>(task, rows, first, heads, queries, bounds);
    else if (heads == 2) summary_bounds<T, 2>(task, rows, first, heads, queries, bounds);
    else if (heads == 3) summary_bounds<T, 3>(task, rows, first, heads, queries, bounds);
    else if (heads == 4) summary_bounds<T, 4>(task, rows, first, heads, queries, bounds);
    else summary_bounds<T, 8>(task, rows, first, heads, queries, bounds);
    for (int64_t g = 0; g < heads; ++g) {
      float* scores = task.scores + (first + g) * task.score_stride;
      if (task.reduction == Reduction::kMass) {
        task.lse[first + g] = scale_and_sum(bounds[g], count, scale, scores);
      } else if (task.reduction == Reduction::kPerQueryHead) {
        for (int64_t i = 0; i < count; ++i) scores[i] = bounds[g][i];
      } else if (first + g == 0) {
        for (int64_t i = 0; i < count; ++i) reduced[i] = bounds[g][i];
      } else if (task.reduction == Reduction::kMax) {
        for (int64_t i = 0; i < count; ++i) {
          const bool greater = bounds[g][i] > reduced[i] || bounds[g][i] != bounds[g][i];  // NaN stays
          reduced[i] = greater ? bounds[g][i] : reduced[i];
        }
      } else {
        for (int64_t i = 0; i < count; ++i) reduced[i] += bounds[g][i];
      }
    }
  }
  if (task.reduction == Reduction::kPerQueryHead || task.reduction == Reduction::kMass) return;
  const float weight = task.reduction == Reduction::kMean ? 1.0f / float(task.group) : 1.0f;
  for (int64_t i = 0; i < count; ++i) task.scores[i] = reduced[i] * weight;
}
