"""One budget for all KV heads of a layer: its places go to the best pages, whichever head they are of."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quest_vllm.ops.reference import num_pages
from quest_vllm.policies.base import DecodeStep
from quest_vllm.policies.bound import BoundPolicy
from quest_vllm.policies.key_codes import KeyCodesPolicy
from quest_vllm.policies.oracle import OraclePolicy


@dataclass(frozen=True)
class SharedPoolPolicy:
    """``first``'s scores, ranked over the heads of a row together; every head has its sink and recent pages.

    A pool of ``num_kv_heads`` times the row's budget (or all of its pages) is spent to the last place. Scores have to
    be logs of mass, normalised for each query head: no others compare across heads. Reads what ``first`` does, one head
    more and another less. For comparison: no backend serves it, since one head's choice would wait for all scores.
    """

    first: BoundPolicy | KeyCodesPolicy | OraclePolicy

    def __post_init__(self) -> None:
        reduction = getattr(self.first, "group_reduction", "mass")
        if reduction != "mass":
            raise ValueError(f"first: expected scores joined by 'mass', got {reduction!r}")

    @property
    def page_summary(self) -> str:
        """What is read of every page."""
        return getattr(self.first, "page_summary", "min_max")

    def choose(self, step: DecodeStep) -> torch.Tensor:
        """See :class:`quest_vllm.policies.base.PagePolicy`; as wide as the head with most pages needs."""
        scores = self.first.scores(step)
        num_reqs, heads, width = scores.shape
        total = num_pages(step.seq_lens, step.page_size)[:, None, None]
        index = torch.arange(width, device=scores.device)
        forced = (index < step.sink_pages) | (index >= total - step.recent_pages)
        scores = scores.nan_to_num(nan=float("inf"), neginf=float("-inf")).masked_fill(forced, float("inf"))
        scores = scores.masked_fill(index >= total, float("-inf"))
        places = torch.minimum(step.page_budgets[:, None, None], total) * heads
        order = scores.flatten(1).argsort(dim=-1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(
            1, order, torch.arange(heads * width, device=order.device).expand_as(order)
        )
        chosen = (rank.view(num_reqs, heads, width) < places) & (index < total)
        listed = torch.where(chosen, index, width).sort(dim=-1).values
        listed = listed[..., : int(chosen.sum(dim=-1).max()) if chosen.numel() else 0]
        return torch.where(listed < width, listed, -1).int()

    def bytes_read(self, num_pages: int, page_budget: int, page_bytes: int, summary_bytes: int) -> int:
        """See :class:`quest_vllm.policies.base.PagePolicy`: the mean over heads."""
        return self.first.bytes_read(num_pages, page_budget, page_bytes, summary_bytes)
