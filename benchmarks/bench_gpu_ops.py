"""One layer's decode attention on a GPU against FlashAttention 3: the fused CUDA launch, and the Triton chain.

usage: bench_gpu_ops.py [--output FILE.json]

32 query and 8 KV heads, head_dim 128, bf16, page size 16, pages in random order. Times are microseconds a layer, the
median of 20 replays of a CUDA graph with the L2 cache flushed before it. ``alone``: one launch, whose code and data all
come from memory, the graph's own launch included. ``in_graph``: as many layers, each with its own cache, as keep L2
cold for data, which is what a decode step does; divided by their number. ``limit`` is the bytes of the byte model
(summaries plus selected pages) over the copy bandwidth measured in the same run. ``stages`` are the mean clocks of the
fused launch's CTAs, as shares of its time on the GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from provenance import commit, save

from quest_vllm import compat
from quest_vllm.config import POLICIES, TWO_STAGE, QuestConfig
from quest_vllm.ops import cuda, cuda_plan, triton
from quest_vllm.page_layout import PageViews, split_chunks

KV_HEADS, GROUP, DIM, PAGE, BLOCK = 8, 4, 128, 16, 16
SCALE = DIM**-0.5
EVERYTHING = 2**31 - 1
COLD_BYTES, MOST_BYTES = 200 * 2**20, 40 * 2**30  # more than L2 holds several times over; what the GPU has room for
KEY_CODES = {"page_summary": "key_codes", "group_reduction": "mass"}  # what is served by default
STAGES = ("inputs", "score", "select", "attend", "merge")
# batch, context, budget
CASES = (
    (1, 32768, 2048),
    (1, 131072, 4096),
    (8, 32768, 2048),
    (8, 131072, 4096),
    (32, 32768, 2048),
    (16, 65536, 2048),
    (1, 1048576, 8192),
)
# batch, context of rows that attend to everything
DENSE_CASES = ((1, 256), (1, 32768), (8, 256), (8, 32768), (32, 256), (32, 32768), (1, 131072))


def time_replays(step: Callable[[], object], repeats: int = 20) -> float:
    """Median microseconds of a graph replay with a cold L2."""
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    flush = torch.empty(64 * 2**20, dtype=torch.float32, device="cuda")
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return sorted(times)[repeats // 2]


def time_layers(steps: Sequence[Callable[[], object]]) -> dict[str, float]:
    """Microseconds of a layer's step, each on a cache of its own: the first alone, and one among the others."""

    def all_layers() -> None:
        for step in steps:
            step()

    return {"alone": time_replays(steps[0]), "in_graph": time_replays(all_layers) / len(steps)}


def copy_bandwidth() -> float:
    """Bytes a microsecond, read and written, of a 1 GiB copy."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * 2**30 / time_replays(lambda: target.copy_(source))


class Layers:
    """The caches of some layers, and a batch of rows of equal length. ``bytes_read``: by a layer's cheapest step."""

    def __init__(self, batch: int, context: int, bytes_read: int) -> None:
        torch.cuda.empty_cache()
        self.batch, self.blocks = batch, context // BLOCK
        content = 2 * DIM + 2 * DIM // PAGE
        layer_bytes = batch * self.blocks * KV_HEADS * BLOCK * content * 2
        count = max(2, min(64, COLD_BYTES // bytes_read, MOST_BYTES // layer_bytes))
        self.views: list[PageViews] = []
        for _ in range(count):
            cache = torch.randn(batch * self.blocks, KV_HEADS, BLOCK, content, device="cuda", dtype=torch.bfloat16)
            views = split_chunks(cache, DIM, PAGE)
            views.summaries[..., 0, :].abs_().neg_()  # a minimum is no greater than a maximum
            views.summaries[..., 1, :].abs_()
            self.views.append(views)
        self.table = torch.randperm(batch * self.blocks, device="cuda").int().view(batch, self.blocks)
        self.query = torch.randn(batch, KV_HEADS * GROUP, DIM, device="cuda", dtype=torch.bfloat16)
        self.output = torch.empty_like(self.query)
        self.starts = torch.arange(batch + 1, device="cuda", dtype=torch.int32)
        self.lengths = self.ints([context] * batch)

    def time(self, step: Callable[[PageViews], object]) -> dict[str, float]:
        """See :func:`time_layers`."""
        return time_layers([partial(step, views) for views in self.views])

    @staticmethod
    def ints(values: list[int]) -> torch.Tensor:
        """Int32 on the GPU."""
        return torch.tensor(values, dtype=torch.int32, device="cuda")

    def quest(self, views: PageViews, implementation: Any, budgets: torch.Tensor, **options: Any) -> None:
        """One decode step of ours."""
        rows = (self.query, views.keys, views.values, views.summaries, self.table, self.lengths, budgets)
        implementation.quest_decode(*rows, page_size=PAGE, scale=SCALE, out=self.output, **options)

    def encode(self) -> None:
        """Put key codes in the place of the minima and maxima."""
        slots = torch.arange(self.views[0].keys.shape[0] * BLOCK, device="cuda")
        for views in self.views:
            cuda.update_page_summaries(views.keys, views.summaries, slots, page_size=PAGE, page_summary="key_codes")

    def dense(self, views: PageViews) -> None:
        """One decode step of FlashAttention 3."""
        compat.flash_attn_varlen_func()(
            q=self.query,
            k=views.keys.transpose(1, 2),
            v=views.values.transpose(1, 2),
            out=self.output,
            cu_seqlens_q=self.starts,
            max_seqlen_q=1,
            seqused_k=self.lengths,
            max_seqlen_k=int(self.blocks * BLOCK),
            softmax_scale=SCALE,
            causal=True,
            block_table=self.table,
            fa_version=3,
        )

    def stage_shares(self, budgets: torch.Tensor, **options: Any) -> dict[str, float]:
        """Mean share of each stage in the time of the fused launch's CTAs."""
        summary, mass = options.get("page_summary", "min_max"), options.get("group_reduction") == "mass"
        cluster = cuda_plan.default_cluster_size(self.batch, KV_HEADS, GROUP, DIM, self.blocks, summary, mass)
        marks = torch.zeros(self.batch, KV_HEADS, cluster, len(STAGES) + 1, dtype=torch.int64, device="cuda")
        for _ in range(3):
            self.quest(self.views[0], cuda, budgets, timeline=marks, **options)
        spans = marks.diff(dim=-1).double().flatten(0, 2).mean(0)
        return dict(zip(STAGES, (spans / spans.sum()).tolist(), strict=True))


def ratio(of: dict[str, float], to: dict[str, float]) -> dict[str, float]:
    """How many times as long ``of`` takes as ``to``."""
    return {way: of[way] / to[way] for way in of}


def run_case(batch: int, context: int, budget: int, bandwidth: float) -> dict[str, Any]:
    """Time one shape, with the original Quest's scores, with the default boxes', by key codes, and in two stages."""
    bytes_read = batch * KV_HEADS * 2 * DIM * 2 * (context // PAGE + budget)
    layers = Layers(batch, context, bytes_read)
    budgets = layers.ints([budget // PAGE] * batch)
    default = QuestConfig(page_summary="min_max").resolved()
    served = {"group_reduction": default.group_reduction, "bound_radius": default.bound_radius}
    case: dict[str, Any] = {"batch": batch, "context": context, "budget": budget, "layers": len(layers.views)}
    case["fa3"] = layers.time(layers.dense)
    case["cuda"] = layers.time(lambda views: layers.quest(views, cuda, budgets))
    case["cuda_served_policy"] = layers.time(lambda views: layers.quest(views, cuda, budgets, **served))
    case["triton"] = layers.time(lambda views: layers.quest(views, triton, budgets))
    case["limit"] = bytes_read / bandwidth
    case["speedup"] = ratio(case["fa3"], case["cuda"])
    case["share"] = {way: case["limit"] / time for way, time in case["cuda"].items()}
    case["stages"] = layers.stage_shares(budgets)
    layers.encode()
    case["cuda_key_codes"] = layers.time(lambda views: layers.quest(views, cuda, budgets, **KEY_CODES))
    twice = KEY_CODES | {"policies": layers.ints([POLICIES.index(TWO_STAGE)] * batch)}
    case["cuda_two_stage"] = layers.time(lambda views: layers.quest(views, cuda, budgets, **twice))
    case["two_stage_over_box"] = ratio(case["cuda_two_stage"], case["cuda_served_policy"])
    case["triton_key_codes"] = layers.time(lambda views: layers.quest(views, triton, budgets, **KEY_CODES))
    case["key_codes_stages"] = layers.stage_shares(budgets, **KEY_CODES)
    return case


def run_dense_case(batch: int, context: int) -> dict[str, Any]:
    """Rows whose budget covers their context, and a batch in which every second row's does."""
    layers = Layers(batch, context, batch * KV_HEADS * 2 * DIM * 2 * min(context, 4096))
    everything = layers.ints([EVERYTHING] * batch)
    case: dict[str, Any] = {"batch": batch, "context": context, "fa3": layers.time(layers.dense)}
    case["cuda"] = layers.time(lambda views: layers.quest(views, cuda, everything))
    if batch > 1 and context > 2048:
        sparse = layers.ints([2048 // PAGE] * batch)
        half = torch.where(torch.arange(batch, device="cuda") % 2 == 0, everything, sparse)
        case["all_sparse"] = layers.time(lambda views: layers.quest(views, cuda, sparse))
        case["half_sparse"] = layers.time(lambda views: layers.quest(views, cuda, half))
    return case | {"speedup": ratio(case["fa3"], case["cuda"])}


def run_write(batch: int) -> dict[str, Any]:
    """Storing one token a row: vLLM's own write, and the write with the summaries."""
    layers = Layers(batch, 4096, batch * KV_HEADS * DIM * 2 * PAGE)
    slots = layers.table[:, -1].long() * BLOCK + BLOCK - 1
    key, value = (torch.randn(batch, KV_HEADS, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    one = torch.ones((), device="cuda")

    def stock(views: PageViews) -> None:
        rows = (views.keys.transpose(1, 2), views.values.transpose(1, 2))
        compat.custom_ops().reshape_and_cache_flash(key, value, *rows, slots, "auto", one, one)

    def ours(views: PageViews, page_summary: str) -> None:
        caches = (views.keys, views.values, views.summaries)
        cuda.KvWriter(*caches, page_size=PAGE, page_summary=page_summary)(key, value, slots)

    return {
        "batch": batch,
        "stock_write": layers.time(stock),
        "write_with_summaries": layers.time(lambda views: ours(views, "min_max")),
        "write_with_key_codes": layers.time(lambda views: ours(views, "key_codes")),
    }


def show(case: dict[str, Any]) -> dict[str, Any]:
    """Print a case in short, and pass it on."""
    print(json.dumps(json.loads(json.dumps(case), parse_float=lambda text: round(float(text), 2))), flush=True)
    return case


def main() -> None:
    """Run every shape and write one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    bandwidth = copy_bandwidth()
    document = {
        "benchmark": "gpu_chain",
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "vllm": compat.vllm_version(),
        "command": " ".join(sys.argv),
        "commit": commit(),
        "copy_TBps": bandwidth / 1e6,
        "unit": "microseconds a layer",
        "cases": [show(run_case(*case, bandwidth)) for case in CASES],
        "dense_rows": [show(run_dense_case(*case)) for case in DENSE_CASES],
        "writes": [show(run_write(batch)) for batch in (1, 32)],
    }
    save(document, arguments.output)


if __name__ == "__main__":
    main()
