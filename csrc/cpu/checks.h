// Checks of arguments, and what names and rows of policies mean. Included by bindings.cpp.

DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return DType::kFloat;
    case at::kBFloat16: return DType::kBFloat16;
    case at::kHalf: return DType::kHalf;
    default: TORCH_CHECK(false, name, ": expected dtype float32, bfloat16 or float16, got ", tensor.scalar_type());
  }
}

void check_cpu(const Tensor& tensor, const char* name) {
  TORCH_CHECK(tensor.device().is_cpu(), name, ": expected a tensor on cpu, got ", tensor.device());
}

void check_dtype(const Tensor& tensor, const char* name, at::ScalarType expected) {
  TORCH_CHECK(tensor.scalar_type() == expected, name, ": expected dtype ", expected, ", got ", tensor.scalar_type());
}

void check_dim(const Tensor& tensor, const char* name, int64_t expected) {
  TORCH_CHECK(tensor.dim() == expected, name, ": expected ", expected, " dimensions, got shape ", tensor.sizes());
}

void check_size(const Tensor& tensor, const char* name, int64_t dim, int64_t expected) {
  TORCH_CHECK(tensor.size(dim) == expected, name, ": expected size ", expected, " at dimension ", dim, ", got shape ",
              tensor.sizes());
}

void check_dense_tail(const Tensor& tensor, const char* name, int64_t dims) {
  int64_t expected = 1;
  for (int64_t dim = tensor.dim() - 1; dim >= tensor.dim() - dims; --dim) {
    TORCH_CHECK(tensor.size(dim) == 1 || tensor.stride(dim) == expected, name, ": expected the last ", dims,
                " dimensions to be contiguous, got shape ", tensor.sizes(), " and strides ", tensor.strides());
    expected *= tensor.size(dim);
  }
}

void check_rows(const Tensor& tensor, const char* name, at::ScalarType dtype, int64_t rows) {
  check_cpu(tensor, name);
  check_dtype(tensor, name, dtype);
  check_dim(tensor, name, 1);
  check_size(tensor, name, 0, rows);
}

void check_int32_rows(const Tensor& tensor, const char* name, int64_t rows) {
  check_rows(tensor, name, at::kInt, rows);
}

void check_head_dim(const Tensor& tensor, const char* name) {
  const int64_t dim = tensor.size(-1);
  TORCH_CHECK(dim > 0 && dim % kLanes == 0 && dim <= kMaxHeadDim, name, ": expected a head_dim that is a multiple of ",
              kLanes, " up to ", kMaxHeadDim, ", got ", dim);
}

void check_page_size(int64_t page_size, int64_t block_size) {
  TORCH_CHECK(page_size > 0 && page_size % kLanes == 0 && page_size <= kMaxPageSize && block_size % page_size == 0,
              "page_size: expected a multiple of ", kLanes, " up to ", kMaxPageSize, " that divides block_size ",
              block_size, ", got ", page_size);
}

void check_cache(const Tensor& cache, const char* name) {
  check_cpu(cache, name);
  check_dim(cache, name, 4);
  check_head_dim(cache, name);
  check_dense_tail(cache, name, 2);
}

void check_summaries(const Tensor& summaries) {
  check_cpu(summaries, "summaries");
  check_dim(summaries, "summaries", 5);
  check_size(summaries, "summaries", 3, 2);
  check_head_dim(summaries, "summaries");
  check_dense_tail(summaries, "summaries", 2);
}

void check_query(const Tensor& query, const Tensor& cache, int64_t num_kv_heads) {
  check_cpu(query, "query");
  check_dim(query, "query", 3);
  check_dtype(query, "query", cache.scalar_type());
  check_size(query, "query", 2, cache.size(-1));
  check_dense_tail(query, "query", 1);
  TORCH_CHECK(num_kv_heads > 0 && query.size(1) % num_kv_heads == 0 && query.size(1) > 0,
              "query: expected a multiple of num_kv_heads ", num_kv_heads, " at dimension 1, got shape ",
              query.sizes());
}

void check_scores(const Tensor& page_scores) {
  check_cpu(page_scores, "page_scores");
  check_dtype(page_scores, "page_scores", at::kFloat);
  check_dim(page_scores, "page_scores", 3);
}

void check_log_sums(const Tensor& log_sums, const Tensor& query) {
  check_cpu(log_sums, "log_sums");
  check_dtype(log_sums, "log_sums", at::kFloat);
  check_dim(log_sums, "log_sums", 2);
  check_size(log_sums, "log_sums", 0, query.size(0));
  check_size(log_sums, "log_sums", 1, query.size(1));
  check_dense_tail(log_sums, "log_sums", 1);
}

void check_page_lists(const Tensor& lists, const char* name, int64_t num_reqs) {
  check_cpu(lists, name);
  check_dtype(lists, name, at::kInt);
  check_dim(lists, name, 3);
  check_size(lists, name, 0, num_reqs);
}

Format parse_format(c10::string_view name, const Tensor& cache) {
  if (name == "rows") return Format::kRows;
  // vLLM packs for "amx" only where head_dim is a multiple of 32, and transposes otherwise
  if (name == "vec" || name == "vec16" || (name == "amx" && cache.size(3) % 32 != 0)) return Format::kTransposed;
  TORCH_CHECK(name == "amx", "kv_format: expected amx, vec, vec16 or rows, got ", name);
  TORCH_CHECK(cache.scalar_type() == at::kBFloat16, "kv_format amx: expected dtype BFloat16, got ",
              cache.scalar_type());
  TORCH_CHECK(cache.size(2) % kLanes == 0, "kv_format amx: expected a block_size that is a multiple of ", kLanes,
              ", got ", cache.size(2));
  return Format::kAmx;
}

Reduction parse_reduction(c10::string_view name) {
  if (name == "max") return Reduction::kMax;
  if (name == "mean") return Reduction::kMean;
  if (name == "mass") return Reduction::kMass;
  TORCH_CHECK(name == "per_query_head", "group_reduction: expected max, mean, mass or per_query_head, got ", name);
  return Reduction::kPerQueryHead;
}

// What each row does instead of the call's own, by its place in quest_vllm.config.POLICIES; `own` where nothing is said.
class Policies {
 public:
  Policies(const std::optional<Tensor>& policies, Reduction own, int64_t num_reqs) : own_(own) {
    if (!policies) return;
    check_int32_rows(*policies, "policies", num_reqs);
    data_ = policies->const_data_ptr<int32_t>();
    stride_ = policies->stride(0);
    for (int64_t row = 0; row < num_reqs; ++row) {
      const int32_t place = data_[row * stride_];
      TORCH_CHECK(place >= 0 && place <= int32_t(Reduction::kTwoStage), "policies[", row, "]: expected 0 to ",
                  int32_t(Reduction::kTwoStage), ", got ", place);
    }
  }
  Reduction of(int64_t row) const { return data_ ? Reduction(data_[row * stride_]) : own_; }

 private:
  Reduction own_;
  const int32_t* data_ = nullptr;
  int64_t stride_ = 0;
};

Summary parse_summary(c10::string_view name, int64_t head_dim, int64_t page_size) {
  if (name == "min_max") return Summary::kMinMax;
  TORCH_CHECK(name == "key_codes", "page_summary: expected min_max or key_codes, got ", name);
  TORCH_CHECK(page_size == kLanes, "page_size: expected ", kLanes, " with page_summary key_codes, got ", page_size);
  TORCH_CHECK(head_dim % (4 * kLanes) == 0, "head_dim: expected a multiple of ", 4 * kLanes,
              " with page_summary key_codes, got ", head_dim);
  return Summary::kKeyCodes;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void check_scored(int64_t length, int64_t row, const Tensor& page_scores, int64_t page_size) {
  const int64_t max_pages = page_scores.size(2);
  TORCH_CHECK(length >= 0 && ceil_div(length, page_size) <= max_pages, "seq_lens[", row, "]: expected 0 to ",
              max_pages * page_size, " (the pages of a row of page_scores), got ", length);
}

// seq_lens as a vector; every block that a request of that length uses is checked here, once, so that the kernels
// read no block outside the cache.
std::vector<int64_t> checked_lengths(const Tensor& block_table, const Tensor& seq_lens, int64_t num_reqs,
                                     int64_t block_size, int64_t num_blocks) {
  check_cpu(block_table, "block_table");
  check_dtype(block_table, "block_table", at::kInt);
  check_dim(block_table, "block_table", 2);
  check_size(block_table, "block_table", 0, num_reqs);
  check_int32_rows(seq_lens, "seq_lens", num_reqs);
  std::vector<int64_t> lengths(num_reqs);
  const int32_t* seq = seq_lens.const_data_ptr<int32_t>();
  const int32_t* table = block_table.const_data_ptr<int32_t>();
  for (int64_t row = 0; row < num_reqs; ++row) {
    const int64_t length = lengths[row] = seq[row * seq_lens.stride(0)];
    TORCH_CHECK(length >= 0 && length <= block_table.size(1) * block_size, "seq_lens[", row, "]: expected 0 to ",
                block_table.size(1) * block_size, " (the blocks of a row of block_table), got ", length);
    const int32_t* ids = table + row * block_table.stride(0);
    for (int64_t i = 0; i < ceil_div(length, block_size); ++i) {
      const int32_t id = ids[i * block_table.stride(1)];
      TORCH_CHECK(id >= 0 && id < num_blocks, "block_table[", row, ", ", i, "]: expected a block id from 0 to ",
                  num_blocks - 1, ", got ", id);
    }
  }
  return lengths;
}
