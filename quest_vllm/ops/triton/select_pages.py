"""Page selection: an exact Top-K per row by radix select, one program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quest_vllm.ops.triton.common import padded

MAX_TILE = 8192


@triton.jit
def ordered_key(score):
    """Map float32 to an int64 in [0, 2^32) that sorts like the score; NaN ranks as +inf, -0.0 as 0.0."""
    score = tl.where(score != score, float("inf"), score)
    score = tl.where(score == 0.0, 0.0, score)
    bits = score.to(tl.int32, bitcast=True)
    flipped = tl.where(bits < 0, ~bits, bits ^ -2147483648)
    return flipped.to(tl.int64) & 0xFFFFFFFF


@triton.jit
def kth_key(score_row, first, last, rank, TILE: tl.constexpr):
    """The ``rank``-th largest key (from 1) among pages ``[first, last)``, and how many of its equals are taken.

    Four passes, eight bits each: histogram the digit of the keys that share the prefix found so far.
    """
    prefix = tl.zeros((), dtype=tl.int64)
    need = rank
    digits = tl.arange(0, 256)
    for step in range(4):
        shift = 24 - 8 * step
        counts = tl.zeros((256,), dtype=tl.int32)
        for start in range(first, last, TILE):
            page = start + tl.arange(0, TILE)
            key = ordered_key(tl.load(score_row + page, mask=page < last, other=0.0))
            match = (page < last) & ((key >> (shift + 8)) == prefix)
            counts += tl.histogram(((key >> shift) & 255).to(tl.int32), 256, mask=match)
        at_least = tl.cumsum(counts, axis=0, reverse=True)
        digit = tl.max(tl.where(at_least >= need, digits, 0), axis=0)
        need -= tl.sum(tl.where(digits > digit, counts, 0), axis=0)
        prefix = (prefix << 8) | digit.to(tl.int64)
    return prefix, need


@triton.jit
def select_pages_kernel(
    score_ptr,  # [num_reqs, num_score_heads, max_pages] float32
    seq_lens_ptr,  # [num_reqs] int32
    budget_ptr,  # [num_reqs] int32
    selected_ptr,  # [num_reqs, num_score_heads, max_page_budget] int32
    max_page_budget,
    score_req_stride,
    score_head_stride,
    selected_req_stride,
    selected_head_stride,
    PAGE_SIZE: tl.constexpr,
    SINK_PAGES: tl.constexpr,
    RECENT_PAGES: tl.constexpr,
    TILE: tl.constexpr,
    FILL_TAIL: tl.constexpr,
):
    """Forced pages are ranges of indices, so only the pages between them are ranked."""
    head = tl.program_id(0).to(tl.int64)
    req = tl.program_id(1).to(tl.int64)
    score_row = score_ptr + req * score_req_stride + head * score_head_stride
    selected_row = selected_ptr + req * selected_req_stride + head * selected_head_stride
    total = tl.cdiv(tl.load(seq_lens_ptr + req), PAGE_SIZE)
    take = tl.maximum(tl.minimum(tl.minimum(tl.load(budget_ptr + req), total), max_page_budget), 0)
    recent = tl.minimum(RECENT_PAGES, take)  # newest first: [total - recent, total)
    sink = tl.minimum(tl.minimum(SINK_PAGES, tl.maximum(total - RECENT_PAGES, 0)), take - recent)  # [0, sink)
    first = sink
    last = total - recent
    rank = take - recent - sink
    threshold = tl.zeros((), dtype=tl.int64) - 1  # every page
    ties = rank
    if rank == 0:
        threshold = threshold + 0x200000000  # no page
    elif rank < last - first:
        threshold, ties = kth_key(score_row, first, last, rank, TILE)
    written = tl.zeros((), dtype=tl.int32)
    equals = tl.zeros((), dtype=tl.int32)
    for start in range(0, tl.where(take > 0, total, 0), TILE):
        page = start + tl.arange(0, TILE)
        ranked = (page >= first) & (page < last)
        key = ordered_key(tl.load(score_row + page, mask=ranked, other=0.0))
        equal = ranked & (key == threshold)
        equal_rank = equals + tl.cumsum(equal.to(tl.int32), axis=0)
        chosen = (page < sink) | ((page >= last) & (page < total))
        chosen = chosen | (ranked & (key > threshold)) | (equal & (equal_rank <= ties))
        position = written + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
        tl.store(selected_row + position, page, mask=chosen)
        written += tl.sum(chosen.to(tl.int32), axis=0)
        equals += tl.sum(equal.to(tl.int32), axis=0)
    if FILL_TAIL:
        for start in range(take, max_page_budget, TILE):
            entry = start + tl.arange(0, TILE)
            tl.store(selected_row + entry, tl.full((TILE,), -1, tl.int32), mask=entry < max_page_budget)


def select_pages(
    page_scores: torch.Tensor,
    seq_lens: torch.Tensor,
    page_budgets: torch.Tensor,
    *,
    page_size: int,
    sink_pages: int = 1,
    recent_pages: int = 2,
    max_page_budget: int,
    out: torch.Tensor | None = None,
    fill_tail: bool = True,
) -> torch.Tensor:
    """Choose the best pages of each row; see :func:`quest_vllm.ops.reference.select_pages`.

    ``page_scores`` is ``[num_reqs, num_score_heads, max_pages]`` float32 (read only up to each request's end),
    ``seq_lens`` and ``page_budgets`` are ``[num_reqs]`` int32. Returns ``out`` (made when None),
    ``[num_reqs, num_score_heads, max_page_budget]`` int32, ascending, -1 padded. ``fill_tail=False`` leaves the
    padding as it was: only for a consumer that is told the budgets.
    """
    num_reqs, num_heads, max_pages = page_scores.shape
    if out is None:
        out = torch.empty(num_reqs, num_heads, max_page_budget, dtype=torch.int32, device=page_scores.device)
    if out.numel() == 0:
        return out
    tile = min(MAX_TILE, padded(max_pages, 128))
    select_pages_kernel[(num_heads, num_reqs)](
        page_scores,
        seq_lens,
        page_budgets,
        out,
        max_page_budget,
        *page_scores.stride()[:2],
        *out.stride()[:2],
        PAGE_SIZE=page_size,
        SINK_PAGES=sink_pages,
        RECENT_PAGES=recent_pages,
        TILE=tile,
        FILL_TAIL=fill_tail,
        num_warps=max(4, min(16, tile // 256)),
    )
    return out
