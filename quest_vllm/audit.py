"""Checks page summaries against the keys they summarise, on a live worker. For tests and for operators who doubt.

Run it through vLLM: ``llm.collective_rpc(audit_summaries)``. Slow (it reads the whole KV cache); never on the hot path.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from quest_vllm import compat
from quest_vllm.layers import has_window
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

    A page written at some time must carry the exact min/max of its rows 0..r for some r; a page of a running request
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
        keys = key_rows(views.keys, layer)
        lowest, highest = _running_extremes(keys, config.page_size)
        report.layers += 1
        if owners[layer.kv_cache.data_ptr()] == 1:
            _audit_blocks(name, views.summaries, lowest, highest, report)
        for blocks, length in compat.live_requests(worker, name):
            _audit_request(name, blocks, length, views.summaries, lowest, highest, report)
    return report


def key_rows(keys: torch.Tensor, layer: Any) -> torch.Tensor:
    """``keys [blocks, heads, block_size, head_dim]`` of ``layer`` as rows, whatever packing its cache has."""
    kv_format = getattr(layer, "isa", "rows")
    if kv_format == "rows":
        return keys
    from quest_vllm.ops.cpu import unpack_keys

    return unpack_keys(keys, kv_format)


def _running_extremes(keys: torch.Tensor, page_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Min and max over rows 0..r of each page, for every r: ``[blocks, heads, pages, page_size, head_dim]``."""
    by_page = keys.unflatten(2, (-1, page_size))
    return torch.cummin(by_page, dim=3).values, torch.cummax(by_page, dim=3).values


def _audit_blocks(
    name: str, summaries: torch.Tensor, lowest: torch.Tensor, highest: torch.Tensor, report: AuditReport
) -> None:
    matches = ((summaries[..., None, 0, :] == lowest) & (summaries[..., None, 1, :] == highest)).all(-1).any(-1)
    written = (summaries != 0).flatten(3).any(-1)
    report.pages_checked += int(written.sum())
    for block, head, page in (written & ~matches).nonzero().tolist():
        report.errors.append(f"{name}: block {block}, KV head {head}, page {page} matches no prefix of its rows")


def _audit_request(
    name: str,
    blocks: list[int],
    length: int,
    summaries: torch.Tensor,
    lowest: torch.Tensor,
    highest: torch.Tensor,
    report: AuditReport,
) -> None:
    pages_per_block, page_size = lowest.shape[2], lowest.shape[3]
    for page in range(-(-length // page_size)):
        # vLLM's count lags one step behind the cache: the newest page may hold more rows than it says
        least = min(page_size, length - page * page_size) - 1
        block, sub_page = blocks[page // pages_per_block], page % pages_per_block
        low = summaries[block, :, sub_page, 0].unsqueeze(1) == lowest[block, :, sub_page, least:]
        high = summaries[block, :, sub_page, 1].unsqueeze(1) == highest[block, :, sub_page, least:]
        report.live_pages_checked += 1
        if not (low & high).all(-1).any(-1).all():
            report.errors.append(f"{name}: page {page} of a running request (block {block}) is stale")
