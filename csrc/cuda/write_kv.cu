// Stores new keys and values, and refreshes the summaries of the pages that they touch, in one launch.
//
// One warp serves a (token, KV head). The warp of a page's last token in this call recomputes the page's min/max over
// rows 0 to its own, or their codes: rows of this call from the input, earlier ones from the cache, so that no warp
// waits for another. A reused block's stale summary is never read.
#include "encode.cuh"

namespace quest {

constexpr int kMaxPageSize = 256;

// Eight 16-bit floats each, two to a word; keep NaN, as torch's amin and amax do.
template <typename T>
__device__ __forceinline__ void widen(uint4& low, uint4& high, const uint4& least, const uint4& greatest) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    (&low.x)[i] = Half<T>::min2((&low.x)[i], (&least.x)[i]);
    (&high.x)[i] = Half<T>::max2((&high.x)[i], (&greatest.x)[i]);
  }
}

// The slots around `token` that may lie in its page, one a lane, from the `round`-th 32 on; -1 past the end.
__device__ __forceinline__ int first_neighbour(const WriteParams& p, int token, int round) {
  return max(0, token - (1 << p.page_shift) + 1) + 32 * round + lane_id();
}
__device__ __forceinline__ int64_t neighbour(const WriteParams& p, int token, int round) {
  const int other = first_neighbour(p, token, round);
  return other < min(p.num_tokens, token + (1 << p.page_shift)) ? p.slot_mapping[other] : -1;
}

// source[r]: the token of this call that wrote row r of the page, or -1. `theirs`: neighbour(p, token, 0). Returns
// whether `token` is the page's last.
__device__ __forceinline__ bool find_page_rows(const WriteParams& p, int token, int64_t slot, int64_t theirs, int* source) {
  const int page_size = 1 << p.page_shift;
#pragma unroll 1
  for (int row = lane_id(); row < page_size; row += 32) source[row] = -1;
  __syncwarp();
  bool later = false;
#pragma unroll 1
  for (int round = 0; round < div_up(2 * page_size, 32); ++round) {
    if (round > 0) theirs = neighbour(p, token, round);
    if (theirs >= 0 && theirs >> p.page_shift == slot >> p.page_shift) {
      source[theirs & (page_size - 1)] = first_neighbour(p, token, round);
      later |= theirs > slot;
    }
  }
  __syncwarp();
  return !__any_sync(0xFFFFFFFFu, later);
}

template <typename T, int D, bool kCodes>
__device__ __forceinline__ void summarise(const WriteParams& p, int64_t slot, int head, const int* source) {
  constexpr int kLanes = D / 8, kRows = 32 / kLanes;  // lanes to a row, rows at a time
  constexpr int kRound = 16 / kRows;                  // reads in flight: 16 rows of the page
  const int part = lane_id() % kLanes * 8;
  const int block_row = static_cast<int>(slot & ((1 << p.block_shift) - 1));
  const int first = block_row >> p.page_shift << p.page_shift, count = block_row - first + 1;
  const int64_t block = slot >> p.block_shift;
  const T* cached = static_cast<const T*>(p.keys) + block * p.key_block_stride + head * p.key_head_stride + part;
  const T* given = static_cast<const T*>(p.key) + head * p.key_head_stride_in + part;
  constexpr uint32_t kInfinities = Half<T>::kInfinity * 0x10001u, kSigns = 0x80008000u;
  uint4 low = make_uint4(kInfinities, kInfinities, kInfinities, kInfinities);
  uint4 high = make_uint4(kInfinities | kSigns, kInfinities | kSigns, kInfinities | kSigns, kInfinities | kSigns);
  uint4 key[kRound] = {};  // a page of 16 keys is read in one round, and stays here
#pragma unroll 1
  for (int round = lane_id() / kLanes; round < count; round += 16) {
#pragma unroll
    for (int k = 0; k < kRound; ++k) {
      const int row = min(round + k * kRows, count - 1);  // the last row once more changes nothing
      const int from = p.key == nullptr ? -1 : source[row];
      const T* place = from < 0 ? cached + (first + row) * p.key_row_stride : given + from * p.key_token_stride;
      key[k] = *reinterpret_cast<const uint4*>(place);
    }
#pragma unroll
    for (int k = 0; k < kRound; ++k) widen<T>(low, high, key[k], key[k]);
  }
#pragma unroll
  for (int step = kLanes; step < 32; step *= 2) {
    uint4 other_low, other_high;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      (&other_low.x)[i] = __shfl_xor_sync(0xFFFFFFFFu, (&low.x)[i], step);
      (&other_high.x)[i] = __shfl_xor_sync(0xFFFFFFFFu, (&high.x)[i], step);
    }
    widen<T>(low, high, other_low, other_high);
  }
  T* summary = static_cast<T*>(p.summaries) + block * p.summary_block_stride + head * p.summary_head_stride +
               (block_row >> p.page_shift) * p.summary_page_stride;
  if constexpr (kCodes) {
    const PageEncoder<T, D> encoder(low, high);
    uint8_t* coded = reinterpret_cast<uint8_t*>(summary);
    if (lane_id() < kLanes) encoder.store_shared(coded);
#pragma unroll
    for (int k = 0; k < kRound; ++k) {
      const int row = lane_id() / kLanes + k * kRows;
      encoder.store_token(coded, row, key[k], row < count);
    }
  } else if (lane_id() < kLanes) {
    *reinterpret_cast<uint4*>(summary + part) = low;
    *reinterpret_cast<uint4*>(summary + p.summary_bound_stride + part) = high;
  }
}

template <typename T, int D, bool kCodes>
__global__ void __launch_bounds__(kThreads) write_kv_kernel(const __grid_constant__ WriteParams p) {
  __shared__ int sources[kWarps][kMaxPageSize];
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kWarps + warp_id();
  if (unit >= static_cast<int64_t>(p.num_tokens) * p.num_kv_heads) return;
  const int token = static_cast<int>(unit / p.num_kv_heads), head = static_cast<int>(unit % p.num_kv_heads);
  const int64_t neighbours = neighbour(p, token, 0);  // asked for together with the slot itself
  const int64_t slot = p.slot_mapping[token];
  if (slot < 0) return;
  if (p.key != nullptr) {
    const int64_t block = slot >> p.block_shift, row = slot & ((1 << p.block_shift) - 1);
    const T* key = static_cast<const T*>(p.key) + token * p.key_token_stride + head * p.key_head_stride_in;
    const T* value = static_cast<const T*>(p.value) + token * p.value_token_stride + head * p.value_head_stride_in;
    T* key_out = static_cast<T*>(p.keys) + block * p.key_block_stride + head * p.key_head_stride + row * p.key_row_stride;
    T* value_out =
        static_cast<T*>(p.values) + block * p.value_block_stride + head * p.value_head_stride + row * p.value_row_stride;
    for (int i = lane_id(); i < D / 4; i += 32) {  // D / 8 vectors of the key, then as many of the value
      const int at = i % (D / 8) * 8;
      const uint4 vector = *reinterpret_cast<const uint4*>((i < D / 8 ? key : value) + at);
      *reinterpret_cast<uint4*>((i < D / 8 ? key_out : value_out) + at) = vector;
    }
  }
  if (find_page_rows(p, token, slot, neighbours, sources[warp_id()])) summarise<T, D, kCodes>(p, slot, head, sources[warp_id()]);
}

#ifdef __CUDACC__  // the rest of this file is also run on a CPU, by tests/kernels/test_cuda_write_on_host.py
template <typename T>
cudaError_t launch_write(const WriteParams& p, cudaStream_t stream) {
  const int64_t units = static_cast<int64_t>(p.num_tokens) * p.num_kv_heads;
  if (units == 0) return cudaSuccess;
  cudaLaunchAttribute early = {};  // start while the kernel before drains; see wait_for_previous_kernel
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>((units + kWarps - 1) / kWarps));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  const auto kernel = p.page_summary == kKeyCodes ? write_kv_kernel<T, QUEST_HEAD_DIM, true> : write_kv_kernel<T, QUEST_HEAD_DIM, false>;
  return cudaLaunchKernelEx(&config, kernel, p);
}

}  // namespace quest

extern "C" __attribute__((visibility("default"))) int quest_write_kv(const quest::WriteParams* p, int bfloat16, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  return bfloat16 ? quest::launch_write<__nv_bfloat16>(*p, s) : quest::launch_write<__half>(*p, s);
}

// Loads the kernels, as quest_prepare does.
extern "C" __attribute__((visibility("default"))) int quest_prepare_write() {
  const void* kernels[] = {reinterpret_cast<const void*>(quest::write_kv_kernel<__nv_bfloat16, QUEST_HEAD_DIM, false>),
                           reinterpret_cast<const void*>(quest::write_kv_kernel<__half, QUEST_HEAD_DIM, false>),
                           reinterpret_cast<const void*>(quest::write_kv_kernel<__nv_bfloat16, QUEST_HEAD_DIM, true>),
                           reinterpret_cast<const void*>(quest::write_kv_kernel<__half, QUEST_HEAD_DIM, true>)};
  for (const void* kernel : kernels) {
    cudaFuncAttributes unused;
    if (const cudaError_t error = cudaFuncGetAttributes(&unused, kernel)) return error;
  }
  return cudaSuccess;
}
#else
}  // namespace quest
#endif
