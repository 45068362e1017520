"""A few launches of every CUDA kernel, small enough for compute-sanitizer's slower tools.

usage: compute-sanitizer --tool initcheck python -m tests.kernels.sanitize [--head-dims 64 128] [--warps 8 16]

Whole tests take these tools too long: each launch here has rows that are empty, short, covered, sparse, adaptive, a
window and of two stages, in one batch. Answers are those of a launch before, bit for bit.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from quest_vllm.ops import cuda, cuda_build
from tests.kernels.paged import places
from tests.kernels.test_cuda_ops import build, run

LENGTHS = [0, 1, 100, 583, 700, 640, 700]
BUDGETS = [3, 3, 200, 9, 30, 12, 9]
TOP_PS = [1.0, 1.0, 1.0, 1.0, 0.8, 1.0, 0.9]
NAMES = ["mass", "mass", "mass", "max", "mean", "window", "two_stage"]
KINDS = [("key_codes", "mass", 4), ("key_codes", "mass", 8), ("min_max", "mass", 3), ("min_max", "max", 4)]
CLUSTERS = [1, 3]


def launch_all(head_dim: int, warps: int, page_summary: str, reduction: str, group: int) -> int:
    """Write a cache and decode from it; returns the number of launches."""
    case = build(LENGTHS, (1, group, head_dim, 16, 32))
    views, slots = case.views, case.slots()
    rows = [cache[slots // 32, :, slots % 32].contiguous() for cache in (views.keys, views.values)]
    cuda.KvWriter(views.keys, views.values, views.summaries, page_size=16, page_summary=page_summary)(*rows, slots)
    options: dict[str, Any] = {"page_summary": page_summary, "group_reduction": reduction, "warps": warps}
    options["top_p"] = torch.tensor(TOP_PS, device=case.query.device)
    if reduction == "mass":
        options["policies"] = places(NAMES, case.query.device)
    taken = torch.zeros(len(LENGTHS), 1, dtype=torch.int32, device=case.query.device)
    for cluster in CLUSTERS:
        first, again = (run(case, BUDGETS, cluster_size=cluster, taken=taken, **options) for _ in range(2))
        assert torch.equal(first, again)
    return 1 + 2 * len(CLUSTERS)


def main() -> None:
    """Launch every kind for every head dimension and number of warps asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dims", type=int, nargs="+", default=cuda_build.HEAD_DIMS)
    parser.add_argument("--warps", type=int, nargs="+", default=(8, 16))
    asked = parser.parse_args()
    start = time.monotonic()
    for head_dim in asked.head_dims:
        for warps in (count for count in asked.warps if count in cuda_build.variants(head_dim)):
            for kind in KINDS:
                count = launch_all(head_dim, warps, *kind)
                print(f"{head_dim} {warps} {kind}: {count} launches, {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
