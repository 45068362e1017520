"""The operations as C++ kernels for x86 (csrc/cpu), and vLLM-CPU's packing of keys and values in plain PyTorch.

Shapes, semantics and argument names are those of :mod:`quest_vllm.ops.reference`; ``kv_format`` says how keys and
values lie inside a block's chunk. vLLM's name for it is the "isa" of ``cpu_attn_reshape_and_cache``; T is block_size:

    kv_format       keys                        values
    "rows"          [T, D]                      [T, D]
    "vec", "vec16"  [D, T]                      [T, D]
    "amx"           [T/16, D/2, 16, 2]          [D/16, T/2, 16, 2]      bfloat16, D a multiple of 32; otherwise as "vec"

Summaries are plain rows in every format. Nothing here falls back: without the library every operation raises
:class:`KernelsUnavailable`. Bad arguments raise RuntimeError with what was expected and what came. Beyond the
reference, head_dim and page_size have to be multiples of 16 (at most 512), and the operations check that every block of
a request lies inside the cache; listed and selected pages past a request's end are skipped unread.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from quest_vllm.ops import cpu_build
from quest_vllm.ops.build_tools import KernelsUnavailable

__all__ = [
    "KV_FORMATS",
    "KernelsUnavailable",
    "isa",
    "load",
    "pack_keys",
    "pack_values",
    "rerank_pages",
    "score_pages",
    "select_pages",
    "shortlist_pages",
    "sparse_paged_attention",
    "unpack_keys",
    "unpack_values",
    "update_page_summaries",
]

KV_FORMATS = ("rows", "vec", "vec16", "amx")
_GROUP = 16  # tokens of a packed group


@functools.cache
def load() -> Any:
    """Build the library if need be, load it, and return its operations. Raises :class:`KernelsUnavailable`."""
    path = cpu_build.build()
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise KernelsUnavailable(f"cannot load {path}: {error}") from error
    return torch.ops.quest_vllm_cpu


def isa() -> str:
    """Return the instruction set of the kernels in use: "generic", "avx2" or "avx512"."""
    name: str = load().isa()
    return name


def update_page_summaries(
    key_cache: torch.Tensor,
    summaries: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    page_size: int,
    kv_format: str = "rows",
    page_summary: str = "min_max",
) -> None:
    """Recompute, in place, the min/max or codes of every page that ``slot_mapping [num_tokens] int64`` wrote to."""
    load().update_page_summaries(key_cache, summaries, slot_mapping, page_size, kv_format, page_summary)


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
    policies: torch.Tensor | None = None,
    log_sums: torch.Tensor | None = None,
) -> torch.Tensor:
    """Score each page from its summary: ``[num_reqs, num_score_heads, max_pages]`` float32, -inf past the end.

    ``log_sums`` ``[num_reqs, num_q_heads]`` float32, its last dimension contiguous, receives the heads' normalisers.
    """
    rows, scoring = (query, summaries, block_table, seq_lens), (group_reduction, bound_radius, scale, page_summary)
    scores: torch.Tensor = load().score_pages(*rows, page_size, *scoring, policies, log_sums)
    return scores


def select_pages(
    page_scores: torch.Tensor,
    seq_lens: torch.Tensor,
    page_budgets: torch.Tensor,
    *,
    page_size: int,
    sink_pages: int = 1,
    recent_pages: int = 2,
    max_page_budget: int,
    top_p: torch.Tensor | None = None,
    mass_scale: float = 1.0,
    policies: torch.Tensor | None = None,
) -> torch.Tensor:
    """Choose each row's pages: ``[num_reqs, num_score_heads, max_page_budget]`` int32, ascending, -1 padded."""
    forced = (sink_pages, recent_pages)
    selected: torch.Tensor = load().select_pages(
        page_scores, seq_lens, page_budgets, page_size, *forced, max_page_budget, top_p, mass_scale, policies
    )
    return selected


def shortlist_pages(
    page_scores: torch.Tensor,
    seq_lens: torch.Tensor,
    page_budgets: torch.Tensor,
    *,
    page_size: int,
    sink_pages: int = 1,
    recent_pages: int = 2,
    max_page_budget: int,
    policies: torch.Tensor | None = None,
) -> torch.Tensor:
    """List the pages that "two_stage" rows rank by keys: ``[num_reqs, num_score_heads, max_page_budget + 1]`` int32."""
    listed: torch.Tensor = load().shortlist_pages(
        page_scores, seq_lens, page_budgets, page_size, sink_pages, recent_pages, max_page_budget, policies
    )
    return listed


def rerank_pages(
    page_scores: torch.Tensor,
    log_sums: torch.Tensor,
    shortlist: torch.Tensor,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    page_size: int,
    scale: float,
    softcap: float = 0.0,
    kv_format: str = "rows",
) -> torch.Tensor:
    """Score the pages of a shortlist once more, by their keys: a copy of ``page_scores`` with theirs exchanged.

    As with :func:`sparse_paged_attention`, a row's scores depend on its own arguments only, bit for bit.
    """
    rows = (log_sums, shortlist, query, key_cache, block_table, seq_lens)
    scores: torch.Tensor = load().rerank_pages(page_scores, *rows, page_size, scale, softcap, kv_format)
    return scores


def sparse_paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    selected_pages: torch.Tensor,
    *,
    page_size: int,
    scale: float,
    softcap: float = 0.0,
    kv_format: str = "rows",
) -> torch.Tensor:
    """Attend to the selected pages: ``[num_reqs, num_q_heads, head_dim]`` in the query's dtype.

    A row's result depends on its own arguments only, bit for bit: not on the batch, nor on the number of threads.
    """
    output: torch.Tensor = load().sparse_paged_attention(
        query,
        key_cache,
        value_cache,
        block_table,
        seq_lens,
        selected_pages,
        page_size,
        scale,
        softcap,
        kv_format,
    )
    return output


def _packing(cache: torch.Tensor, kv_format: str) -> str:
    if kv_format not in KV_FORMATS:
        raise ValueError(f"kv_format: expected one of {KV_FORMATS}, got {kv_format!r}")
    if kv_format == "rows":
        return "rows"
    return "amx" if kv_format == "amx" and cache.shape[3] % 32 == 0 else "transposed"


def unpack_keys(key_cache: torch.Tensor, kv_format: str) -> torch.Tensor:
    """Return the keys as rows, ``[num_blocks, num_kv_heads, block_size, head_dim]``; a copy unless they are rows."""
    packing = _packing(key_cache, kv_format)
    if packing == "rows":
        return key_cache
    blocks, heads, tokens, dim = key_cache.shape
    flat = key_cache.reshape(blocks, heads, -1)
    if packing == "transposed":
        return flat.view(blocks, heads, dim, tokens).transpose(2, 3).contiguous()
    groups = flat.view(blocks, heads, tokens // _GROUP, dim // 2, _GROUP, 2)
    return groups.transpose(3, 4).reshape(blocks, heads, tokens, dim)


def unpack_values(value_cache: torch.Tensor, kv_format: str) -> torch.Tensor:
    """Return the values as rows, ``[num_blocks, num_kv_heads, block_size, head_dim]``; a copy only for "amx"."""
    if _packing(value_cache, kv_format) != "amx":
        return value_cache
    blocks, heads, tokens, dim = value_cache.shape
    tiles = value_cache.reshape(blocks, heads, dim // _GROUP, tokens // 2, _GROUP, 2)
    return tiles.permute(0, 1, 3, 5, 2, 4).reshape(blocks, heads, tokens, dim)


def pack_keys(rows: torch.Tensor, kv_format: str) -> torch.Tensor:
    """Invert :func:`unpack_keys`: a packed copy of ``rows``, of the same shape."""
    packing = _packing(rows, kv_format)
    blocks, heads, tokens, dim = rows.shape
    if packing == "rows":
        return rows.clone()
    if packing == "transposed":
        return rows.transpose(2, 3).reshape(rows.shape)
    groups = rows.reshape(blocks, heads, tokens // _GROUP, _GROUP, dim // 2, 2)
    return groups.transpose(3, 4).reshape(rows.shape)


def pack_values(rows: torch.Tensor, kv_format: str) -> torch.Tensor:
    """Invert :func:`unpack_values`: a packed copy of ``rows``, of the same shape."""
    if _packing(rows, kv_format) != "amx":
        return rows.clone()
    blocks, heads, tokens, dim = rows.shape
    pairs = rows.reshape(blocks, heads, tokens // 2, 2, dim // _GROUP, _GROUP)
    return pairs.permute(0, 1, 4, 2, 5, 3).reshape(rows.shape)
