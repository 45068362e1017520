"""What the API server knows of its model: the stat logger leaves it, replies and ``/v1/sparse_attention`` read it."""

from __future__ import annotations

from typing import Any

from quest_vllm import compat
from quest_vllm.budget import BudgetLimits

_vllm_config: Any = None
_engine_died = False


def set_vllm_config(vllm_config: Any) -> None:
    """Keep the VllmConfig of this API server."""
    global _vllm_config
    _vllm_config = vllm_config


def note_engine_death(died: bool) -> None:
    """When the HTTP server ends: keep whether its engine had died, rather than been stopped."""
    global _engine_died
    _engine_died = died


def engine_died() -> bool:
    """Whether this process's HTTP server ended because its engine had died."""
    return _engine_died


def one_token_a_step() -> bool:
    """Whether every decode step yields one token. Under speculation it may yield several."""
    return getattr(_vllm_config, "speculative_config", None) is None


def steps_follow() -> bool:
    """Whether what a decode step does follows from its length and budget: our backend serves, one token a step."""
    return one_token_a_step() and (_vllm_config is None or compat.serves_custom_backend(_vllm_config))


def describe(limits: BudgetLimits, served: list[str]) -> dict[str, Any]:
    """The body of ``GET /v1/sparse_attention``."""
    config = limits.config
    return {
        "object": "sparse_attention",
        "models": served,
        "token_budget": {
            "default": config.token_budget,
            "min": limits.smallest,
            "max": limits.largest,
            "dense_allowed": config.broken_limit(0) is None,
            "override_allowed": config.allow_override,
        },
        "top_p": {"default": config.top_p},
        "policies": list(config.policies if config.allow_override else config.policies[:1]),
        "aliases": dict(config.aliases),
        "page_size": config.page_size,
        "policy": {
            "sink_pages": config.sink_pages,
            "recent_pages": config.recent_pages,
            "group_reduction": config.group_reduction,
            "page_summary": config.page_summary,
            "layer_shares": dict(config.layer_shares),
        },
        "model": _describe_model(config.dense_layers, config.group_reduction == "per_query_head"),
        "max_body_bytes": config.max_body_bytes,
    }


def _describe_model(dense_layers: tuple[int, ...], per_query_head: bool) -> dict[str, Any] | None:
    """Shape of the model as far as sparse attention goes; None before the engine is up."""
    if _vllm_config is None:
        return None
    model = _vllm_config.model_config
    heads = model.hf_text_config.num_attention_heads
    kv_heads = model.get_total_num_kv_heads()
    layers = _full_attention_layers(model) if compat.serves_custom_backend(_vllm_config) else []
    return {
        "max_model_len": model.max_model_len,
        "layers": model.hf_text_config.num_hidden_layers,
        "sparse_layers": len([layer for layer in layers if layer not in dense_layers]),
        "kv_heads": kv_heads,
        "selecting_heads": heads if per_query_head else kv_heads,
        "speculative_decoding": not one_token_a_step(),
    }


def _full_attention_layers(model: Any) -> list[int]:
    """Indices of the layers without a sliding window; none under MLA."""
    if model.use_mla:
        return []
    layers = range(model.hf_text_config.num_hidden_layers)
    kinds = getattr(model.hf_text_config, "layer_types", None)
    if kinds is not None:
        return [layer for layer in layers if kinds[layer] == "full_attention"]
    return [] if model.get_sliding_window() else list(layers)
