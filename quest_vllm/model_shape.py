"""Reads a model's configuration for ``quest-vllm check``: the byte model's shape, and what its layers ask of attention.

By transformers and without loading weights: sizes come from the safetensors headers of a local folder, or else from the
model built on the meta device. Knows nothing of vLLM.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quest_vllm.byte_model import ModelShape
from quest_vllm.errors import QuestConfigError

_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")


def read_config(model: str) -> Any:
    """The text part of the transformers configuration of ``model`` (a folder or a Hub name).

    Raises :class:`QuestConfigError` where there is none that transformers knows.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        raise QuestConfigError(
            f"--model: expected a folder or Hub name with a config.json that transformers knows, got {model!r}: {error}"
        ) from error
    return config if config.is_encoder_decoder else config.get_text_config(decoder=True)


def head_dim(config: Any) -> int:
    """Elements of one head's key."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def layer_windows(config: Any) -> tuple[int, ...]:
    """One entry per layer with a KV cache: its sliding window in tokens, 0 for full attention."""
    window = int(getattr(config, "sliding_window", None) or 0)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        used = window if getattr(config, "use_sliding_window", True) else 0
        return (used,) * config.num_hidden_layers
    windows = {"full_attention": 0, "sliding_attention": window}
    return tuple(windows[kind] for kind in kinds if kind in windows)


def attention_features(config: Any) -> dict[str, Any]:
    """What the model asks of an attention backend, by the field names of vLLM's AttentionSelectorConfig.

    Beyond those: ``alibi`` True where positions enter as a bias on the scores.
    """
    features: dict[str, Any] = {"head_size": head_dim(config)}
    if any(layer_windows(config)):
        features["has_sliding_window"] = True
    if config.is_encoder_decoder:
        features["attn_type"] = "encoder_decoder"
    if config.model_type == "gpt_oss":
        features["has_sink"] = True
    if getattr(config, "kv_lora_rank", None):
        features["use_mla"] = True
    if config.model_type in ("bloom", "mpt") or getattr(config, "alibi", False):
        features["alibi"] = True
    return features


def read_shape(model: str, config: Any) -> ModelShape:
    """The byte model's shape of ``model``. Raises :class:`QuestConfigError` where its weights can't be sized."""
    sizes = list(_stored_sizes(Path(model)) if Path(model).is_dir() else ()) or list(_meta_sizes(config))
    experts = sum(size for name, size in sizes if ".experts." in name)
    # one row of the input embedding is read per token; tied, the same matrix is read whole as the output head
    embedding = sum(size for name, size in sizes if name.endswith(("embed_tokens.weight", "wte.weight")))
    untied = any(name.endswith("lm_head.weight") for name, _ in sizes) and not config.tie_word_embeddings
    dense = sum(size for _, size in sizes) - experts - (embedding if untied else 0)
    num_experts = next((n for key in _EXPERT_COUNTS if (n := getattr(config, key, None))), 1)
    return ModelShape(
        layer_windows=layer_windows(config),
        num_q_heads=config.num_attention_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=head_dim(config),
        kv_element_size=served_dtype(config).itemsize,
        dense_weight_bytes=dense,
        expert_weight_bytes=experts,
        num_experts=num_experts,
        experts_per_token=min(getattr(config, "num_experts_per_tok", None) or 1, num_experts),
    )


def served_dtype(config: Any) -> Any:
    """The ``torch.dtype`` that vLLM serves the model in, unless told otherwise."""
    import torch

    dtype = getattr(config, "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    # vLLM serves float32 checkpoints in bfloat16 too, unless told otherwise
    return torch.bfloat16 if dtype in (None, torch.float32) else dtype


def _stored_sizes(folder: Path) -> Iterator[tuple[str, int]]:
    """``(tensor name, bytes)`` from the headers of the folder's safetensors files."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                yield name, end - start


def _meta_sizes(config: Any) -> Iterator[tuple[str, int]]:
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, ImportError) as error:
        raise QuestConfigError(
            f"--model: cannot size the weights of a {config.model_type!r} model from its configuration alone: {error}; "
            "give a folder with its safetensors files"
        ) from error
    itemsize = served_dtype(config).itemsize
    for name, parameter in model.named_parameters():
        yield name, math.prod(parameter.shape) * itemsize
