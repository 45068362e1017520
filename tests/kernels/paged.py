"""Builds paged KV caches for op tests, in any dtype, with blocks in shuffled order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quest_vllm.config import POLICIES
from quest_vllm.ops import reference
from quest_vllm.page_layout import PageViews, split_chunks, summary_bytes_per_token


def places(names: Sequence[str], device: torch.device | str = "cpu") -> torch.Tensor:
    """Rows' policies as operations take them, ``[num_reqs]`` int32."""
    return torch.tensor([POLICIES.index(name) for name in names], dtype=torch.int32, device=device)


@dataclass
class PagedCase:
    """One batch: queries, a cache with its summaries, and who owns which block."""

    query: torch.Tensor  # [num_reqs, num_q_heads, head_dim]
    views: PageViews
    block_table: torch.Tensor  # [num_reqs, max_blocks] int32
    seq_lens: torch.Tensor  # [num_reqs] int32
    page_size: int

    def slots(self) -> torch.Tensor:
        """Slot of every stored token of every request, in order."""
        block_size = self.views.keys.shape[2]
        found = [
            self.block_table[row, position // block_size].long() * block_size + position % block_size
            for row, length in enumerate(self.seq_lens.tolist())
            for position in range(length)
        ]
        return torch.tensor(found, dtype=torch.int64, device=self.query.device)


def make_case(
    seq_lens: list[int],
    *,
    num_kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 64,
    block_size: int = 32,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    page_summary: str = "min_max",
) -> PagedCase:
    """Random case; its summaries come from the reference. Unused rows hold NaN, so that reading one shows."""
    generator = torch.Generator().manual_seed(seed)
    max_blocks = max(1, -(-max(seq_lens, default=1) // block_size))
    num_reqs = len(seq_lens)
    num_blocks = num_reqs * max_blocks + 1
    extra = summary_bytes_per_token(head_dim, dtype.itemsize, page_size) // dtype.itemsize
    cache = torch.full((num_blocks, num_kv_heads, block_size, 2 * head_dim + extra), float("nan"), dtype=dtype)
    views = split_chunks(cache, head_dim, page_size)
    order = torch.randperm(num_blocks - 1, generator=generator) + 1
    block_table = order[: num_reqs * max_blocks].view(num_reqs, max_blocks).int()
    lengths = torch.tensor(seq_lens, dtype=torch.int32)
    query = torch.randn(num_reqs, num_kv_heads * group, head_dim, generator=generator).to(dtype)
    case = PagedCase(query, views, block_table, lengths, page_size)
    slots = case.slots()
    for cached in (views.keys, views.values):
        rows = torch.randn(slots.numel(), num_kv_heads, head_dim, generator=generator).to(dtype)
        cached[slots // block_size, :, slots % block_size] = rows
    reference.update_page_summaries(views.keys, views.summaries, slots, page_size=page_size, page_summary=page_summary)
    return case
