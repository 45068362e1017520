// Stores new keys and values, and refreshes the summaries of the pages that they touch, in one launch.
//
// One warp serves a (token, KV head), or several where key codes are wanted and the GPU has room for them: then each
// codes a share of the channels, and so finds out by itself what all of them must know. The warps of a page's last token
// in this call recompute the page's min/max over rows 0 to its own, or their codes: rows of this call from the input,
// earlier ones from the cache, so that no warp waits for another. A reused block's stale summary is never read.
#include <algorithm>

#include "encode.cuh"

namespace quest {

constexpr int kMaxPageSize = 256;
constexpr int kCodedPageShift = 4;

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
__device__ __forceinline__ int first_neighbour(int page_shift, int token, int round) {
  return max(0, token - (1 << page_shift) + 1) + 32 * round + lane_id();
}
__device__ __forceinline__ int64_t neighbour(const WriteParams& p, int page_shift, int token, int round) {
  const int other = first_neighbour(page_shift, token, round);
  return other < min(p.num_tokens, token + (1 << page_shift)) ? p.slot_mapping[other] : -1;
}

// No row of the page is from this call, as far as is known.
__device__ __forceinline__ void forget_page_rows(int page_shift, int* source) {
#pragma unroll 1
  for (int row = lane_id(); row < 1 << page_shift; row += 32) source[row] = -1;
  __syncwarp();
}

// source[r], which was forgotten: the token of this call whose key is row r of the page, or -1. `theirs`: neighbour(p,
// page_shift, token, 0). Returns whether `token` is the page's last.
__device__ __forceinline__ bool find_page_rows(const WriteParams& p, int page_shift, int token, int64_t slot, int64_t theirs,
                                               int* source) {
  const int page_size = 1 << page_shift;
  bool later = false;
#pragma unroll 1
  for (int round = 0; round < div_up(2 * page_size, 32); ++round) {
    if (round > 0) theirs = neighbour(p, page_shift, token, round);
    if (theirs >= 0 && theirs >> page_shift == slot >> page_shift) {
      if (p.key != nullptr) source[theirs & (page_size - 1)] = first_neighbour(page_shift, token, round);
      later |= theirs > slot;
    }
  }
  __syncwarp();
  return !__any_sync(0xFFFFFFFFu, later);
}

// A page of one KV head up to the row of its last token.
template <typename T>
class Page {
 public:
  // `source`: from find_page_rows.
  __device__ __forceinline__ Page(const WriteParams& p, int page_shift, int64_t slot, int head, const int* source)
      : source_(source), row_stride_(p.key_row_stride), token_stride_(p.key_token_stride) {
    const unsigned block = slot >> p.block_shift;
    const int row = static_cast<int>(slot & ((1 << p.block_shift) - 1)), page = row >> page_shift;
    const int first = page << page_shift;
    count_ = row - first + 1;
    cached_ = static_cast<const T*>(p.keys) + block * p.key_block_stride + head * p.key_head_stride + first * row_stride_;
    given_ = static_cast<const T*>(p.key) + head * p.key_head_stride_in;
    summary_ = static_cast<T*>(p.summaries) + block * p.summary_block_stride + head * p.summary_head_stride +
               page * p.summary_page_stride;
  }

  __device__ __forceinline__ int count() const { return count_; }  // rows
  __device__ __forceinline__ T* summary() const { return summary_; }

  // Eight channels of a key; of the last one for rows past it.
  __device__ __forceinline__ uint4 key(int row, unsigned channel) const {
    row = min(row, count_ - 1);
    const int from = source_[row];
    const bool is_new = from >= 0;  // no branch: a page has rows of both kinds
    const unsigned index = is_new ? from : row;
    const T* key = (is_new ? given_ : cached_) + index * (is_new ? token_stride_ : row_stride_);
    return *reinterpret_cast<const uint4*>(key + channel);
  }

 private:
  const T *cached_, *given_;
  T* summary_;
  const int* source_;
  int64_t row_stride_, token_stride_;
  int count_;
};

template <typename T, int D>
__device__ __forceinline__ void store_min_max(const Page<T>& page, int64_t bound_stride) {
  constexpr int kLanes = D / 8, kRows = 32 / kLanes;  // lanes to a row, rows at a time
  constexpr int kRound = 16 / kRows;                  // reads in flight: 16 rows of the page
  const int part = lane_id() % kLanes * 8;
  constexpr uint32_t kInfinities = Half<T>::kInfinity * 0x10001u, kSigns = 0x80008000u;
  uint4 low = make_uint4(kInfinities, kInfinities, kInfinities, kInfinities);
  uint4 high = make_uint4(kInfinities | kSigns, kInfinities | kSigns, kInfinities | kSigns, kInfinities | kSigns);
#pragma unroll 1
  for (int round = lane_id() / kLanes; round < page.count(); round += 16) {
    uint4 key[kRound];
#pragma unroll
    for (int k = 0; k < kRound; ++k) key[k] = page.key(round + k * kRows, part);
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
  if (lane_id() < kLanes) {
    *reinterpret_cast<uint4*>(page.summary() + part) = low;
    *reinterpret_cast<uint4*>(page.summary() + bound_stride + part) = high;
  }
}

// Codes every `parts`-th eight of the page's pairs of channels, from the `part`-th on.
template <typename T, int D>
__device__ __forceinline__ void store_key_codes(const Page<T>& page, unsigned part, unsigned parts) {
  uint8_t* coded = reinterpret_cast<uint8_t*>(page.summary());
  const int row = lane_id() % 16;
  uint4 next = page.key(row, first_channel<D>(part));
#pragma unroll 1
  for (unsigned eight = part; eight < D / 16; eight += parts) {
    const uint4 key = next;
    if (eight + parts < D / 16) next = page.key(row, first_channel<D>(eight + parts));
    const uint32_t shared = store_shared<T, D>(coded, eight, bound_of_rows<T>(key));
    store_codes<T, D>(coded, eight, key, shared, page.count());
  }
}

// A (token, KV head)'s key and value, read at once and stored later: what lies between need not wait for them.
template <typename T, int D>
class NewRow {
 public:
  // The `part`-th of `parts` warps that share the row.
  __device__ __forceinline__ NewRow(const WriteParams& p, int token, int head, unsigned part, unsigned parts)
      : first_(part), apart_(parts) {
    const T* key = static_cast<const T*>(p.key) + token * p.key_token_stride + head * p.key_head_stride_in;
    const T* value = static_cast<const T*>(p.value) + token * p.value_token_stride + head * p.value_head_stride_in;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      if (p.key == nullptr || at(k) >= 2 * D) continue;
      vectors_[k] = *reinterpret_cast<const uint4*>(at(k) < D ? key + at(k) : value + at(k) - D);
    }
  }

  __device__ __forceinline__ void store(const WriteParams& p, int64_t slot, int head) const {
    const unsigned block = slot >> p.block_shift, row = slot & ((1 << p.block_shift) - 1);
    T* key = static_cast<T*>(p.keys) + block * p.key_block_stride + head * p.key_head_stride + row * p.key_row_stride;
    T* value = static_cast<T*>(p.values) + block * p.value_block_stride + head * p.value_head_stride + row * p.value_row_stride;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      if (p.key == nullptr || at(k) >= 2 * D) continue;
      *reinterpret_cast<uint4*>(at(k) < D ? key + at(k) : value + at(k) - D) = vectors_[k];
    }
  }

 private:
  static constexpr int kVectors = div_up(D / 4, 32);
  // Where in the key, and the value behind it, the lane's k-th vector begins.
  __device__ __forceinline__ unsigned at(unsigned k) const { return ((k * apart_ + first_) * 32 + lane_id()) * 8; }

  uint4 vectors_[kVectors];
  unsigned first_, apart_;
};

template <typename T, int D, bool kCodes>
__global__ void __launch_bounds__(kThreads)
    write_kv_kernel(const __grid_constant__ WriteParams p, const __grid_constant__ int parts_shift) {
  __shared__ int sources[kWarps][kCodes ? 1 << kCodedPageShift : kMaxPageSize];
  const int page_shift = kCodes ? kCodedPageShift : p.page_shift;
  const unsigned warp = blockIdx.x * kWarps + warp_id(), unit = warp >> parts_shift;
  const unsigned parts = 1u << parts_shift, part = warp & (parts - 1);
  const int token = static_cast<int>(unit / p.num_kv_heads), head = static_cast<int>(unit % p.num_kv_heads);
  if (token >= p.num_tokens) return;  // before the wait, so that the division is, too
  int* source = sources[warp_id()];
  forget_page_rows(page_shift, source);
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int64_t neighbours = neighbour(p, page_shift, token, 0);  // asked for together with the slot itself, and the row
  const int64_t slot = p.slot_mapping[token];
  const NewRow<T, D> row(p, token, head, part, parts);
  if (slot < 0) return;
  if (find_page_rows(p, page_shift, token, slot, neighbours, source)) {
    const Page<T> page(p, page_shift, slot, head, source);
    if constexpr (kCodes) {
      store_key_codes<T, D>(page, part, parts);
    } else {
      store_min_max<T, D>(page, p.summary_bound_stride);
    }
  }
  row.store(p, slot, head);
}

inline int64_t count_units(const WriteParams& p) { return static_cast<int64_t>(p.num_tokens) * p.num_kv_heads; }

// Log2 of the warps that share a unit, a (token, KV head): for codes as many as all find their place on the GPU at once.
inline int choose_parts_shift(const WriteParams& p) {
  constexpr int64_t kRoom = 132 * 32;  // warps: the SMs of an H100 or H200, half of each
  constexpr int kMost = std::min(kWarps, QUEST_HEAD_DIM / 16);
  int shift = 0;
  while (p.page_summary == kKeyCodes && 2 << shift <= kMost && count_units(p) << (shift + 1) <= kRoom) ++shift;
  return shift;
}

inline int64_t count_ctas(const WriteParams& p, int parts_shift) {
  return ((count_units(p) << parts_shift) + kWarps - 1) / kWarps;
}

#ifdef __CUDACC__  // the rest of this file is also run on a CPU, by tests/kernels/test_cuda_write_on_host.py
template <typename T>
cudaError_t launch_write(const WriteParams& p, cudaStream_t stream) {
  if (count_units(p) == 0) return cudaSuccess;
  if (count_units(p) > INT32_MAX) return cudaErrorInvalidValue;
  const int parts_shift = choose_parts_shift(p);
  cudaLaunchAttribute early = {};  // start while the kernel before drains; see wait_for_previous_kernel
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(count_ctas(p, parts_shift)));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  const auto kernel = p.page_summary == kKeyCodes ? write_kv_kernel<T, QUEST_HEAD_DIM, true> : write_kv_kernel<T, QUEST_HEAD_DIM, false>;
  return cudaLaunchKernelEx(&config, kernel, p, parts_shift);
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
