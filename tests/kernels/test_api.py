"""Dispatch: what is asked for by name is used, or refused with a reason."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from quest_vllm.ops import api, cpu, cuda
from quest_vllm.ops.build_tools import KernelsUnavailable


@pytest.fixture(autouse=True)
def forget_choices() -> None:
    """Choices are kept for a process's life; every test makes its own."""
    api.load_ops.cache_clear()


def test_a_named_implementation_is_the_one_returned() -> None:
    for name in ("reference", "torch", "cpu"):
        assert api.load_ops(name, "cpu").name == name


def test_a_named_implementation_never_falls_back() -> None:
    with pytest.raises(api.ImplementationUnavailable, match="'triton' needs tensors on cuda, the model runs on cpu"):
        api.load_ops("triton", "cpu")


def test_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="implementation: expected one of.*got 'fast'"):
        api.load_ops("fast", "cpu")


def test_auto_without_a_compiler_warns_and_takes_plain_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_compiler() -> None:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(cpu, "load", no_compiler)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        assert api.load_ops("auto", "cpu").name == "torch"
    assert "no C++ compiler" in caplog.text
    with pytest.raises(api.ImplementationUnavailable, match="no C\\+\\+ compiler"):
        api.load_ops("cpu", "cpu")


@pytest.mark.parametrize(
    "layer,said",
    [
        ((4, 16, torch.float16), "dtype: expected bfloat16 with page_summary key_codes, got torch.float16"),
        ((4, 32, torch.bfloat16), "page_size: expected 16 with page_summary key_codes, got 32"),
        ((9, 16, torch.bfloat16), "query heads a selection: expected at most 8 with page_summary key_codes, got 9"),
    ],
)
def test_layers_whose_codes_the_cuda_kernels_cannot_read_are_refused(layer: tuple[Any, ...], said: str) -> None:
    cuda.check_page_summary("key_codes", 8, 16, torch.bfloat16)
    cuda.check_page_summary("min_max", *layer)
    with pytest.raises(KernelsUnavailable, match=said):
        cuda.check_page_summary("key_codes", *layer)
