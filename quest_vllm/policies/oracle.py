"""Pages ranked by the attention mass that they really hold. Reads every key: for measuring only."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quest_vllm.ops.api import Ops
from quest_vllm.ops.reference import group_mass
from quest_vllm.policies.base import DecodeStep
from quest_vllm.policies.bound import select
from quest_vllm.policies.logits import token_logits


def page_logits(step: DecodeStep) -> torch.Tensor:
    """Log-sum-exp of the logits of each page's keys: ``[num_reqs, num_kv_heads, group, max_pages]`` float32."""
    return token_logits(step).unflatten(-1, (-1, step.page_size)).logsumexp(dim=-1)


@dataclass(frozen=True)
class OraclePolicy:
    """Exact page mass, summed over the query heads of a group: what a better estimate can reach with one selection.

    ``top_p`` below 1 takes as few of the budget's pages as hold that share of their mass.
    """

    ops: Ops
    top_p: float = 1.0

    def scores(self, step: DecodeStep) -> torch.Tensor:
        """Log of each page's mass, ``[num_reqs, num_kv_heads, max_pages]`` float32."""
        return group_mass(page_logits(step))

    def choose(self, step: DecodeStep) -> torch.Tensor:
        """See :class:`quest_vllm.policies.base.PagePolicy`."""
        return select(self.ops, self.scores(step), step, self.top_p)

    def bytes_read(self, num_pages: int, page_budget: int, page_bytes: int, summary_bytes: int) -> int:
        """See :class:`quest_vllm.policies.base.PagePolicy`: every key, and the values of the selected pages."""
        return (num_pages + min(num_pages, page_budget)) * page_bytes // 2
