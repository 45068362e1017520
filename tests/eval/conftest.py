"""The small model's real tokenizer, and one engine that all engine tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quest_vllm.eval.prompts import Codec, load_codec
from tests.conftest import DTYPE

MAX_MODEL_LEN = 1024


@pytest.fixture(scope="session")
def codec(model_path: Path) -> Codec:
    return load_codec(str(model_path))


@pytest.fixture(scope="package")
def llm(model_path: Path) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        from vllm import LLM

        engine = LLM(
            model=str(model_path),
            attention_backend="CUSTOM",
            dtype=DTYPE,
            logits_processors=["quest_vllm.eval.forcing:ForcedTokens"],
            enforce_eager=True,
            max_model_len=MAX_MODEL_LEN,
            max_num_batched_tokens=512,
            max_num_seqs=4,
            disable_log_stats=False,
            seed=0,
        )
        yield engine
        engine.llm_engine.engine_core.shutdown()
