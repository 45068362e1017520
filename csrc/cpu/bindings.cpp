// Threading and registration of the operations; the arithmetic is in kernels_impl.h.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/clone.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "kernels.h"

namespace quest {
namespace {

using at::Tensor;

#include "checks.h"

// The widest kernels this processor runs; QUEST_VLLM_CPU_ISA (generic, avx2, avx512) asks for others, for tests.
const Kernels& choose_kernels() {
  const char* wanted = std::getenv("QUEST_VLLM_CPU_ISA");
  const auto allowed = [&](const Kernels& kernels) { return !wanted || !std::strcmp(wanted, kernels.isa); };
#ifdef QUEST_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && allowed(kAvx512Kernels)) return kAvx512Kernels;
  if (avx2 && allowed(kAvx2Kernels)) return kAvx2Kernels;
#endif
  TORCH_CHECK(allowed(kGenericKernels), "QUEST_VLLM_CPU_ISA: expected an instruction set of this processor, got ",
              wanted);
  return kGenericKernels;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose_kernels();
  return chosen;
}

// Calls fn(task) for every task on the intra-op pool; a free thread takes the next task. `bytes` is about what all
// tasks read: a thread has to be worth waking.
template <typename Fn>
void for_each_task(int64_t tasks, int64_t bytes, const Fn& fn) {
  constexpr int64_t kBytesPerThread = 256 * 1024;
  const int64_t threads = std::min<int64_t>({tasks, at::get_num_threads(), 1 + bytes / kBytesPerThread});
  if (threads <= 1 || at::in_parallel_region()) {
    for (int64_t task = 0; task < tasks; ++task) fn(task);
    return;
  }
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) fn(task);
  });
}

char* byte_pointer(const Tensor& tensor) { return static_cast<char*>(tensor.data_ptr()); }

struct TouchedPage {
  int64_t page, last_row;
};

// The pages that slot_mapping names, each with the last row written.
std::vector<TouchedPage> touched_pages(const Tensor& slot_mapping, int64_t num_slots, int64_t page_size) {
  std::vector<TouchedPage> touched;
  const int64_t* slots = slot_mapping.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < slot_mapping.size(0); ++i) {
    const int64_t slot = slots[i * slot_mapping.stride(0)];
    if (slot < 0) continue;  // padding
    TORCH_CHECK(slot < num_slots, "slot_mapping[", i, "]: expected a slot below ", num_slots, ", got ", slot);
    const int64_t page = slot / page_size, row = slot % page_size;
    if (!touched.empty() && touched.back().page == page) {
      touched.back().last_row = std::max(touched.back().last_row, row);
    } else {
      touched.push_back({page, row});
    }
  }
  std::sort(touched.begin(), touched.end(), [](const TouchedPage& a, const TouchedPage& b) {
    return a.page != b.page ? a.page < b.page : a.last_row > b.last_row;
  });
  const auto same = [](const TouchedPage& a, const TouchedPage& b) { return a.page == b.page; };
  touched.erase(std::unique(touched.begin(), touched.end(), same), touched.end());
  return touched;
}

void update_page_summaries(const Tensor& key_cache, const Tensor& summaries, const Tensor& slot_mapping,
                           int64_t page_size, c10::string_view kv_format, c10::string_view page_summary) {
  check_cache(key_cache, "key_cache");
  check_summaries(summaries);
  const int64_t num_blocks = key_cache.size(0), heads = key_cache.size(1), block_size = key_cache.size(2);
  check_page_size(page_size, block_size);
  const int64_t pages_per_block = block_size / page_size;
  check_dtype(summaries, "summaries", key_cache.scalar_type());
  check_size(summaries, "summaries", 0, num_blocks);
  check_size(summaries, "summaries", 1, heads);
  check_size(summaries, "summaries", 2, pages_per_block);
  check_size(summaries, "summaries", 4, key_cache.size(3));
  check_cpu(slot_mapping, "slot_mapping");
  check_dtype(slot_mapping, "slot_mapping", at::kLong);
  check_dim(slot_mapping, "slot_mapping", 1);
  const DType dtype = dtype_of(key_cache, "key_cache");
  const Format format = parse_format(kv_format, key_cache);
  const Summary kind = parse_summary(page_summary, key_cache.size(3), page_size);
  const std::vector<TouchedPage> touched = touched_pages(slot_mapping, num_blocks * block_size, page_size);
  const int64_t size = key_cache.element_size();
  const char* keys = byte_pointer(key_cache);
  char* out = byte_pointer(summaries);
  constexpr int64_t kItemsPerTask = 8;
  const int64_t items = int64_t(touched.size()) * heads;
  for_each_task(ceil_div(items, kItemsPerTask), items * page_size * key_cache.size(3) * size, [&](int64_t task) {
    for (int64_t item = task * kItemsPerTask; item < std::min(items, (task + 1) * kItemsPerTask); ++item) {
      const TouchedPage& page = touched[item / heads];
      const int64_t head = item % heads, block = page.page / pages_per_block, sub_page = page.page % pages_per_block;
      const SummaryTask work{
          keys + size * (block * key_cache.stride(0) + head * key_cache.stride(1)),
          out + size * (block * summaries.stride(0) + head * summaries.stride(1) + sub_page * summaries.stride(2)),
          block_size, key_cache.size(3), sub_page * page_size, page.last_row + 1, kind};
      kernels().summarise(dtype, format, work);
    }
  });
}

// A stretch of work of one (request, head): scores' chunk or attention's split `part`.
struct Part {
  int64_t row, head, part;
};

// One call of score_pages: its output, and the scratch of the mass reduction. A part is a chunk of one (row, head).
struct Scores {
  Tensor output;                    // [num_reqs, num_score_heads, max_pages]
  std::vector<int64_t> pages;       // [num_reqs]
  std::vector<Part> parts;          // those of a (row, head) lie together
  std::vector<int64_t> first_part;  // [num_reqs * heads + 1]
  Tensor logits;                    // [parts, group, kScoreChunk]
  Tensor part_lse;                  // [parts, group]
};

Scores plan_scores(std::vector<int64_t> pages, int64_t heads, int64_t group, int64_t max_pages, Reduction reduction,
                   const at::TensorOptions& options) {
  Scores scores;
  const int64_t num_reqs = pages.size();
  for (int64_t row = 0; row < num_reqs; ++row) {
    const int64_t chunks = std::max<int64_t>(1, ceil_div(pages[row], kScoreChunk));
    for (int64_t head = 0; head < heads; ++head) {
      scores.first_part.push_back(scores.parts.size());
      for (int64_t part = 0; part < chunks; ++part) scores.parts.push_back({row, head, part});
    }
  }
  const int64_t num_parts = scores.parts.size();
  scores.first_part.push_back(num_parts);
  scores.pages = std::move(pages);
  const int64_t score_heads = reduction == Reduction::kPerQueryHead ? heads * group : heads;
  scores.output = at::empty({num_reqs, score_heads, max_pages}, options);
  if (reduction == Reduction::kMass) {
    scores.logits = at::empty({num_parts, group, kScoreChunk}, options);
    scores.part_lse = at::full({num_parts, group}, -INFINITY, options);
  }
  return scores;
}

// Calls fn(task, row, head, first page, last page + 1) for every part.
template <typename Fn>
void for_each_part(const Scores& scores, int64_t bytes_per_page, const Fn& fn) {
  const int64_t num_parts = scores.parts.size();
  for_each_task(num_parts, num_parts * kScoreChunk * bytes_per_page, [&](int64_t task) {
    const auto [row, head, part] = scores.parts[task];
    const int64_t first = part * kScoreChunk;
    fn(task, row, head, first, std::min(scores.pages[row], first + kScoreChunk));
  });
}

// A request's log-sum-exp from those of its parts, `group` apart; 0 where no page has mass.
float merge_lse(const float* parts, int64_t count, int64_t group) {
  float top = -INFINITY, sum = 0;
  for (int64_t i = 0; i < count; ++i) top = std::max(top, parts[i * group]);
  if (std::isinf(top)) return top < 0 ? 0.0f : top;
  for (int64_t i = 0; i < count; ++i) sum += std::exp(parts[i * group] - top);
  return top + std::log(sum);
}

// Second pass of the mass reduction: every head's normaliser, then the scores of every part.
void combine_parts(const Scores& scores, int64_t heads, int64_t group, const Policies& policies,
                   const std::optional<Tensor>& log_sums) {
  const int64_t units = int64_t(scores.first_part.size()) - 1, max_pages = scores.output.size(2);
  const Tensor unit_lse = at::empty({units, group}, scores.output.options());
  float* lse = unit_lse.data_ptr<float>();
  const float* part_lse = scores.part_lse.const_data_ptr<float>();
  for (int64_t unit = 0; unit < units; ++unit) {
    const int64_t first = scores.first_part[unit], count = scores.first_part[unit + 1] - first;
    for (int64_t g = 0; g < group; ++g) lse[unit * group + g] = merge_lse(part_lse + first * group + g, count, group);
  }
  if (log_sums) log_sums->copy_(unit_lse.view(log_sums->sizes()));
  const float* logits = scores.logits.const_data_ptr<float>();
  float* out = scores.output.data_ptr<float>();
  constexpr int64_t kCombineCost = 16;  // a logit costs about what reading that many bytes does
  for_each_part(scores, group * kCombineCost,
                [&](int64_t task, int64_t row, int64_t head, int64_t first, int64_t end) {
    const int64_t unit = row * heads + head;
    kernels().combine_mass(MassTask{logits + task * group * kScoreChunk, lse + unit * group,
                                    out + unit * max_pages + first, group, end - first, kScoreChunk,
                                    policies.of(row)});
  });
}

Tensor score_pages(const Tensor& query, const Tensor& summaries, const Tensor& block_table, const Tensor& seq_lens,
                   int64_t page_size, c10::string_view group_reduction, double bound_radius, double scale,
                   c10::string_view page_summary, const std::optional<Tensor>& row_policies,
                   const std::optional<Tensor>& log_sums) {
  check_summaries(summaries);
  const int64_t heads = summaries.size(1), pages_per_block = summaries.size(2);
  check_page_size(page_size, page_size * pages_per_block);
  check_query(query, summaries, heads);
  const Reduction reduction = parse_reduction(group_reduction);
  const Summary kind = parse_summary(page_summary, query.size(2), page_size);
  TORCH_CHECK(bound_radius >= 0 && bound_radius <= 1, "bound_radius: expected a number from 0 to 1, got ",
              bound_radius);
  const DType dtype = dtype_of(query, "query");
  const int64_t num_reqs = query.size(0), group = query.size(1) / heads;
  std::vector<int64_t> pages =
      checked_lengths(block_table, seq_lens, num_reqs, page_size * pages_per_block, summaries.size(0));
  const std::vector<int64_t> lengths = pages;
  const Policies policies(row_policies, reduction, num_reqs);
  if (log_sums) check_log_sums(*log_sums, query);
  for (int64_t row = 0; row < num_reqs; ++row) {  // a window needs no score
    pages[row] = policies.of(row) == Reduction::kWindow ? 0 : ceil_div(pages[row], page_size);
  }
  const int64_t max_pages = block_table.size(1) * pages_per_block;
  const bool mass = reduction == Reduction::kMass;
  const int64_t outputs_per_head = reduction == Reduction::kPerQueryHead ? group : 1;
  const Scores scores =
      plan_scores(std::move(pages), heads, group, max_pages, reduction, query.options().dtype(at::kFloat));
  float* logits = mass ? scores.logits.data_ptr<float>() : nullptr;
  float* part_lse = mass ? scores.part_lse.data_ptr<float>() : nullptr;
  const int64_t size = query.element_size();
  const char* q = byte_pointer(query);
  const char* rows = byte_pointer(summaries);
  const int32_t* table = block_table.const_data_ptr<int32_t>();
  float* out = scores.output.data_ptr<float>();
  for_each_part(scores, 2 * query.size(2) * size,
                [&](int64_t task, int64_t row, int64_t head, int64_t first, int64_t end) {
    float* row_scores = out + (row * heads + head) * outputs_per_head * max_pages;
    if (end > first) {
      const ScoreTask work{q + size * (row * query.stride(0) + head * group * query.stride(1)),
                           rows + size * head * summaries.stride(1), table + row * block_table.stride(0),
                           mass ? logits + task * group * kScoreChunk : row_scores + first,
                           mass ? part_lse + task * group : nullptr,
                           query.stride(1), summaries.stride(0), summaries.stride(2), block_table.stride(1),
                           mass ? kScoreChunk : max_pages, group, query.size(2), pages_per_block, first, end, lengths[row],
                           kind, reduction,
                           float((1 + bound_radius) / 2), float((1 - bound_radius) / 2), float(scale)};
      kernels().score(dtype, work);
    }
    if (end < scores.pages[row]) return;
    for (int64_t i = 0; i < outputs_per_head; ++i)
      std::fill(row_scores + i * max_pages + end, row_scores + (i + 1) * max_pages, -INFINITY);
  });
  if (mass) combine_parts(scores, heads, group, policies, log_sums);
  return scores.output;
}

// What select_pages takes, or with `shortlist` shortlist_pages, which lists one page more than a budget may have.
Tensor choose_rows(const Tensor& page_scores, const Tensor& seq_lens, const Tensor& page_budgets, int64_t page_size,
                   int64_t sink_pages, int64_t recent_pages, int64_t max_page_budget,
                   const std::optional<Tensor>& top_p, double mass_scale, const std::optional<Tensor>& row_policies,
                   bool shortlist) {
  check_scores(page_scores);
  check_dense_tail(page_scores, "page_scores", 1);
  const int64_t num_reqs = page_scores.size(0), heads = page_scores.size(1), max_pages = page_scores.size(2);
  check_int32_rows(seq_lens, "seq_lens", num_reqs);
  check_int32_rows(page_budgets, "page_budgets", num_reqs);
  TORCH_CHECK(page_size > 0, "page_size: expected a positive number, got ", page_size);
  TORCH_CHECK(sink_pages >= 0, "sink_pages: expected 0 or more, got ", sink_pages);
  TORCH_CHECK(recent_pages >= 0, "recent_pages: expected 0 or more, got ", recent_pages);
  TORCH_CHECK(max_page_budget >= 0, "max_page_budget: expected 0 or more, got ", max_page_budget);
  if (top_p) check_rows(*top_p, "top_p", at::kFloat, num_reqs);
  const Policies policies(row_policies, Reduction::kMax, num_reqs);
  const int32_t* lengths = seq_lens.const_data_ptr<int32_t>();
  const int32_t* budgets = page_budgets.const_data_ptr<int32_t>();
  const float* shares = top_p ? top_p->const_data_ptr<float>() : nullptr;
  for (int64_t row = 0; row < num_reqs; ++row)
    check_scored(lengths[row * seq_lens.stride(0)], row, page_scores, page_size);
  const int64_t width = max_page_budget + shortlist;
  Tensor selected = at::empty({num_reqs, heads, width}, seq_lens.options());
  const float* scores = page_scores.const_data_ptr<float>();
  int32_t* out = selected.data_ptr<int32_t>();
  constexpr int64_t kSelectCost = 24;  // a page of a row costs about what reading that many bytes does
  for_each_task(num_reqs * heads, num_reqs * heads * max_pages * kSelectCost, [&](int64_t task) {
    const int64_t row = task / heads, head = task % heads;
    const int64_t pages = ceil_div(lengths[row * seq_lens.stride(0)], page_size);
    static thread_local std::vector<uint32_t> scratch;
    static thread_local std::vector<float> mass;
    if (int64_t(scratch.size()) < 2 * pages) scratch.resize(2 * pages);
    if (int64_t(mass.size()) < pages + kLanes) mass.resize(pages + kLanes);
    const bool takes = !shortlist || policies.of(row) == Reduction::kTwoStage;
    const int64_t budget = takes ? std::min<int64_t>(budgets[row * page_budgets.stride(0)], max_page_budget) : 0;
    const int64_t window = policies.of(row) == Reduction::kWindow ? std::min(budget, pages) - sink_pages : 0;
    const SelectTask work{scores + row * page_scores.stride(0) + head * page_scores.stride(1),
                          out + task * width, scratch.data(), mass.data(), pages,
                          budget, max_page_budget, sink_pages, std::max(recent_pages, window),
                          shares ? shares[row * top_p->stride(0)] : 1.0f, float(mass_scale)};
    (shortlist ? kernels().shortlist : kernels().select)(work);
  });
  return selected;
}

Tensor select_pages(const Tensor& page_scores, const Tensor& seq_lens, const Tensor& page_budgets, int64_t page_size,
                    int64_t sink_pages, int64_t recent_pages, int64_t max_page_budget,
                    const std::optional<Tensor>& top_p, double mass_scale,
                    const std::optional<Tensor>& row_policies) {
  return choose_rows(page_scores, seq_lens, page_budgets, page_size, sink_pages, recent_pages, max_page_budget, top_p,
                     mass_scale, row_policies, false);
}

Tensor shortlist_pages(const Tensor& page_scores, const Tensor& seq_lens, const Tensor& page_budgets,
                       int64_t page_size, int64_t sink_pages, int64_t recent_pages, int64_t max_page_budget,
                       const std::optional<Tensor>& row_policies) {
  return choose_rows(page_scores, seq_lens, page_budgets, page_size, sink_pages, recent_pages, max_page_budget,
                     std::nullopt, 1.0, row_policies, true);
}

// The selected pages of every (request, selection head) that hold a token, packed; splits are counted from them.
struct Selection {
  std::vector<int32_t> pages;
  std::vector<int64_t> first_page, first_part;  // [units + 1]
  std::vector<Part> parts;                      // head: the selection head
};

int64_t pages_per_split(int64_t page_size) { return std::max<int64_t>(1, kSplitTokens / page_size); }

Selection pack_selection(const Tensor& selected, const std::vector<int64_t>& lengths, int64_t page_size) {
  Selection packed;
  const int64_t heads = selected.size(1), split = pages_per_split(page_size);
  packed.pages.reserve(selected.numel());
  const int32_t* data = selected.const_data_ptr<int32_t>();
  for (int64_t row = 0; row < selected.size(0); ++row) {
    const int64_t pages = ceil_div(lengths[row], page_size);
    for (int64_t head = 0; head < heads; ++head) {
      packed.first_page.push_back(packed.pages.size());
      packed.first_part.push_back(packed.parts.size());
      const int32_t* entries = data + row * selected.stride(0) + head * selected.stride(1);
      for (int64_t i = 0; i < selected.size(2); ++i) {
        const int32_t page = entries[i * selected.stride(2)];
        if (page >= 0 && page < pages) packed.pages.push_back(page);
      }
      const int64_t count = int64_t(packed.pages.size()) - packed.first_page.back();
      for (int64_t part = 0; part < std::max<int64_t>(1, ceil_div(count, split)); ++part)
        packed.parts.push_back({row, head, part});
    }
  }
  packed.first_page.push_back(packed.pages.size());
  packed.first_part.push_back(packed.parts.size());
  return packed;
}

Tensor rerank_pages(const Tensor& page_scores, const Tensor& log_sums, const Tensor& shortlist, const Tensor& query,
                    const Tensor& key_cache, const Tensor& block_table, const Tensor& seq_lens, int64_t page_size,
                    double scale, double softcap, c10::string_view kv_format) {
  check_cache(key_cache, "key_cache");
  const int64_t heads = key_cache.size(1), block_size = key_cache.size(2), dim = key_cache.size(3);
  check_page_size(page_size, block_size);
  check_query(query, key_cache, heads);
  const int64_t num_reqs = query.size(0), group = query.size(1) / heads;
  const Format format = parse_format(kv_format, key_cache);
  const DType dtype = dtype_of(query, "query");
  check_scores(page_scores);
  check_size(page_scores, "page_scores", 0, num_reqs);
  check_size(page_scores, "page_scores", 1, heads);
  check_log_sums(log_sums, query);
  check_page_lists(shortlist, "shortlist", num_reqs);
  check_size(shortlist, "shortlist", 1, heads);
  const std::vector<int64_t> lengths = checked_lengths(block_table, seq_lens, num_reqs, block_size, key_cache.size(0));
  for (int64_t row = 0; row < num_reqs; ++row) check_scored(lengths[row], row, page_scores, page_size);
  const Selection listed = pack_selection(shortlist, lengths, page_size);
  const int64_t split = pages_per_split(page_size), max_pages = page_scores.size(2), size = query.element_size();
  Tensor output = page_scores.clone(at::MemoryFormat::Contiguous);
  const char* q = byte_pointer(query);
  const char* keys = byte_pointer(key_cache);
  const float* lse = log_sums.const_data_ptr<float>();
  const int32_t* table = block_table.const_data_ptr<int32_t>();
  float* out = output.data_ptr<float>();
  for_each_task(listed.parts.size(), int64_t(listed.pages.size()) * page_size * dim * size, [&](int64_t task) {
    const auto [row, head, part] = listed.parts[task];
    const int64_t unit = row * heads + head, first = listed.first_page[unit] + part * split;
    const int64_t count = std::min(listed.first_page[unit + 1] - first, split);
    if (count <= 0) return;
    static thread_local std::vector<float> logits;
    if (int64_t(logits.size()) < group * kLanes) logits.resize(group * kLanes);
    const KeyTask met{q + size * (row * query.stride(0) + head * group * query.stride(1)),
                      keys + size * head * key_cache.stride(1), table + row * block_table.stride(0),
                      listed.pages.data() + first, query.stride(1), key_cache.stride(0), block_table.stride(1), group,
                      dim, block_size, page_size, count, lengths[row], float(scale), float(softcap)};
    kernels().rerank(dtype, format, RerankTask{met, logits.data()});
    float scores[kLanes];
    kernels().combine_mass(MassTask{logits.data(), lse + row * log_sums.stride(0) + head * group, scores, group, count,
                                    kLanes, Reduction::kMass});
    for (int64_t i = 0; i < count; ++i) out[unit * max_pages + listed.pages[first + i]] = scores[i];
  });
  return output;
}

Tensor sparse_paged_attention(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                              const Tensor& block_table, const Tensor& seq_lens, const Tensor& selected_pages,
                              int64_t page_size, double scale, double softcap, c10::string_view kv_format) {
  check_cache(key_cache, "key_cache");
  check_cache(value_cache, "value_cache");
  TORCH_CHECK(key_cache.sizes() == value_cache.sizes(), "value_cache: expected key_cache's shape ", key_cache.sizes(),
              ", got ", value_cache.sizes());
  TORCH_CHECK(key_cache.strides() == value_cache.strides(), "value_cache: expected key_cache's strides ",
              key_cache.strides(), ", got ", value_cache.strides());
  check_dtype(value_cache, "value_cache", key_cache.scalar_type());
  const int64_t kv_heads = key_cache.size(1), block_size = key_cache.size(2), dim = key_cache.size(3);
  check_page_size(page_size, block_size);
  check_query(query, key_cache, kv_heads);
  const int64_t num_reqs = query.size(0), q_heads = query.size(1);
  const Format format = parse_format(kv_format, key_cache);
  const DType dtype = dtype_of(query, "query");
  check_page_lists(selected_pages, "selected_pages", num_reqs);
  const int64_t units = selected_pages.size(1);
  TORCH_CHECK(units == kv_heads || units == q_heads, "selected_pages: expected num_kv_heads ", kv_heads,
              " or num_q_heads ", q_heads, " at dimension 1, got shape ", selected_pages.sizes());
  const std::vector<int64_t> lengths = checked_lengths(block_table, seq_lens, num_reqs, block_size, key_cache.size(0));
  const int64_t group = q_heads / units, units_per_kv_head = units / kv_heads;
  const int64_t split = pages_per_split(page_size);
  const Selection selection = pack_selection(selected_pages, lengths, page_size);

  Tensor output = at::empty({num_reqs, q_heads, dim}, query.options());
  const int64_t num_parts = selection.parts.size();
  Tensor scratch = at::empty({num_parts * group * (dim + 2)}, query.options().dtype(at::kFloat));
  float* partial = scratch.data_ptr<float>();
  float* row_max = partial + num_parts * group * dim;
  float* row_sum = row_max + num_parts * group;
  std::unique_ptr<std::atomic<int64_t>[]> done(new std::atomic<int64_t>[num_reqs * units]());
  const int64_t size = query.element_size();
  const char* q = byte_pointer(query);
  const char* keys = byte_pointer(key_cache);
  const char* values = byte_pointer(value_cache);
  char* out = byte_pointer(output);
  const int32_t* table = block_table.const_data_ptr<int32_t>();
  for_each_task(num_parts, int64_t(selection.pages.size()) * 2 * page_size * dim * size, [&](int64_t task) {
    const auto [row, head, part] = selection.parts[task];
    const int64_t unit = row * units + head;
    const int64_t first = selection.first_page[unit] + part * split;
    const int64_t count = std::min(selection.first_page[unit + 1] - first, split);
    const int64_t kv_offset = size * (head / units_per_kv_head) * key_cache.stride(1);
    char* row_out = out + size * (row * q_heads + head * group) * dim;
    if (count <= 0) {  // no token to attend to
      std::memset(row_out, 0, size * group * dim);
      return;
    }
    const KeyTask met{q + size * (row * query.stride(0) + head * group * query.stride(1)), keys + kv_offset,
                      table + row * block_table.stride(0), selection.pages.data() + first, query.stride(1),
                      key_cache.stride(0), block_table.stride(1), group, dim, block_size, page_size, count,
                      lengths[row], float(scale), float(softcap)};
    const AttendTask work{met, values + kv_offset, partial + task * group * dim, row_max + task * group,
                          row_sum + task * group};
    kernels().attend(dtype, format, work);
    const int64_t first_part = selection.first_part[unit], splits = selection.first_part[unit + 1] - first_part;
    if (done[unit].fetch_add(1, std::memory_order_acq_rel) + 1 < splits) return;
    kernels().merge(dtype, MergeTask{partial + first_part * group * dim, row_max + first_part * group,
                                     row_sum + first_part * group, row_out, splits, group, dim, dim});
  });
  return output;
}

std::string isa() { return kernels().isa; }

}  // namespace

TORCH_LIBRARY(quest_vllm_cpu, library) {
  library.def(
      "update_page_summaries(Tensor key_cache, Tensor(a!) summaries, Tensor slot_mapping, int page_size, "
      "str kv_format, str page_summary) -> ()");
  library.def(
      "score_pages(Tensor query, Tensor summaries, Tensor block_table, Tensor seq_lens, int page_size, "
      "str group_reduction, float bound_radius, float scale, str page_summary, Tensor? policies, "
      "Tensor(a!)? log_sums) -> Tensor");
  library.def(
      "select_pages(Tensor page_scores, Tensor seq_lens, Tensor page_budgets, int page_size, int sink_pages, "
      "int recent_pages, int max_page_budget, Tensor? top_p, float mass_scale, Tensor? policies) -> Tensor");
  library.def(
      "shortlist_pages(Tensor page_scores, Tensor seq_lens, Tensor page_budgets, int page_size, int sink_pages, "
      "int recent_pages, int max_page_budget, Tensor? policies) -> Tensor");
  library.def(
      "rerank_pages(Tensor page_scores, Tensor log_sums, Tensor shortlist, Tensor query, Tensor key_cache, "
      "Tensor block_table, Tensor seq_lens, int page_size, float scale, float softcap, str kv_format) -> Tensor");
  library.def(
      "sparse_paged_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table, Tensor seq_lens, "
      "Tensor selected_pages, int page_size, float scale, float softcap, str kv_format) -> Tensor");
  library.def("isa() -> str", &isa);
}

// Every dispatch key, so that a tensor on another device meets the checks' message.
TORCH_LIBRARY_IMPL(quest_vllm_cpu, CompositeExplicitAutograd, library) {
  library.impl("update_page_summaries", &update_page_summaries);
  library.impl("score_pages", &score_pages);
  library.impl("select_pages", &select_pages);
  library.impl("shortlist_pages", &shortlist_pages);
  library.impl("rerank_pages", &rerank_pages);
  library.impl("sparse_paged_attention", &sparse_paged_attention);
}

}  // namespace quest
