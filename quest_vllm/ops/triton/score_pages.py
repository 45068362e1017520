"""Page scores from the summaries: a bound of ``q.k`` for each page and query head, reduced over the GQA group.

The mass reduction takes a second launch, for its normaliser spans the row: the first leaves each head's logits and the
log-sum-exp of each tile of them in scratch, the second merges those of a row and combines the heads, by that row's own
policy where it has one. Rows with the policy "window" are scored as well, for nobody: they have nothing to compete for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from quest_vllm.config import POLICIES
from quest_vllm.ops.reference import check_bound_radius, check_page_summary
from quest_vllm.ops.triton.common import MIN_DOT_ROWS, cdiv, dot, dot_tile, finite_or_zero, max_with_nan, padded
from quest_vllm.ops.triton.key_codes import CODED_PAGES_PER_TILE, score_codes

PAGES_PER_TILE = 64
TARGET_PROGRAMS = 2048
PAGES_PER_COMBINE_TILE = 256
LSE_TILE = 128  # tiles whose log-sum-exp is merged at once
REDUCTIONS = {"max": 0, "mean": 1, "per_query_head": 2, "mass": 3}
MAX, MEAN = (tl.constexpr(POLICIES.index(name)) for name in ("max", "mean"))


@triton.jit
def score_pages_kernel(
    query_ptr,  # [num_reqs, num_kv_heads * GROUP, HEAD_DIM]
    summary_ptr,  # [num_blocks, num_kv_heads, PAGES_PER_BLOCK, 2, HEAD_DIM]
    block_table_ptr,  # [num_reqs, max_blocks] int32
    seq_lens_ptr,  # [num_reqs] int32
    score_ptr,  # [num_reqs, num_score_heads, max_pages] float32; a head's logits for "mass"
    lse_ptr,  # [num_reqs, num_q_heads, tiles of max_pages] float32, for "mass"
    max_pages,
    near,
    far,
    scale,
    query_req_stride,
    query_head_stride,
    summary_block_stride,
    summary_head_stride,
    summary_page_stride,
    summary_bound_stride,
    table_req_stride,
    score_req_stride,
    score_head_stride,
    lse_req_stride,
    lse_head_stride,
    PAGE_SIZE: tl.constexpr,
    PAGES_PER_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE: tl.constexpr,
    REDUCTION: tl.constexpr,
    FULL_RADIUS: tl.constexpr,
    FILL_TAIL: tl.constexpr,
):
    """One program per (tile of pages, KV head, request), striding over the tiles that the request really has."""
    head = tl.program_id(1).to(tl.int64)
    req = tl.program_id(2).to(tl.int64)
    total = tl.cdiv(tl.load(seq_lens_ptr + req), PAGE_SIZE)
    group = tl.arange(0, PADDED_GROUP)
    dims = tl.arange(0, PADDED_DIM)
    inside = (dims < HEAD_DIM)[None, :]
    query_rows = query_ptr + req * query_req_stride + (head * GROUP + group) * query_head_stride
    query = tl.load(query_rows[:, None] + dims[None, :], mask=(group < GROUP)[:, None] & inside, other=0.0)
    query = query.to(tl.float32)
    if FULL_RADIUS:
        positive = tl.where(query < 0, 0.0, query)  # NaN stays
        negative = tl.where(query > 0, 0.0, query)
    else:
        positive = query * tl.where(query < 0, far, near)
        negative = query * tl.where(query < 0, near, far)
    positive = positive.to(summary_ptr.dtype.element_ty)
    negative = negative.to(summary_ptr.dtype.element_ty)
    base = summary_ptr + head * summary_head_stride
    end = max_pages if FILL_TAIL else total
    for tile in range(tl.program_id(0), tl.cdiv(end, TILE), tl.num_programs(0)):
        page = tile * TILE + tl.arange(0, TILE)
        valid = page < total
        block = tl.load(block_table_ptr + req * table_req_stride + page // PAGES_PER_BLOCK, mask=valid, other=0)
        row = base + block.to(tl.int64) * summary_block_stride + (page % PAGES_PER_BLOCK) * summary_page_stride
        mask = valid[:, None] & inside
        low = tl.load(row[:, None] + dims[None, :], mask=mask, other=0.0)
        high = tl.load(row[:, None] + summary_bound_stride + dims[None, :], mask=mask, other=0.0)
        bound = dot(negative, tl.trans(low), tl.zeros((PADDED_GROUP, TILE), tl.float32))
        bound = dot(positive, tl.trans(high), bound)
        if REDUCTION == 2:
            heads = head * GROUP + group
            out = score_ptr + req * score_req_stride + heads[:, None] * score_head_stride + page[None, :]
            bound = tl.where(valid[None, :], bound, float("-inf"))
            tl.store(out, bound, mask=(group < GROUP)[:, None] & (page < end)[None, :])
        elif REDUCTION == 3:
            heads = head * GROUP + group
            logits = bound * scale
            out = score_ptr + req * score_req_stride + heads[:, None] * score_head_stride + page[None, :]
            tl.store(out, logits, mask=(group < GROUP)[:, None] & valid[None, :])
            counted = tl.where(valid[None, :] & (logits == logits), logits, float("-inf"))
            shift = finite_or_zero(tl.max(counted, axis=1))
            lse = shift + tl.log(tl.sum(tl.exp(counted - shift[:, None]), axis=1))
            tl.store(lse_ptr + req * lse_req_stride + heads * lse_head_stride + tile, lse, mask=group < GROUP)
        else:
            if REDUCTION == 0:
                score = max_with_nan(tl.where((group < GROUP)[:, None], bound, float("-inf")), 0)
            else:
                score = tl.sum(tl.where((group < GROUP)[:, None], bound, 0.0), axis=0) / GROUP
            out = score_ptr + req * score_req_stride + head * score_head_stride + page
            tl.store(out, tl.where(valid, score, float("-inf")), mask=page < end)


@triton.jit
def combine_mass_kernel(
    logit_ptr,  # [num_reqs, num_q_heads, max_pages] float32
    lse_ptr,  # [num_reqs, num_q_heads, tiles of max_pages] float32
    seq_lens_ptr,  # [num_reqs] int32
    policy_ptr,  # [num_reqs] int32, unless not HAS_POLICIES
    score_ptr,  # [num_reqs, num_kv_heads, max_pages] float32
    log_sum_ptr,  # [num_reqs, num_q_heads] float32, unless not HAS_LOG_SUMS
    max_pages,
    logit_req_stride,
    logit_head_stride,
    lse_req_stride,
    lse_head_stride,
    log_sum_req_stride,
    score_req_stride,
    score_head_stride,
    PAGE_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    TILE: tl.constexpr,
    COMBINE_TILE: tl.constexpr,
    LSE_TILE: tl.constexpr,
    FILL_TAIL: tl.constexpr,
    HAS_POLICIES: tl.constexpr,
    HAS_LOG_SUMS: tl.constexpr,
):
    """One program per (tile of pages, KV head, request): ``log(sum_g exp(logit_g - lse_g))`` of each page.

    Or the greatest, or the mean, of the ``logit_g``, as the row's policy says.
    """
    head = tl.program_id(1).to(tl.int64)
    req = tl.program_id(2).to(tl.int64)
    total = tl.cdiv(tl.load(seq_lens_ptr + req), PAGE_SIZE)
    num_tiles = tl.cdiv(total, TILE)
    group = tl.arange(0, PADDED_GROUP)
    used = (group < GROUP)[:, None]
    heads = head * GROUP + group
    top = tl.full((PADDED_GROUP,), float("-inf"), tl.float32)
    mass = tl.zeros((PADDED_GROUP,), tl.float32)
    lse_rows = lse_ptr + req * lse_req_stride + heads[:, None] * lse_head_stride
    for start in range(0, num_tiles, LSE_TILE):
        tile = start + tl.arange(0, LSE_TILE)
        part = tl.load(lse_rows + tile[None, :], mask=used & (tile < num_tiles)[None, :], other=float("-inf"))
        new_top = tl.maximum(top, tl.max(part, axis=1))
        shift = finite_or_zero(new_top)
        mass = mass * tl.exp(top - shift) + tl.sum(tl.exp(part - shift[:, None]), axis=1)
        top = new_top
    lse = finite_or_zero(top) + tl.log(mass)
    lse = tl.where(lse == float("-inf"), 0.0, lse)  # no page has mass: its score is -inf, not NaN
    if HAS_LOG_SUMS:
        log_sums = log_sum_ptr + req * log_sum_req_stride + heads
        if tl.program_id(0) == 0:
            tl.store(log_sums, lse, mask=group < GROUP)
    logit_rows = logit_ptr + req * logit_req_stride + heads[:, None] * logit_head_stride
    end = max_pages if FILL_TAIL else total
    for tile in range(tl.program_id(0), tl.cdiv(end, COMBINE_TILE), tl.num_programs(0)):
        page = tile * COMBINE_TILE + tl.arange(0, COMBINE_TILE)
        valid = page < total
        logits = tl.load(logit_rows + page[None, :], mask=used & valid[None, :], other=float("-inf"))
        share = tl.where(used, logits - lse[:, None], float("-inf"))
        shift = finite_or_zero(tl.max(tl.where(share == share, share, float("-inf")), axis=0))
        score = shift + tl.log(tl.sum(tl.exp(share - shift[None, :]), axis=0))  # NaN stays
        if HAS_POLICIES:
            policy = tl.load(policy_ptr + req)
            mean = tl.sum(tl.where(used, logits, 0.0), axis=0) / GROUP
            score = tl.where(policy == MEAN, mean, score)
            score = tl.where(policy == MAX, max_with_nan(logits, 0), score)
        out = score_ptr + req * score_req_stride + head * score_head_stride + page
        tl.store(out, tl.where(valid, score, float("-inf")), mask=page < end)


@dataclass(frozen=True)
class MassScratch:
    """What the mass reduction keeps between its launches. Needs no initialisation; may be larger than needed."""

    logits: torch.Tensor  # [num_reqs, num_q_heads, max_pages] float32
    lse: torch.Tensor  # [num_reqs, num_q_heads, ceil(max_pages / 32) or more] float32


def mass_scratch(num_reqs: int, num_q_heads: int, max_pages: int, *, device: torch.device) -> MassScratch:
    """Allocate the scratch of :func:`score_pages` with ``group_reduction="mass"``."""
    logits = torch.empty(num_reqs, num_q_heads, max_pages, dtype=torch.float32, device=device)
    lse_tiles = cdiv(max_pages, min(PAGES_PER_TILE // 2, CODED_PAGES_PER_TILE))  # dot_tile may halve the tile
    return MassScratch(logits, torch.empty(num_reqs, num_q_heads, lse_tiles, dtype=torch.float32, device=device))


def score_pages(
    query: torch.Tensor,
    summaries: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    page_size: int,
    group_reduction: str = "max",
    bound_radius: float = 1.0,
    scale: float = 1.0,
    page_summary: str = "min_max",
    policies: torch.Tensor | None = None,
    log_sums: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    scratch: MassScratch | None = None,
    fill_tail: bool = True,
) -> torch.Tensor:
    """Score each page from its summary; see :func:`quest_vllm.ops.reference.score_pages`.

    ``query`` is ``[num_reqs, num_q_heads, head_dim]``, ``summaries``
    ``[num_blocks, num_kv_heads, pages_per_block, 2, head_dim]``, ``block_table`` ``[num_reqs, max_blocks]`` int32,
    ``seq_lens`` ``[num_reqs]`` int32. Returns ``out`` (made when None), ``[num_reqs, num_score_heads, max_pages]``
    float32. ``scratch`` (made when None) and ``log_sums`` (``[num_reqs, num_q_heads]`` float32, its last dimension
    contiguous) serve "mass" alone. ``fill_tail=False`` leaves the entries past a request's end as they were, so that
    the work doesn't grow with ``max_pages``; :func:`select_pages` never reads them. Raises ``ValueError`` for an
    unknown reduction, a radius outside [0, 1], or a kind of summary that pages cannot have.
    """
    if group_reduction not in REDUCTIONS:
        raise ValueError(f"group_reduction: expected one of {tuple(REDUCTIONS)}, got {group_reduction!r}")
    check_bound_radius(bound_radius)
    check_page_summary(page_summary, query.shape[2], page_size)
    num_reqs, num_q_heads, _ = query.shape
    num_kv_heads, pages_per_block = summaries.shape[1:3]
    max_pages = block_table.shape[1] * pages_per_block
    if out is None:
        num_heads = num_q_heads if group_reduction == "per_query_head" else num_kv_heads
        out = torch.empty(num_reqs, num_heads, max_pages, dtype=torch.float32, device=query.device)
    if out.numel() == 0:
        return out
    mass = group_reduction == "mass"
    bounds = lse = out
    if mass:
        scratch = scratch or mass_scratch(num_reqs, num_q_heads, max_pages, device=query.device)
        bounds, lse = scratch.logits, scratch.lse
    tensors = (query, summaries, block_table, seq_lens, bounds, lse)
    settings: dict[str, Any] = {"reduction": REDUCTIONS[group_reduction], "scale": float(scale)}
    settings["fill_tail"] = fill_tail and not mass  # the second launch does
    if page_summary == "key_codes":
        tile = CODED_PAGES_PER_TILE
        score_codes(*tensors, programs=_programs(max_pages, tile, num_reqs * num_kv_heads), **settings)
    else:
        tile = _score_boxes(*tensors, page_size=page_size, bound_radius=bound_radius, **settings)
    if mass:
        _combine_mass(bounds, lse, seq_lens, policies, out, log_sums, page_size, tile, fill_tail)
    return out


def _programs(max_pages: int, tile: int, rows: int) -> int:
    """How many programs share a row. Changes no result: a page's score depends on its own tile column only."""
    return min(cdiv(max_pages, tile), max(1, TARGET_PROGRAMS // rows))


def _score_boxes(
    query: torch.Tensor,
    summaries: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    bounds: torch.Tensor,
    lse: torch.Tensor,
    *,
    page_size: int,
    reduction: int,
    bound_radius: float,
    scale: float,
    fill_tail: bool,
) -> int:
    """Launch the kernel of minima and maxima; returns the pages of a tile."""
    num_reqs, num_q_heads, head_dim = query.shape
    num_kv_heads, pages_per_block = summaries.shape[1:3]
    max_pages = block_table.shape[1] * pages_per_block
    group = num_q_heads // num_kv_heads
    padded_dim = padded(head_dim, 16)
    tile, stages = dot_tile(PAGES_PER_TILE, padded_dim * summaries.element_size())
    programs = _programs(max_pages, tile, num_reqs * num_kv_heads)
    score_pages_kernel[(programs, num_kv_heads, num_reqs)](
        query,
        summaries,
        block_table,
        seq_lens,
        bounds,
        lse,
        max_pages,
        (1.0 + bound_radius) / 2,
        (1.0 - bound_radius) / 2,
        scale,
        *query.stride()[:2],
        *summaries.stride()[:4],
        block_table.stride(0),
        *bounds.stride()[:2],
        *lse.stride()[:2],
        PAGE_SIZE=page_size,
        PAGES_PER_BLOCK=pages_per_block,
        GROUP=group,
        PADDED_GROUP=padded(group, MIN_DOT_ROWS),
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim,
        TILE=tile,
        REDUCTION=reduction,
        FULL_RADIUS=bound_radius == 1.0,
        FILL_TAIL=fill_tail,
        num_warps=4,
        num_stages=stages,
    )
    return tile


def _combine_mass(
    logits: torch.Tensor,
    lse: torch.Tensor,
    seq_lens: torch.Tensor,
    policies: torch.Tensor | None,
    out: torch.Tensor,
    log_sums: torch.Tensor | None,
    page_size: int,
    tile: int,
    fill_tail: bool,
) -> None:
    num_reqs, num_kv_heads, max_pages = out.shape
    group = logits.shape[1] // num_kv_heads
    combine_tile = min(PAGES_PER_COMBINE_TILE, padded(max_pages, 16))
    tiles = _programs(max_pages, combine_tile, num_reqs * num_kv_heads)
    combine_mass_kernel[(tiles, num_kv_heads, num_reqs)](
        logits,
        lse,
        seq_lens,
        seq_lens if policies is None else policies,
        out,
        out if log_sums is None else log_sums,
        max_pages,
        *logits.stride()[:2],
        *lse.stride()[:2],
        0 if log_sums is None else log_sums.stride(0),
        *out.stride()[:2],
        PAGE_SIZE=page_size,
        GROUP=group,
        PADDED_GROUP=padded(group),
        TILE=tile,
        COMBINE_TILE=combine_tile,
        LSE_TILE=LSE_TILE,
        FILL_TAIL=fill_tail,
        HAS_POLICIES=policies is not None,
        HAS_LOG_SUMS=log_sums is not None,
        num_warps=4,
    )
