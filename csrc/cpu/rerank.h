// rerank_pages: the mass that the keys of listed pages hold. Included by kernels_impl.h.

// masses[i], a whole vector: log of the sum of e^logit over the tokens of page i, -inf past the last of `pages`; a NaN
// leaves its own page NaN.
__attribute__((noinline)) void key_masses(const float* logits, int64_t pages, int64_t page_size, float* masses) {
  Vec tops[kLanes], sums[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) {
    tops[i] = splat(-kInfinity);
    for (int64_t t = 0; i < pages && t < page_size; t += kLanes) {
      const Vec logit = load(logits + i * page_size + t);
      tops[i] = logit > tops[i] ? logit : tops[i];
    }
  }
  const Vec top = reduce_rows(tops, Max{});
  const VecI infinite = (top == kInfinity) | (top == -kInfinity);
  const Vec shift = infinite ? Vec{} : top;
  for (int64_t i = 0; i < kLanes; ++i) {
    sums[i] = Vec{};
    for (int64_t t = 0; i < pages && t < page_size; t += kLanes)  // +inf counts as 0, in this order a NaN stays one
      sums[i] += exp_nonpositive(vmin(Vec{}, load(logits + i * page_size + t) - shift[i]));
  }
  const Vec sum = reduce_rows(sums, Add{});
  store(masses, infinite & (sum == sum) ? top : shift + log_positive(sum));
}

// `heads` <= G real heads, the rest zero queries.
template <typename Layout, int G>
void rerank_heads(const RerankTask& task, int64_t first, int64_t heads) {
  alignas(64) float query[G * kMaxHeadDim];
  alignas(64) float logits[G * kSplitStride];
  float row_max[G];
  widen_queries<typename Layout::Element, G>(task, first, heads, query);
  split_logits<Layout, G>(task, nullptr, query, logits, row_max);
  for (int64_t g = 0; g < heads; ++g)
    key_masses(logits + g * kSplitStride, task.num_pages, task.page_size, task.logits + (first + g) * kLanes);
}

template <typename Layout>
void rerank_batches(const RerankTask& task) {
  for_head_batches(task.group, [&]<int G>(int64_t first, int64_t heads) { rerank_heads<Layout, G>(task, first, heads); });
}
