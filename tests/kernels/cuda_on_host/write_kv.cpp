// csrc/cuda/write_kv.cu as a host function: every warp of the grid in turn, and its lanes, in the order given or the
// reverse. 0: every lane came to the same meeting points.
#include "emulate.h"

#include "write_kv.cu"

static const quest::WriteParams* params;
static int shift;
static bool reversed;

static void run_lane(unsigned lane) {
  const quest::WriteParams& p = *params;
  const unsigned warps = quest::count_ctas(p, shift) * quest::kWarps;
  for (unsigned i = 0; i < warps; ++i) {
    const unsigned warp = reversed ? warps - 1 - i : i;
    blockIdx.x = warp / quest::kWarps;
    threadIdx.x = warp % quest::kWarps * 32 + lane;
    if (p.page_summary == quest::kKeyCodes) {
      quest::write_kv_kernel<__nv_bfloat16, QUEST_HEAD_DIM, true>(p, shift);
    } else {
      quest::write_kv_kernel<__nv_bfloat16, QUEST_HEAD_DIM, false>(p, shift);
    }
    __syncwarp();
  }
}

// `parts`: warps that share a (token, KV head); 0: as many as a launch would take.
extern "C" int write_kv_on_host(const quest::WriteParams* p, int backwards, int parts) {
  params = p;
  shift = parts ? std::bit_width(static_cast<unsigned>(parts)) - 1 : quest::choose_parts_shift(*p);
  reversed = backwards;
  return Warp::run(run_lane, reversed) ? 0 : 1;
}

// Warps that a launch takes for a (token, KV head).
extern "C" int write_kv_parts(const quest::WriteParams* p) { return 1 << quest::choose_parts_shift(*p); }
