"""Chooses which implementation of the operations runs. The only place where that is decided.

An implementation asked for by name never falls back: it works or it raises. Only "auto" looks for the best one, and
it says so when that is not the fastest kind.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from quest_vllm.config import IMPLEMENTATIONS, POLICIES, TWO_STAGE
from quest_vllm.errors import QuestError
from quest_vllm.ops import packed, reference, torch_ops

logger = logging.getLogger("vllm.quest_vllm")


class ImplementationUnavailable(QuestError):
    """The implementation that was asked for by name cannot run here; the message says why."""


@dataclass(frozen=True)
class LayerShape:
    """What an implementation has to know of a layer before it can promise to serve it."""

    head_dim: int
    rows: int  # query heads that share a selection
    page_size: int
    block_size: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Ops:
    """The operations of one implementation, with the signatures of :mod:`quest_vllm.ops.reference`.

    ``choose_pages`` is the selection, with the keys at hand for rows that want it in two stages (see
    :func:`in_two_stages`), and ``quest_decode`` all decode operations in one call (see :func:`compose`).
    ``kv_writer``, where there is one, makes what stores keys and values and updates the summaries in one launch (see
    :class:`quest_vllm.ops.cuda.KvWriter`). ``choose_pages`` None: it is inside ``quest_decode`` alone.
    """

    name: str
    update_page_summaries: Callable[..., None]
    score_pages: Callable[..., torch.Tensor]
    select_pages: Callable[..., torch.Tensor]
    sparse_paged_attention: Callable[..., torch.Tensor]
    quest_decode: Callable[..., torch.Tensor]
    choose_pages: Callable[..., torch.Tensor] | None = None
    kv_writer: Callable[..., Callable[..., None]] | None = None


def in_two_stages(
    select_pages: Callable[..., torch.Tensor],
    shortlist_pages: Callable[..., torch.Tensor],
    rerank_pages: Callable[..., torch.Tensor],
) -> Callable[..., torch.Tensor]:
    """Return ``choose_pages``: ``select_pages``, by the keys of a shortlist where a row's policy is "two_stage".

    Its positional arguments are ``page_scores``, ``log_sums``, ``query``, ``key_cache``, ``block_table``, ``seq_lens``
    and ``page_budgets``, with the reference's shapes. ``log_sums`` are :func:`room_for_log_sums`, which ``score_pages``
    has filled: None where no row's policy is "two_stage".
    """

    def choose_pages(
        page_scores: torch.Tensor,
        log_sums: torch.Tensor | None,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        page_budgets: torch.Tensor,
        *,
        page_size: int,
        max_page_budget: int,
        scale: float,
        softcap: float = 0.0,
        sink_pages: int = 1,
        recent_pages: int = 2,
        top_p: torch.Tensor | None = None,
        mass_scale: float = 1.0,
        policies: torch.Tensor | None = None,
    ) -> torch.Tensor:
        rows = (seq_lens, page_budgets)
        options: dict[str, Any] = {
            "page_size": page_size,
            "sink_pages": sink_pages,
            "recent_pages": recent_pages,
            "max_page_budget": max_page_budget,
            "policies": policies,
        }
        if log_sums is not None:
            listed = shortlist_pages(page_scores, *rows, **options)
            keys = (query, key_cache, block_table, seq_lens)
            softened = {"page_size": page_size, "scale": scale, "softcap": softcap}
            page_scores = rerank_pages(page_scores, log_sums, listed, *keys, **softened)
        adaptive = {} if top_p is None else {"top_p": top_p, "mass_scale": mass_scale}
        return select_pages(page_scores, *rows, **adaptive, **options)

    return choose_pages


def room_for_log_sums(query: torch.Tensor, policies: torch.Tensor | None) -> torch.Tensor | None:
    """Where ``score_pages`` leaves its ``log_sums``, if a row's policy is "two_stage"; else None.

    ``query`` is ``[num_reqs, num_q_heads, head_dim]``. Looks at ``policies``: on a GPU that waits for it.
    """
    if policies is None or not bool((policies == POLICIES.index(TWO_STAGE)).any()):
        return None
    return query.new_empty(query.shape[:2], dtype=torch.float32)


def compose(
    score_pages: Callable[..., torch.Tensor],
    choose_pages: Callable[..., torch.Tensor],
    sparse_paged_attention: Callable[..., torch.Tensor],
) -> Callable[..., torch.Tensor]:
    """Return ``quest_decode``: the composition of the operations.

    Its positional arguments are ``query``, ``key_cache``, ``value_cache``, ``summaries``, ``block_table``, ``seq_lens``
    and ``page_budgets``, with the reference's shapes; a row whose budget covers its context attends to all of it (or
    to the pages that hold ``top_p`` of its mass, where that is given: ``[num_reqs]`` float32, see
    :func:`quest_vllm.ops.reference.select_pages`). ``taken`` ``[num_reqs, num_select_heads]`` int32, its last dimension
    contiguous, receives the number of pages attended to. ``policies`` as in the reference: a row's own way to choose.
    Returns ``out``, ``[num_reqs, num_q_heads, head_dim]``, made when None.
    """

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
        rows = (block_table, seq_lens)
        common: dict[str, Any] = {"page_size": page_size, "policies": policies}
        scoring: dict[str, Any] = {"group_reduction": group_reduction, "bound_radius": bound_radius, "scale": scale}
        log_sums = room_for_log_sums(query, policies)
        scores = score_pages(query, summaries, *rows, page_summary=page_summary, log_sums=log_sums, **scoring, **common)
        selected = choose_pages(
            scores,
            log_sums,
            query,
            key_cache,
            *rows,
            page_budgets,
            max_page_budget=scores.shape[2],
            scale=scale,
            softcap=softcap,
            sink_pages=sink_pages,
            recent_pages=recent_pages,
            top_p=top_p,
            mass_scale=reference.mass_scale_of(group_reduction, scale, page_summary),
            **common,
        )
        if taken is not None:
            taken.copy_((selected >= 0).sum(dim=-1))
        attended = sparse_paged_attention(
            query, key_cache, value_cache, *rows, selected, page_size=page_size, scale=scale, softcap=softcap
        )
        return attended if out is None else out.copy_(attended)

    return quest_decode


def _from_module(name: str, module: Any) -> Ops:
    stages = (module.score_pages, module.select_pages, module.sparse_paged_attention)
    if hasattr(module, "quest_decode"):
        kv_writer, choose = getattr(module, "KvWriter", None), None
        if hasattr(module, "shortlist_pages"):
            choose = in_two_stages(module.select_pages, module.shortlist_pages, module.rerank_pages)
        return Ops(name, module.update_page_summaries, *stages, module.quest_decode, choose, kv_writer)
    return _composed(name, module, module.update_page_summaries, module.rerank_pages, module.sparse_paged_attention)


def _eager(name: str, module: Any, kv_format: str) -> Ops:
    """Wrap the reference or the plain PyTorch path; a packed cache needs the unpacking adapter."""
    if kv_format == "rows":
        return _from_module(name, module)
    from quest_vllm.ops.cpu import unpack_keys, unpack_values

    update = functools.partial(packed.update_page_summaries, module.update_page_summaries, unpack_keys, kv_format)
    rerank = functools.partial(packed.rerank_pages, module.rerank_pages, unpack_keys, kv_format)
    attend = functools.partial(
        packed.sparse_paged_attention, module.sparse_paged_attention, unpack_keys, unpack_values, kv_format
    )
    return _composed(name, module, update, rerank, attend)


def _composed(
    name: str,
    module: Any,
    update: Callable[..., None],
    rerank: Callable[..., torch.Tensor],
    attend: Callable[..., torch.Tensor],
) -> Ops:
    """``module``'s operations, with those of its that touch keys or values as given."""
    score, select = module.score_pages, module.select_pages
    choose = in_two_stages(select, module.shortlist_pages, rerank)
    return Ops(name, update, score, select, attend, compose(score, choose, attend), choose)


def _cpu(kv_format: str) -> Ops:
    from quest_vllm.ops import cpu

    cpu.load()
    update = functools.partial(cpu.update_page_summaries, kv_format=kv_format)
    attend = functools.partial(cpu.sparse_paged_attention, kv_format=kv_format)
    rerank = functools.partial(cpu.rerank_pages, kv_format=kv_format)
    return _composed("cpu", cpu, update, rerank, attend)


def _triton() -> Ops:
    return _from_module("triton", importlib.import_module("quest_vllm.ops.triton"))


def _cuda(shape: LayerShape | None, page_summary: str) -> Ops:
    from quest_vllm.ops import cuda, cuda_library

    cuda.check_device()
    if shape is not None:
        cuda.check_layer(shape.head_dim, shape.rows, shape.page_size, shape.block_size, shape.dtype)
        cuda.check_page_summary(page_summary, shape.rows, shape.page_size, shape.dtype)
        cuda_library.prepare(shape.head_dim)
    return _from_module("cuda", cuda)


def _auto(device_type: str, *settings: Any) -> Ops:
    fast, portable, slow = ("cuda", "triton", "") if device_type == "cuda" else ("cpu", "torch", ", which is slow")
    try:
        return load_ops(fast, device_type, *settings)
    except ImplementationUnavailable as error:
        logger.warning("quest_vllm: no fast kernels (%s); using %s%s", error, portable, slow)
        return load_ops(portable, device_type, *settings)


@functools.cache  # one build attempt, and one warning, for all layers
def load_ops(
    implementation: str,
    device_type: str,
    kv_format: str = "rows",
    shape: LayerShape | None = None,
    page_summary: str = "min_max",
) -> Ops:
    """Return the operations of ``implementation`` for tensors on ``device_type`` ("cpu" or "cuda").

    ``kv_format`` is how keys and values lie inside a block: "rows" everywhere but on vLLM-CPU. ``shape`` is the
    layer's, where it is known. Raises :class:`ImplementationUnavailable` when a named implementation cannot run here or
    serve that shape or ``page_summary``, ``ValueError`` for an unknown name.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: expected one of {IMPLEMENTATIONS}, got {implementation!r}")
    if implementation == "auto":
        return _auto(device_type, kv_format, shape, page_summary)
    if implementation == "reference":
        return _eager("reference", reference, kv_format)
    if implementation == "torch":
        return _eager("torch", torch_ops, kv_format)
    required = "cpu" if implementation == "cpu" else "cuda"
    if device_type != required:
        raise ImplementationUnavailable(
            f"implementation {implementation!r} needs tensors on {required}, the model runs on {device_type}"
        )
    try:
        if implementation == "cpu":
            return _cpu(kv_format)
        return _triton() if implementation == "triton" else _cuda(shape, page_summary)
    except (ImportError, OSError, RuntimeError) as error:
        raise ImplementationUnavailable(f"{implementation}: {error}") from error
