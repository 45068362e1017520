"""Registration, and what start-up refuses. Real vLLM, no engine."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
import torch

from quest_vllm import compat, plugin, support


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's backend registry, its overrides put back afterwards."""
    module = compat.backend_registry()
    monkeypatch.setattr(module, "_ATTN_OVERRIDES", dict(module._ATTN_OVERRIDES))
    module._ATTN_OVERRIDES.pop(module.AttentionBackendEnum.CUSTOM, None)
    return module


def test_register_claims_custom_and_is_idempotent(registry: Any) -> None:
    plugin.register()
    plugin.register()
    assert registry.AttentionBackendEnum.CUSTOM.get_path() == plugin.CPU_BACKEND


def test_custom_claimed_by_someone_else_is_an_error_that_names_them(registry: Any) -> None:
    registry.register_backend(registry.AttentionBackendEnum.CUSTOM, "other_plugin.Backend")
    with pytest.raises(compat.UnsupportedVllm, match="already claimed by other_plugin.Backend.*VLLM_PLUGINS"):
        plugin.register()


def test_unsupported_vllm_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "vllm_version", lambda: "0.40.1")
    with pytest.raises(compat.UnsupportedVllm, match="0.32 and 0.33, found 0.40.1"):
        plugin.register()


def select(**features: Any) -> str:
    """The backend that our CPU platform chooses for a layer with ``features``."""
    from vllm.v1.attention.selector import AttentionSelectorConfig

    from quest_vllm.platform_cpu import QuestCpuPlatform

    layer = {"head_size": 64, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": 32} | features
    custom = compat.backend_registry().AttentionBackendEnum.CUSTOM
    return QuestCpuPlatform.get_attn_backend_cls(custom, AttentionSelectorConfig(**layer))


def test_custom_is_honoured_on_cpu() -> None:
    assert select() == plugin.CPU_BACKEND
    assert select(has_sliding_window=True) == plugin.CPU_BACKEND


@pytest.mark.parametrize(
    ("features", "name"),
    [
        ({"has_sink": True}, "attention sinks"),
        ({"use_dcp": True}, "DCP"),
        ({"use_pcp": True}, "PCP"),
        ({"attn_type": "encoder_decoder"}, "attention type encoder_decoder"),
        ({"use_non_causal": True}, "non-causal"),
        ({"use_batch_invariant": True}, "batch invariance"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype"),
    ],
)
def test_unsupported_feature_stops_the_start_and_names_the_way_out(features: dict[str, Any], name: str) -> None:
    with pytest.raises(compat.UnsupportedVllm, match=f"{name}.*start without"):
        select(**features)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", ["fp8", "fp8_e4m3", "fp8_e5m2"])
def test_a_quantised_kv_cache_is_refused_with_what_would_do(device: str, dtype: str) -> None:
    reason, *_ = support.refusals(device, {"kv_cache_dtype": dtype})  # FlashAttention adds one of its own
    assert re.fullmatch(rf"kv_cache_dtype not supported: expected one of auto, bfloat16.*, got {dtype}", reason)
    assert support.refusals(device, {"kv_cache_dtype": "bfloat16"}) == []


@pytest.mark.parametrize(
    ("capability", "dtype", "advised"),
    [
        ("AVX2", torch.bfloat16, ["bfloat16 slowly: prefill is several times faster with --dtype float32"]),
        ("AVX2", torch.float16, ["float16 slowly: prefill is several times faster with --dtype float32"]),
        ("AVX2", torch.float32, []),
        ("AVX512", torch.bfloat16, []),
        ("DEFAULT", torch.bfloat16, []),  # Arm
    ],
)
def test_slow_16_bit_floats_are_named_once(
    capability: str, dtype: torch.dtype, advised: list[str], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    from quest_vllm import platform_cpu

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(platform_cpu, "_announced", set())
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.INFO, "vllm.quest_vllm"):
        platform_cpu.advise_dtype(dtype)
        platform_cpu.advise_dtype(dtype)
    assert len(caplog.messages) == len(advised)
    for message, expected in zip(caplog.messages, advised, strict=True):
        assert expected in message


def test_mla_layers_stay_on_vllms_own_backend() -> None:
    assert "quest_vllm" not in select(use_mla=True)
