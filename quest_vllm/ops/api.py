"""Chooses which implementation of the four operations runs. The only place where that is decided.

An implementation asked for by name never falls back: it works or it raises. Only "auto" looks for the best one, and
it says so when that is not the fastest kind.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from quest_vllm.config import IMPLEMENTATIONS
from quest_vllm.errors import QuestError
from quest_vllm.ops import packed, reference, torch_ops

logger = logging.getLogger("vllm.quest_vllm")


class ImplementationUnavailable(QuestError):
    """The implementation that was asked for by name cannot run here; the message says why."""


@dataclass(frozen=True)
class Ops:
    """The four operations of one implementation, with the signatures of :mod:`quest_vllm.ops.reference`."""

    name: str
    update_page_summaries: Callable[..., None]
    score_pages: Callable[..., torch.Tensor]
    select_pages: Callable[..., torch.Tensor]
    sparse_paged_attention: Callable[..., torch.Tensor]


def _from_module(name: str, module: Any) -> Ops:
    return Ops(
        name, module.update_page_summaries, module.score_pages, module.select_pages, module.sparse_paged_attention
    )


def _eager(name: str, module: Any, kv_format: str) -> Ops:
    """Wrap the reference or the plain PyTorch path; a packed cache needs the unpacking adapter."""
    ops = _from_module(name, module)
    if kv_format == "rows":
        return ops
    from quest_vllm.ops.cpu import unpack_keys, unpack_values

    return Ops(
        name,
        functools.partial(packed.update_page_summaries, ops.update_page_summaries, unpack_keys, kv_format),
        ops.score_pages,
        ops.select_pages,
        functools.partial(
            packed.sparse_paged_attention, ops.sparse_paged_attention, unpack_keys, unpack_values, kv_format
        ),
    )


def _cpu(kv_format: str) -> Ops:
    from quest_vllm.ops import cpu

    cpu.load()
    return Ops(
        "cpu",
        functools.partial(cpu.update_page_summaries, kv_format=kv_format),
        cpu.score_pages,
        cpu.select_pages,
        functools.partial(cpu.sparse_paged_attention, kv_format=kv_format),
    )


def _triton() -> Ops:
    return _from_module("triton", importlib.import_module("quest_vllm.ops.triton"))


def _auto(device_type: str, kv_format: str) -> Ops:
    if device_type == "cuda":
        return load_ops("triton", device_type)
    try:
        return load_ops("cpu", device_type, kv_format)
    except ImplementationUnavailable as error:
        logger.warning("quest_vllm: no C++ kernels (%s); using the plain PyTorch path, which is slow", error)
        return load_ops("torch", device_type, kv_format)


@functools.cache  # one build attempt, and one warning, for all layers
def load_ops(implementation: str, device_type: str, kv_format: str = "rows") -> Ops:
    """Return the operations of ``implementation`` for tensors on ``device_type`` ("cpu" or "cuda").

    ``kv_format`` is how keys and values lie inside a block: "rows" everywhere but on vLLM-CPU. Raises
    :class:`ImplementationUnavailable` when a named implementation cannot run here, ``ValueError`` for an unknown name.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: expected one of {IMPLEMENTATIONS}, got {implementation!r}")
    if implementation == "auto":
        return _auto(device_type, kv_format)
    if implementation == "reference":
        return _eager("reference", reference, kv_format)
    if implementation == "torch":
        return _eager("torch", torch_ops, kv_format)
    required = "cpu" if implementation == "cpu" else "cuda"
    if device_type != required:
        raise ImplementationUnavailable(
            f"implementation {implementation!r} needs tensors on {required}, the model runs on {device_type}"
        )
    try:
        return _cpu(kv_format) if implementation == "cpu" else _triton()
    except (ImportError, OSError, RuntimeError) as error:
        raise ImplementationUnavailable(f"{implementation}: {error}") from error
