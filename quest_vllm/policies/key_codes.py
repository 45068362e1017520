"""Pages ranked by the attention mass that two-bit codes of their keys promise, at the bytes of a 16-bit min/max."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from quest_vllm.ops.api import Ops
from quest_vllm.policies.base import DecodeStep
from quest_vllm.policies.bound import select


@dataclass(frozen=True)
class KeyCodesPolicy:
    """``ops``' scores of summaries that hold key codes (:mod:`quest_vllm.ops.key_codes`), not minima and maxima.

    Unlike a box or means, they keep the sixteen tokens of a page apart, so that one key among them is not lost. Heads
    of a group are joined as ``group_reduction`` says. Reads every summary once, 4 * head_dim bytes a page and KV head,
    and the keys and values of the selected pages: with ``top_p`` below 1 as few of the budget's pages as hold that
    share of their estimated mass.
    """

    ops: Ops
    group_reduction: str = "max"
    top_p: float = 1.0
    page_summary: ClassVar[str] = "key_codes"

    def scores(self, step: DecodeStep, log_sums: torch.Tensor | None = None) -> torch.Tensor:
        """``page_scores [num_reqs, num_score_heads, max_pages]`` float32; ``log_sums`` as in the reference."""
        return self.ops.score_pages(
            step.query,
            step.summaries,
            step.block_table,
            step.seq_lens,
            page_size=step.page_size,
            group_reduction=self.group_reduction,
            scale=step.scale,
            log_sums=log_sums,
            page_summary=self.page_summary,
        )

    def choose(self, step: DecodeStep) -> torch.Tensor:
        """See :class:`quest_vllm.policies.base.PagePolicy`; ``step.summaries`` hold codes."""
        return select(self.ops, self.scores(step), step, self.top_p)

    def bytes_read(self, num_pages: int, page_budget: int, page_bytes: int, summary_bytes: int) -> int:
        """See :class:`quest_vllm.policies.base.PagePolicy`; of a query head where each selects its own pages.

        With ``top_p`` an upper limit.
        """
        return num_pages * summary_bytes + min(num_pages, page_budget) * page_bytes
