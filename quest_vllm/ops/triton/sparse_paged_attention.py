"""Attention over the selected pages: split-KV partial results, then a log-sum-exp merge."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from quest_vllm.ops.triton.common import MIN_DOT_ROWS, capped, cdiv, dot, dot_tile, padded

TOKENS_PER_SPLIT = 256
TOKENS_PER_TILE = 64
TARGET_PROGRAMS = 2048
SPLITS_PER_MERGE_TILE = 16


@triton.jit
def num_entries(seq_lens_ptr, budget_ptr, req, width, PAGE_SIZE: tl.constexpr, HAS_BUDGETS: tl.constexpr):
    """How many leading entries of a row of ``selected_pages`` may be pages; the rest is padding."""
    entries = tl.minimum(tl.cdiv(tl.load(seq_lens_ptr + req), PAGE_SIZE), width)
    if HAS_BUDGETS:
        entries = tl.minimum(entries, tl.load(budget_ptr + req))
    return entries


@triton.jit
def attend_splits_kernel(
    query_ptr,  # [num_reqs, num_q_heads, HEAD_DIM]
    key_ptr,  # [num_blocks, num_kv_heads, block_size, HEAD_DIM]
    value_ptr,  # [num_blocks, num_kv_heads, block_size, HEAD_DIM]
    block_table_ptr,  # [num_reqs, max_blocks] int32
    seq_lens_ptr,  # [num_reqs] int32
    budget_ptr,  # [num_reqs] int32, unless not HAS_BUDGETS
    selected_ptr,  # [num_reqs, num_select_heads, width] int32
    partial_ptr,  # [num_reqs, num_q_heads, num_splits, HEAD_DIM] float32
    lse_ptr,  # [num_reqs, num_q_heads, num_splits] float32
    width,
    scale,
    softcap,
    query_req_stride,
    query_head_stride,
    key_block_stride,
    key_head_stride,
    key_row_stride,
    value_block_stride,
    value_head_stride,
    value_row_stride,
    table_req_stride,
    selected_req_stride,
    selected_head_stride,
    partial_req_stride,
    partial_head_stride,
    partial_split_stride,
    lse_req_stride,
    lse_head_stride,
    HEADS_PER_KV: tl.constexpr,
    ROWS: tl.constexpr,
    PADDED_ROWS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PAGES_PER_BLOCK: tl.constexpr,
    PAGES_PER_SPLIT: tl.constexpr,
    TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_BUDGETS: tl.constexpr,
):
    """One program per (split, selection head, request); ROWS query heads share a selection."""
    select_head = tl.program_id(1).to(tl.int64)
    req = tl.program_id(2).to(tl.int64)
    seq_len = tl.load(seq_lens_ptr + req)
    entries = num_entries(seq_lens_ptr, budget_ptr, req, width, PAGE_SIZE, HAS_BUDGETS)
    row = tl.arange(0, PADDED_ROWS)
    q_head = select_head * ROWS + row
    kv_head = select_head * ROWS // HEADS_PER_KV
    dims = tl.arange(0, PADDED_DIM)
    inside = (dims < HEAD_DIM)[None, :]
    row_mask = (row < ROWS)[:, None] & inside
    query_rows = query_ptr + req * query_req_stride + q_head * query_head_stride
    query = tl.load(query_rows[:, None] + dims[None, :], mask=row_mask, other=0.0).to(key_ptr.dtype.element_ty)
    selected_row = selected_ptr + req * selected_req_stride + select_head * selected_head_stride
    table_row = block_table_ptr + req * table_req_stride
    key_base = key_ptr + kv_head * key_head_stride
    value_base = value_ptr + kv_head * value_head_stride
    for split in range(tl.program_id(0), tl.cdiv(entries, PAGES_PER_SPLIT), tl.num_programs(0)):
        top = tl.full((PADDED_ROWS,), float("-inf"), tl.float32)
        mass = tl.zeros((PADDED_ROWS,), tl.float32)
        acc = tl.zeros((PADDED_ROWS, PADDED_DIM), tl.float32)
        first = split * PAGES_PER_SPLIT
        stop = tl.minimum(entries, first + PAGES_PER_SPLIT)
        for entry in range(first, stop, TILE // PAGE_SIZE):
            item = tl.arange(0, TILE)
            slot = entry + item // PAGE_SIZE
            page = tl.load(selected_row + slot, mask=slot < stop, other=-1)
            valid = (page >= 0) & (page * PAGE_SIZE + item % PAGE_SIZE < seq_len)
            block = tl.load(table_row + page // PAGES_PER_BLOCK, mask=valid, other=0).to(tl.int64)
            in_block = (page % PAGES_PER_BLOCK) * PAGE_SIZE + item % PAGE_SIZE
            mask = valid[:, None] & inside
            key_rows = key_base + block * key_block_stride + in_block * key_row_stride
            value_rows = value_base + block * value_block_stride + in_block * value_row_stride
            key = tl.load(key_rows[:, None] + dims[None, :], mask=mask, other=0.0)
            value = tl.load(value_rows[:, None] + dims[None, :], mask=mask, other=0.0)
            logits = dot(query, tl.trans(key), tl.zeros((PADDED_ROWS, TILE), tl.float32)) * scale
            if HAS_SOFTCAP:
                logits = capped(logits, softcap)
            logits = tl.where(valid[None, :], logits, float("-inf"))
            new_top = tl.maximum(top, tl.max(logits, axis=1))
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)
            weight = tl.exp(logits - shift[:, None])
            decay = tl.exp(top - shift)
            mass = mass * decay + tl.sum(weight, axis=1)
            acc = dot(weight.to(value.dtype), value, acc * decay[:, None])
            top = new_top
        empty = mass == 0.0
        acc = acc / tl.where(empty, 1.0, mass)[:, None]
        lse = tl.where(empty, float("-inf"), top + tl.log(tl.where(empty, 1.0, mass)))
        partial = partial_ptr + req * partial_req_stride + split * partial_split_stride
        tl.store(partial + q_head[:, None] * partial_head_stride + dims[None, :], acc, mask=row_mask)
        tl.store(lse_ptr + req * lse_req_stride + q_head * lse_head_stride + split, lse, mask=row < ROWS)


@triton.jit
def merge_splits_kernel(
    partial_ptr,  # [num_reqs, num_q_heads, num_splits, HEAD_DIM] float32
    lse_ptr,  # [num_reqs, num_q_heads, num_splits] float32
    seq_lens_ptr,  # [num_reqs] int32
    budget_ptr,  # [num_reqs] int32, unless not HAS_BUDGETS
    out_ptr,  # [num_reqs, num_q_heads, HEAD_DIM]
    width,
    partial_req_stride,
    partial_head_stride,
    partial_split_stride,
    lse_req_stride,
    lse_head_stride,
    out_req_stride,
    out_head_stride,
    PAGE_SIZE: tl.constexpr,
    PAGES_PER_SPLIT: tl.constexpr,
    TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    HAS_BUDGETS: tl.constexpr,
):
    """One program per (query head, request): weigh the splits' outputs by their log-sum-exp."""
    head = tl.program_id(0).to(tl.int64)
    req = tl.program_id(1).to(tl.int64)
    entries = num_entries(seq_lens_ptr, budget_ptr, req, width, PAGE_SIZE, HAS_BUDGETS)
    num_splits = tl.cdiv(entries, PAGES_PER_SPLIT)
    dims = tl.arange(0, PADDED_DIM)
    top = tl.full((1,), float("-inf"), tl.float32)
    mass = tl.zeros((1,), tl.float32)
    acc = tl.zeros((PADDED_DIM,), tl.float32)
    partial = partial_ptr + req * partial_req_stride + head * partial_head_stride
    for start in range(0, num_splits, TILE):
        split = start + tl.arange(0, TILE)
        lse_row = lse_ptr + req * lse_req_stride + head * lse_head_stride
        lse = tl.load(lse_row + split, mask=split < num_splits, other=float("-inf"))
        used = (lse != float("-inf"))[:, None]  # NaN counts as used
        mask = used & (dims < HEAD_DIM)[None, :]
        part = tl.load(partial + split[:, None] * partial_split_stride + dims[None, :], mask=mask, other=0.0)
        new_top = tl.maximum(top, tl.max(lse, axis=0))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp(lse - shift)
        decay = tl.exp(top - shift)
        mass = mass * decay + tl.sum(weight, axis=0)
        acc = acc * decay + tl.sum(part * weight[:, None], axis=0)
        top = new_top
    result = acc / tl.where(mass == 0.0, 1.0, mass)
    out = out_ptr + req * out_req_stride + head * out_head_stride + dims
    tl.store(out, result.to(out_ptr.dtype.element_ty), mask=dims < HEAD_DIM)


@dataclass(frozen=True)
class AttentionScratch:
    """Partial results of the splits. Needs no initialisation; may be larger than a launch needs, in dims 0 to 2."""

    partial: torch.Tensor  # [num_reqs, num_q_heads, num_splits, head_dim] float32
    lse: torch.Tensor  # [num_reqs, num_q_heads, num_splits] float32


def pages_per_split(page_size: int) -> int:
    """Fixed, so that how a row is summed depends on nothing but its own selection."""
    return max(1, TOKENS_PER_SPLIT // page_size)


def attention_scratch(
    num_reqs: int, num_q_heads: int, head_dim: int, max_page_budget: int, *, page_size: int, device: torch.device
) -> AttentionScratch:
    """Allocate the scratch of :func:`sparse_paged_attention` for ``max_page_budget`` pages a row."""
    num_splits = cdiv(max_page_budget, pages_per_split(page_size))
    shape = (num_reqs, num_q_heads, num_splits)
    return AttentionScratch(
        torch.empty(*shape, head_dim, dtype=torch.float32, device=device),
        torch.empty(shape, dtype=torch.float32, device=device),
    )


def sparse_paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    selected_pages: torch.Tensor,
    *,
    page_size: int,
    scale: float,
    softcap: float = 0.0,
    out: torch.Tensor | None = None,
    scratch: AttentionScratch | None = None,
    page_budgets: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend to the selected pages only; see :func:`quest_vllm.ops.reference.sparse_paged_attention`.

    ``query`` is ``[num_reqs, num_q_heads, head_dim]``; the caches ``[num_blocks, num_kv_heads, block_size, head_dim]``;
    ``selected_pages`` ``[num_reqs, num_kv_heads or num_q_heads, width]`` int32, whose pages lie within a row's first
    ``ceil(seq_len / page_size)`` entries (padding at the end). ``page_budgets`` (``[num_reqs]`` int32), when given,
    promises that no page lies past a row's budget: the padding is then not read. Returns ``out`` (made when None), the
    query's shape and dtype.
    """
    num_reqs, num_q_heads, head_dim = query.shape
    num_kv_heads, block_size = key_cache.shape[1:3]
    select_heads, width = selected_pages.shape[1:]
    out = torch.empty_like(query) if out is None else out
    if out.numel() == 0:
        return out
    if scratch is None:
        scratch = attention_scratch(num_reqs, num_q_heads, head_dim, width, page_size=page_size, device=query.device)
    rows = num_q_heads // select_heads
    split_pages = pages_per_split(page_size)
    splits = min(cdiv(width, split_pages), max(1, TARGET_PROGRAMS // (num_reqs * select_heads)))
    budgets = seq_lens if page_budgets is None else page_budgets
    padded_dim = padded(head_dim, 16)
    tile, stages = dot_tile(TOKENS_PER_TILE, padded_dim * key_cache.element_size())
    shared = {"HEAD_DIM": head_dim, "PADDED_DIM": padded_dim, "PAGE_SIZE": page_size}
    shared |= {"PAGES_PER_SPLIT": split_pages, "HAS_BUDGETS": page_budgets is not None, "num_warps": 4}
    scratch_strides = (*scratch.partial.stride()[:3], *scratch.lse.stride()[:2])
    if splits > 0:
        attend_splits_kernel[(splits, select_heads, num_reqs)](
            query,
            key_cache,
            value_cache,
            block_table,
            seq_lens,
            budgets,
            selected_pages,
            scratch.partial,
            scratch.lse,
            width,
            scale,
            softcap,
            *query.stride()[:2],
            *key_cache.stride()[:3],
            *value_cache.stride()[:3],
            block_table.stride(0),
            *selected_pages.stride()[:2],
            *scratch_strides,
            HEADS_PER_KV=num_q_heads // num_kv_heads,
            ROWS=rows,
            PADDED_ROWS=padded(rows, MIN_DOT_ROWS),
            PAGES_PER_BLOCK=block_size // page_size,
            TILE=max(page_size, tile),
            HAS_SOFTCAP=softcap > 0,
            num_stages=stages,
            **shared,
        )
    merge_splits_kernel[(num_q_heads, num_reqs)](
        scratch.partial,
        scratch.lse,
        seq_lens,
        budgets,
        out,
        width,
        *scratch_strides,
        *out.stride()[:2],
        TILE=SPLITS_PER_MERGE_TILE,
        **shared,
    )
    return out
