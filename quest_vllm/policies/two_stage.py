"""A shortlist by the bound, ranked again by the mass that its keys really hold."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from quest_vllm.ops.reference import group_mass
from quest_vllm.policies.base import DecodeStep
from quest_vllm.policies.bound import BoundPolicy, select
from quest_vllm.policies.key_codes import KeyCodesPolicy
from quest_vllm.policies.oracle import page_logits


@dataclass(frozen=True)
class TwoStagePolicy:
    """``first`` chooses ``shortlist`` times the budget; of those, the pages with the most mass are attended to.

    Mass is relative to the shortlist, which changes no row's order under one query head and holds nearly all of it
    under several. A shortlist of all pages makes this the oracle. Reads the keys of the shortlist beside the summaries,
    so compare it at equal bytes.
    """

    first: BoundPolicy | KeyCodesPolicy
    shortlist: float = 4.0

    def __post_init__(self) -> None:
        if not self.shortlist >= 1:
            raise ValueError(f"shortlist: expected 1 or more times the budget, got {self.shortlist!r}")

    @property
    def page_summary(self) -> str:
        """What the first stage reads of every page."""
        return getattr(self.first, "page_summary", "min_max")

    def choose(self, step: DecodeStep) -> torch.Tensor:
        """See :class:`quest_vllm.policies.base.PagePolicy`."""
        max_pages = step.block_table.shape[1] * step.summaries.shape[2]
        budgets = (step.page_budgets * self.shortlist).ceil().clamp(max=max_pages).int()
        wide = replace(step, page_budgets=budgets, max_page_budget=int(budgets.max()) if len(budgets) else 0)
        listed = self.first.choose(wide).long()
        absent = torch.ones((*listed.shape[:2], max_pages + 1), dtype=torch.bool, device=listed.device)
        absent.scatter_(-1, torch.where(listed < 0, max_pages, listed), False)  # padding: a last page
        mass = group_mass(page_logits(step).masked_fill(absent[..., None, :max_pages], float("-inf")))
        return select(self.first.ops, mass, step)

    def bytes_read(self, num_pages: int, page_budget: int, page_bytes: int, summary_bytes: int) -> int:
        """See :class:`quest_vllm.policies.base.PagePolicy`: the keys of selected pages are read twice."""
        keys = min(num_pages, math.ceil(page_budget * self.shortlist)) * page_bytes // 2
        return self.first.bytes_read(num_pages, page_budget, page_bytes, summary_bytes) + keys
