// csrc/cuda/quest_decode.cu as a host function, a cluster of CTAs at a time. 0: none waited for ever.
#include "cluster.h"

// FP16 and bfloat16 arithmetic that CUDA's headers have for a GPU alone.
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  const float2 x = __half22float2(a), y = __half22float2(b), z = __half22float2(c);
  return __floats2half2_rn(std::fma(x.x, y.x, z.x), std::fma(x.y, y.y, z.y));
}
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t found = 0;
  for (int i = 0; i < 4; ++i) found |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
  return found;
}

namespace quest {
struct Shared;
Shared& shared_on_host();
char* window_on_host();
}  // namespace quest

#include "quest_decode.cu"

namespace quest {

// All lanes' values of one kind: what a warp's matrix product is made of.
static void gather(uint64_t mine, uint64_t (&all)[32]) {
  std::memcpy(&exchange_slots[threadIdx.x % 32], &mine, sizeof(mine));
  meet_warp();
  std::memcpy(all, exchange_slots, sizeof(all));
  meet_warp();
}

// An operand's k-th element of sixteen in a row or column, whose first lane is `lane`.
template <typename T>
static float element(const uint64_t (&operand)[32], int lane, int k) {
  return Half<T>::to_float(static_cast<uint32_t>(operand[lane + k % 8 / 2] >> k / 8 * 32 + k % 2 * 16));
}

// m16n8k16: see the PTX manual for which lane has which elements.
template <typename T>
void mma_on_host(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  uint64_t upper[32], lower[32], columns[32];  // rows 0-7, rows 8-15
  gather(a0 | static_cast<uint64_t>(a2) << 32, upper);
  gather(a1 | static_cast<uint64_t>(a3) << 32, lower);
  gather(b0 | static_cast<uint64_t>(b1) << 32, columns);
  const int n = lane_id() / 4, t = lane_id() % 4;
  for (int c = 0; c < 4; ++c) {
    double sum = d[c];
    for (int k = 0; k < 16; ++k) {
      const double row = element<T>(c < 2 ? upper : lower, n * 4, k);
      sum += row * element<T>(columns, (2 * t + c % 2) * 4, k);
    }
    d[c] = static_cast<float>(sum);
  }
}

static const DecodeParams* params;

Shared& shared_on_host() { return *reinterpret_cast<Shared*>(Cluster::shared()); }
char* window_on_host() { return Cluster::shared() + sizeof(Shared); }

template <typename T, int kHeadTiles, template <typename, int, int> class Estimate>
static void decode() {
  quest_decode_kernel<T, QUEST_HEAD_DIM, kHeadTiles, Estimate>(*params);
}

static void (*kernel_of(const DecodeParams& p, bool bfloat16))() {
  if (p.page_summary == kKeyCodes) {
    return p.rows <= 4 ? decode<__nv_bfloat16, 1, PairedCodes> : decode<__nv_bfloat16, 1, SingleCodes>;
  }
  if (!bfloat16) return decode<__half, 1, BoxEstimate>;
  return p.rows <= 8 ? decode<__nv_bfloat16, 1, BoxEstimate> : decode<__nv_bfloat16, 2, BoxEstimate>;
}

}  // namespace quest

extern "C" int quest_decode_on_host(const quest::DecodeParams* p, int bfloat16, int backwards) {
  using namespace quest;
  params = p;
  const auto run = kernel_of(*p, bfloat16);
  const size_t bytes = div_up(sizeof(Shared) + dynamic_bytes(*p), 128) * 128;
  std::vector<char> memories(p->cluster_size * bytes + 128);
  char* shared = memories.data() + (128 - reinterpret_cast<uintptr_t>(memories.data()) % 128);
  gridDim.x = p->cluster_size;
  Cluster::watch_more = [] {  // of this row and head
    const int64_t row = blockIdx.z * params->num_select_heads + blockIdx.y;
    const int64_t listed = params->max_pages + kMaxCluster, scores = num_planes(*params) * params->plane_pages;
    races::watch(params->listed + row * listed, listed * sizeof(int32_t));
    if (params->score_scratch) races::watch(params->score_scratch + row * scores, scores * sizeof(float));
  };
  for (int req = 0; req < p->num_reqs; ++req) {
    for (int head = 0; head < p->num_select_heads; ++head) {
      blockIdx.y = head, blockIdx.z = req;
      std::memset(shared, 0xFF, p->cluster_size * bytes);  // NaN
      if (!Cluster::run(run, p->cluster_size, kThreads, shared, bytes, backwards)) return 1;
    }
  }
  return 0;
}
