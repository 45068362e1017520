"""How a fused launch is cut up: CTAs of a cluster, warps of a CTA, and where the scores lie. Measured on an H100."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

from quest_vllm.ops import cuda_build
from quest_vllm.ops.cuda_library import load
from quest_vllm.ops.cuda_params import PAGE_SUMMARIES, REDUCTIONS, DecodeParams

SHARED_SCORE_BYTES = 33 * 1024  # and the inbox: two CTAs fit an SM, at head_dim 128
ALL_SCORE_BYTES = 78 * 1024  # one CTA fits an SM
MAX_CLUSTER = 16  # kMaxCluster in csrc/cuda/common.cuh
SMALLEST_SHARE = 144  # pages; see kMinimumWork in csrc/cuda/shared.cuh
NUM_SMS = 132  # of an H100 or H200
CLUSTER_SIZES = (8, 4, 3, 2)  # by default: larger ones did not all find their SMs, and 6 may not in a whole model


@dataclass(frozen=True)
class Shape:
    """What a launch's shapes come down to."""

    num_reqs: int
    num_select_heads: int
    rows: int
    head_dim: int
    max_pages: int


@functools.cache
def resident_clusters(
    head_dim: int, warps: int, rows: int, cluster_size: int, plane_pages: int, page_summary: int
) -> int:
    """How many clusters of a launch the current GPU runs at a time: less than its SMs over the CTAs of a cluster."""
    params = DecodeParams(
        rows=rows,
        plane_pages=plane_pages,
        num_reqs=1,
        num_select_heads=1,
        reduction=REDUCTIONS["max"],
        page_summary=page_summary,
    )
    params.set_cluster(cluster_size)
    library, resident = load(head_dim, warps), ctypes.c_int()
    error = library.quest_resident_clusters(ctypes.byref(params), ctypes.byref(resident))
    if error:
        raise RuntimeError(f"quest_resident_clusters: {library.quest_error_string(error).decode()}")
    return resident.value


def _shared_pages(shape: Shape, planes: int, cluster_size: int, room: int) -> int:
    """Pages of which a CTA keeps scores in shared memory: its part of the longest context; 0: ``room`` is too small."""
    share = max(SMALLEST_SHARE, shape.max_pages // cluster_size + 1)
    pages = -(-share // 16) * 16 + 8  # plus 8: no two planes in the same banks
    inbox = 8 * (shape.rows * shape.head_dim // 2 + MAX_CLUSTER)  # see quest_decode.cu
    return pages if 4 * pages + max(4 * pages * (planes - 1), inbox) <= room else 0


@functools.cache
def plan(
    shape: Shape, planes: int, page_summary: int, cluster_size: int | None, warps: int | None
) -> tuple[int, int, int]:
    """Cluster size, warps of a CTA, and the pages of which it keeps scores in shared memory, where not all is given.

    16 warps a CTA read faster than 8 where all clusters find their SMs at once: then clusters are as large as that
    allows. Else 8 warps, two CTAs an SM, and two CTAs even where one would do, so that a long row has two. Measured on
    an H100 (docs/gpu-chain.md); depends on the batch's size, never on its content.
    """
    clusters = max(1, shape.num_reqs * shape.num_select_heads)

    def together(size: int, count: int, pages: int) -> bool:
        if clusters * size > NUM_SMS:
            return False
        launch = (shape.head_dim, count, shape.rows, size, planes * pages, page_summary)
        return clusters <= resident_clusters(*launch)

    if warps != 8 and shape.rows <= 8 and 16 in cuda_build.variants(shape.head_dim):
        for size in CLUSTER_SIZES if cluster_size is None else (cluster_size,):
            pages = _shared_pages(shape, planes, size, ALL_SCORE_BYTES)
            if warps == 16 or together(size, 16, pages):
                return size, 16, pages
    size = cluster_size or next((size for size in (8, 4) if clusters * size <= NUM_SMS), 2)
    pages = _shared_pages(shape, planes, size, ALL_SCORE_BYTES)
    if not together(size, 8, pages):
        pages = _shared_pages(shape, planes, size, SHARED_SCORE_BYTES)
    return size, 8, pages


def default_cluster_size(
    num_reqs: int, num_select_heads: int, rows: int, head_dim: int, max_pages: int, page_summary: str, mass: bool
) -> int:
    """CTAs of a (request, head)'s cluster in a fused launch that names none; ``rows`` query heads share a selection."""
    shape = Shape(num_reqs, num_select_heads, rows, head_dim, max_pages)
    return plan(shape, rows if mass else 1, PAGE_SUMMARIES[page_summary], None, None)[0]
