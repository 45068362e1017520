"""What the whole-model benchmarks share: model shapes, what they say of a machine, and ratios between backends."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import Any

from provenance import commit

LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 140000,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
POLICY = ("page_summary", "group_reduction", "bound_radius", "dense_layers")
LLAMA_70B = LLAMA_8B | {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}


def write_config(folder: str | Path, shape: dict[str, Any], layers: int) -> None:
    """A model folder for ``load_format="dummy"``."""
    (Path(folder) / "config.json").write_text(json.dumps(shape | {"num_hidden_layers": layers}))


def versions() -> dict[str, str]:
    """Versions, command and commit of this run."""
    import torch
    import vllm

    return {
        "torch": torch.__version__,
        "vllm": vllm.__version__,
        "python": platform.python_version(),
        "command": " ".join(sys.argv),
        "commit": commit(),
    }


def describe(gpu: str, implementation: str) -> dict[str, Any]:
    """``gpu``, ``implementation`` of the kernels, policy, versions and command of this run."""
    from quest_vllm.config import load_config
    from quest_vllm.runtime import Heads, why_boxes

    config = load_config(None)
    group = LLAMA_70B["num_attention_heads"] // LLAMA_70B["num_key_value_heads"]  # no less than the 8B's
    config = config.resolved(why_boxes(config, Heads(LLAMA_8B["head_dim"], group, "torch.bfloat16"), "cuda"))
    return {
        "implementation": implementation,
        "policy": {name: getattr(config, name) for name in POLICY},
        "gpu": gpu,
        **versions(),
    }


def add_ratios(records: list[dict[str, Any]], keys: tuple[str, ...] = ("context", "batch")) -> None:
    """Give this plugin's records ``speedup`` and ``time_to_first_token_ratio`` over FLASH_ATTN's of equal ``keys``."""
    stock = {tuple(r[key] for key in keys): r for r in records if r["backend"] != "CUSTOM"}
    for record in records:
        base = stock.get(tuple(record[key] for key in keys))
        if record["backend"] == "CUSTOM" and base:
            record["speedup"] = base["time_per_output_token"] / record["time_per_output_token"]
            record["time_to_first_token_ratio"] = base["time_to_first_token"] / record["time_to_first_token"]
