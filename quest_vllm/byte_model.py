"""What a decode step reads, in bytes, and the speed-up that follows where memory is the limit.

Per KV head, with context L, budget B, page size P and D elements of e bytes a vector: dense 2LDe; Quest (2L/P)De for
the summaries plus 2BDe for the pages; a window no summaries, and two stages about BDe more for keys to choose by. An
upper limit on what kernels can reach, not a forecast. Knows nothing of vLLM.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from quest_vllm.config import TWO_STAGE, WINDOW, QuestConfig
from quest_vllm.layer_shares import layer_pages

GPU_BANDWIDTHS = {
    "A100-40GB": 1555.0,
    "A100-80GB": 2039.0,
    "H100-PCIe": 2000.0,
    "H100": 3350.0,
    "H200": 4800.0,
    "L4": 300.0,
    "L40S": 864.0,
}
"""Memory bandwidth in GB/s (1e9 bytes) by the makers' data sheets; H100 and H200 are the SXM boards."""


@dataclass(frozen=True)
class ModelShape:
    """What the byte counts depend on. Layers are decoder layers with a KV cache, by what they attend to.

    ``layer_windows``: one entry a layer, the sliding window in tokens, 0 for full attention. ``kv_element_size`` is in
    bytes. ``dense_weight_bytes`` are read in every step, ``expert_weight_bytes`` (all layers, all experts) in part:
    each token goes through ``experts_per_token`` of ``num_experts``.
    """

    layer_windows: tuple[int, ...]
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    kv_element_size: int
    dense_weight_bytes: int
    expert_weight_bytes: int = 0
    num_experts: int = 1
    experts_per_token: int = 1

    def weight_bytes(self, batch: int) -> int:
        """Weight bytes that a step of ``batch`` tokens reads; experts by their expected number under even routing."""
        untouched = (1 - self.experts_per_token / self.num_experts) ** batch
        return self.dense_weight_bytes + round(self.expert_weight_bytes * (1 - untouched))


@dataclass(frozen=True)
class Traffic:
    """Bytes of the same work, dense and sparse."""

    dense: int
    sparse: int

    @property
    def speedup(self) -> float:
        """Dense over sparse."""
        return self.dense / self.sparse


@dataclass(frozen=True)
class Estimate:
    """The byte model's answer for ``batch`` requests of ``context`` tokens with ``token_budget``.

    ``vectors``: K+V pairs per request and KV head of a sparse layer. ``layer``: KV bytes of one sparse layer.
    ``step``: KV of every layer plus ``weight_bytes``. The last three need a model; None without.
    """

    context: int
    batch: int
    token_budget: int
    vectors: Traffic
    layer: Traffic | None = None
    step: Traffic | None = None
    weight_bytes: int | None = None


def read_vectors(context: int, token_budget: int, config: QuestConfig, group_size: int = 1) -> Traffic:
    """K+V pairs that one request reads per KV head of a sparse layer; a page summary is as large as one pair.

    ``token_budget`` 0 is dense, and so is one that covers ``context``. ``group_size`` is query heads per KV head: with
    ``group_reduction`` per_query_head each selects pages of its own. With ``layer_shares``: the mean over layers. The
    policy is the server's own.
    """
    num_pages = -(-context // config.page_size)
    page_budget = -(-token_budget // config.page_size)
    if token_budget == 0 or page_budget >= num_pages:
        return Traffic(context, context)
    missing = num_pages * config.page_size - context  # of the newest page, which is always selected
    selections = group_size if config.group_reduction == "per_query_head" else 1
    pages = layer_pages(config, page_budget, num_pages)
    attended = selections * (statistics.fmean(pages) * config.page_size - missing)
    choosing: float = 0 if config.own_policy == WINDOW else num_pages
    if config.own_policy == TWO_STAGE:
        forced = config.sink_pages + config.recent_pages
        listed = statistics.fmean(_pages_listed(own, num_pages, forced) for own in pages)
        choosing += listed * config.page_size / 2  # keys alone
    return Traffic(context, round(choosing + attended))


def _pages_listed(take: int, num_pages: int, forced: int) -> int:
    """:func:`quest_vllm.metadata.pages_listed` of one row."""
    is_open = forced < take < num_pages
    return min(take + (take + 1) // 2, num_pages) - max(take // 2, forced) if is_open else 0


def estimate(
    context: int, batch: int, token_budget: int, config: QuestConfig, shape: ModelShape | None = None
) -> Estimate:
    """Apply the byte model; see :class:`Estimate`."""
    group_size = shape.num_q_heads // shape.num_kv_heads if shape else 1
    vectors = read_vectors(context, token_budget, config, group_size)
    if shape is None:
        return Estimate(context, batch, token_budget, vectors)
    scale = batch * shape.num_kv_heads * 2 * shape.head_dim * shape.kv_element_size
    layer = Traffic(vectors.dense * scale, vectors.sparse * scale)
    weights = shape.weight_bytes(batch)
    dense = sparse = weights
    for index, window in enumerate(shape.layer_windows):
        attended = min(context, window) * scale if window else layer.dense
        dense += attended
        sparse += attended if window or index in config.dense_layers else layer.sparse
    return Estimate(context, batch, token_budget, vectors, layer, Traffic(dense, sparse), weights)
