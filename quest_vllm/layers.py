"""Which layers are sparse, and the start-up checks that need the model."""

from __future__ import annotations

import logging
from typing import Any

from quest_vllm import compat
from quest_vllm.accounting import record_memory
from quest_vllm.config import QuestConfig, why_no_codes
from quest_vllm.layer_shares import misplaced_shares
from quest_vllm.plugin import CPU_WORKER
from quest_vllm.runtime import activate, active_config

logger = logging.getLogger("vllm.quest_vllm")


def start_up(vllm_config: Any | None, kv_cache_spec: Any = None, layer_names: list[str] | None = None) -> QuestConfig:
    """Read the configuration; with a spec and layer names, check them and report the cost once.

    Raises :class:`~quest_vllm.compat.UnsupportedVllm` where a block does not hold a whole number of pages, or pages
    cannot have the summary that was asked for.
    """
    config = activate(vllm_config) if vllm_config is not None else active_config()
    if kv_cache_spec is not None and layer_names is not None:
        refuse_engine_features(vllm_config)
        refuse_block_size(kv_cache_spec.block_size, config.page_size)
        refuse_page_summary(config, kv_cache_spec.head_size)
        _report(config, layer_names, kv_cache_spec)
        record_memory(vllm_config, kv_cache_spec, layer_names)
    return config


def refuse_engine_features(vllm_config: Any) -> None:
    """Raise :class:`~quest_vllm.compat.UnsupportedVllm` for an engine in which budgets would not reach every worker."""
    # model runner V2 tells logits processors of new requests on the last pipeline rank alone: the others would not
    # know the budgets. Can go once V2 calls add_request on every rank.
    if vllm_config.parallel_config.pipeline_parallel_size > 1 and vllm_config.use_v2_model_runner:
        raise compat.UnsupportedVllm(
            "quest_vllm does not support pipeline parallelism with model runner V2; use --tensor-parallel-size, or "
            "start without --attention-backend CUSTOM"
        )
    # model runner V1 drops plugins' logits processors when it speculates; our CPU worker puts ours back
    parallel = vllm_config.parallel_config
    if vllm_config.speculative_config is not None and not (
        vllm_config.use_v2_model_runner or parallel.worker_cls == CPU_WORKER
    ):
        raise compat.UnsupportedVllm(
            "quest_vllm does not support speculative decoding with model runner V1 and worker "
            f"{parallel.worker_cls!r}: token budgets would not reach it; leave --worker-cls out and "
            "VLLM_USE_V2_MODEL_RUNNER unset, or start without --attention-backend CUSTOM"
        )
    refuse_connectors(getattr(vllm_config, "kv_transfer_config", None))


def refuse_connectors(transfer: Any) -> None:
    """Raise :class:`~quest_vllm.compat.UnsupportedVllm` for a KV connector that would leave the summaries behind.

    ``transfer`` is vLLM's ``KVTransferConfig``, or None. LMCache 0.5 describes what it stores as keys and values by
    token, ``[2, layers, tokens, heads x head_size]``, not as blocks: pages that it loads would be scored by whatever
    summaries their block held before. Can go once an audit after a load has shown that they travel.
    """
    if transfer is None:
        return
    inner = (transfer.kv_connector_extra_config or {}).get("connectors", ())  # MultiConnector's
    for name in (transfer.kv_connector, *(entry.get("kv_connector") for entry in inner)):
        if name and name.startswith("LMCache"):
            raise compat.UnsupportedVllm(
                f"quest_vllm does not support the KV connector {name}: it stores keys and values by token, and "
                "nothing shows that the page summaries of their blocks travel with them; use a connector that moves "
                "whole blocks, or start without --attention-backend CUSTOM"
            )


def refuse_block_size(block_size: int, page_size: int) -> None:
    """Raise :class:`~quest_vllm.compat.UnsupportedVllm` where a block does not hold a whole number of pages."""
    if block_size % page_size:
        raise compat.UnsupportedVllm(
            f"page_size: a KV block must hold a whole number of pages, got block size {block_size} with page_size "
            f"{page_size}; set page_size to a divisor (16, 32 or 64) or --block-size to a multiple"
        )


def refuse_page_summary(config: QuestConfig, head_dim: int) -> None:
    """Raise :class:`~quest_vllm.compat.UnsupportedVllm` where page_summary is one that this start cannot serve."""
    if config.page_summary == "key_codes" and (why := why_no_codes(config.page_size, head_dim)):
        raise compat.UnsupportedVllm(f"page_summary: {why}; set page_summary to min_max")


def _report(config: QuestConfig, layer_names: list[str], spec: Any) -> None:
    dense = sum(compat.layer_index(name) in config.dense_layers for name in layer_names)
    base = (spec.head_size + spec.head_size_v) * spec.dtype.itemsize
    logger.info(
        "quest_vllm: %d attention layers, %d of them dense by dense_layers; page size %d; default token budget %s; "
        "page summaries add %.2f%% to the KV cache",
        len(layer_names),
        dense,
        config.page_size,
        config.token_budget or "0 (dense)",
        100 * (spec.state_content_size_bytes - base) / base,
    )


def refuse_layer_features(alibi_slopes: Any, sinks: Any) -> None:
    """Raise :class:`~quest_vllm.compat.UnsupportedVllm` for what a layer asks of attention and the kernels lack."""
    for feature, value in (("ALiBi slopes", alibi_slopes), ("attention sinks", sinks)):
        if value is not None:
            raise compat.UnsupportedVllm(
                f"quest_vllm does not support {feature}; start without --attention-backend CUSTOM to serve this model"
            )


def sparse_layers(vllm_config: Any, layers: dict[str, Any], config: QuestConfig) -> dict[str, int]:
    """Index of each of ``layers`` (name to attention module) that ever selects pages; a log line for sliding windows.

    Raises :class:`~quest_vllm.compat.UnsupportedVllm` where layer_shares are not of this model's sparse layers.
    """
    windowed = [compat.layer_index(name) for name, layer in layers.items() if has_window(layer.impl)]
    if windowed:
        logger.info("quest_vllm: %d sliding-window layers stay dense", len(windowed))
    found = {name: compat.layer_index(name) for name in layers if is_sparse_layer(name, layers[name].impl, config)}
    refuse_layer_shares(vllm_config, config, set(found.values()), set(windowed))
    return found


def refuse_layer_shares(vllm_config: Any, config: QuestConfig, sparse: set[int], windowed: set[int]) -> None:
    """Raise :class:`~quest_vllm.compat.UnsupportedVllm` for shares that are not of this rank's layers."""
    if not config.layer_shares:
        return
    method = getattr(vllm_config.speculative_config, "method", None)
    if method not in (None, "ngram", "ngram_gpu", "suffix"):
        raise compat.UnsupportedVllm(
            "layer_shares: expected no draft model beside them, whose layers have no shares, got speculation by "
            f"{method}; set layer_shares to {{}}, or speculate by ngram or suffix"
        )
    num_layers = vllm_config.model_config.get_total_num_hidden_layers()
    if wrong := misplaced_shares(config, sparse, windowed, num_layers):
        raise compat.UnsupportedVllm(f"{wrong}; run quest-vllm calibrate for this model, or set layer_shares to {{}}")


def counts_rows(vllm_config: Any, layer_names: list[str], config: QuestConfig) -> bool:
    """Whether the builder of ``layer_names`` counts rows: of all groups and ranks, that of the first sparse layer.

    A model with sliding windows has several KV cache groups, each with a builder, and more than one may be sparse. A
    first pipeline stage may hold nothing but ``dense_layers``: the next one counts then.
    """
    parallel = vllm_config.parallel_config
    stage, tensor_rank = divmod(parallel.rank, parallel.tensor_parallel_size)
    every = compat.attention_layers(vllm_config, None)
    if tensor_rank != 0 or not every:
        return False
    before = range(min(map(compat.layer_index, every)))
    if stage > 0 and not set(before) <= set(config.dense_layers):
        return False
    first = next((name for name, layer in every.items() if is_sparse_layer(name, layer.impl, config)), None)
    return first in layer_names


def has_window(impl: Any) -> bool:
    """Whether the layer attends to a sliding window; vLLM-CPU writes "none" as -1, FlashAttention as (-1, -1)."""
    window = getattr(impl, "sliding_window", None)
    return window is not None and window not in (-1, (-1, -1))


def is_sparse_layer(layer_name: str, impl: Any, config: QuestConfig) -> bool:
    """Whether the layer ever selects pages: not in ``dense_layers``, and no sliding window."""
    return not has_window(impl) and compat.layer_index(layer_name) not in config.dense_layers
