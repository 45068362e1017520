"""The small model's real tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from quest_vllm.eval.prompts import Codec, load_codec


@pytest.fixture(scope="session")
def codec(model_path: Path) -> Codec:
    return load_codec(str(model_path))
