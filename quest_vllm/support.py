"""What is supported, what stays dense and what is refused, asked of the very code that refuses at start-up.

Nothing here holds an opinion of its own: :func:`probe` hands features to ``validate_configuration`` (through
:mod:`quest_vllm.capabilities`) and to the checks of :mod:`quest_vllm.layers`, and keeps what they say.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

from quest_vllm import compat, layers
from quest_vllm.config import PAGE_SIZES
from quest_vllm.plugin import CPU_BACKEND, CPU_WORKER, CUDA_BACKEND

HOPPER = (9, 0)
SELECTOR_FEATURES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("bfloat16", {"dtype": "bfloat16"}),
    ("float16", {"dtype": "float16"}),
    ("float32", {"dtype": "float32"}),
    *((f"head size {size}", {"head_size": size}) for size in (64, 80, 96, 128, 256)),
    ("FP8 KV cache (e4m3)", {"kv_cache_dtype": "fp8_e4m3"}),
    ("FP8 KV cache (e5m2)", {"kv_cache_dtype": "fp8_e5m2"}),
    ("sliding-window layers", {"has_sliding_window": True}),
    ("R-SWA layers", {"use_rswa": True}),
    ("MLA layers", {"use_mla": True}),
    ("attention sinks", {"has_sink": True}),
    ("encoder-decoder attention", {"attn_type": "encoder_decoder"}),
    ("encoder-only attention", {"attn_type": "encoder_only"}),
    ("bidirectional multimodal prefixes", {"use_mm_prefix": True}),
    ("non-causal decode", {"use_non_causal": True}),
    ("per-head quantisation scales", {"use_per_head_quant_scales": True}),
    ("KV connectors", {"use_kv_connector": True}),
    ("decode context parallelism", {"use_dcp": True}),
    ("prefill context parallelism", {"use_pcp": True}),
    ("batch invariance", {"use_batch_invariant": True}),
    ("adaptive verification", {"use_adaptive_verification": True}),
)


@dataclass(frozen=True)
class Finding:
    """One feature on one device. ``reason`` is empty where it is supported, else the words of the refusal."""

    feature: str
    supported: bool
    reason: str = ""


def backend_class(device: str) -> Any:
    """Our backend for ``device``, "cpu" or "cuda"; importing the other device's one works as well."""
    module, _, name = (CPU_BACKEND if device == "cpu" else CUDA_BACKEND).rpartition(".")
    return getattr(importlib.import_module(module), name)


def refusals(device: str, features: Mapping[str, Any]) -> list[str]:
    """What the backend for ``device`` refuses of a layer with ``features``, fields of vLLM's selector config.

    A GPU's compute capability is this machine's, or 9.0 where there is no GPU.
    """
    import torch

    layer: dict[str, Any] = {
        "head_size": 128,
        "dtype": "bfloat16",
        "kv_cache_dtype": "auto",
        "block_size": None,
        **features,
    }
    layer["dtype"] = getattr(torch, layer["dtype"])
    capability = None
    if device == "cuda":
        found = torch.cuda.get_device_capability() if torch.cuda.is_available() else HOPPER
        capability = compat.device_capability(*found)
    return compat.validate_attention(backend_class(device), layer, capability)


def model_refusals(device: str, features: Mapping[str, Any]) -> list[str]:
    """As :func:`refusals`, for a whole model's features, "alibi" among them."""
    selector = {name: value for name, value in features.items() if name != "alibi"}
    reasons = refusals(device, selector) if not _stays_stock(device, selector) else []
    if features.get("alibi"):
        reasons.append(_tried("ALiBi", partial(layers.refuse_layer_features, [0.5], None)).reason)
    return reasons


def _stays_stock(device: str, features: Mapping[str, Any]) -> bool:
    """Our CPU platform leaves MLA layers to vLLM's own backend; the CUDA platform refuses them."""
    return device == "cpu" and bool(features.get("use_mla"))


def probe(device: str) -> Iterator[Finding]:
    """Every feature that start-up can refuse on ``device``, with the answer it gives."""
    for name, features in SELECTOR_FEATURES:
        if _stays_stock(device, features):
            yield Finding(name, True, "stay dense on vLLM's own backend")
            continue
        reasons = refusals(device, features)
        note = "run dense" if features.get("has_sliding_window") else ""
        yield Finding(name, not reasons, "; ".join(reasons) or note)
    for name, check in _start_up_checks(device):
        yield _tried(name, check)


def _start_up_checks(device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """``(feature, the start-up check that knows)`` for what depends on more than one layer's features."""
    runners = (("V1", False),) if device == "cpu" else (("V2", True), ("V1", False))
    yield "ALiBi", partial(layers.refuse_layer_features, [0.5], None)
    for runner, is_v2 in runners:
        engine = _engine(is_v2, pipeline_parallel_size=2)
        yield f"pipeline parallelism, model runner {runner}", partial(layers.refuse_engine_features, engine)
        worker = CPU_WORKER if device == "cpu" else "auto"
        engine = _engine(is_v2, speculates=True, worker_cls=worker)
        yield f"speculative decoding, model runner {runner}", partial(layers.refuse_engine_features, engine)
    lmcache = SimpleNamespace(kv_connector="LMCacheConnectorV1", kv_connector_extra_config={})
    yield "LMCache", partial(layers.refuse_connectors, lmcache)
    if device == "cpu":
        from quest_vllm.platform_cpu import refuse_eager_pipeline

        engine = _engine(False, pipeline_parallel_size=2, worker_cls=CPU_WORKER)
        yield "pipeline parallelism with --enforce-eager", partial(refuse_eager_pipeline, engine)
    block = 32 if device == "cpu" else 16
    for size in PAGE_SIZES:
        yield f"page size {size} with blocks of {block} tokens", partial(layers.refuse_block_size, block, size)


def _engine(v2: bool, speculates: bool = False, pipeline_parallel_size: int = 1, worker_cls: str = "auto") -> Any:
    """As much of a VllmConfig as the engine checks read."""
    return SimpleNamespace(
        use_v2_model_runner=v2,
        speculative_config=SimpleNamespace() if speculates else None,
        compilation_config=SimpleNamespace(mode=compat.no_compilation()),
        parallel_config=SimpleNamespace(pipeline_parallel_size=pipeline_parallel_size, worker_cls=worker_cls),
    )


def _tried(feature: str, check: Callable[[], object]) -> Finding:
    try:
        check()
    except compat.UnsupportedVllm as error:
        return Finding(feature, False, str(error))
    return Finding(feature, True)
