// csrc/cuda/write_kv.cu as a host function: every warp of the grid in turn, and its lanes, in the order given or the
// reverse. 0: every lane came to the same meeting points.
#include "emulate.h"

#include "write_kv.cu"

static const quest::WriteParams* params;
static bool reversed;

static void run_lane(unsigned lane) {
  const quest::WriteParams& p = *params;
  const unsigned units = p.num_tokens * p.num_kv_heads;
  for (unsigned i = 0; i < units; ++i) {
    const unsigned unit = reversed ? units - 1 - i : i;
    blockIdx.x = unit / quest::kWarps;
    threadIdx.x = unit % quest::kWarps * 32 + lane;
    if (p.page_summary == quest::kKeyCodes) {
      quest::write_kv_kernel<__nv_bfloat16, QUEST_HEAD_DIM, true>(p);
    } else {
      quest::write_kv_kernel<__nv_bfloat16, QUEST_HEAD_DIM, false>(p);
    }
    __syncwarp();
  }
}

extern "C" int write_kv_on_host(const quest::WriteParams* p, int backwards) {
  params = p;
  reversed = backwards;
  return Warp::run(run_lane, reversed) ? 0 : 1;
}
