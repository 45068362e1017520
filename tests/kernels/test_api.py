"""Dispatch: what is asked for by name is used, or refused with a reason."""

from __future__ import annotations

import logging

import pytest

from quest_vllm.ops import api, cpu


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


def test_codes_of_keys_are_refused_by_the_cuda_kernels_and_go_to_triton(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("triton")
    with pytest.raises(api.ImplementationUnavailable, match="cuda: page_summary: expected min_max, got key_codes"):
        api.load_ops("cuda", "cuda", page_summary="key_codes")
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        assert api.load_ops("auto", "cuda", page_summary="key_codes").name == "triton"
    assert (
        "page_summary: expected min_max, got key_codes, which implementation triton has); using triton" in caplog.text
    )
