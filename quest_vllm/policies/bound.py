"""Pages ranked by a bound from their summaries: the original Quest, and what is served. No key is read to choose."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quest_vllm.ops.api import Ops
from quest_vllm.ops.reference import mass_scale_of
from quest_vllm.policies.base import DecodeStep


@dataclass(frozen=True)
class BoundPolicy:
    """``ops``' own scores and selection. ``group_reduction="max"``, ``bound_radius=1.0`` is the original Quest's score.

    Reads every summary once, and the keys and values of the selected pages: with ``top_p`` below 1 as few of the budget
    as hold that share of its estimated mass.
    """

    ops: Ops
    group_reduction: str = "max"
    bound_radius: float = 1.0
    top_p: float = 1.0

    def scores(self, step: DecodeStep, log_sums: torch.Tensor | None = None) -> torch.Tensor:
        """``page_scores [num_reqs, num_score_heads, max_pages]`` float32; ``log_sums`` as in the reference."""
        return self.ops.score_pages(
            step.query,
            step.summaries,
            step.block_table,
            step.seq_lens,
            page_size=step.page_size,
            group_reduction=self.group_reduction,
            bound_radius=self.bound_radius,
            scale=step.scale,
            log_sums=log_sums,
        )

    def choose(self, step: DecodeStep) -> torch.Tensor:
        """See :class:`quest_vllm.policies.base.PagePolicy`."""
        mass_scale = mass_scale_of(self.group_reduction, step.scale, "min_max")
        return select(self.ops, self.scores(step), step, self.top_p, mass_scale)

    def bytes_read(self, num_pages: int, page_budget: int, page_bytes: int, summary_bytes: int) -> int:
        """See :class:`quest_vllm.policies.base.PagePolicy`; of a query head where each selects its own pages.

        With ``top_p`` an upper limit.
        """
        return num_pages * summary_bytes + min(num_pages, page_budget) * page_bytes


def select(
    ops: Ops,
    page_scores: torch.Tensor,
    step: DecodeStep,
    top_p: float = 1.0,
    mass_scale: float = 1.0,
    policies: torch.Tensor | None = None,
) -> torch.Tensor:
    """The step's budgets and forced pages, and one ``top_p`` for all rows, applied to ``page_scores``."""
    shares = torch.full(step.seq_lens.shape, top_p, device=step.seq_lens.device)
    adaptive = {"top_p": shares, "mass_scale": mass_scale} if top_p < 1 else {}
    return ops.select_pages(
        page_scores,
        step.seq_lens,
        step.page_budgets,
        page_size=step.page_size,
        sink_pages=step.sink_pages,
        recent_pages=step.recent_pages,
        max_page_budget=step.max_page_budget,
        policies=policies,
        **adaptive,
    )
