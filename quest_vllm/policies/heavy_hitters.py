"""Eviction by attention received so far, like H2O (arXiv 2306.14048): what is dropped never comes back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from quest_vllm.policies.base import NO_SUMMARY, DecodeStep
from quest_vllm.policies.logits import token_logits


@dataclass(frozen=True)
class HeavyHitterPolicy:
    """Half of the budget is the newest pages, the other half those with most attention from all queries up to now.

    One set a KV head, from attention summed over its group. The prefill decides first, by ``step.attended``; each
    decoded token then joins, the weakest kept page that is not among the newest half goes, and the attention that the
    step gives to what is left is added up. So a page's worth is known from earlier queries alone. At ``page_size`` 1 it
    evicts tokens, as H2O does. Rows are steps of one or more continuations of the prefill, in order: one that is not a
    token longer than the row before it starts afresh. For comparison: no backend serves it.
    """

    page_summary: ClassVar[str] = NO_SUMMARY
    one_budget: ClassVar[bool] = True  # rows of a step cannot have different ones

    def choose(self, step: DecodeStep) -> torch.Tensor:
        """See :class:`quest_vllm.policies.base.PagePolicy`. Raises ``ValueError`` without ``step.attended``."""
        if step.attended is None:
            raise ValueError("attended: expected the prefill's attention per token, got None")
        budget, size = step.max_page_budget, step.page_size
        logits = token_logits(step)  # [rows, num_kv_heads, group, tokens]
        pages, prefilled = logits.shape[-1] // size, step.attended.shape[1] // size
        selected = torch.full((*logits.shape[:2], budget), -1, dtype=torch.int32, device=logits.device)
        found = continuations(step.seq_lens)
        received = by_page(step.attended, size, pages).repeat(len(found), 1, 1)  # [continuations, num_kv_heads, pages]
        kept = torch.zeros_like(received, dtype=torch.bool)
        kept[..., :prefilled] = True
        for offset in range(max(map(len, found), default=0)):  # all continuations at once
            live = torch.tensor([number for number, rows in enumerate(found) if len(rows) > offset])
            rows = torch.tensor([found[number][offset] for number in live.tolist()])
            count = -(-int(step.seq_lens[rows[0]]) // size)
            kept[live, :, count - 1] = True
            kept[live] = strongest(received[live], kept[live], count, budget)
            taken = kept[live].nonzero()[:, -1].view(len(live), received.shape[1], -1)  # as many of every head
            selected[rows, :, : taken.shape[-1]] = taken.int()
            hidden = ~kept[live].repeat_interleave(size, dim=-1)[:, :, None]
            weights = logits[rows].masked_fill(hidden, float("-inf")).softmax(-1).sum(dim=2)
            received[live] += by_page(weights, size, pages)
        return selected

    def bytes_read(self, num_pages: int, page_budget: int, page_bytes: int, summary_bytes: int) -> int:
        """See :class:`quest_vllm.policies.base.PagePolicy`: the kept pages alone."""
        return min(num_pages, page_budget) * page_bytes


def continuations(seq_lens: torch.Tensor) -> list[range]:
    """Rows of each run of lengths that grow by one."""
    lengths = seq_lens.tolist()
    starts = [row for row, length in enumerate(lengths) if row == 0 or length != lengths[row - 1] + 1]
    return [range(start, end) for start, end in zip(starts, [*starts[1:], len(lengths)], strict=True)]


def by_page(per_token: torch.Tensor, size: int, pages: int) -> torch.Tensor:
    """``[..., tokens]`` added up in pages, ``[..., pages]``; tokens that are not there count 0."""
    missing = pages * size - per_token.shape[-1]
    return torch.nn.functional.pad(per_token, (0, missing)).unflatten(-1, (pages, size)).sum(-1)


def strongest(received: torch.Tensor, kept: torch.Tensor, count: int, budget: int) -> torch.Tensor:
    """Of ``kept [..., pages]``: as many of the newest of ``count`` as half of ``budget``, then the most attended."""
    if count <= budget:
        return kept
    newest = torch.arange(kept.shape[-1], device=kept.device) >= count - (budget - budget // 2)
    worth = received.masked_fill(~kept, -1.0).masked_fill(newest & kept, float("inf"))
    best = worth.topk(budget, dim=-1).indices
    return torch.zeros_like(kept).scatter_(-1, best, True) & kept
