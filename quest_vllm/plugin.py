"""Entry points that vLLM calls. Importing this module does nothing; calling them twice does nothing more.

vLLM calls :func:`register` in every process (API server, engine core, workers) and :func:`cpu_platform` while it
detects its platform.
"""

from __future__ import annotations

from quest_vllm import compat
from quest_vllm.metrics_files import ensure_metrics_dir

CPU_BACKEND = "quest_vllm.backend_cpu.QuestCpuBackend"
CUDA_BACKEND = "quest_vllm.backend_cuda.QuestCudaBackend"
CPU_PLATFORM = "quest_vllm.platform_cpu.QuestCpuPlatform"
CPU_WORKER = "quest_vllm.worker_cpu.QuestCpuWorker"


def register() -> None:
    """Claim vLLM's CUSTOM attention backend and name the metrics directory (entry point ``vllm.general_plugins``).

    Raises :class:`~quest_vllm.compat.UnsupportedVllm` for an unsupported vLLM version, and where another plugin holds
    CUSTOM already.
    """
    compat.check_vllm_version()
    ensure_metrics_dir()
    registry = compat.backend_registry()
    ours = CPU_BACKEND if compat.is_cpu_platform() else CUDA_BACKEND
    custom = registry.AttentionBackendEnum.CUSTOM
    if custom.is_overridden():
        holder = custom.get_path()
        if holder != ours:
            raise compat.UnsupportedVllm(
                f"attention backend CUSTOM is already claimed by {holder}; vLLM has one such slot: uninstall that "
                "plugin, or leave it out with VLLM_PLUGINS=quest_vllm"
            )
        return
    registry.register_backend(custom, ours)


def cpu_platform() -> str | None:
    """Name our CPU platform where vLLM would run on its own (entry point ``vllm.platform_plugins``).

    vLLM-CPU ignores ``--attention-backend``; ours honours CUSTOM and is the stock platform otherwise. None on a GPU
    build, and where vLLM would choose a special CPU platform of its own.
    """
    return CPU_PLATFORM if compat.stock_cpu_platform() == "vllm.platforms.cpu.CpuPlatform" else None
