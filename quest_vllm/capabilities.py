"""What the backend can serve, said through vLLM's capability methods, and the enlarged KV cache spec.

Shared by the CPU and the CUDA backend. A feature that is refused here stops start-up with its name.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from quest_vllm import compat
from quest_vllm.page_layout import summary_bytes_per_token
from quest_vllm.runtime import active_config


class QuestCapabilities:
    """Mixin in front of a dense vLLM backend."""

    forward_includes_kv_cache_update = False
    supported_kv_cache_dtypes: list[str]

    @staticmethod
    def get_name() -> str:
        """The one name that vLLM keeps for plugins; a name of our own would not unpickle in spawned workers."""
        return "CUSTOM"

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...]:
        """Head-major blocks: each (block, KV head) is one contiguous chunk that ends with its summaries."""
        return (compat.kv_cache_interface().KVCacheLayout.LBHNC,)

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """Decoder self-attention alone: encoders have no decode step to make sparse."""
        return bool(attn_type == compat.attention_backend().AttentionType.DECODER)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Such layers run dense."""
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        """Attention sinks are not in the sparse softmax yet."""
        return False

    @classmethod
    def supports_non_causal(cls) -> bool:
        """Selection assumes causal decode."""
        return False

    @classmethod
    def supports_rswa(cls) -> bool:
        """Its mask is not in the sparse softmax."""
        return False

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """Adaptive verification: rows are sorted into sparse and dense by the host's query lengths."""
        return False

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """Dense rows use stock kernels, which promise nothing here."""
        return False

    @classmethod
    def supports_pcp(cls) -> bool:
        """Prefill context parallelism splits a request's pages over ranks."""
        return False

    @classmethod
    def supports_dcp(cls) -> bool:
        """Decode context parallelism splits a request's pages over ranks."""
        return False

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        """Bidirectional multimodal prefixes are not decode attention."""
        return False

    @classmethod
    def validate_configuration(cls, **features: Any) -> list[str]:
        """vLLM's reasons why a layer with ``features`` cannot be served; those that name no value get it here."""
        reasons: list[str] = super().validate_configuration(**features)  # type: ignore[misc]
        dtype, expected = features.get("kv_cache_dtype"), ", ".join(cls.supported_kv_cache_dtypes)
        told = f"kv_cache_dtype not supported: expected one of {expected}, got {dtype}"
        return [told if reason == "kv_cache_dtype not supported" else reason for reason in reasons]

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Make room for one min and one max row per page and KV head in every block.

        vLLM also calls this with ``block_size=1`` for sizing, so the size goes by the page, not by the block.
        """
        if spec.state_content_bytes is not None:
            return spec
        element_size = spec.dtype.itemsize
        content = (spec.head_size + spec.head_size_v) * element_size
        extra = summary_bytes_per_token(spec.head_size, element_size, active_config().page_size)
        return dataclasses.replace(spec, state_content_bytes=content + extra)
