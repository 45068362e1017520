// update_page_summaries: min and max over the written rows of one page. Included by kernels_impl.h.

template <typename T>
void summarise_rows(const SummaryTask& task) {
  const T* rows = static_cast<const T*>(task.keys) + task.first_row * task.head_dim;
  T* summary = static_cast<T*>(task.summary);
  for (int64_t d = 0; d < task.head_dim; d += kLanes) {
    Vec low = load(rows + d), high = low;
    for (int64_t row = 1; row < task.written; ++row) {
      const Vec key = load(rows + row * task.head_dim + d);
      low = vmin(low, key);
      high = vmax(high, key);
    }
    store(summary + d, low);
    store(summary + task.head_dim + d, high);
  }
}

// Folds one group of sixteen tokens into channel i's running minimum and maximum; tokens past the end count as the
// group's first, which is always written.
QUEST_INLINE void fold_tokens(Vec key, int64_t valid, bool first, Vec& low, Vec& high) {
  if (valid < kLanes) key = lane_index() < int32_t(valid) ? key : splat(key[0]);
  low = first ? key : vmin(low, key);
  high = first ? key : vmax(high, key);
}

template <typename T>
void summarise_transposed(const SummaryTask& task) {
  const T* columns = static_cast<const T*>(task.keys) + task.first_row;
  T* summary = static_cast<T*>(task.summary);
  Vec low[kLanes] = {}, high[kLanes] = {};
  for (int64_t d = 0; d < task.head_dim; d += kLanes) {
    for (int64_t token = 0; token < task.written; token += kLanes)
      for (int i = 0; i < kLanes; ++i)
        fold_tokens(load(columns + (d + i) * task.block_size + token), task.written - token, token == 0, low[i],
                    high[i]);
    store(summary + d, reduce_rows(low, Min{}));
    store(summary + task.head_dim + d, reduce_rows(high, Max{}));
  }
}

void summarise_amx(const SummaryTask& task) {
  const BFloat16* groups = static_cast<const BFloat16*>(task.keys) + task.first_row * task.head_dim;
  BFloat16* summary = static_cast<BFloat16*>(task.summary);
  Vec low[kLanes] = {}, high[kLanes] = {};
  for (int64_t d = 0; d < task.head_dim; d += kLanes) {
    for (int64_t token = 0; token < task.written; token += kLanes) {
      const BFloat16* lines = groups + (token * task.head_dim) + d * kLanes;
      for (int i = 0; i < kLanes; i += 2) {
        Vec even, odd;
        load_pairs(lines + i * kLanes, even, odd);
        fold_tokens(even, task.written - token, token == 0, low[i], high[i]);
        fold_tokens(odd, task.written - token, token == 0, low[i + 1], high[i + 1]);
      }
    }
    store(summary + d, reduce_rows(low, Min{}));
    store(summary + task.head_dim + d, reduce_rows(high, Max{}));
  }
}
