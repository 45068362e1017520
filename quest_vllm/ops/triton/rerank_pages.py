"""Scores of the pages on two-stage rows' shortlists once more, in place, from their keys; other rows leave at once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quest_vllm.ops.triton.common import (
    MIN_DOT_COLUMNS,
    TWO_STAGE_POLICY,
    capped,
    cdiv,
    dot,
    dot_tile,
    finite_or_zero,
    padded,
    shortlist_ranks,
)

TOKENS_PER_TILE = 64
TARGET_PROGRAMS = 2048


@triton.jit
def num_listed(
    seq_lens_ptr,
    policy_ptr,
    budget_ptr,
    req,
    width,
    PAGE_SIZE: tl.constexpr,
    SINK_PAGES: tl.constexpr,
    RECENT_PAGES: tl.constexpr,
    HAS_BUDGETS: tl.constexpr,
):
    """How many leading entries of a row's shortlist to look at: without budgets, all."""
    entries = width
    if HAS_BUDGETS:
        total = tl.cdiv(tl.load(seq_lens_ptr + req), PAGE_SIZE)
        budget = tl.load(budget_ptr + req)
        begin, end = shortlist_ranks(budget, total, width - 1, SINK_PAGES, RECENT_PAGES)
        entries = tl.where(tl.load(policy_ptr + req) == TWO_STAGE_POLICY, end - begin, 0)
    return entries


@triton.jit
def rerank_pages_kernel(
    query_ptr,  # [num_reqs, num_kv_heads * GROUP, HEAD_DIM]
    key_ptr,  # [num_blocks, num_kv_heads, block_size, HEAD_DIM]
    block_table_ptr,  # [num_reqs, max_blocks] int32
    seq_lens_ptr,  # [num_reqs] int32
    policy_ptr,  # [num_reqs] int32, unless not HAS_BUDGETS
    budget_ptr,  # [num_reqs] int32, unless not HAS_BUDGETS
    listed_ptr,  # [num_reqs, num_kv_heads, width] int32
    log_sum_ptr,  # [num_reqs, num_kv_heads * GROUP] float32
    score_ptr,  # [num_reqs, num_kv_heads, max_pages] float32
    width,
    scale,
    softcap,
    query_req_stride,
    query_head_stride,
    key_block_stride,
    key_head_stride,
    key_row_stride,
    table_req_stride,
    listed_req_stride,
    listed_head_stride,
    log_sum_req_stride,
    score_req_stride,
    score_head_stride,
    PAGE_SIZE: tl.constexpr,
    SINK_PAGES: tl.constexpr,
    RECENT_PAGES: tl.constexpr,
    PAGES_PER_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_BUDGETS: tl.constexpr,
):
    """One program per (tile of listed pages, KV head, request), striding over the tiles that the row really has."""
    head = tl.program_id(1).to(tl.int64)
    req = tl.program_id(2).to(tl.int64)
    entries = num_listed(
        seq_lens_ptr,
        policy_ptr,
        budget_ptr,
        req,
        width,
        PAGE_SIZE,
        SINK_PAGES,
        RECENT_PAGES,
        HAS_BUDGETS,
    )
    PAGES: tl.constexpr = TILE // PAGE_SIZE
    if tl.program_id(0) * PAGES >= entries:
        return
    seq_len = tl.load(seq_lens_ptr + req)
    group = tl.arange(0, PADDED_GROUP)
    used = group < GROUP
    heads = head * GROUP + group
    dims = tl.arange(0, PADDED_DIM)
    inside = dims < HEAD_DIM
    query_rows = query_ptr + req * query_req_stride + heads * query_head_stride
    query = tl.load(query_rows[None, :] + dims[:, None], mask=inside[:, None] & used[None, :], other=0.0)
    query = query.to(key_ptr.dtype.element_ty)
    log_sum = tl.load(log_sum_ptr + req * log_sum_req_stride + heads, mask=used, other=0.0)
    listed_row = listed_ptr + req * listed_req_stride + head * listed_head_stride
    table_row = block_table_ptr + req * table_req_stride
    score_row = score_ptr + req * score_req_stride + head * score_head_stride
    for tile in range(tl.program_id(0), tl.cdiv(entries, PAGES), tl.num_programs(0)):
        item = tl.arange(0, TILE)
        slot = tile * PAGES + item // PAGE_SIZE
        page = tl.load(listed_row + slot, mask=slot < entries, other=-1)
        valid = (page >= 0) & (page * PAGE_SIZE + item % PAGE_SIZE < seq_len)
        block = tl.load(table_row + page // PAGES_PER_BLOCK, mask=valid, other=0).to(tl.int64)
        in_block = (page % PAGES_PER_BLOCK) * PAGE_SIZE + item % PAGE_SIZE
        key_rows = key_ptr + head * key_head_stride + block * key_block_stride + in_block * key_row_stride
        key = tl.load(key_rows[:, None] + dims[None, :], mask=valid[:, None] & inside[None, :], other=0.0)
        logits = dot(key, query, tl.zeros((TILE, PADDED_GROUP), tl.float32)) * scale
        if HAS_SOFTCAP:
            logits = capped(logits, softcap)
        logits = tl.where(valid[:, None], logits, float("-inf"))
        logits = tl.reshape(logits, (PAGES, PAGE_SIZE, PADDED_GROUP))
        top = finite_or_zero(tl.max(logits, axis=1))
        mass = top + tl.log(tl.sum(tl.exp(logits - top[:, None, :]), axis=1))  # NaN stays
        share = tl.where(used[None, :], mass - log_sum[None, :], float("-inf"))
        shift = finite_or_zero(tl.max(tl.where(share == share, share, float("-inf")), axis=1))
        score = shift + tl.log(tl.sum(tl.exp(share - shift[:, None]), axis=1))
        entry = tile * PAGES + tl.arange(0, PAGES)
        page = tl.load(listed_row + entry, mask=entry < entries, other=-1)
        tl.store(score_row + page, score, mask=page >= 0)


def rerank_pages(
    page_scores: torch.Tensor,
    log_sums: torch.Tensor,
    shortlist: torch.Tensor,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    page_size: int,
    scale: float,
    softcap: float = 0.0,
    sink_pages: int = 1,
    recent_pages: int = 2,
    page_budgets: torch.Tensor | None = None,
    policies: torch.Tensor | None = None,
) -> torch.Tensor:
    """Score listed pages by their keys; see :func:`quest_vllm.ops.reference.rerank_pages`.

    Overwrites those scores and returns ``page_scores``, ``[num_reqs, num_kv_heads, max_pages]`` float32. ``log_sums``
    is ``[num_reqs, num_q_heads]`` float32, its last dimension contiguous; ``shortlist`` ``[num_reqs, num_kv_heads,
    width]`` int32; ``query`` ``[num_reqs, num_q_heads, head_dim]``; ``key_cache`` ``[num_blocks, num_kv_heads,
    block_size, head_dim]``.

    ``page_budgets`` and ``policies`` (``[num_reqs]`` int32), when given, both, promise a shortlist of
    :func:`shortlist_pages` by them and by ``sink_pages`` and ``recent_pages``: its padding is then not read.
    """
    num_reqs, num_q_heads, head_dim = query.shape
    num_kv_heads, block_size = key_cache.shape[1:3]
    width = shortlist.shape[2]
    if shortlist.numel() == 0:
        return page_scores
    group = num_q_heads // num_kv_heads
    padded_dim = padded(head_dim, 16)
    tile, stages = dot_tile(TOKENS_PER_TILE, padded_dim * key_cache.element_size())
    tile = max(page_size, tile)
    programs = min(cdiv(width, tile // page_size), max(1, TARGET_PROGRAMS // (num_reqs * num_kv_heads)))
    has_budgets = page_budgets is not None and policies is not None
    rerank_pages_kernel[(programs, num_kv_heads, num_reqs)](
        query,
        key_cache,
        block_table,
        seq_lens,
        policies if has_budgets else seq_lens,
        page_budgets if has_budgets else seq_lens,
        shortlist,
        log_sums,
        page_scores,
        width,
        float(scale),
        float(softcap),
        *query.stride()[:2],
        *key_cache.stride()[:3],
        block_table.stride(0),
        *shortlist.stride()[:2],
        log_sums.stride(0),
        *page_scores.stride()[:2],
        PAGE_SIZE=page_size,
        SINK_PAGES=sink_pages,
        RECENT_PAGES=recent_pages,
        PAGES_PER_BLOCK=block_size // page_size,
        GROUP=group,
        PADDED_GROUP=padded(group, MIN_DOT_COLUMNS),
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim,
        TILE=tile,
        HAS_SOFTCAP=softcap > 0,
        HAS_BUDGETS=has_budgets,
        num_warps=4,
        num_stages=stages,
    )
    return page_scores
