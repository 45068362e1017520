"""The API server's half of the plugin: limits for request validation, and the collector of the workers' metrics.

Entry point ``vllm.stat_logger_plugins``. vLLM creates one in each API server, with its VllmConfig, before the first
request comes in: the one place where a plugin gets to see it in that process. It logs nothing, and vLLM's own loggers
and metrics stay as they are.
"""

from __future__ import annotations

import os
from typing import Any

from prometheus_client import REGISTRY

from quest_vllm.budget import set_budget_limits
from quest_vllm.compat_metrics import AggregateStatLoggerBase
from quest_vllm.metrics_files import FilesCollector, is_multiprocess, metrics_dir
from quest_vllm.runtime import activate
from quest_vllm.server import spans
from quest_vllm.server.facts import set_vllm_config

_registered: tuple[int, str] | None = None


class QuestStatLogger(AggregateStatLoggerBase):
    """Sets this API server up; its recording hooks do nothing."""

    def __init__(self, vllm_config: Any, engine_indexes: list[int]) -> None:
        config = activate(vllm_config)
        set_vllm_config(vllm_config)
        set_budget_limits(config, vllm_config.model_config.max_model_len)
        spans.install(vllm_config)
        if not is_multiprocess():
            _register_collector(config.metrics_dir)

    def record(self, *_: Any, **__: Any) -> None:
        """Nothing: vLLM's statistics don't say which request, or which budget, a number belongs to."""

    def log_engine_initialized(self) -> None:
        """Nothing."""


def _register_collector(configured: str | None) -> None:
    """Register one collector of this server's directory in this process, however many engines it makes."""
    global _registered
    directory = metrics_dir(configured)
    if _registered != (os.getpid(), str(directory)):
        REGISTRY.register(FilesCollector(directory))
        _registered = (os.getpid(), str(directory))
