"""Models of a few layers and heads with random weights. No tokenizer: prompts are token ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VOCABULARY = 512
MAX_MODEL_LEN = 2048

_BASE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": MAX_MODEL_LEN,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
_WINDOWS = ["sliding_attention"] * 3 + ["full_attention"]

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},  # heads of any number, for parallelism
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None},
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        **_EXPERTS,
    },
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "num_hidden_layers": 8,
        "layer_types": _WINDOWS * 2,
        "sliding_window": 128,
        "query_pre_attn_scalar": 32,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    },
    "gemma3_few_windows": {  # three KV cache groups of full attention
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "num_hidden_layers": 8,
        "layer_types": ["sliding_attention", "full_attention", "full_attention", "full_attention"] * 2,
        "sliding_window": 128,
        "query_pre_attn_scalar": 32,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    },
    "gpt_oss": {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 128,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 64,
    },
    "bloom": {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "n_head": 4,
        "n_layer": 2,
    },
}


def write_config(folder: Path, name: str, **changes: Any) -> Path:
    """Write the configuration ``name``, with ``changes``, into a new folder of that name under ``folder``."""
    path = folder / name
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({**_BASE, **CONFIGS[name], **changes}))
    return path


def write_model(folder: Path, name: str, **changes: Any) -> Path:
    """As :func:`write_config`, with random weights, large enough that attention is far from uniform."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    path = write_config(folder, name, initializer_range=0.15, **changes)
    written = (path / "config.json").read_text()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch.bfloat16)
    model.save_pretrained(path)
    (path / "config.json").write_text(written)
    return path
