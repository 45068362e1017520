"""The configuration in force in this process.

vLLM hands its ``additional_config`` to backends only through the VllmConfig, which the spec hook does not get; the
backend's constructors leave it here.
"""

from __future__ import annotations

from typing import Any

from quest_vllm.config import QuestConfig, load_config

_active: QuestConfig | None = None


def activate(vllm_config: Any | None) -> QuestConfig:
    """Read the server defaults from ``vllm_config`` (None: files and environment alone) and keep them."""
    global _active
    additional = getattr(vllm_config, "additional_config", None) if vllm_config is not None else None
    _active = load_config(additional if isinstance(additional, dict) else None)
    return _active


def active_config() -> QuestConfig:
    """The configuration left by :func:`activate`, or that of files and environment."""
    return _active if _active is not None else activate(None)
