"""Page scores: the upper bound of ``q.k`` over every key of each page (Quest, algorithm 1)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quest_vllm.ops.triton.common import MIN_DOT_ROWS, cdiv, dot, dot_tile, max_with_nan, padded

PAGES_PER_TILE = 64
TARGET_PROGRAMS = 2048
REDUCTIONS = {"max": 0, "mean": 1, "per_query_head": 2}


@triton.jit
def score_pages_kernel(
    query_ptr,  # [num_reqs, num_kv_heads * GROUP, HEAD_DIM]
    summary_ptr,  # [num_blocks, num_kv_heads, PAGES_PER_BLOCK, 2, HEAD_DIM]
    block_table_ptr,  # [num_reqs, max_blocks] int32
    seq_lens_ptr,  # [num_reqs] int32
    score_ptr,  # [num_reqs, num_score_heads, max_pages] float32
    max_pages,
    query_req_stride,
    query_head_stride,
    summary_block_stride,
    summary_head_stride,
    summary_page_stride,
    summary_bound_stride,
    table_req_stride,
    score_req_stride,
    score_head_stride,
    PAGE_SIZE: tl.constexpr,
    PAGES_PER_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE: tl.constexpr,
    REDUCTION: tl.constexpr,
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
    positive = tl.where(query < 0, 0.0, query).to(summary_ptr.dtype.element_ty)  # NaN stays
    negative = tl.where(query > 0, 0.0, query).to(summary_ptr.dtype.element_ty)
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
        else:
            if REDUCTION == 0:
                score = max_with_nan(tl.where((group < GROUP)[:, None], bound, float("-inf")), 0)
            else:
                score = tl.sum(tl.where((group < GROUP)[:, None], bound, 0.0), axis=0) / GROUP
            out = score_ptr + req * score_req_stride + head * score_head_stride + page
            tl.store(out, tl.where(valid, score, float("-inf")), mask=page < end)


def score_pages(
    query: torch.Tensor,
    summaries: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    page_size: int,
    group_reduction: str = "max",
    out: torch.Tensor | None = None,
    fill_tail: bool = True,
) -> torch.Tensor:
    """Bound ``q.k`` over every key of each page; see :func:`quest_vllm.ops.reference.score_pages`.

    ``query`` is ``[num_reqs, num_q_heads, head_dim]``, ``summaries``
    ``[num_blocks, num_kv_heads, pages_per_block, 2, head_dim]``, ``block_table`` ``[num_reqs, max_blocks]`` int32,
    ``seq_lens`` ``[num_reqs]`` int32. Returns ``out`` (made when None), ``[num_reqs, num_score_heads, max_pages]``
    float32. ``fill_tail=False`` leaves the entries past a request's end as they were, so that the work doesn't grow
    with ``max_pages``; :func:`select_pages` never reads them. Raises ``ValueError`` for an unknown reduction.
    """
    if group_reduction not in REDUCTIONS:
        raise ValueError(f"group_reduction: expected one of {tuple(REDUCTIONS)}, got {group_reduction!r}")
    num_reqs, num_q_heads, head_dim = query.shape
    num_kv_heads, pages_per_block = summaries.shape[1:3]
    max_pages = block_table.shape[1] * pages_per_block
    group = num_q_heads // num_kv_heads
    if out is None:
        num_heads = num_q_heads if group_reduction == "per_query_head" else num_kv_heads
        out = torch.empty(num_reqs, num_heads, max_pages, dtype=torch.float32, device=query.device)
    if out.numel() == 0:
        return out
    padded_dim = padded(head_dim, 16)
    tile, stages = dot_tile(PAGES_PER_TILE, padded_dim * summaries.element_size())
    # how many programs share a row changes no result: a page's score depends on its own tile column only
    tiles = min(cdiv(max_pages, tile), max(1, TARGET_PROGRAMS // (num_reqs * num_kv_heads)))
    score_pages_kernel[(tiles, num_kv_heads, num_reqs)](
        query,
        summaries,
        block_table,
        seq_lens,
        out,
        max_pages,
        *query.stride()[:2],
        *summaries.stride()[:4],
        block_table.stride(0),
        *out.stride()[:2],
        PAGE_SIZE=page_size,
        PAGES_PER_BLOCK=pages_per_block,
        GROUP=group,
        PADDED_GROUP=padded(group, MIN_DOT_ROWS),
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim,
        TILE=tile,
        REDUCTION=REDUCTIONS[group_reduction],
        FILL_TAIL=fill_tail,
        num_warps=4,
        num_stages=stages,
    )
    return out
