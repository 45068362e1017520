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

    def choose(self, step: DecodeStep) -> torch.Tensor:
        """See :class:`quest_vllm.policies.base.PagePolicy`. Raises ``ValueError`` without ``step.attended``."""
        if step.attended is None:
            raise ValueError("attended: expected the prefill's attention per token, got None")
        budget, size = step.max_page_budget, step.page_size
        logits = token_logits(step)  # [rows, num_kv_heads, group, tokens]
        pages = logits.shape[-1] // size
        selected = torch.full((*logits.shape[:2], budget), -1, dtype=torch.int32)
        for rows in continuations(step.seq_lens):
            received = by_page(step.attended, size, pages)
            filled = step.attended.shape[1] // size  # a whole number of pages was prefilled
            kept = torch.zeros_like(received, dtype=torch.bool)
            kept[:, :filled] = True
            for row in rows:
                count = -(-int(step.seq_lens[row]) // size)
                kept[:, filled:count] = True
                kept = strongest(received, kept, count, budget)
                filled = count
                selected[row] = positions(kept, budget)
                hidden = ~kept.repeat_interleave(size, dim=1)[:, None]
                weights = logits[row].masked_fill(hidden, float("-inf")).softmax(-1).sum(dim=1)
                received = received + by_page(weights, size, pages)
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
    """``[num_kv_heads, tokens]`` added up in pages, ``[num_kv_heads, pages]``; tokens that are not there count 0."""
    whole = per_token.new_zeros(per_token.shape[0], pages * size)
    whole[:, : per_token.shape[1]] = per_token
    return whole.unflatten(1, (pages, size)).sum(-1)


def strongest(received: torch.Tensor, kept: torch.Tensor, count: int, budget: int) -> torch.Tensor:
    """Of ``kept [num_kv_heads, pages]``: as many of the newest as half of ``budget``, then the most attended."""
    if count <= budget:
        return kept
    newest = torch.arange(kept.shape[1]) >= count - (budget - budget // 2)
    worth = received.masked_fill(~kept, -1.0).masked_fill(newest & kept, float("inf"))
    best = worth.topk(budget, dim=1).indices
    return torch.zeros_like(kept).scatter_(1, best, True) & kept


def positions(kept: torch.Tensor, budget: int) -> torch.Tensor:
    """``[num_kv_heads, pages]`` bool to ascending indices, -1 padded: ``[num_kv_heads, budget]`` int32."""
    pages = kept.shape[1]
    index = torch.where(kept, torch.arange(pages), pages).sort(dim=1).values[:, :budget]
    found = torch.full((kept.shape[0], budget), -1)
    found[:, : index.shape[1]] = torch.where(index < pages, index, -1)
    return found.int()
