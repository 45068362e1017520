"""The pages of two-stage rows whose keys are worth reading: an exact range of ranks, one program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quest_vllm.ops.triton.common import TWO_STAGE_POLICY, padded, shortlist_ranks
from quest_vllm.ops.triton.select_pages import MAX_TILE, kth_key, ordered_key


@triton.jit
def key_of_best(score_row, first, last, count, TILE: tl.constexpr):
    """Least key of the ``count`` best pages of ``[first, last)``, and how many of its equals are among them."""
    key = tl.zeros((), dtype=tl.int64) - 1  # every page
    ties = count
    if count == 0:
        key = key + 0x200000000  # no page
    elif count < last - first:
        key, ties = kth_key(score_row, first, last, count, TILE)
    return key, ties


@triton.jit
def shortlist_pages_kernel(
    score_ptr,  # [num_reqs, num_score_heads, max_pages] float32
    seq_lens_ptr,  # [num_reqs] int32
    budget_ptr,  # [num_reqs] int32
    policy_ptr,  # [num_reqs] int32
    listed_ptr,  # [num_reqs, num_score_heads, width] int32
    width,
    score_req_stride,
    score_head_stride,
    listed_req_stride,
    listed_head_stride,
    PAGE_SIZE: tl.constexpr,
    SINK_PAGES: tl.constexpr,
    RECENT_PAGES: tl.constexpr,
    TILE: tl.constexpr,
    FILL_TAIL: tl.constexpr,
):
    """One program a row: the best ``end`` pages that are not forced, without the best ``begin``."""
    head = tl.program_id(0).to(tl.int64)
    req = tl.program_id(1).to(tl.int64)
    score_row = score_ptr + req * score_req_stride + head * score_head_stride
    listed_row = listed_ptr + req * listed_req_stride + head * listed_head_stride
    written = tl.zeros((), dtype=tl.int32)
    if tl.load(policy_ptr + req) == TWO_STAGE_POLICY:
        total = tl.cdiv(tl.load(seq_lens_ptr + req), PAGE_SIZE)
        begin, end = shortlist_ranks(tl.load(budget_ptr + req), total, width - 1, SINK_PAGES, RECENT_PAGES)
        if end > begin:
            first = SINK_PAGES
            last = total - RECENT_PAGES
            known, known_ties = key_of_best(score_row, first, last, begin, TILE)
            worst, worst_ties = key_of_best(score_row, first, last, end, TILE)
            knowns = tl.zeros((), dtype=tl.int32)
            worsts = tl.zeros((), dtype=tl.int32)
            for start in range(first, last, TILE):
                page = start + tl.arange(0, TILE)
                ranked = page < last
                key = ordered_key(tl.load(score_row + page, mask=ranked, other=0.0))
                is_known = (ranked & (key == known)).to(tl.int32)
                is_worst = (ranked & (key == worst)).to(tl.int32)
                past = (key < known) | ((key == known) & (knowns + tl.cumsum(is_known, axis=0) > known_ties))
                within = (key > worst) | ((key == worst) & (worsts + tl.cumsum(is_worst, axis=0) <= worst_ties))
                listed = (ranked & past & within).to(tl.int32)
                position = written + tl.cumsum(listed, axis=0) - 1
                tl.store(listed_row + position, page, mask=listed > 0)
                written += tl.sum(listed, axis=0)
                knowns += tl.sum(is_known, axis=0)
                worsts += tl.sum(is_worst, axis=0)
    if FILL_TAIL:
        for start in range(written, width, TILE):
            entry = start + tl.arange(0, TILE)
            tl.store(listed_row + entry, tl.full((TILE,), -1, tl.int32), mask=entry < width)


def shortlist_pages(
    page_scores: torch.Tensor,
    seq_lens: torch.Tensor,
    page_budgets: torch.Tensor,
    *,
    page_size: int,
    sink_pages: int = 1,
    recent_pages: int = 2,
    max_page_budget: int,
    policies: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    fill_tail: bool = True,
) -> torch.Tensor:
    """List the pages to score by their keys; see :func:`quest_vllm.ops.reference.shortlist_pages`.

    ``page_scores`` is ``[num_reqs, num_score_heads, max_pages]`` float32 (read only up to each request's end),
    ``seq_lens``, ``page_budgets`` and ``policies`` are ``[num_reqs]`` int32. Returns ``out`` (made when None),
    ``[num_reqs, num_score_heads, max_page_budget + 1]`` int32, ascending, -1 padded. ``fill_tail=False`` leaves the
    padding as it was, and whole rows of other policies: only for a consumer that is told the policies and budgets.
    """
    num_reqs, num_heads, max_pages = page_scores.shape
    width = max_page_budget + 1
    if out is None:
        out = torch.empty(num_reqs, num_heads, width, dtype=torch.int32, device=page_scores.device)
    if policies is None:
        return out.fill_(-1) if fill_tail else out
    if out.numel() == 0:
        return out
    tile = min(MAX_TILE, padded(max_pages, 128))
    shortlist_pages_kernel[(num_heads, num_reqs)](
        page_scores,
        seq_lens,
        page_budgets,
        policies,
        out,
        width,
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
