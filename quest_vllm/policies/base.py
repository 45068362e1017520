"""The interface between a decode step and whoever chooses its pages. Knows tensors only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

NO_SUMMARY = "none"
"""``page_summary`` of a policy that looks at no page it has not chosen."""


@dataclass(frozen=True)
class DecodeStep:
    """One layer's decode step; shapes as in :mod:`quest_vllm.ops.reference`, keys as rows.

    ``page_budgets`` counts the forced ``sink_pages`` and ``recent_pages``. Rows may be of several ``prefixes``, as many
    of each and one after the other: blocks that all rows of a prefix share may then be read once. ``attended`` is there
    for policies that remember: how much attention the queries of the first tokens gave each of them, summed over a
    group. ``logits`` are :func:`quest_vllm.policies.logits.token_logits`, where somebody has them already.
    """

    query: torch.Tensor  # [num_reqs, num_q_heads, head_dim]
    key_cache: torch.Tensor  # [num_blocks, num_kv_heads, block_size, head_dim]
    summaries: torch.Tensor  # [num_blocks, num_kv_heads, pages_per_block, 2, head_dim]
    block_table: torch.Tensor  # [num_reqs, max_blocks] int32
    seq_lens: torch.Tensor  # [num_reqs] int32
    page_budgets: torch.Tensor  # [num_reqs] int32
    max_page_budget: int
    page_size: int
    scale: float
    sink_pages: int = 1
    recent_pages: int = 2
    prefixes: int = 1
    attended: torch.Tensor | None = None  # [num_kv_heads, prefilled tokens] float32
    logits: torch.Tensor | None = None  # [num_reqs, num_kv_heads, group, max_blocks * block_size] float32


class PagePolicy(Protocol):
    """Chooses the pages of each row and KV head (or query head) of a step."""

    def choose(self, step: DecodeStep) -> torch.Tensor:
        """``selected_pages [num_reqs, num_select_heads, max_page_budget]`` int32, ascending, -1 padded."""
        ...

    def bytes_read(self, num_pages: int, page_budget: int, page_bytes: int, summary_bytes: int) -> int:
        """Bytes that one KV head reads in one step, attention included.

        ``num_pages`` is the request's; ``page_bytes`` a page's keys and values, ``summary_bytes`` its two rows.
        """
        ...
