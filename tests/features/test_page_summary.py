"""Key codes served by a real engine: kept up to date through prefill, decode and reused prefixes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quest_vllm.runtime import active_config
from tests.features.conftest import audit, counted_rows, engine, params

pytestmark = pytest.mark.engine


def test_codes_follow_the_keys(model_path: Path) -> None:
    shared = list(range(1000, 1700))
    prompts: Any = [{"prompt_token_ids": shared + list(range(start, start + 37))} for start in (2000, 3000, 4000)]
    settings = {"quest": {"audit_steps": 1}}
    with engine(model_path, additional_config=settings) as llm, counted_rows() as rows:
        chosen = active_config()  # by "auto": pages of 16 tokens, a head_dim of 64
        assert (chosen.page_summary, chosen.group_reduction) == ("key_codes", "mass")
        first = llm.generate(prompts, params(128, 20), use_tqdm=False)
        again = llm.generate(prompts, params(128, 20), use_tqdm=False)  # from cached prefixes
        audit(llm, 30)
    assert rows["sparse/budget"] == 2 * 3 * 19
    assert [o.outputs[0].token_ids for o in first] == [o.outputs[0].token_ids for o in again]
