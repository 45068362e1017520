"""Speculative decoding on model runner V1, which drops plugins' logits processors: budgets must arrive all the same."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quest_vllm import layers
from quest_vllm.compat import UnsupportedVllm
from tests.features.conftest import audit, counted_rows, engine, params

pytestmark = pytest.mark.engine

STEPS = 16


@pytest.fixture(scope="module")
def llm(model_path: Path) -> Iterator[Any]:
    """An engine that proposes three tokens by n-gram look-up."""
    speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    with engine(model_path, speculative_config=speculation) as running:
        yield running


def repetitive(words: int) -> str:
    """A prompt whose continuation the n-gram look-up finds often."""
    rng = random.Random(0)
    line = " ".join(rng.choice(("river", "garden", "engine", "letter")) for _ in range(20))
    return (line + ". ") * (words // 20)


@pytest.mark.parametrize(
    ("budget", "single", "absent"),
    [
        (128, "sparse/budget", "dense/no_budget"),
        (0, "dense/no_budget", "sparse/budget"),
        (4096, "dense/budget_covers_context", "dense/no_budget"),
        (None, "dense/budget_covers_context", "dense/no_budget"),
    ],
)
def test_budget_arrives_and_verify_rows_are_counted(llm: Any, budget: int | None, single: str, absent: str) -> None:
    rng = random.Random(1)
    unguessable = {"prompt_token_ids": [rng.randint(1000, 40000) for _ in range(700)]}
    with counted_rows() as rows:
        llm.generate([repetitive(400), unguessable], params(budget, STEPS), use_tqdm=False)
    assert rows[single] > 0, rows
    assert rows["dense/speculative"] > 0, rows  # drafts were verified, densely, and said so
    assert absent not in rows, rows
    assert rows[single] + rows["dense/speculative"] <= 2 * (STEPS - 1)


def test_summaries_are_right_after_rejected_drafts(llm: Any) -> None:
    sampling = [params(budget, 24, seed=budget, temperature=0.7) for budget in (64, 128, 256, 0)]
    llm.generate([repetitive(200 + 40 * i) for i in range(4)], sampling, use_tqdm=False)
    metrics = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    drafted, accepted = (metrics[f"vllm:spec_decode_num_{kind}_tokens"] for kind in ("draft", "accepted"))
    assert drafted > accepted > 0
    audit(llm, 30)


@pytest.mark.parametrize("worker", ["mine.Worker", "auto"])
def test_speculation_without_the_tap_is_refused(worker: str) -> None:
    config = SimpleNamespace(
        use_v2_model_runner=False,
        speculative_config=SimpleNamespace(),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1, worker_cls=worker),
    )
    with pytest.raises(UnsupportedVllm, match=f"speculative decoding.*{worker}.*budgets would not reach it"):
        layers.refuse_engine_features(config)
