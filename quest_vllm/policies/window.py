"""The first and the newest pages, whatever the query: what a sliding window with attention sinks keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from quest_vllm.config import POLICIES, WINDOW
from quest_vllm.ops.api import Ops
from quest_vllm.policies.base import NO_SUMMARY, DecodeStep
from quest_vllm.policies.bound import select


@dataclass(frozen=True)
class WindowPolicy:
    """``step.sink_pages`` at the start, and as many of the newest pages as the budget still has.

    Reads no summary and may forget every other page. Served to requests that ask for it (``policies`` of
    :func:`quest_vllm.ops.reference.select_pages`).
    """

    ops: Ops
    page_summary: ClassVar[str] = NO_SUMMARY

    def choose(self, step: DecodeStep) -> torch.Tensor:
        """See :class:`quest_vllm.policies.base.PagePolicy`."""
        shape = (len(step.seq_lens), step.key_cache.shape[1], step.block_table.shape[1] * step.key_cache.shape[2])
        unread = step.query.new_zeros(*shape[:2], shape[2] // step.page_size, dtype=torch.float32)
        window = torch.full_like(step.seq_lens, POLICIES.index(WINDOW))
        return select(self.ops, unread, step, policies=window)

    def bytes_read(self, num_pages: int, page_budget: int, page_bytes: int, summary_bytes: int) -> int:
        """See :class:`quest_vllm.policies.base.PagePolicy`: the chosen pages alone."""
        return min(num_pages, page_budget) * page_bytes
