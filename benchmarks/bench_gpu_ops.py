"""One layer's decode attention on a GPU: score, select and attend against FlashAttention 3, stage by stage.

usage: bench_gpu_ops.py [--output FILE.json]

32 query and 8 KV heads, head_dim 128, bf16, page size 16, pages in random order. Each number is the median of 20
replays of a CUDA graph with the L2 cache flushed before it. ``limit`` is the bytes of the byte model (summaries plus
selected pages) over the copy bandwidth measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from quest_vllm import compat
from quest_vllm.ops import triton as ops
from quest_vllm.page_layout import split_chunks

KV_HEADS, GROUP, DIM, PAGE, BLOCK = 8, 4, 128, 16, 16
# batch, context, budget
CASES = (
    (1, 32768, 2048),
    (1, 131072, 4096),
    (8, 32768, 2048),
    (8, 131072, 4096),
    (32, 32768, 2048),
    (16, 65536, 2048),
)


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


def run_case(batch: int, context: int, budget: int, bandwidth: float) -> dict[str, float]:
    """Time one shape; microseconds a layer."""
    blocks = context // BLOCK
    content = 2 * DIM + 2 * DIM // PAGE
    cache = torch.randn(batch * blocks, KV_HEADS, BLOCK, content, device="cuda", dtype=torch.bfloat16)
    views = split_chunks(cache, DIM, PAGE)
    table = torch.randperm(batch * blocks, device="cuda").int().view(batch, blocks)
    query = torch.randn(batch, KV_HEADS * GROUP, DIM, device="cuda", dtype=torch.bfloat16)
    lengths = torch.full((batch,), context, dtype=torch.int32, device="cuda")
    budgets = torch.full((batch,), budget // PAGE, dtype=torch.int32, device="cuda")
    starts = torch.arange(batch + 1, device="cuda", dtype=torch.int32)
    output, scale = torch.empty_like(query), DIM**-0.5
    scratch = ops.attention_scratch(batch, KV_HEADS * GROUP, DIM, blocks, page_size=PAGE, device=query.device)
    short = {"page_size": PAGE, "fill_tail": False}
    scores = ops.score_pages(query, views.summaries, table, lengths, **short)
    selected = ops.select_pages(scores, lengths, budgets, max_page_budget=blocks, **short)

    def score() -> None:
        ops.score_pages(query, views.summaries, table, lengths, out=scores, **short)

    def select() -> None:
        ops.select_pages(scores, lengths, budgets, max_page_budget=blocks, out=selected, **short)

    def attend() -> None:
        rows = (query, views.keys, views.values, table, lengths, selected)
        ops.sparse_paged_attention(
            *rows, page_size=PAGE, scale=scale, out=output, scratch=scratch, page_budgets=budgets
        )

    def chain() -> None:
        score()
        select()
        attend()

    def dense() -> None:
        compat.flash_attn_varlen_func()(
            q=query,
            k=views.keys.transpose(1, 2),
            v=views.values.transpose(1, 2),
            out=output,
            cu_seqlens_q=starts,
            max_seqlen_q=1,
            seqused_k=lengths,
            max_seqlen_k=context,
            softmax_scale=scale,
            causal=True,
            block_table=table,
            fa_version=3,
        )

    steps = {"fa3": dense, "score": score, "select": select, "attend": attend, "chain": chain}
    times = {name: time_replays(step) for name, step in steps.items()}
    bytes_moved = batch * KV_HEADS * 2 * DIM * 2 * (context // PAGE + budget)
    limit = bytes_moved / bandwidth
    case = {"batch": batch, "context": context, "budget": budget, **times, "limit_us": limit}
    return case | {"speedup": times["fa3"] / times["chain"], "share": limit / times["chain"]}


def main() -> None:
    """Run every shape and write one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    bandwidth = copy_bandwidth()
    cases = []
    for batch, context, budget in CASES:
        cases.append(run_case(batch, context, budget, bandwidth))
        print({name: round(value, 2) for name, value in cases[-1].items()}, flush=True)
    document = {
        "benchmark": "gpu_chain_triton",
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "vllm": compat.vllm_version(),
        "command": " ".join(sys.argv),
        "commit": os.environ.get("QUEST_COMMIT", "unknown"),
        "copy_TBps": bandwidth / 1e6,
        "unit": "microseconds a layer",
        "cases": cases,
    }
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
