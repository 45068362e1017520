"""The chain of the Triton kernels: nothing in it scales with the longest context that the server allows."""

from __future__ import annotations

from typing import Any

import torch

from quest_vllm.ops.reference import mass_scale_of
from quest_vllm.ops.triton.rerank_pages import rerank_pages
from quest_vllm.ops.triton.score_pages import score_pages
from quest_vllm.ops.triton.select_pages import select_pages
from quest_vllm.ops.triton.shortlist_pages import shortlist_pages
from quest_vllm.ops.triton.sparse_paged_attention import sparse_paged_attention


def quest_decode(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    summaries: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    page_budgets: torch.Tensor,
    *,
    page_size: int,
    scale: float,
    softcap: float = 0.0,
    group_reduction: str = "max",
    bound_radius: float = 1.0,
    page_summary: str = "min_max",
    sink_pages: int = 1,
    recent_pages: int = 2,
    top_p: torch.Tensor | None = None,
    policies: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    taken: torch.Tensor | None = None,
) -> torch.Tensor:
    """Score, select and attend; see :func:`quest_vllm.ops.api.compose` for arguments and result.

    What lies past a row's end or budget is left unwritten between the kernels. Where rows may be of the policy
    "two_stage" its two launches are always there, for a captured graph must serve any mix: other rows leave at once.
    """
    two_stages = group_reduction == "mass" and policies is not None
    log_sums = query.new_empty(query.shape[:2], dtype=torch.float32) if two_stages else None
    scores = score_pages(
        query,
        summaries,
        block_table,
        seq_lens,
        page_size=page_size,
        group_reduction=group_reduction,
        bound_radius=bound_radius,
        scale=scale,
        page_summary=page_summary,
        policies=policies,
        log_sums=log_sums,
        fill_tail=False,
    )
    max_pages = scores.shape[2]
    choosing: dict[str, Any] = {
        "page_size": page_size,
        "sink_pages": sink_pages,
        "recent_pages": recent_pages,
        "policies": policies,
    }
    widest: dict[str, Any] = {"max_page_budget": max_pages, "fill_tail": False}
    selected = None
    if log_sums is not None:
        listed = shortlist_pages(scores, seq_lens, page_budgets, **widest, **choosing)
        rerank_pages(
            scores,
            log_sums,
            listed,
            query,
            key_cache,
            block_table,
            seq_lens,
            scale=scale,
            softcap=softcap,
            page_budgets=page_budgets,
            **choosing,
        )
        selected = listed[..., :max_pages]
    selected = select_pages(
        scores,
        seq_lens,
        page_budgets,
        top_p=top_p,
        mass_scale=mass_scale_of(group_reduction, scale, page_summary),
        taken=taken,
        out=selected,
        **widest,
        **choosing,
    )
    return sparse_paged_attention(
        query,
        key_cache,
        value_cache,
        block_table,
        seq_lens,
        selected,
        page_size=page_size,
        scale=scale,
        softcap=softcap,
        page_budgets=page_budgets,
        out=out,
    )
