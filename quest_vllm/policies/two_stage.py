"""Pages whose scores leave it open whether the budget takes them, ranked again by the mass that their keys hold."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from quest_vllm.ops.reference import group_mass, num_pages
from quest_vllm.policies.base import DecodeStep
from quest_vllm.policies.bound import BoundPolicy, select
from quest_vllm.policies.key_codes import KeyCodesPolicy
from quest_vllm.policies.oracle import page_logits


@dataclass(frozen=True)
class TwoStagePolicy:
    """Of the pages that ``first`` ranks from ``certain`` to ``shortlist`` times the budget the keys are read.

    Those pages are then ranked by their exact masses, each head's relative to what ``first`` estimates that all pages
    hold, and all others by the estimates; heads of a group have to be joined by "mass". With ``certain`` 0 and a
    shortlist of all pages this is the oracle, but for the weights of a group's heads where the estimate of all pages is
    off. A row whose budget covers its context reads no key to choose.

    The default is what rows with the policy "two_stage" are served with: see
    :func:`quest_vllm.ops.reference.shortlist_pages`. It reads as many pages' keys as the budget has pages, beside the
    summaries and the keys and values of the selected pages. ``top_p`` as in :class:`KeyCodesPolicy`.
    """

    first: BoundPolicy | KeyCodesPolicy
    shortlist: float = 1.5
    certain: float = 0.5
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.shortlist >= 1:
            raise ValueError(f"shortlist: expected 1 or more times the budget, got {self.shortlist!r}")
        if not 0 <= self.certain <= 1:
            raise ValueError(f"certain: expected a share of the budget, from 0 to 1, got {self.certain!r}")
        if self.first.group_reduction != "mass":
            raise ValueError(f"first: expected scores joined by 'mass', got {self.first.group_reduction!r}")

    @property
    def page_summary(self) -> str:
        """What the first stage reads of every page."""
        return getattr(self.first, "page_summary", "min_max")

    def choose(self, step: DecodeStep) -> torch.Tensor:
        """See :class:`quest_vllm.policies.base.PagePolicy`."""
        log_sums = torch.empty(step.query.shape[:2], device=step.query.device)
        scores = self.first.scores(step, log_sums)
        exact = page_logits(step)
        mass = group_mass(exact, log_sums.view(exact.shape[:3]))
        pages = num_pages(step.seq_lens, step.page_size)
        take = torch.minimum(step.page_budgets.long(), pages)
        listed = self._best(step, scores, (take * self.shortlist).ceil()) & (take < pages)[:, None, None]
        forced = step.sink_pages + step.recent_pages
        known = self._best(step, scores, (take * self.certain).floor().clamp(min=forced))
        return select(self.first.ops, torch.where(listed & ~known, mass, scores), step, self.top_p)

    def _best(self, step: DecodeStep, scores: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Whether a page is among the ``counts [num_reqs]`` best of its row, forced ones first; as ``scores``."""
        width = scores.shape[2]
        wide = replace(step, page_budgets=counts.clamp(max=width).int(), max_page_budget=width)
        pages = select(self.first.ops, scores, wide).long()
        flags = torch.zeros((*scores.shape[:2], width + 1), dtype=torch.bool, device=scores.device)
        return flags.scatter_(-1, torch.where(pages < 0, width, pages), True)[..., :width]  # padding: a last page

    def bytes_read(self, num_pages: int, page_budget: int, page_bytes: int, summary_bytes: int) -> int:
        """See :class:`quest_vllm.policies.base.PagePolicy`: listed keys that are chosen are read twice."""
        take = min(num_pages, page_budget)
        listed = min(num_pages, math.ceil(take * self.shortlist)) - math.floor(take * self.certain)
        read = listed if take < num_pages else 0
        return self.first.bytes_read(num_pages, page_budget, page_bytes, summary_bytes) + read * page_bytes // 2
