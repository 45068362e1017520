"""The byte model against DESIGN's figures and against what the worker's own accounting counts."""

from __future__ import annotations

import numpy as np
import pytest

from quest_vllm.byte_model import ModelShape, estimate, read_vectors
from quest_vllm.config import QuestConfig
from quest_vllm.metadata import classify_rows, measure_traffic

LLAMA_8B = ModelShape(
    layer_windows=(0,) * 32,
    num_q_heads=32,
    num_kv_heads=8,
    head_dim=128,
    kv_element_size=2,
    dense_weight_bytes=15_010_000_000,
)


@pytest.mark.parametrize(
    ("context", "budget", "page_size", "speedup"),
    [
        (32 << 10, 2 << 10, 16, 8.0),
        (128 << 10, 4 << 10, 16, 10.67),
        (128 << 10, 4 << 10, 32, 16.0),
        (1 << 20, 8 << 10, 16, 14.22),
    ],
)
def test_attention_speedups_of_the_design(context: int, budget: int, page_size: int, speedup: float) -> None:
    found = read_vectors(context, budget, QuestConfig(page_size=page_size))
    assert found.speedup == pytest.approx(speedup, abs=0.005)


@pytest.mark.parametrize("policy", ["auto", "window", "two_stage"])
@pytest.mark.parametrize(
    ("context", "budget"), [(4001, 512), (4001, 2048), (64, 48), (4001, 0), (500, 512), (1, 48), (33, 49)]
)
def test_it_equals_what_a_worker_counts(context: int, budget: int, policy: str) -> None:
    config = QuestConfig(policy=policy)
    length, budgets = np.array([context], np.int32), np.array([budget], np.int32)
    rows = classify_rows(np.array([1], np.int32), length, np.array([False]), budgets, config)
    counted = measure_traffic(rows, length, config.page_size)
    assert read_vectors(context, budget, config).sparse == round(counted.vectors_read)
    assert read_vectors(context, budget, config).dense == counted.vectors_dense


def test_query_heads_that_select_alone_read_pages_of_their_own() -> None:
    shared = read_vectors(32768, 2048, QuestConfig(), group_size=4)
    alone = read_vectors(32768, 2048, QuestConfig(group_reduction="per_query_head"), group_size=4)
    assert alone.sparse - shared.sparse == 3 * 2048


def test_layer_bytes_are_those_behind_the_designs_limits() -> None:
    # DESIGN section 4: 8 x 128K at 4K is 120.2 us at 3.35 TB/s
    found = estimate(128 << 10, 8, 4 << 10, QuestConfig(), LLAMA_8B)
    assert found.layer is not None
    assert found.layer.sparse / 3.35e12 * 1e6 == pytest.approx(120.2, abs=0.1)


def test_a_step_adds_weights_and_dense_layers() -> None:
    found = estimate(64 << 10, 4, 2048, QuestConfig(dense_layers=(0, 1)), LLAMA_8B)
    assert found.step is not None and found.layer is not None
    assert found.step.dense == 15_010_000_000 + 32 * found.layer.dense
    assert found.step.sparse == 15_010_000_000 + 2 * found.layer.dense + 30 * found.layer.sparse


def test_windows_are_read_whole_on_either_path() -> None:
    shape = ModelShape((1024, 1024, 1024, 0), 8, 4, 256, 2, dense_weight_bytes=0)
    found = estimate(32768, 1, 2048, QuestConfig(dense_layers=()), shape)
    assert found.step is not None and found.layer is not None
    window = 3 * 1024 * 4 * 2 * 256 * 2
    assert found.step.dense == window + found.layer.dense
    assert found.step.sparse == window + found.layer.sparse


def test_experts_are_read_by_expected_number() -> None:
    shape = ModelShape((0,), 8, 8, 128, 2, 100, expert_weight_bytes=8000, num_experts=8, experts_per_token=2)
    assert shape.weight_bytes(1) == 100 + 2000
    assert shape.weight_bytes(1000) == pytest.approx(8100, abs=1)
