"""LoRA: adapters switched per request while decode is sparse."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.features.adapters import write_adapter
from tests.features.conftest import audit, counted_rows, engine, largest_difference, logprobs, params

pytestmark = pytest.mark.engine

STEPS = 5
NOISE = 0.05  # bf16; the batches that are compared have the same shape
PROMPT = "The river near the garden was quiet today, and the engine in the market was not. " * 8


@pytest.fixture(scope="module")
def llm(model_path: Path) -> Iterator[Any]:
    """An engine that serves two adapters; nothing is cached, so every batch computes everything."""
    with engine(
        model_path,
        enable_lora=True,
        max_loras=2,
        max_lora_rank=8,
        lora_target_modules=["q_proj", "k_proj", "v_proj"],
        enable_prefix_caching=False,
    ) as running:
        yield running


@pytest.fixture(scope="module")
def adapters(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Two different adapters."""
    from vllm.lora.request import LoRARequest

    root = tmp_path_factory.mktemp("adapters")
    folders = [write_adapter(root / str(number), model_path, number) for number in (1, 2)]
    return [LoRARequest(f"adapter-{n}", n, str(folder)) for n, folder in enumerate(folders, start=1)]


def generate(llm: Any, adapters: list[Any], budgets: list[int]) -> list[list[dict[int, float]]]:
    sampling = [params(budget, STEPS, logprobs=5) for budget in budgets]
    outputs = llm.generate([PROMPT] * len(budgets), sampling, lora_request=adapters, use_tqdm=False)
    return [logprobs(output) for output in outputs]


def test_adapters_switched_per_request(llm: Any, adapters: list[Any]) -> None:
    # nobody goes without an adapter in a mixed batch: vLLM-CPU's stock backend, too, gives such a row the last one's
    one, two = adapters
    with counted_rows() as rows:
        first, second, first_again = generate(llm, [one, two, one], [64] * 3)
    assert rows["sparse/budget"] == 3 * (STEPS - 1)
    alike = {adapter: generate(llm, [adapter] * 3, [64] * 3) for adapter in (one, two, None)}
    assert largest_difference(first, alike[one][0]) <= 3 * NOISE
    assert largest_difference(second, alike[two][1]) <= 3 * NOISE
    assert largest_difference(first_again, alike[one][2]) <= 3 * NOISE
    # and the adapters do something, in the first step already
    for answer, other in ((first, second), (first, alike[None][0]), (second, alike[None][1])):
        shared = answer[0].keys() & other[0].keys()
        assert not shared or largest_difference(answer[:1], other[:1]) > 6 * NOISE
    audit(llm, 30)


def test_covering_budget_equals_dense_for_each_adapter(llm: Any, adapters: list[Any]) -> None:
    order = [*adapters, adapters[0]]
    dense = generate(llm, order, [0] * 3)
    covered = generate(llm, order, [2048] * 3)
    for one, other in zip(dense, covered, strict=True):
        assert largest_difference(one, other) <= 2 * NOISE
