"""The configuration in force in this process.

vLLM hands its ``additional_config`` to backends only through the VllmConfig, which the spec hook does not get; the
backend's constructors leave it here.
"""

from __future__ import annotations

import functools
import logging
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
    why_boxes = _why_boxes(vllm_config, config)
    _report_summary("min_max" if why_boxes else "key_codes", why_boxes)
    return config.resolved(why_boxes)


def _why_boxes(vllm_config: Any, config: QuestConfig) -> str | None:
    """What the model or the device has against key codes, in words; None: nothing.

    On a GPU the CUDA kernels score codes in little more time than boxes, Triton's in several times as much.
    """
    model = vllm_config.model_config
    if (why := config.why_boxes(model.get_head_size())) or compat.is_cpu_platform():
        return why
    parallel = vllm_config.parallel_config
    heads = model.get_num_attention_heads(parallel) // max(1, model.get_num_kv_heads(parallel))
    generation = compat.gpu_generation()
    found = (
        (config.implementation in ("auto", "cuda"), f"implementation {config.implementation}"),
        (generation == HOPPER, f"compute capability {generation}.x"),
        (str(model.dtype) == "torch.bfloat16", f"{model.dtype}"),
        (heads <= MOST_CODED_ROWS, f"{heads} query heads a KV head"),
    )
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
