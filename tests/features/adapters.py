"""Random LoRA adapters for the small model, in the PEFT folder layout."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

RANK = 4


def write_adapter(folder: Path, model: Path, seed: int) -> Path:
    """Write an adapter of the query, key and value projections of every layer; ``seed`` makes it a different one."""
    config = json.loads((model / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["head_dim"]
    sizes = {
        "q_proj": config["num_attention_heads"] * heads,
        "k_proj": config["num_key_value_heads"] * heads,
        "v_proj": config["num_key_value_heads"] * heads,
    }
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, size in sizes.items():
            key = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, hidden, generator=generator) * hidden**-0.5
            tensors[f"{key}.lora_B.weight"] = torch.randn(size, RANK, generator=generator) * 0.5
    folder.mkdir(parents=True)
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "r": RANK,
                "lora_alpha": RANK,
                "target_modules": sorted(sizes),
                "bias": "none",
                "base_model_name_or_path": str(model),
            }
        )
    )
    return folder
