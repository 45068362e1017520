// The whole of Quest's decode attention in one launch: score, select, attend, merge. One cluster of CTAs serves a
// (request, selection head); scores, histograms and partial outputs stay in its shared memory. Loop bounds come from
// seq_lens and page_budgets on the device, so one captured CUDA graph serves every mix of lengths and budgets, and a
// row whose budget covers its context goes straight to attention.
//
// Compiled once per head_dim and number of warps: -DQUEST_HEAD_DIM=64, 128 or 256, -DQUEST_WARPS=8 or 16.
#include "attend.cuh"
#include "rerank.cuh"
#include "score.cuh"
#include "share.cuh"

namespace quest {

// The scores leave for whoever asked for them; kMass counts in powers of two up to here.
__device__ __forceinline__ void store_scores(const DecodeParams& p, const Row& row, float* global, const float* buffer) {
  const float unit = p.reduction == kMass ? 1.f / kLog2e : 1.f;
  row.each_page([&](int i) {
    if (i < row.count) global[row.page(i)] = buffer[i] * unit;
  });
}

// Whether some of the row's pages are ranked by their keys.
__device__ __forceinline__ bool is_two_stage(const DecodeParams& p, const Row& row) {
  return p.reduction == kMass && p.stages == (kScore | kSelect | kAttend) && policy_of(p, row.req) == kTwoStage;
}

// Where a CTA lists pages that do not fit its shared memory.
__device__ __forceinline__ int32_t* spare_list(const DecodeParams& p, const Row& row) {
  const int64_t row_index = static_cast<int64_t>(row.req) * p.num_select_heads + row.head;
  return p.listed + row_index * (p.max_pages + kMaxCluster) + row.rank * row.most_owned();
}

// kTwoStage: the pages whose scores leave open whether they are taken get new ones, by their keys. Makes the row anew:
// handed over, it stayed in registers while pages were scored, and made that spill.
template <typename T, int D, int kHeadTiles>
__device__ __forceinline__ void look_at_keys(const DecodeParams& p, const QueryFragment<D, kHeadTiles>& query, Shared& shared, char* window,
                                             float* buffer, float2 range) {
  const Row row = Row::make(p);
  PageSelector better(row, shared, buffer), possible(row, shared, buffer);
  better.find_threshold(range, row.certain());
  PageSelector::clear_again(shared);
  possible.find_threshold(range, row.possible());
  const int32_t* list;
  const int entries = list_pages(row, shared, spare_list(p, row), list, [&](int i) { return possible.chooses(i) && !better.chooses(i); });
  PageReranker<T, D, kHeadTiles>(p, row, window, list, entries).run(query, shared, buffer);
  PageSelector::clear_again(shared);
}

// Staging halves of all warps, or the partial outputs of the merge that takes their place.
template <int D>
__host__ __device__ constexpr int window_bytes(int rows) {
  const int merge = partial_floats<D>(rows) * static_cast<int>(sizeof(float));
  return Staging<D>::kWarpBytes * kWarps > merge ? Staging<D>::kWarpBytes * kWarps : div_up(merge, 128) * 128;
}

// What peers send of their outputs: each CTA's part of the pairs of dims is rounded up.
template <int D>
__host__ __device__ constexpr int inbox_bytes(int rows) {
  return (rows * D / 2 + kMaxCluster) * static_cast<int>(sizeof(float2));
}

__host__ __device__ __forceinline__ int num_planes(const DecodeParams& p) { return p.reduction == kMass ? p.rows : 1; }

template <typename T, int D, int kHeadTiles, template <typename, int, int> class Estimate>
__global__ void __launch_bounds__(kThreads, kWarps == 8 && kHeadTiles == 1 && D <= 128 ? 2 : 1) quest_decode_kernel(const __grid_constant__ DecodeParams p) {
  // window: the warps' staging halves, later the merge; then the scores; then the inbox, which takes the place of the planes
  // that become one: the selection's barriers lie between
#ifdef QUEST_ON_HOST
  Shared& shared = shared_on_host();
  char* window = window_on_host();
#else
  __shared__ Shared shared;
  extern __shared__ __align__(128) char window[];
#endif
  cluster_arrive_early();  // see the wait
  wait_for_previous_kernel();
  mark(p, 0);
  // the query and the first blocks are asked for before the row's length is known: the reads overlap
  const Row guess = Row::guess(p);
  QueryFragment<D, kHeadTiles> query;
  query.load(p, guess.req, guess.head);
  using Scorer = PageScorer<T, D, kHeadTiles, Estimate<T, D, kHeadTiles>>;
  const int early_block = Scorer::guess_block(p, guess);
  const Row row = Row::make(p);
  if (row.rank >= row.size) return;  // a barrier counts those that have not left
  const int64_t row_index = static_cast<int64_t>(row.req) * p.num_select_heads + row.head;
  float* buffer = reinterpret_cast<float*>(window + window_bytes<D>(p.rows));
  float* inbox = buffer;
  if (p.score_scratch != nullptr) {
    buffer = p.score_scratch + row_index * num_planes(p) * p.plane_pages + row.rank * (div_up(row.most_owned(), 8) * 8);
  } else {
    inbox += p.plane_pages;
  }
  PageSelector::clear(shared);
  // a CTA's shared memory may be written by its peers once it runs
  cluster_wait();
  mark(p, 1);
  float2 range = make_float2(0.f, 0.f);
  // no score is needed where nothing competes, unless somebody reads them
  const bool crowded = row.ranked < row.last - row.first;
  const bool competition = !row.dense && row.ranked > 0 && (crowded || top_p_of(p, row.req) < 1.f);
  if (p.stages == kScore ? row.total > 0 : competition && (p.stages & kScore)) {
    range = Scorer(p, row, window, buffer, p.plane_pages).run(query, shared, early_block);
    if (p.stages == kScore) store_scores(p, row, p.scores + row_index * p.max_pages, buffer);
  } else if (competition && (p.stages & kSelect)) {
    range = load_scores(row, shared, p.scores + row_index * p.max_pages, buffer);
  }
  if (!Estimate<T, D, kHeadTiles>::kKeepsQuery) query.load(p, row.req, row.head);
  mark(p, 2);
  PageSelector selector(row, shared, buffer);
  ShareSelector by_mass(row, shared, buffer, p.mass_unit);
  uint8_t* chosen = p.chosen + row_index * p.max_pages;
  const int32_t* list = nullptr;
  int entries = row.count;
  if (p.stages != kScore && !row.dense) {
    const bool select = p.stages & kSelect;
    if (crowded && competition && is_two_stage(p, row)) look_at_keys<T, D, kHeadTiles>(p, query, shared, window, buffer, range);
    if (select) selector.find_threshold(range, row.ranked);
    if (const float top_p = top_p_of(p, row.req); select && row.ranked > 0 && top_p < 1.f) {
      by_mass.find(top_p, [&](int i) { return selector.chooses(i); });
    }
    const auto chooses = [&](int i) { return selector.chooses(i) && by_mass.needs(i); };
    if (select && p.chosen != nullptr) {
      row.each_page([&](int i) {
        if (i < row.count) chosen[row.page(i)] = chooses(i);
      });
    }
    entries = list_pages(row, shared, spare_list(p, row), list, [&](int i) {
      return select ? chooses(i) : i < row.count && chosen[row.page(i)];
    });
  }
  if (p.taken != nullptr && threadIdx.x == 0) put(&shared.taken_inbox[row.rank], row.peer(0), entries);
  mark(p, 3);
  if (p.stages & kAttend) {
    PageAttention<T, D, kHeadTiles>(p, row, window, list, entries).run(query, shared, reinterpret_cast<float*>(window), inbox);
  } else {
    cluster_sync();  // nobody leaves while others write to its inbox
  }
  if (p.taken != nullptr && threadIdx.x == 0 && row.rank == 0) {
    p.taken[row.req * p.taken_req_stride + row.head] = row.taken(shared);
  }
  mark(p, 5);
}

// What a CTA of a launch has in shared memory beside its Shared: the window, the inbox, and the scores if they fit.
inline size_t dynamic_bytes(const DecodeParams& p) {
  constexpr int D = QUEST_HEAD_DIM;
  const int plane = p.score_scratch ? 0 : static_cast<int>(sizeof(float)) * p.plane_pages;
  const int others = plane * (num_planes(p) - 1), inbox = inbox_bytes<D>(p.rows);
  return window_bytes<D>(p.rows) + plane + (others > inbox ? others : inbox);
}

#ifdef __CUDACC__  // the rest of this file is also run on a CPU, by tests/kernels/test_cuda_decode_on_host.py
// A launch's grid. Points into itself: not to be copied.
struct Grid {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};

  Grid(const Grid&) = delete;
  Grid(const DecodeParams& p, size_t bytes, cudaStream_t stream) {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = p.cluster_size;
    attributes[0].val.clusterDim.y = 1;
    attributes[0].val.clusterDim.z = 1;
    // start while the kernel before drains; see wait_for_previous_kernel
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    config.gridDim = dim3(p.cluster_size, p.num_select_heads, p.num_reqs);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = bytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = 2;
  }
};

template <typename T, int kHeadTiles, template <typename, int, int> class Estimate>
struct Kernel {
  static constexpr auto run = quest_decode_kernel<T, QUEST_HEAD_DIM, kHeadTiles, Estimate>;

  // Launches, or, where `resident` is given, only tells how many clusters the GPU runs at a time.
  static cudaError_t launch(const DecodeParams& p, cudaStream_t stream, int* resident) {
    const size_t bytes = dynamic_bytes(p);
    cudaError_t error = cudaFuncSetAttribute(run, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (error == cudaSuccess && p.cluster_size > 8) {
      error = cudaFuncSetAttribute(run, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    }
    if (error != cudaSuccess) return error;
    const Grid grid(p, bytes, stream);
    if (resident != nullptr) return cudaOccupancyMaxActiveClusters(resident, run, &grid.config);
    return cudaLaunchKernelEx(&grid.config, run, p);
  }

  static cudaError_t prepare() {
    cudaFuncAttributes unused;
    return cudaFuncGetAttributes(&unused, run);
  }
};

template <template <typename, int, int> class Codes>
using CodedKernel = Kernel<__nv_bfloat16, 1, Codes>;
template <typename T, int kHeadTiles>
using BoxedKernel = Kernel<T, kHeadTiles, BoxEstimate>;

template <typename T>
cudaError_t launch_rows(const DecodeParams& p, cudaStream_t stream, int* resident) {
  if (p.rows <= 8) return BoxedKernel<T, 1>::launch(p, stream, resident);
#if QUEST_HEAD_DIM <= 128 && QUEST_WARPS == 8  // 16 warps have no registers for more heads
  if (p.rows <= 16) return BoxedKernel<T, 2>::launch(p, stream, resident);
#endif
  return cudaErrorInvalidValue;
}

cudaError_t launch_any(const DecodeParams& p, int bfloat16, cudaStream_t stream, int* resident) {
  if (p.page_summary == kMinMax) {
    return bfloat16 ? launch_rows<__nv_bfloat16>(p, stream, resident) : launch_rows<__half>(p, stream, resident);
  }
  if (!bfloat16 || p.rows > 8) return cudaErrorInvalidValue;
  return p.rows <= 4 ? CodedKernel<PairedCodes>::launch(p, stream, resident)
                     : CodedKernel<SingleCodes>::launch(p, stream, resident);
}

}  // namespace quest

// Loads the kernels now: a first use while a CUDA graph is captured is too late for that. Returns a cudaError_t.
extern "C" __attribute__((visibility("default"))) int quest_prepare() {
  cudaError_t error = quest::BoxedKernel<__nv_bfloat16, 1>::prepare();
  if (error == cudaSuccess) error = quest::BoxedKernel<__half, 1>::prepare();
  if (error == cudaSuccess) error = quest::CodedKernel<quest::SingleCodes>::prepare();
  if (error == cudaSuccess) error = quest::CodedKernel<quest::PairedCodes>::prepare();
#if QUEST_HEAD_DIM <= 128 && QUEST_WARPS == 8
  if (error == cudaSuccess) error = quest::BoxedKernel<__nv_bfloat16, 2>::prepare();
  if (error == cudaSuccess) error = quest::BoxedKernel<__half, 2>::prepare();
#endif
  return error;
}

// Returns a cudaError_t; `bfloat16` tells the two 16-bit types apart.
extern "C" __attribute__((visibility("default"))) int quest_decode(const quest::DecodeParams* p, int bfloat16, void* stream) {
  return quest::launch_any(*p, bfloat16, static_cast<cudaStream_t>(stream), nullptr);
}

// How many clusters of such a launch the GPU runs at a time. Returns a cudaError_t.
extern "C" __attribute__((visibility("default"))) int quest_resident_clusters(const quest::DecodeParams* p, int* resident) {
  return quest::launch_any(*p, 1, nullptr, resident);
}

extern "C" __attribute__((visibility("default"))) const char* quest_error_string(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

// What ctypes has to agree with.
extern "C" __attribute__((visibility("default"))) int quest_params_size(int which) {
  return static_cast<int>(which == 0 ? sizeof(quest::DecodeParams) : sizeof(quest::WriteParams));
}
#else
}  // namespace quest
#endif
