"""Several small boxes a page in place of one: tighter scores, at the same bytes where the boxes are in FP8.

No backend serves it: it measures what a second pair of summary rows would buy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quest_vllm.ops.api import Ops
from quest_vllm.ops.reference import group_mass, num_pages, page_table
from quest_vllm.policies.base import DecodeStep
from quest_vllm.policies.bound import select


@dataclass(frozen=True)
class SplitBoxPolicy:
    """``parts`` boxes a page, each over ``page_size / parts`` neighbouring tokens, kept as ``dtype``.

    A page's score for a query head is the log-sum-exp (times the attention scale) of its boxes' ``q.mid +
    bound_radius * |q|.rad``; heads of a group are joined as "max" or "mass". Two boxes in float8_e4m3fn take the bytes
    of one in 16 bits. Raises ValueError for another reduction, or parts that do not divide the page.
    """

    ops: Ops
    parts: int = 2
    bound_radius: float = 0.5
    group_reduction: str = "max"
    dtype: torch.dtype = torch.float8_e4m3fn

    def __post_init__(self) -> None:
        if self.group_reduction not in ("max", "mass"):
            raise ValueError(f"group_reduction: expected max or mass, got {self.group_reduction!r}")

    def scores(self, step: DecodeStep) -> torch.Tensor:
        """``page_scores [num_reqs, num_kv_heads, max_pages]`` float32, -inf past the end."""
        if step.page_size % self.parts:
            raise ValueError(f"parts: expected a divisor of the page size {step.page_size}, got {self.parts}")
        num_kv_heads, pages_per_block = step.key_cache.shape[1], step.summaries.shape[2]
        shape = (len(step.seq_lens), num_kv_heads, step.block_table.shape[1] * pages_per_block)
        scores = torch.full(shape, float("-inf"), device=step.query.device)
        for row, count in enumerate(num_pages(step.seq_lens, step.page_size).tolist()):
            if count:
                bounds = self._bounds(step, row, count)
                joined = bounds.amax(dim=1) if self.group_reduction == "max" else group_mass(bounds)
                scores[row, :, :count] = joined
        return scores

    def choose(self, step: DecodeStep) -> torch.Tensor:
        """See :class:`quest_vllm.policies.base.PagePolicy`."""
        return select(self.ops, self.scores(step), step)

    def bytes_read(self, num_pages: int, page_budget: int, page_bytes: int, summary_bytes: int) -> int:
        """See :class:`quest_vllm.policies.base.PagePolicy`."""
        boxes = num_pages * summary_bytes * self.parts * self.dtype.itemsize // 2
        return boxes + min(num_pages, page_budget) * page_bytes

    def _bounds(self, step: DecodeStep, row: int, count: int) -> torch.Tensor:
        """``[num_kv_heads, group, count]``: each head's estimate of a page's log mass."""
        num_kv_heads, block_size = step.key_cache.shape[1:3]
        table = page_table(step.block_table[row : row + 1], block_size // step.page_size)[0][:count]
        positions = torch.arange(count * step.page_size, device=table.device)
        slots = table.repeat_interleave(step.page_size) * step.page_size + positions % step.page_size
        keys = step.key_cache[slots // block_size, :, slots % block_size].float()  # [tokens, num_kv_heads, head_dim]
        hidden = (positions >= step.seq_lens[row])[:, None, None]
        boxes = (-1, step.page_size // self.parts)
        low = keys.masked_fill(hidden, float("inf")).unflatten(0, boxes).amin(dim=1)  # [boxes, num_kv_heads, head_dim]
        high = keys.masked_fill(hidden, float("-inf")).unflatten(0, boxes).amax(dim=1)
        empty = low > high  # a part without a token yet
        low, high = (side.masked_fill(empty, 0).to(self.dtype).float() for side in (low, high))
        query = step.query[row].float().view(num_kv_heads, -1, step.query.shape[-1])
        middle = torch.einsum("hgd,bhd->hgb", query, (high + low) / 2)
        radius = torch.einsum("hgd,bhd->hgb", query.abs(), (high - low) / 2)
        bound = step.scale * (middle + self.bound_radius * radius)
        bound = bound.masked_fill(empty.any(dim=-1).T[:, None], float("-inf"))
        return bound.unflatten(-1, (count, self.parts)).logsumexp(dim=-1)
