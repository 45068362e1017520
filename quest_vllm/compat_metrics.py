"""vLLM's base class of stat loggers; a class statement needs it at import.

vLLM says that the interface is not stable. Only :mod:`quest_vllm.stat_logger` imports this module, and vLLM imports
that through the entry point group ``vllm.stat_logger_plugins``.
"""

from vllm.v1.metrics.loggers import AggregateStatLoggerBase

__all__ = ["AggregateStatLoggerBase"]
