"""Audit while serving: every N steps, a few summaries of one running request against their keys.

Off unless ``audit_steps`` is set. Its cost is bounded (one layer of one request, at most :data:`MAX_PAGES` pages), but
it waits for the device, so on a GPU choose N in the thousands. A wrong page is logged, and counted in
``quest_audit_pages_total``; attention goes on.
"""

from __future__ import annotations

import logging
import random
from typing import Any

import torch

from quest_vllm.audit import key_rows, stored_summaries, summarise_rows
from quest_vllm.layers import is_sparse_layer
from quest_vllm.metadata import RowClasses
from quest_vllm.metrics import get_worker_metrics
from quest_vllm.page_layout import split_chunks
from quest_vllm.token_rows import StepRows

MAX_PAGES = 1024
logger = logging.getLogger("vllm.quest_vllm")


class OnlineAudit:
    """Audits of one group of attention layers, called by the metadata builder before each step's forward pass."""

    def __init__(self, layers: dict[str, Any], interval: int) -> None:
        """``layers``: name to attention module; ``interval``: steps with sparse rows from one audit to the next."""
        self._layers = layers
        self._interval = interval
        self._steps = 0
        self._random = random.Random(0)

    def step(self, rows: RowClasses, step: StepRows, block_table: torch.Tensor) -> None:
        """Note one step; ``block_table`` is ``[num_reqs, max_blocks]`` on any device."""
        if not self._interval or not rows.sparse.any():
            return
        self._steps += 1
        if self._steps % self._interval:
            return
        names = [name for name, layer in self._layers.items() if is_sparse_layer(name, layer.impl, layer.impl.config)]
        row = self._random.choice(rows.sparse.nonzero()[0].tolist())
        # the step's own tokens are not in the cache yet; the page that they go to may be half full. Full pages hold
        # every key that their last write covered, those of rejected drafts overwritten: their summaries are exact
        self._audit(self._random.choice(names), int(step.stored[row]), block_table[int(step.requests[row])])

    def _audit(self, name: str, stored: int, blocks: torch.Tensor) -> None:
        layer = self._layers[name]
        page_size = layer.impl.config.page_size
        full_pages = stored // page_size
        first = self._random.randint(0, max(0, full_pages - MAX_PAGES))
        wrong, checked = compare_full_pages(layer, blocks, first, min(full_pages, first + MAX_PAGES))
        metrics = get_worker_metrics()
        metrics.audited("right", checked - len(wrong))
        metrics.audited("wrong", len(wrong))
        if wrong:
            logger.error(
                "quest_vllm: audit of %s: %d of %d page summaries do not match their keys; first: KV head %d, page %d",
                name,
                len(wrong),
                checked,
                *wrong[0],
            )


def compare_full_pages(
    layer: Any, block_table: torch.Tensor, first: int, last: int
) -> tuple[list[tuple[int, int]], int]:
    """Compare the summaries of pages ``first .. last - 1`` of a request, all of them full, with their keys.

    ``block_table`` is the request's row, ``[max_blocks]``. Returns ``(KV head, page)`` of each that is wrong, and how
    many were compared.
    """
    page_size = layer.impl.config.page_size
    views = split_chunks(layer.kv_cache, layer.impl.head_size, page_size)
    per_block = views.summaries.shape[2]
    start = first // per_block
    blocks = block_table[start : -(-last // per_block)].long()
    config = layer.impl.config
    by_page = key_rows(views.keys[blocks], layer).unflatten(2, (-1, page_size))  # [blocks, heads, pages, rows, dim]
    true = summarise_rows(by_page, page_size, config)
    same = (true == stored_summaries(views.summaries, config)[blocks]).all(-1)  # [blocks, heads, pages]
    by_head = same.transpose(0, 1).flatten(1)[:, first - start * per_block : last - start * per_block]
    wrong = [(head, first + page) for head, page in (~by_head).nonzero().tolist()]
    return wrong, by_head.numel()
