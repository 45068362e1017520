"""Pages ranked by the attention mass that they really hold. Reads every key: for measuring only."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quest_vllm.ops.api import Ops
from quest_vllm.ops.reference import group_mass, page_table
from quest_vllm.policies.base import DecodeStep
from quest_vllm.policies.bound import select
from quest_vllm.policies.logits import token_logits


def page_logits(step: DecodeStep, row: int, pages: torch.Tensor) -> torch.Tensor:
    """Log-sum-exp of the logits of each page's keys, for each query head of a request.

    ``pages`` is ``[num_kv_heads, count]`` int64; entries below 0 give -inf, as do tokens at or past the request's end.
    Returns ``[num_kv_heads, group, count]`` float32.
    """
    num_kv_heads, block_size = step.key_cache.shape[1:3]
    query = step.query[row].float().view(num_kv_heads, -1, step.query.shape[-1])
    tokens = torch.arange(step.page_size, device=pages.device)
    positions = pages[..., None] * step.page_size + tokens  # [num_kv_heads, count, page_size]
    table = page_table(step.block_table[row : row + 1], block_size // step.page_size)[0]
    slots = table[pages.clamp(min=0)][..., None] * step.page_size + tokens
    heads = torch.arange(num_kv_heads, device=pages.device)[:, None, None]
    keys = step.key_cache[slots // block_size, heads, slots % block_size].float()
    logits = torch.einsum("hgd,hptd->hgpt", query, keys) * step.scale
    hidden = (pages < 0)[..., None] | (positions >= step.seq_lens[row])
    return logits.masked_fill(hidden[:, None], float("-inf")).logsumexp(dim=-1)


def page_mass(step: DecodeStep, row: int, pages: torch.Tensor) -> torch.Tensor:
    """Log of the mass of ``pages`` among themselves, summed over a group: ``[num_kv_heads, count]`` float32."""
    return group_mass(page_logits(step, row, pages))


@dataclass(frozen=True)
class OraclePolicy:
    """Exact page mass, summed over the query heads of a group: what a better estimate can reach with one selection.

    ``top_p`` below 1 takes as few of the budget's pages as hold that share of their mass.
    """

    ops: Ops
    top_p: float = 1.0

    def choose(self, step: DecodeStep) -> torch.Tensor:
        """See :class:`quest_vllm.policies.base.PagePolicy`."""
        by_page = token_logits(step).unflatten(-1, (-1, step.page_size)).logsumexp(dim=-1)
        return select(self.ops, group_mass(by_page), step, self.top_p)

    def bytes_read(self, num_pages: int, page_budget: int, page_bytes: int, summary_bytes: int) -> int:
        """See :class:`quest_vllm.policies.base.PagePolicy`: every key, and the values of the selected pages."""
        return (num_pages + min(num_pages, page_budget)) * page_bytes // 2
