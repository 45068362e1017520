// What a launch is told. No CUDA or framework header: quest_vllm/ops/cuda_params.py mirrors it field by field.
#pragma once
#include <stdint.h>

namespace quest {

enum PageSummary : int32_t { kMinMax = 0, kKeyCodes = 1 };
// In the order of quest_vllm.config.POLICIES. The last two are a row's own: its newest pages, whatever their scores; and
// kMass, but by their keys for pages whose scores leave open whether they are taken.
enum Policy : int32_t { kMax = 0, kMean = 1, kMass = 2, kPerQueryHead = 3, kWindow = 4, kTwoStage = 5 };
// Where a CTA's clock is read: start, inputs known, scored, selected, attended, done.
constexpr int kMarks = 6;

enum Stage : int32_t { kScore = 1, kSelect = 2, kAttend = 4 };

// H is the number of selection heads; `rows` query heads share one selection. Strides count elements.
struct DecodeParams {
  const void* query;            // [num_reqs, H * rows, D]
  const void* keys;             // [num_blocks, num_kv_heads, block_size, D]
  const void* values;           // [num_blocks, num_kv_heads, block_size, D]
  const void* summaries;        // [num_blocks, num_kv_heads, pages_per_block, 2, D], or codes: 4 D bytes a page
  const int32_t* block_table;   // [num_reqs, max_blocks]
  const int32_t* seq_lens;      // [num_reqs]
  const int32_t* page_budgets;  // [num_reqs]
  const float* top_p;           // [num_reqs], share of the budget's mass; null: all of it
  const int32_t* policies;      // [num_reqs]; null: `reduction`, which alone may ask for kMass, in every row
  float* scores;                // [num_reqs, H, max_pages]; null when all stages run
  float* score_scratch;         // [num_reqs, H, rows or 1, plane_pages]; null when a CTA's share fits shared memory
  int32_t* listed;              // [num_reqs, H, max_pages + kMaxCluster], chosen pages for which shared memory is too small
  uint8_t* chosen;              // [num_reqs, H, max_pages], 1 where a page is chosen; null when all stages run and nobody asks
  void* out;                    // [num_reqs, H * rows, D]
  int32_t* taken;               // [num_reqs, H], pages attended to; null: nobody asks
  int64_t* timeline;            // [num_reqs, H, cluster_size, kMarks] clock ticks of a CTA; null: not measured
  int64_t query_req_stride, query_head_stride;
  int64_t key_block_stride, key_head_stride, key_row_stride;
  int64_t value_block_stride, value_head_stride, value_row_stride;
  int64_t summary_block_stride, summary_head_stride, summary_page_stride, summary_bound_stride;
  int64_t table_req_stride;
  int64_t out_req_stride, out_head_stride, taken_req_stride;
  int32_t num_reqs, num_select_heads, rows, heads_per_kv;
  int32_t page_shift, block_shift;  // log2 of tokens in a page and of pages in a block
  int32_t max_pages;
  int32_t sink_pages, recent_pages;
  int32_t reduction, stages, page_summary;
  int32_t cluster_size;
  uint32_t cluster_inverse;  // 2^31 over cluster_size, rounded up
  int32_t plane_pages;  // room for scores: of a CTA's pages in its shared memory, or of a row's in score_scratch
  float bound_radius, scale, softcap;
  float mass_unit;  // what a score is multiplied by to be log2 of a mass
};

struct WriteParams {
  const void* key;              // [num_tokens, num_kv_heads, D]
  const void* value;            // [num_tokens, num_kv_heads, D]
  void* keys;                   // [num_blocks, num_kv_heads, block_size, D]
  void* values;                 // [num_blocks, num_kv_heads, block_size, D]
  void* summaries;              // [num_blocks, num_kv_heads, pages_per_block, 2, D], or codes: 4 D bytes a page
  const int64_t* slot_mapping;  // [num_tokens]; negative: padding
  int64_t key_token_stride, key_head_stride_in, value_token_stride, value_head_stride_in;
  int64_t key_block_stride, key_head_stride, key_row_stride;
  int64_t value_block_stride, value_head_stride, value_row_stride;
  int64_t summary_block_stride, summary_head_stride, summary_page_stride, summary_bound_stride;
  int32_t num_tokens, num_kv_heads, page_shift, block_shift;  // log2 of tokens in a page and in a block
  int32_t page_summary;
};

}  // namespace quest
