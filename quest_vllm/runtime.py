"""The configuration in force in this process.

vLLM hands its ``additional_config`` to backends only through the VllmConfig, which the spec hook does not get; the
backend's constructors leave it here.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from quest_vllm.config import QuestConfig, load_config
from quest_vllm.model_settings import find_settings

logger = logging.getLogger("vllm.quest_vllm")
_active: QuestConfig | None = None


def config_of(vllm_config: Any | None) -> QuestConfig:
    """The server defaults of ``vllm_config``: its ``additional_config``, and what was calibrated for its model."""
    additional = getattr(vllm_config, "additional_config", None)
    model = getattr(getattr(vllm_config, "model_config", None), "model", None)
    model = model if isinstance(model, str) else None
    config = load_config(additional if isinstance(additional, dict) else None, model=model)
    if model:
        _report_settings(model)
    return config


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
