"""Turns each step's row classes into metrics. Called once a step by the metadata builders, on host data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from quest_vllm.layer_budgets import LayerBudgets
from quest_vllm.metadata import IntArray, RowClasses, measure_traffic, pages_listed
from quest_vllm.metrics import get_worker_metrics
from quest_vllm.tally import get_tally_writer
from quest_vllm.token_rows import StepRows


@dataclass(frozen=True)
class LayerGroup:
    """What the byte counts of a group of sparse layers depend on, on this rank.

    ``num_select_heads`` is how many heads choose pages of their own: KV heads, or query heads. ``budgets``: those of
    each sparse layer, where they differ.
    """

    num_sparse_layers: int
    num_kv_heads: int
    num_select_heads: int
    head_dim: int
    element_size: int
    page_size: int
    counts_rows: bool
    budgets: LayerBudgets | None = None

    @property
    def vector_bytes(self) -> int:
        """Bytes of one token's K and V in one KV head."""
        return 2 * self.head_dim * self.element_size

    def page_budgets(self, rows: RowClasses) -> IntArray:
        """``[num_rows]`` where all layers have the rows' own page budgets; by layer: ``[num_layers, num_rows]``."""
        return self.budgets.rows(rows.page_budgets, rows.num_pages) if self.budgets else rows.page_budgets

    def layer_pages(self, rows: RowClasses) -> IntArray:
        """``[num_layers, num_rows]`` page budgets, whether layers differ or not."""
        return np.broadcast_to(self.page_budgets(rows), (self.num_sparse_layers, len(rows.page_budgets)))


def record_step(group: LayerGroup, rows: RowClasses, step: StepRows, token_budgets: IntArray) -> None:
    """Add one step to this worker's metrics. A row is counted by the first rank alone, bytes by every rank.

    ``token_budgets`` is ``[num_rows]``, as ``rows`` and ``step`` are. What adaptive rows read is not known yet:
    :func:`record_reached` adds it.
    """
    metrics = get_worker_metrics()
    if group.counts_rows:
        for path, reason, count in rows.counts():
            metrics.rows(path, reason, count)
        for budget, count in zip(*np.unique(token_budgets[rows.sparse], return_counts=True), strict=True):
            metrics.budget(int(budget), int(count))
    layers, layer_pages = group.num_sparse_layers, group.layer_pages(rows)
    traffic = measure_traffic(rows, step.seq_lens, group.page_size, step.requests, layer_pages)
    if group.counts_rows and traffic.tokens_available:
        metrics.tokens(traffic.tokens_attended / layers, traffic.tokens_available / layers)
    byte_scale = group.num_kv_heads * group.vector_bytes
    if traffic.pages_available:
        heads = group.num_select_heads
        metrics.pages(traffic.pages_selected * heads, traffic.pages_available * heads)
    if traffic.vectors_dense:
        metrics.kv_bytes(int(traffic.vectors_read * byte_scale), traffic.vectors_dense * byte_scale)


@dataclass(frozen=True)
class AdaptiveRows:
    """The rows of a step that adapt their budget: their places among the sparse rows, and what a layer's count needs.

    All arrays are ``[num_adaptive]`` and on the host. ``tallies``: the number under which usage is kept; 0: none.
    ``keys``: how many keys each read to choose, the mean over the group's layers; 0 but for two-stage rows.
    """

    group: LayerGroup
    rows: npt.NDArray[np.intp]
    seq_lens: IntArray
    num_pages: IntArray
    tallies: IntArray
    keys: npt.NDArray[np.float64]


def adaptive_rows(group: LayerGroup, rows: RowClasses, seq_lens: IntArray, tallies: IntArray) -> AdaptiveRows | None:
    """What :func:`record_reached` needs of a step, from ``[num_reqs]`` arrays; None where no row adapts."""
    if not rows.adaptive.any():
        return None
    chosen = np.flatnonzero(rows.adaptive)
    places = np.flatnonzero(rows.adaptive[rows.sparse])
    lengths, pages = seq_lens[chosen], rows.num_pages[chosen]
    keys, listing = np.zeros(len(chosen)), rows.two_stage[chosen]
    if listing.any():
        by_layer = pages_listed(group.layer_pages(rows)[:, chosen], pages, rows.forced)
        keys = np.where(listing, by_layer.mean(axis=0) * group.page_size, 0.0)
    return AdaptiveRows(group, places, lengths, pages, tallies[chosen], keys)


def record_reached(rows: AdaptiveRows, pages_taken: IntArray) -> None:
    """Add what adaptive rows took, ``[num_layers, num_adaptive, num_select_heads]`` pages, in some layers."""
    group, metrics = rows.group, get_worker_metrics()
    layers, _, heads = pages_taken.shape
    available, lengths = rows.num_pages.astype(np.int64), rows.seq_lens.astype(np.int64)
    # the newest page is always taken, and it alone may be partial
    tokens = pages_taken.astype(np.int64) * group.page_size - (available * group.page_size - lengths)[:, None]
    # of one head, summed over layers
    own_tokens, own_pages = tokens.mean(axis=2).sum(axis=0), pages_taken.mean(axis=2).sum(axis=0)
    byte_scale = group.num_kv_heads * group.vector_bytes
    metrics.pages(int(pages_taken.sum()), int(available.sum()) * heads * layers)
    read = own_tokens.sum() + (available.sum() + rows.keys.sum() / 2) * layers
    metrics.kv_bytes(round(read * byte_scale), int(lengths.sum()) * layers * byte_scale)
    metrics.reached(tokens)
    if group.counts_rows:
        share = layers / group.num_sparse_layers
        metrics.tokens(float(own_tokens.sum()) / group.num_sparse_layers, float(lengths.sum()) * share)
        for row in np.flatnonzero(rows.tallies):
            parts = (own_pages[row] / group.num_sparse_layers, own_tokens[row] / group.num_sparse_layers)
            get_tally_writer().add(int(rows.tallies[row]), share, *parts)


_group_memory: dict[str, tuple[int, int]] = {}


def record_memory(vllm_config: Any, spec: Any, layer_names: list[str]) -> None:
    """Report the KV cache memory of one group of layers: ``spec`` bytes a token, in every block of the cache.

    vLLM's groups of layers share their blocks' memory, so the largest group's is the worker's.
    """
    cache = vllm_config.cache_config
    if not cache.num_gpu_blocks or not layer_names:
        return
    vectors = cache.num_gpu_blocks * cache.block_size * spec.num_kv_heads * len(layer_names)
    kv = (spec.head_size + spec.head_size_v) * spec.dtype.itemsize
    _group_memory[layer_names[0]] = (vectors * kv, vectors * (spec.state_content_size_bytes - kv))
    get_worker_metrics().kv_memory(*max(_group_memory.values()))
