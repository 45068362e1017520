"""The configuration in force in this process.

vLLM hands its ``additional_config`` to backends only through the VllmConfig, which the spec hook does not get; the
backend's constructors leave it here.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any

from quest_vllm import compat
from quest_vllm.config import AUTO, QuestConfig, load_config
from quest_vllm.model_settings import find_settings
from quest_vllm.ops.cuda_params import HOPPER, MOST_CODED_ROWS

logger = logging.getLogger("vllm.quest_vllm")
_active: QuestConfig | None = None


def config_of(vllm_config: Any | None) -> QuestConfig:
    """The server defaults of ``vllm_config``: its ``additional_config``, and what was calibrated for its model.

    Without "auto": what that means is logged once.
    """
    additional = getattr(vllm_config, "additional_config", None)
    model = getattr(getattr(vllm_config, "model_config", None), "model", None)
    model = model if isinstance(model, str) else None
    config = load_config(additional if isinstance(additional, dict) else None, model=model)
    if model:
        _report_settings(model)
    if config.page_summary != AUTO or not hasattr(getattr(vllm_config, "model_config", None), "get_head_size"):
        return config.resolved()
    why = why_boxes(config, _heads_of(vllm_config), "cpu" if compat.is_cpu_platform() else "cuda")
    _report_summary("min_max" if why else "key_codes", why)
    return config.resolved(why)


@dataclass(frozen=True)
class Heads:
    """What page_summary auto asks of a model: channels of a head, query heads a KV head, "torch.bfloat16" or another.

    The same of every layer.
    """

    head_dim: int
    group: int
    dtype: str


def _heads_of(vllm_config: Any) -> Heads:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    group = model.get_num_attention_heads(parallel) // max(1, model.get_num_kv_heads(parallel))
    return Heads(model.get_head_size(), group, str(model.dtype))


def why_boxes(config: QuestConfig, heads: Heads | None, device: str) -> str | None:
    """What the settings, the model or the ``device`` ("cpu" or "cuda") have against key codes, in words; None: nothing.

    ``heads`` None: no model is known, and nothing is held against it. On a GPU the CUDA kernels score codes in little
    more time than boxes, Triton's in several times as much.
    """
    if (why := config.why_boxes(heads.head_dim if heads else None)) or device == "cpu":
        return why
    generation = compat.gpu_generation()
    found = [
        (config.implementation in ("auto", "cuda"), f"implementation {config.implementation}"),
        (generation == HOPPER, f"compute capability {generation}.x"),
    ]
    if heads:
        found.append((heads.dtype == "torch.bfloat16", heads.dtype))
        found.append((heads.group <= MOST_CODED_ROWS, f"{heads.group} query heads a KV head"))
    return next((f"no CUDA kernels for key codes with {what}" for fits, what in found if not fits), None)


@functools.cache
def _report_summary(chosen: str, why_boxes: str | None) -> None:
    logger.info("quest_vllm: page_summary auto: %s%s", chosen, f" ({why_boxes})" if why_boxes else "")


@functools.cache
def _report_settings(model: str) -> None:
    path, settings = find_settings(model)
    if path:
        logger.info("quest_vllm: settings calibrated for %s: %s, from %s", model, dict(settings), path)


def activate(vllm_config: Any | None) -> QuestConfig:
    """Read the server defaults from ``vllm_config`` (None: files and environment alone) and keep them."""
    global _active
    _active = config_of(vllm_config)
    return _active


def active_config() -> QuestConfig:
    """The configuration left by :func:`activate`, or that of files and environment."""
    return _active if _active is not None else activate(None)
