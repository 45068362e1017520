"""Checks page summaries against the keys they summarise, on a live worker. For tests and for operators who doubt.

Run it through vLLM: ``llm.collective_rpc(audit_summaries)``. Slow (it reads the whole KV cache); never on the hot path.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from quest_vllm import compat
from quest_vllm.config import QuestConfig
from quest_vllm.layers import has_window
from quest_vllm.ops import key_codes
from quest_vllm.page_layout import split_chunks


@dataclass
class AuditReport:
    """What one audit saw. ``errors`` names layer, block and page of every summary that is wrong."""

    layers: int
    pages_checked: int
    live_pages_checked: int
    errors: list[str]


def audit_summaries(worker: Any) -> AuditReport:
    """Audit every layer of ``worker``.

    A page written at some time must carry the exact summary of its rows 0..r for some r; a page of a running request
    must do so for an r that covers its stored rows. Pages never written (all zero) are skipped, and so are pages of no
    running request in memory that layers of several KV cache groups share: a sliding-window layer, which keeps no
    summaries, may have had them last.
    """
    report = AuditReport(0, 0, 0, [])
    layers = compat.cached_layers(worker)
    owners = Counter(layer.kv_cache.data_ptr() for layer in layers.values())
    for name, layer in layers.items():
        config = layer.impl.config
        if has_window(layer.impl):
            continue
        views = split_chunks(layer.kv_cache, layer.impl.head_size, config.page_size)
        stored = stored_summaries(views.summaries, config)
        written = (stored != 0).any(-1)
        fits = _fitting_rows(key_rows(views.keys, layer), stored, written, config)
        report.layers += 1
        if owners[layer.kv_cache.data_ptr()] == 1:
            _audit_blocks(name, written, fits, report)
        for blocks, length in compat.live_requests(worker, name):
            _audit_request(name, blocks, length, fits, report)
    return report


def key_rows(keys: torch.Tensor, layer: Any) -> torch.Tensor:
    """``keys [blocks, heads, block_size, head_dim]`` of ``layer`` as rows, whatever packing its cache has."""
    kv_format = getattr(layer, "isa", "rows")
    if kv_format == "rows":
        return keys
    from quest_vllm.ops.cpu import unpack_keys

    return unpack_keys(keys, kv_format)


def stored_summaries(summaries: torch.Tensor, config: QuestConfig) -> torch.Tensor:
    """``[blocks, heads, pages, size]``: a page's minima and maxima, or its bytes, whichever ``config`` keeps."""
    return key_codes.code_bytes(summaries) if config.page_summary == "key_codes" else summaries.flatten(3)


def summarise_rows(by_page: torch.Tensor, rows: int, config: QuestConfig) -> torch.Tensor:
    """What :func:`stored_summaries` are of each page's first ``rows`` keys; ``by_page [..., page_size, head_dim]``."""
    if config.page_summary == "key_codes":
        return key_codes.encode(by_page, torch.full(by_page.shape[:-2], rows, device=by_page.device))
    written = by_page[..., :rows, :]
    return torch.cat((written.amin(dim=-2), written.amax(dim=-2)), dim=-1)


def _fitting_rows(keys: torch.Tensor, stored: torch.Tensor, written: torch.Tensor, config: QuestConfig) -> torch.Tensor:
    """``[blocks, heads, pages, page_size]`` bool: whether a page's summary is that of its first 1, 2, ... rows.

    Nearly all pages are full: fewer rows are tried where all of them do not fit, in pages that were written.
    """
    by_page = keys.unflatten(2, (-1, config.page_size))
    fits = torch.zeros(by_page.shape[:-1], dtype=torch.bool, device=keys.device)
    fits[..., -1] = (stored == summarise_rows(by_page, config.page_size, config)).all(-1)
    rest = written & ~fits[..., -1]
    some, kept = by_page[rest], stored[rest]
    tried = [(kept == summarise_rows(some, rows, config)).all(-1) for rows in range(1, config.page_size)]
    fits[rest] = torch.stack([*tried, fits[rest][:, -1]], dim=-1)
    return fits


def _audit_blocks(name: str, written: torch.Tensor, fits: torch.Tensor, report: AuditReport) -> None:
    report.pages_checked += int(written.sum())
    for block, head, page in (written & ~fits.any(-1)).nonzero().tolist():
        report.errors.append(f"{name}: block {block}, KV head {head}, page {page} matches no prefix of its rows")


def _audit_request(name: str, blocks: list[int], length: int, fits: torch.Tensor, report: AuditReport) -> None:
    pages_per_block, page_size = fits.shape[2:4]
    for page in range(-(-length // page_size)):
        # vLLM's count lags one step behind the cache: the newest page may hold more rows than it says
        least = min(page_size, length - page * page_size) - 1
        block, sub_page = blocks[page // pages_per_block], page % pages_per_block
        report.live_pages_checked += 1
        if not fits[block, :, sub_page, least:].any(-1).all():
            report.errors.append(f"{name}: page {page} of a running request (block {block}) is stale")
