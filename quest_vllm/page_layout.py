"""Where a page's summary lies inside vLLM's KV blocks.

vLLM's LBHNC layout gives every (block, KV head) one contiguous chunk. :func:`summary_bytes_per_token` enlarges that
chunk through the KV cache spec, so vLLM's own accounting, prefix cache, preemption and connectors carry the summaries:

    K [block_size, head_dim] | V [block_size, head_dim] | summaries [pages_per_block, 2, head_dim]

Knows sizes and views only; nothing of vLLM's classes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


def summary_bytes_per_token(head_dim: int, element_size: int, page_size: int) -> int:
    """Bytes that each token of a chunk gains: ``2 * head_dim * element_size / page_size``, in whole elements.

    The share of K+V is exactly ``1 / page_size`` wherever ``2 * head_dim`` is a multiple of ``page_size``.
    """
    elements = -(-2 * head_dim // page_size)
    return elements * element_size


@dataclass(frozen=True)
class PageViews:
    """Views into one layer's KV cache; none of them copies.

    ``keys``, ``values``: ``[num_blocks, num_kv_heads, block_size, head_dim]``;
    ``summaries``: ``[num_blocks, num_kv_heads, pages_per_block, 2, head_dim]``, min at 0 and max at 1.
    """

    keys: torch.Tensor
    values: torch.Tensor
    summaries: torch.Tensor

    @functools.cached_property
    def by_token(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as vLLM's kernels take them, ``[num_blocks, block_size, num_kv_heads, head_dim]``."""
        return self.keys.transpose(1, 2), self.values.transpose(1, 2)


def split_chunks(kv_cache: torch.Tensor, head_dim: int, page_size: int) -> PageViews:
    """Split ``kv_cache [num_blocks, num_kv_heads, block_size, content]`` into its three parts.

    ``content`` is K, V and the summary share of one token, in elements. Raises ValueError where a chunk is not
    contiguous, is too small, or does not hold a whole number of pages.
    """
    num_blocks, num_kv_heads, block_size, content = kv_cache.shape
    if block_size % page_size:
        raise ValueError(f"block_size: expected a multiple of page_size {page_size}, got {block_size}")
    pages_per_block = block_size // page_size
    needed = 2 * head_dim * (block_size + pages_per_block)
    if content * block_size < needed:
        raise ValueError(f"kv_cache: expected at least {needed} elements a chunk, got {content * block_size}")
    if kv_cache.stride(3) != 1 or kv_cache.stride(2) != content:
        raise ValueError(f"kv_cache: expected contiguous chunks (layout LBHNC), got strides {kv_cache.stride()}")
    block_stride, head_stride = kv_cache.stride(0), kv_cache.stride(1)
    start, half = kv_cache.storage_offset(), block_size * head_dim

    def rows(offset: int) -> torch.Tensor:
        shape = (num_blocks, num_kv_heads, block_size, head_dim)
        return kv_cache.as_strided(shape, (block_stride, head_stride, head_dim, 1), start + offset)

    summaries = kv_cache.as_strided(
        (num_blocks, num_kv_heads, pages_per_block, 2, head_dim),
        (block_stride, head_stride, 2 * head_dim, head_dim, 1),
        start + 2 * half,
    )
    return PageViews(rows(0), rows(half), summaries)


class BoundViews:
    """One layer's :func:`split_chunks`, kept as long as its cache stays where vLLM bound it."""

    def __init__(self, head_dim: int, page_size: int) -> None:
        self._sizes = (head_dim, page_size)
        self._pointer = 0
        self._views: PageViews | None = None

    def of(self, kv_cache: torch.Tensor) -> PageViews:
        """Views into ``kv_cache``; raises as :func:`split_chunks` does."""
        if self._views is None or self._pointer != kv_cache.data_ptr():
            self._views = split_chunks(kv_cache, *self._sizes)
            self._pointer = kv_cache.data_ptr()
        return self._views
