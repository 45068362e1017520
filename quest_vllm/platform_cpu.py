"""vLLM's CPU platform, except that it honours ``--attention-backend CUSTOM``, with speculative decoding too."""

from __future__ import annotations

import logging
from typing import Any

import torch

from quest_vllm import compat
from quest_vllm.plugin import CPU_BACKEND, CPU_WORKER

STOCK_WORKER = "vllm.v1.worker.cpu_worker.CPUWorker"

logger = logging.getLogger("vllm.quest_vllm")
_announced: set[str] = set()


def announce_once(message: str) -> None:
    """Log ``message`` at INFO, once in this process."""
    if message not in _announced:
        _announced.add(message)
        logger.info("quest_vllm: %s", message)


def refuse_eager_pipeline(vllm_config: Any) -> None:
    """Raise :class:`~quest_vllm.compat.UnsupportedVllm` for pipeline stages without torch.compile in a foreign worker.

    Ours makes the buffers that vLLM-CPU leaves out then (:mod:`quest_vllm.worker_cpu`).
    """
    parallel, eager = vllm_config.parallel_config, vllm_config.compilation_config.mode == compat.no_compilation()
    if eager and parallel.pipeline_parallel_size > 1 and parallel.worker_cls != CPU_WORKER:
        raise compat.UnsupportedVllm(
            f"worker_cls: pipeline parallelism without torch.compile (--enforce-eager, LoRA) needs {CPU_WORKER}, got "
            f"{parallel.worker_cls}; leave --worker-cls out, or use --tensor-parallel-size"
        )


def advise_dtype(dtype: torch.dtype) -> None:
    """Say that ``dtype`` is slow here: oneDNN multiplies 16-bit floats on x86 with AVX-512 alone.

    SmolLM2 on AVX2 prefills three (4000 tokens) to six times (512) faster in float32.
    """
    if dtype.itemsize < 4 and torch.backends.cpu.get_cpu_capability() == "AVX2":
        announce_once(
            f"this processor has no AVX-512 and multiplies {str(dtype).removeprefix('torch.')} slowly: prefill is "
            "several times faster with --dtype float32, in twice the memory"
        )


class QuestCpuPlatform(compat.cpu_platform_module().CpuPlatform):  # type: ignore[misc]
    """The stock CPU platform plus one choice of backend, and the worker that goes with it."""

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        """As the stock platform; with CUSTOM, the worker that keeps seeds, and budgets under speculative decoding.

        A ``--worker-cls`` of the user's stays; under speculative decoding
        :func:`quest_vllm.layers.refuse_engine_features` then stops the start.
        """
        super().check_and_update_config(vllm_config)
        backend = vllm_config.attention_config.backend
        if backend is None or backend.name != "CUSTOM":
            return
        advise_dtype(vllm_config.model_config.dtype)
        parallel = vllm_config.parallel_config
        if parallel.worker_cls == STOCK_WORKER:
            parallel.worker_cls = CPU_WORKER
        refuse_eager_pipeline(vllm_config)

    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        """Return our backend for CUSTOM, the stock choice for anything else and for MLA layers.

        Raises :class:`~quest_vllm.compat.UnsupportedVllm` naming every feature that our backend does not support.
        """
        if selected_backend is None or selected_backend.name != "CUSTOM":
            return super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)
        if attn_selector_config.use_mla:
            announce_once("MLA layers stay dense on vLLM's own backend")
            return super().get_attn_backend_cls(None, attn_selector_config, num_heads)
        from quest_vllm.backend_cpu import QuestCpuBackend

        reasons = QuestCpuBackend.validate_configuration(device_capability=None, **attn_selector_config._asdict())
        if reasons:
            raise compat.UnsupportedVllm(
                f"quest_vllm cannot serve this model: {'; '.join(reasons)}. Switch the feature off, or start without "
                "--attention-backend CUSTOM to serve it densely"
            )
        return CPU_BACKEND
