// What the per-ISA kernels offer to the bindings. No framework header: every kernel file is compiled with its own
// instruction set, and an inline function shared with the rest of the program must not be.
#pragma once
#include <cstdint>

namespace quest {

constexpr int kLanes = 16;          // tokens of a packed group, channels of a vector
constexpr int kMaxHeadDim = 512;    // stack buffers
constexpr int kMaxPageSize = 512;   // stack buffers
constexpr int kHeadBatch = 8;       // query heads that share one read of a page
constexpr int kSplitTokens = 256;   // tokens of one split of the attention: fixed, so a row never depends on its batch
constexpr int kScoreChunk = 128;    // pages of one score task
static_assert(kSplitTokens / kLanes <= kLanes, "the pages of a split are a vector");

enum class DType : int { kFloat = 0, kBFloat16 = 1, kHalf = 2 };

// How keys and values lie inside a (block, kv head) chunk of block_size tokens; found by packing coded keys with
// vLLM's cpu_attn_reshape_and_cache.
//                keys                             values
//   kRows        [block_size][D]                  [block_size][D]
//   kTransposed  [D][block_size]                  [block_size][D]                      vLLM "vec", "vec16"
//   kAmx         [block_size/16][D/2][16][2]      [D/16][block_size/2][16][2]          vLLM "amx" (bfloat16)
enum class Format : int { kRows = 0, kTransposed = 1, kAmx = 2 };

// How the heads of a group are joined, in the order of quest_vllm.config.POLICIES; kWindow: a row has no scores;
// kTwoStage: by mass, and those near the edge of the budget by their keys.
enum class Reduction : int { kMax = 0, kMean = 1, kMass = 2, kPerQueryHead = 3, kWindow = 4, kTwoStage = 5 };

// What a page's two summary rows hold: its minimum and maximum, or the bytes of codes.h.
enum class Summary : int { kMinMax = 0, kKeyCodes = 1 };

// One page and kv head. `written` rows, starting at row `first_row` of the chunk, are summarised.
struct SummaryTask {
  const void* keys;      // the chunk's keys
  void* summary;         // [2, head_dim]
  int64_t block_size, head_dim, first_row, written;
  Summary kind;
};

// Pages [first_page, end_page) of one request and kv head; end_page - first_page <= kScoreChunk.
struct ScoreTask {
  const void* query;     // [group, head_dim], rows query_stride apart
  const void* summaries; // block 0 of this kv head
  const int32_t* block_ids;
  float* scores;         // first_page of the first score head, heads score_stride apart; kMass: logits, whole vectors
  float* lse;            // [group], for kMass: log-sum-exp of these pages' logits
  int64_t query_stride, block_stride, page_stride, block_ids_stride, score_stride;
  int64_t group, head_dim, pages_per_block, first_page, end_page;
  int64_t length;        // tokens of the request
  Summary kind;
  Reduction reduction;
  float near, far;       // (1 + bound_radius) / 2 and (1 - bound_radius) / 2
  float scale;           // of the logits, for kMass and kKeyCodes
};

// The scores of one score task under kMass, or of one split of a shortlist; a row may have kMax or kMean of the logits
// instead.
struct MassTask {
  const float* logits;   // [group, pages], rows logit_stride apart, whole vectors
  const float* lse;      // [group], of the whole request
  float* scores;         // [pages]
  int64_t group, pages, logit_stride;
  Reduction policy;
};

// One row of scores.
struct SelectTask {
  const float* scores;   // [pages]
  int32_t* selected;     // [max_page_budget], of a shortlist one more
  uint32_t* scratch;     // [2 * pages]
  float* mass;           // [pages + kLanes], scratch where top_p < 1
  int64_t pages, page_budget, max_page_budget, sink_pages, recent_pages;
  float top_p, mass_scale;  // see reference.select_pages
};

// A split of a list of pages of one request and kv head, whose keys meet the query.
struct KeyTask {
  const void* query;     // [group, head_dim], rows query_stride apart
  const void* keys;      // block 0 of this kv head
  const int32_t* block_ids;
  const int32_t* pages;  // [num_pages], each below ceil(seq_len / page_size)
  int64_t query_stride, block_stride, block_ids_stride;
  int64_t group, head_dim, block_size, page_size, num_pages, seq_len;
  float scale, softcap;
};

// Attends to the selected pages of a split.
struct AttendTask : KeyTask {
  const void* values;    // block 0 of this kv head
  float* partial;        // [group, head_dim]
  float* row_max;        // [group]
  float* row_sum;        // [group]
};

// Weighs the listed pages of a split.
struct RerankTask : KeyTask {
  float* logits;         // [group, kLanes]: log of the mass of each page's keys, -inf past the last page
};

// Merges the splits of one request and kv head by their log-sum-exp, in order.
struct MergeTask {
  const float* partial;  // [splits, group, head_dim]
  const float* row_max;  // [splits, group]
  const float* row_sum;  // [splits, group]
  void* output;          // [group, head_dim], rows output_stride apart
  int64_t splits, group, head_dim, output_stride;
};

struct Kernels {
  const char* isa;
  void (*summarise)(DType, Format, const SummaryTask&);
  void (*score)(DType, const ScoreTask&);
  void (*combine_mass)(const MassTask&);
  void (*select)(const SelectTask&);
  void (*shortlist)(const SelectTask&);
  void (*rerank)(DType, Format, const RerankTask&);
  void (*attend)(DType, Format, const AttendTask&);
  void (*merge)(DType, const MergeTask&);
};

extern const Kernels kGenericKernels;
#ifdef QUEST_X86
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace quest
