"""Plain PyTorch path: the reference's results without its Python loops.

Used where no compiler is at hand. Scores and selection are the reference's own; the two operations that loop there
are vectorised here. Shapes as in :mod:`quest_vllm.ops.reference`.
"""

from __future__ import annotations

import torch

from quest_vllm.ops import key_codes
from quest_vllm.ops.reference import (
    check_page_summary,
    page_table,
    rerank_pages,
    score_pages,
    select_pages,
    shortlist_pages,
)

__all__ = [
    "rerank_pages",
    "score_pages",
    "select_pages",
    "shortlist_pages",
    "sparse_paged_attention",
    "update_page_summaries",
]


def update_page_summaries(
    key_cache: torch.Tensor,
    summaries: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    page_size: int,
    page_summary: str = "min_max",
) -> None:
    """Recompute the min/max or the codes of every page that ``slot_mapping`` wrote to; see the reference."""
    check_page_summary(page_summary, key_cache.shape[3], page_size)
    slots = slot_mapping[slot_mapping >= 0]
    pages, inverse = torch.unique(slots // page_size, return_inverse=True)
    last = torch.zeros_like(pages).scatter_reduce_(0, inverse, slots % page_size, "amax")
    pages_per_block = key_cache.shape[2] // page_size
    block, sub_page = pages // pages_per_block, pages % pages_per_block
    rows = torch.arange(page_size, device=pages.device)
    keys = key_cache.transpose(1, 2)[block[:, None], sub_page[:, None] * page_size + rows]  # [pages, rows, heads, dim]
    if page_summary == "key_codes":
        by_head = keys.transpose(1, 2)  # [pages, heads, rows, dim]
        coded = key_codes.encode(by_head, (last + 1)[:, None].expand(by_head.shape[:2]))
        key_codes.code_bytes(summaries).transpose(1, 2)[block, sub_page] = coded
        return
    written = (rows <= last[:, None])[:, :, None, None]
    by_page = summaries.transpose(1, 2)
    by_page[block, sub_page, :, 0] = keys.masked_fill(~written, float("inf")).amin(dim=1)
    by_page[block, sub_page, :, 1] = keys.masked_fill(~written, float("-inf")).amax(dim=1)


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
) -> torch.Tensor:
    """Attend to the selected pages only; see the reference. One request at a time, all its heads at once."""
    num_q_heads = query.shape[1]
    num_kv_heads, block_size = key_cache.shape[1], key_cache.shape[2]
    pages_per_block = block_size // page_size
    group = num_q_heads // num_kv_heads
    global_pages = page_table(block_table, pages_per_block)
    rows = torch.arange(page_size, device=query.device)
    output = torch.empty_like(query)
    for row in range(query.shape[0]):
        pages = selected_pages[row].long()
        if pages.shape[0] != num_q_heads:
            pages = pages.repeat_interleave(group, dim=0)
        heads = torch.arange(num_q_heads, device=query.device)[:, None] // group
        positions = pages[:, :, None] * page_size + rows
        hidden = ((pages < 0)[:, :, None] | (positions >= seq_lens[row])).flatten(1)
        slots = (global_pages[row][pages.clamp(min=0)][:, :, None] * page_size + rows).flatten(1)
        keys = key_cache[slots // block_size, heads, slots % block_size].float()
        values = value_cache[slots // block_size, heads, slots % block_size].float()
        logits = torch.einsum("hd,htd->ht", query[row].float(), keys) * scale
        if softcap > 0:
            logits = softcap * torch.tanh(logits / softcap)
        weights = torch.softmax(logits.masked_fill(hidden, float("-inf")), dim=-1).nan_to_num()
        # a hidden row may hold anything, NaN included: zero it rather than multiply it by zero
        values = values.masked_fill(hidden[:, :, None], 0.0)
        output[row] = torch.einsum("ht,htd->hd", weights, values).to(query.dtype)
    return output
