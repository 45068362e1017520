// The kernels; compiled once per instruction set, each time in a namespace of its own.
#include "kernels.h"

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#define QUEST_STRING_(x) #x
#define QUEST_STRING(x) QUEST_STRING_(x)

namespace quest {
namespace QUEST_ISA {
namespace {

#include "vec16.h"
#include "summarise.h"
#include "mass.h"
#include "codes.h"
#include "score.h"
#include "select.h"
#include "attend.h"
#include "rerank.h"

template <typename Fn>
QUEST_INLINE void with_dtype(DType dtype, Fn fn) {
  if (dtype == DType::kFloat) fn(static_cast<const float*>(nullptr));
  else if (dtype == DType::kBFloat16) fn(static_cast<const BFloat16*>(nullptr));
  else fn(static_cast<const Half*>(nullptr));
}

template <typename T>
T element(const T*);

void code_keys(DType dtype, Format format, const SummaryTask& task) {
  if (format == Format::kAmx) return code_amx(task);
  with_dtype(dtype, [&](auto type) {
    using T = decltype(element(type));
    format == Format::kRows ? code_rows<T>(task) : code_transposed<T>(task);
  });
}

void summarise(DType dtype, Format format, const SummaryTask& task) {
  if (task.kind == Summary::kKeyCodes) return code_keys(dtype, format, task);
  if (format == Format::kAmx) return summarise_amx(task);
  with_dtype(dtype, [&](auto type) {
    using T = decltype(element(type));
    format == Format::kRows ? summarise_rows<T>(task) : summarise_transposed<T>(task);
  });
}

void score(DType dtype, const ScoreTask& task) {
  with_dtype(dtype, [&](auto type) { score_chunk<decltype(element(type))>(task); });
}

template <typename Fn>
QUEST_INLINE void with_layout(DType dtype, Format format, Fn fn) {
  if (format == Format::kAmx) return fn.template operator()<AmxLayout>();
  with_dtype(dtype, [&](auto type) {
    using T = decltype(element(type));
    if (format == Format::kRows) fn.template operator()<RowLayout<T>>();
    else fn.template operator()<TransposedLayout<T>>();
  });
}

void rerank(DType dtype, Format format, const RerankTask& task) {
  with_layout(dtype, format, [&]<typename Layout>() { rerank_batches<Layout>(task); });
}

void attend(DType dtype, Format format, const AttendTask& task) {
  with_layout(dtype, format, [&]<typename Layout>() { attend_batches<Layout>(task); });
}

void merge(DType dtype, const MergeTask& task) {
  with_dtype(dtype, [&](auto type) { merge_splits<decltype(element(type))>(task); });
}

}  // namespace
}  // namespace QUEST_ISA

extern const Kernels QUEST_KERNELS = {QUEST_STRING(QUEST_ISA), QUEST_ISA::summarise, QUEST_ISA::score,
                                      QUEST_ISA::combine_mass, QUEST_ISA::select_row, QUEST_ISA::shortlist_row,
                                      QUEST_ISA::rerank, QUEST_ISA::attend, QUEST_ISA::merge};

}  // namespace quest
