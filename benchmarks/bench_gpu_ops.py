"""One layer's decode attention on a GPU against FlashAttention 3: the fused CUDA launch, and the Triton chain.

usage: bench_gpu_ops.py [--output FILE.json]

32 query and 8 KV heads, head_dim 128, bf16, page size 16, pages in random order. Each number is the median of 20
replays of a CUDA graph with the L2 cache flushed before it, in microseconds a layer. ``limit`` is the bytes of the
byte model (summaries plus selected pages) over the copy bandwidth measured in the same run. ``stages`` are the mean
clocks of the fused launch's CTAs, as shares of its time on the GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from provenance import commit

from quest_vllm import compat
from quest_vllm.config import QuestConfig
from quest_vllm.ops import cuda, triton
from quest_vllm.page_layout import PageViews, split_chunks

KV_HEADS, GROUP, DIM, PAGE, BLOCK = 8, 4, 128, 16, 16
SCALE = DIM**-0.5
EVERYTHING = 2**31 - 1
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


def copy_bandwidth() -> float:
    """Bytes a microsecond, read and written, of a 1 GiB copy."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * 2**30 / time_replays(lambda: target.copy_(source))


class Layer:
    """One layer's cache and a batch of rows of equal length."""

    def __init__(self, batch: int, context: int) -> None:
        torch.cuda.empty_cache()
        self.batch, self.blocks = batch, context // BLOCK
        content = 2 * DIM + 2 * DIM // PAGE
        cache = torch.randn(batch * self.blocks, KV_HEADS, BLOCK, content, device="cuda", dtype=torch.bfloat16)
        self.views: PageViews = split_chunks(cache, DIM, PAGE)
        self.views.summaries[..., 0, :].abs_().neg_()  # a minimum is no greater than a maximum
        self.views.summaries[..., 1, :].abs_()
        self.table = torch.randperm(batch * self.blocks, device="cuda").int().view(batch, self.blocks)
        self.query = torch.randn(batch, KV_HEADS * GROUP, DIM, device="cuda", dtype=torch.bfloat16)
        self.output = torch.empty_like(self.query)
        self.starts = torch.arange(batch + 1, device="cuda", dtype=torch.int32)
        self.lengths = self.ints([context] * batch)

    @staticmethod
    def ints(values: list[int]) -> torch.Tensor:
        """Int32 on the GPU."""
        return torch.tensor(values, dtype=torch.int32, device="cuda")

    def quest(self, implementation: Any, budgets: torch.Tensor, **options: Any) -> None:
        """One decode step of ours."""
        views = self.views
        rows = (self.query, views.keys, views.values, views.summaries, self.table, self.lengths, budgets)
        implementation.quest_decode(*rows, page_size=PAGE, scale=SCALE, out=self.output, **options)

    def dense(self) -> None:
        """One decode step of FlashAttention 3."""
        compat.flash_attn_varlen_func()(
            q=self.query,
            k=self.views.keys.transpose(1, 2),
            v=self.views.values.transpose(1, 2),
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
        cluster = cuda.default_cluster_size(self.batch, KV_HEADS)
        marks = torch.zeros(self.batch, KV_HEADS, cluster, len(STAGES) + 1, dtype=torch.int64, device="cuda")
        for _ in range(3):
            self.quest(cuda, budgets, timeline=marks, **options)
        spans = marks.diff(dim=-1).double().flatten(0, 2).mean(0)
        return dict(zip(STAGES, (spans / spans.sum()).tolist(), strict=True))


def run_case(batch: int, context: int, budget: int, bandwidth: float) -> dict[str, Any]:
    """Time one shape, with the original Quest's scores and with the default configuration's."""
    layer = Layer(batch, context)
    budgets = layer.ints([budget // PAGE] * batch)
    default = QuestConfig()
    served = {"group_reduction": default.group_reduction, "bound_radius": default.bound_radius}
    fa3 = time_replays(layer.dense)
    fused = time_replays(lambda: layer.quest(cuda, budgets))
    bytes_moved = batch * KV_HEADS * 2 * DIM * 2 * (context // PAGE + budget)
    return {
        "batch": batch,
        "context": context,
        "budget": budget,
        "fa3": fa3,
        "cuda": fused,
        "cuda_16_warps": time_replays(lambda: layer.quest(cuda, budgets, warps=16)),
        "cuda_served_policy": time_replays(lambda: layer.quest(cuda, budgets, **served)),
        "triton": time_replays(lambda: layer.quest(triton, budgets)),
        "limit": bytes_moved / bandwidth,
        "speedup": fa3 / fused,
        "share": bytes_moved / bandwidth / fused,
        "stages": layer.stage_shares(budgets),
    }


def run_dense_case(batch: int, context: int) -> dict[str, Any]:
    """Rows whose budget covers their context, and a batch in which every second row's does."""
    layer = Layer(batch, context)
    everything = layer.ints([EVERYTHING] * batch)
    case = {"batch": batch, "context": context, "fa3": time_replays(layer.dense)}
    case["cuda"] = time_replays(lambda: layer.quest(cuda, everything))
    if batch > 1 and context > 2048:
        sparse = layer.ints([2048 // PAGE] * batch)
        half = torch.where(torch.arange(batch, device="cuda") % 2 == 0, everything, sparse)
        case["all_sparse"] = time_replays(lambda: layer.quest(cuda, sparse))
        case["half_sparse"] = time_replays(lambda: layer.quest(cuda, half))
    return case | {"speedup": case["fa3"] / case["cuda"]}


def run_write(batch: int) -> dict[str, Any]:
    """Storing one token a row: vLLM's own write, and the write with the summaries."""
    layer = Layer(batch, 4096)
    views = layer.views
    slots = layer.table[:, -1].long() * BLOCK + BLOCK - 1
    key, value = (torch.randn(batch, KV_HEADS, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    one = torch.ones((), device="cuda")
    rows = (views.keys.transpose(1, 2), views.values.transpose(1, 2))
    stock = time_replays(
        lambda: compat.custom_ops().reshape_and_cache_flash(key, value, *rows, slots, "auto", one, one)
    )
    caches = (views.keys, views.values, views.summaries)
    ours = time_replays(lambda: cuda.write_kv(key, value, *caches, slots, page_size=PAGE))
    return {"batch": batch, "stock_write": stock, "write_with_summaries": ours}


def show(case: dict[str, Any]) -> dict[str, Any]:
    """Print a case in short, and pass it on."""
    print({name: round(item, 2) if isinstance(item, float) else item for name, item in case.items()}, flush=True)
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
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
