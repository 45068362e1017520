"""The operations for rows that share all blocks but their last, in PyTorch: on a GPU in float32, no loop over rows.

What the decode rows of :mod:`hf_reference` are: of one prefix or several, as many of each and one after the other.
Scores equal :mod:`quest_vllm.ops.reference`'s to rounding: what a prefix's blocks hold is read once for all its rows,
as keys of one request whose groups are all rows' query heads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from quest_vllm.ops import key_codes, torch_ops
from quest_vllm.ops.api import Ops, compose, in_two_stages
from quest_vllm.ops.reference import check_page_summary, group_mass, log_sum, num_pages, split_query

JOINS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "max": lambda bound: bound.amax(dim=2),
    "mean": lambda bound: bound.mean(dim=2),
    "mass": group_mass,
    "per_query_head": lambda bound: bound.flatten(1, 2),
}
"""``[rows, num_kv_heads, group, pages]`` to ``[rows, num_score_heads, pages]``, by ``group_reduction``."""


def score_pages(
    query: torch.Tensor,
    summaries: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    page_size: int,
    group_reduction: str = "max",
    bound_radius: float = 1.0,
    scale: float = 1.0,
    page_summary: str = "min_max",
    policies: None = None,
    log_sums: torch.Tensor | None = None,
) -> torch.Tensor:
    """See the reference. Rows of a prefix must share every block but their last, and have at least a token in it."""
    num_reqs, _, head_dim = query.shape
    num_kv_heads, pages_per_block = summaries.shape[1:3]
    check_page_summary(page_summary, head_dim, page_size)
    prefixes = count_prefixes(block_table)
    rows = num_reqs // prefixes
    grouped = query.float().view(num_reqs, num_kv_heads, -1, head_dim)
    # a prefix is one request: all its rows' query heads
    every = grouped.unflatten(0, (prefixes, rows)).transpose(1, 2).flatten(2, 3)
    # [prefixes, blocks, num_kv_heads, pages_per_block, 2, head_dim]
    shared = summaries[block_table[::rows, :-1].long()]
    own = summaries[block_table[:, -1:].long()]
    in_own = seq_lens - (block_table.shape[1] - 1) * pages_per_block * page_size
    if page_summary == "key_codes":
        first, last = _all_coded(every, shared, scale), _coded(grouped, own, in_own, scale)
        factor = 1.0
    else:
        first, last = (_boxed(*side, bound_radius) for side in ((every, shared), (grouped, own)))
        factor = scale if group_reduction == "mass" else 1.0
    first = first.unflatten(2, (rows, -1)).transpose(1, 2).flatten(0, 1)  # [num_reqs, num_kv_heads, group, pages]
    bound = torch.cat([first, last], dim=-1) * factor
    valid = torch.arange(bound.shape[-1], device=query.device) < num_pages(seq_lens, page_size)[:, None]
    if group_reduction == "mass":
        bound = bound.masked_fill(~valid[:, None, None], float("-inf"))
        if log_sums is not None:
            log_sums.copy_(log_sum(bound).flatten(1))
    return JOINS[group_reduction](bound).masked_fill(~valid[:, None], float("-inf"))


def count_prefixes(block_table: torch.Tensor) -> int:
    """How many prefixes the rows of ``block_table [num_reqs, blocks + 1]`` are of, by their first block."""
    first = block_table[:, 0]
    return int((first[1:] != first[:-1]).sum()) + 1


def _by_head(summaries: torch.Tensor) -> torch.Tensor:
    """``[reqs, blocks, num_kv_heads, pages_per_block, ...]`` to ``[reqs, num_kv_heads, pages, ...]``."""
    return summaries.transpose(1, 2).flatten(2, 3)


def _coded(query: torch.Tensor, summaries: torch.Tensor, tokens: torch.Tensor, scale: float) -> torch.Tensor:
    """``[reqs, num_kv_heads, group, pages]`` of the ``tokens [reqs]`` that the blocks hold."""
    coded = key_codes.code_bytes(_by_head(summaries).contiguous())
    starts = torch.arange(coded.shape[2], device=query.device) * key_codes.TOKENS
    held = (tokens[:, None] - starts).clamp(0, key_codes.TOKENS)[:, None].expand(coded.shape[:3])
    return key_codes.page_logits(query, coded, held, scale=scale)


def _all_coded(query: torch.Tensor, summaries: torch.Tensor, scale: float) -> torch.Tensor:
    """:func:`_coded` of whole blocks: the keys that codes stand for, then one product with every query head.

    A key is what the codes make of the unit vectors as queries.
    """
    coded = key_codes.code_bytes(_by_head(summaries).contiguous())
    units = torch.eye(query.shape[-1], device=query.device).expand(*coded.shape[:2], -1, -1)
    shared, each = key_codes.split_logits(units, coded, 1.0)  # [reqs, num_kv_heads, head_dim, pages] and [..., 16]
    keys = (shared[..., None] + each).flatten(-2)  # [reqs, num_kv_heads, head_dim, tokens]
    return (query @ keys * scale).unflatten(-1, (-1, key_codes.TOKENS)).logsumexp(-1)


def _boxed(query: torch.Tensor, summaries: torch.Tensor, bound_radius: float) -> torch.Tensor:
    """``[reqs, num_kv_heads, group, pages]``."""
    rows = _by_head(summaries).float()
    low, high = split_query(query, bound_radius)
    return torch.einsum("rhgd,rhpd->rhgp", low, rows[..., 0, :]) + torch.einsum(
        "rhgd,rhpd->rhgp", high, rows[..., 1, :]
    )


def shared_prefix_ops() -> Ops:
    """These scores with the plain PyTorch path's other operations."""
    select, attend = torch_ops.select_pages, torch_ops.sparse_paged_attention
    fused = compose(score_pages, in_two_stages(select, torch_ops.shortlist_pages, torch_ops.rerank_pages), attend)
    return Ops("shared_prefix", torch_ops.update_page_summaries, score_pages, select, attend, fused)
