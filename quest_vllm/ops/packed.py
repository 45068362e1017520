"""Runs row-layout operations over a packed KV cache, by unpacking the blocks they touch.

vLLM-CPU packs keys and values for its instruction set. The C++ kernels read that packing; the reference and the plain
PyTorch path do not, so this adapter hands them compact row-layout copies. Correct and slow, by design.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Unpack = Callable[[torch.Tensor, str], torch.Tensor]


def update_page_summaries(
    operation: Callable[..., None],
    unpack_keys: Unpack,
    kv_format: str,
    key_cache: torch.Tensor,
    summaries: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    page_size: int,
    page_summary: str = "min_max",
) -> None:
    """Apply ``operation`` to the blocks that ``slot_mapping`` names and write their summaries back."""
    block_size = key_cache.shape[2]
    slots = slot_mapping[slot_mapping >= 0]
    if slots.numel() == 0:
        return
    blocks, inverse = torch.unique(slots // block_size, return_inverse=True)
    compact = summaries[blocks]
    keys = unpack_keys(key_cache[blocks], kv_format)
    operation(keys, compact, inverse * block_size + slots % block_size, page_size=page_size, page_summary=page_summary)
    summaries[blocks] = compact


def _compact(block_table: torch.Tensor, seq_lens: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The blocks that the requests use, and a block table of places among them."""
    used = torch.arange(block_table.shape[1], device=block_table.device) * block_size < seq_lens[:, None]
    blocks, inverse = torch.unique(torch.where(used, block_table, 0).long(), return_inverse=True)
    return blocks, inverse.int()


def rerank_pages(
    operation: Callable[..., torch.Tensor],
    unpack_keys: Unpack,
    kv_format: str,
    page_scores: torch.Tensor,
    log_sums: torch.Tensor,
    shortlist: torch.Tensor,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    **options: Any,
) -> torch.Tensor:
    """Apply ``operation`` to row-layout copies of the keys of the blocks that the requests use."""
    blocks, table = _compact(block_table, seq_lens, key_cache.shape[2])
    keys = unpack_keys(key_cache[blocks], kv_format)
    return operation(page_scores, log_sums, shortlist, query, keys, table, seq_lens, **options)


def sparse_paged_attention(
    operation: Callable[..., torch.Tensor],
    unpack_keys: Unpack,
    unpack_values: Unpack,
    kv_format: str,
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
    """Apply ``operation`` to row-layout copies of the blocks that the requests use."""
    blocks, table = _compact(block_table, seq_lens, key_cache.shape[2])
    return operation(
        query,
        unpack_keys(key_cache[blocks], kv_format),
        unpack_values(value_cache[blocks], kv_format),
        table,
        seq_lens,
        selected_pages,
        page_size=page_size,
        scale=scale,
        softcap=softcap,
    )
