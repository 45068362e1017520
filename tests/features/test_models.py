"""Model families in tiny shapes with random weights: they start, decode sparsely, and keep their summaries right."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from quest_vllm.compat import UnsupportedVllm
from tests.features.conftest import audit, counted_rows, engine, largest_difference, logprobs, params
from tests.features.tiny_models import MAX_MODEL_LEN, VOCABULARY, write_config, write_model

pytestmark = pytest.mark.engine

TINY = {"skip_tokenizer_init": True, "max_model_len": MAX_MODEL_LEN, "num_gpu_blocks_override": 400}
FIRST_TWO_DENSE = {"additional_config": {"quest": {"dense_layers": [0, 1]}}}  # dense layers beside sparse ones
STEPS = 12


def prompts(*lengths: int) -> list[dict[str, Any]]:
    rng = random.Random(0)
    return [{"prompt_token_ids": [rng.randint(3, VOCABULARY - 1) for _ in range(length)]} for length in lengths]


def sampling(budget: int) -> Any:
    return params(budget, STEPS, detokenize=False, logprobs=5)


@pytest.mark.parametrize(
    ("name", "layers", "sparse_layers"),
    [
        ("qwen2", 4, 2),
        ("qwen3", 4, 2),  # QK-norm
        ("mistral", 4, 2),
        ("mixtral", 4, 2),
        ("qwen3_moe", 4, 2),
        ("gemma3", 2, 2),  # six of its eight layers have a window: dense, without summaries
        ("gemma3_few_windows", 6, 5),
    ],
)
def test_family(tmp_path: Path, name: str, layers: int, sparse_layers: int) -> None:
    model = write_model(tmp_path, name)
    long, short = prompts(900, 300)
    with engine(model, **TINY, **FIRST_TWO_DENSE) as llm:
        with counted_rows() as rows:
            outputs = llm.generate(
                [long, long, long, short],
                [sampling(0), sampling(0), sampling(896), sampling(128)],
                use_tqdm=False,
            )
        dense, again, nearly_all, _ = map(logprobs, outputs)
        narrow = logprobs(llm.generate([long], [sampling(64)], use_tqdm=False)[0])
        audit(llm, layers)
        builder = llm.llm_engine.model_executor.driver_worker.worker.model_runner.attn_groups
        sparse = sum(group[0].get_metadata_builder().group.num_sparse_layers for group in builder)
    assert sparse == sparse_layers
    assert rows["sparse/budget"] == 2 * (STEPS - 1)
    assert rows["dense/no_budget"] == 2 * (STEPS - 1)
    # the first token comes out of prefill, so the second step is the first that pages were chosen for: without its
    # least page the answer hardly moves, with 4 of 57 it must
    second = slice(1, 2)
    noise = largest_difference(dense[second], again[second])
    nearly = largest_difference(dense[second], nearly_all[second])
    assert nearly <= 3 * max(noise, 0.05)
    assert largest_difference(dense[second], narrow[second]) > 2 * nearly


@pytest.mark.parametrize(("name", "reason"), [("gpt_oss", "attention sinks"), ("bloom", "ALiBi")])
def test_refused_family(tmp_path: Path, name: str, reason: str) -> None:
    model = write_config(tmp_path, name)
    with (
        pytest.raises(UnsupportedVllm, match=f"{reason}.*start without"),
        engine(model, load_format="dummy", **TINY),
    ):
        pass
