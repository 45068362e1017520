// csrc/cuda/write_kv.cu as a host function: every warp of the grid in turn, in the order given or the reverse.
#include "emulate.h"

#include "write_kv.cu"

extern "C" void write_kv_on_host(const quest::WriteParams* p, int backwards) {
  const int units = p->num_tokens * p->num_kv_heads;
  std::vector<std::thread> lanes;
  for (unsigned lane = 0; lane < 32; ++lane) {
    lanes.emplace_back([=] {
      for (int i = 0; i < units; ++i) {
        const unsigned unit = backwards ? units - 1 - i : i;
        blockIdx.x = unit / quest::kWarps;
        threadIdx.x = unit % quest::kWarps * 32 + lane;
        if (p->page_summary == quest::kKeyCodes) {
          quest::write_kv_kernel<__nv_bfloat16, QUEST_HEAD_DIM, true>(*p);
        } else {
          quest::write_kv_kernel<__nv_bfloat16, QUEST_HEAD_DIM, false>(*p);
        }
        __syncwarp();
      }
    });
  }
  for (auto& lane : lanes) lane.join();
}
