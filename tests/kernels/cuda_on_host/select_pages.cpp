// The selection of csrc/cuda/quest_decode.cu as a host function, a cluster of CTAs at a time. 0: none waited for ever.
#include "cluster.h"

#include "share.cuh"

namespace quest {

static const DecodeParams* params;

struct Memory {
  Shared shared;
};

// The kernel's steps between the inputs and attention.
static void select() {
  const DecodeParams& p = *params;
  Shared& shared = reinterpret_cast<Memory*>(Cluster::shared())->shared;
  const Row row = Row::make(p);
  if (row.rank >= row.size) return;
  const int64_t row_index = static_cast<int64_t>(row.req) * p.num_select_heads + row.head;
  float* buffer = p.score_scratch + blockIdx.x * p.plane_pages;
  PageSelector::clear(shared);
  cluster_sync();
  const bool adaptive = top_p_of(p, row.req) < 1.f && row.ranked > 0;
  float2 range = make_float2(0.f, 0.f);
  if (adaptive || (row.ranked > 0 && row.ranked < row.last - row.first)) {
    range = load_scores(row, shared, p.scores + row_index * p.max_pages, buffer);
  }
  PageSelector selector(row, shared, buffer);
  ShareSelector by_mass(row, shared, buffer, p.mass_unit);
  selector.find_threshold(range);
  if (adaptive) by_mass.find(top_p_of(p, row.req), [&](int i) { return selector.chooses(i); });
  const auto chooses = [&](int i) { return selector.chooses(i) && by_mass.needs(i); };
  row.each_page([&](int i) {
    if (i < row.count) p.chosen[row_index * p.max_pages + row.page(i)] = chooses(i);
  });
  const int32_t* list = nullptr;
  const int entries = list_pages(row, shared, p.listed + blockIdx.x * p.plane_pages, list, chooses);
  if (threadIdx.x == 0) put(&shared.taken_inbox[row.rank], row.peer(0), entries);
  cluster_sync();
  if (threadIdx.x == 0 && row.rank == 0) p.taken[row.req * p.taken_req_stride + row.head] = row.taken(shared);
}

}  // namespace quest

extern "C" int select_pages_on_host(const quest::DecodeParams* p, int backwards) {
  quest::params = p;
  std::vector<quest::Memory> memories(p->cluster_size);
  gridDim.x = p->cluster_size;
  for (int req = 0; req < p->num_reqs; ++req) {
    for (int head = 0; head < p->num_select_heads; ++head) {
      blockIdx.y = head, blockIdx.z = req;
      std::memset(static_cast<void*>(memories.data()), 0xA5, memories.size() * sizeof(quest::Memory));
      char* shared = reinterpret_cast<char*>(memories.data());
      if (!Cluster::run(quest::select, p->cluster_size, quest::kThreads, shared, sizeof(quest::Memory), backwards)) return 1;
    }
  }
  return 0;
}
