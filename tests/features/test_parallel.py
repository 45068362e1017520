"""Tensor and pipeline parallelism with real worker processes on the CPU. One engine a layout, shared by the tests."""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from quest_vllm.audit import audit_summaries
from quest_vllm.audit_ranks import RankSelections, by_head, disagreements, record_selections, recorded_selections
from tests.features.conftest import counted_rows, engine, largest_difference, logprobs, params, samples
from tests.features.tiny_models import MAX_MODEL_LEN, VOCABULARY, write_model

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]  # the first test with a layout starts its processes

STEPS, PAGE = 5, 16
LENGTHS, BUDGETS = (700, 333), (128, 64)
PAGES_OF_A_HEAD = (STEPS - 1) * sum(BUDGETS) // PAGE  # in one layer
KV_HEADS, SPARSE_LAYERS = 2, 3
TWO_RANKS = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
# each stage has a sparse layer: 1, and 2 with 3
FOUR_RANKS = {**TWO_RANKS, "pipeline_parallel_size": 2}
# as many pages in all as if the layers were alike
LATER_LAYERS = {"additional_config": {"quest": {"dense_layers": [0], "layer_shares": {1: 1, 2: 3, 3: 2}}}}
# each rank holds the one KV head and one of its two query heads, and chooses for that one alone
FINER = {"additional_config": {"quest": {"group_reduction": "per_query_head"}}}
ONE_KV_HEAD = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}


@pytest.fixture(scope="module", autouse=True)
def _processes() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        # vLLM-CPU binds each worker to a NUMA node of its own unless told otherwise
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("OMP_NUM_THREADS", "1")
        # functions travel to the workers, and what they return from them, as pickles
        patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
        yield


@dataclass
class Run:
    """What one engine answered and did. ``pages``: what `/metrics` counted as selected."""

    logprobs: list[list[dict[int, float]]]
    rows: dict[str, int]
    pages: float
    ranks: list[RankSelections]


def run(model: Path, **settings: Any) -> Run:
    """Two requests, budgets 128 and 64, in float32: ranks sum in another order, which bfloat16 would show."""
    rng = random.Random(0)
    prompts: list[Any] = [{"prompt_token_ids": [rng.randint(3, VOCABULARY - 1) for _ in range(n)]} for n in LENGTHS]
    sampling = [params(budget, STEPS, detokenize=False, logprobs=5) for budget in BUDGETS]
    tiny = {"skip_tokenizer_init": True, "max_model_len": MAX_MODEL_LEN, "num_gpu_blocks_override": 200}
    with engine(model, dtype="float32", max_num_batched_tokens=2048, **tiny, **settings) as llm:
        llm.collective_rpc(record_selections)
        before = sum(samples("quest_pages_selected_total").values())
        with counted_rows() as rows:
            outputs = llm.generate(prompts, sampling, use_tqdm=False)
        pages = sum(samples("quest_pages_selected_total").values()) - before
        reports = llm.collective_rpc(audit_summaries)
        ranks = llm.collective_rpc(recorded_selections)
    for report in reports:
        assert report.pages_checked > 0 and not report.errors, report.errors[:3]
    return Run([logprobs(output) for output in outputs], rows, pages, ranks)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """``run`` of a layout, once: ``runs("llama")`` is one rank, ``runs("llama", 4)`` four."""
    folder = tmp_path_factory.mktemp("models")
    llama = write_model(folder, "llama")  # 4 query and 2 KV heads: one KV head a rank
    one_kv_head = write_model(folder / "one", "llama", **ONE_KV_HEAD)

    @functools.cache
    def find(model: str, ranks: int = 1) -> Run:
        layout = {1: {}, 2: TWO_RANKS, 4: FOUR_RANKS}[ranks]
        return run(llama, **LATER_LAYERS, **layout) if model == "llama" else run(one_kv_head, **FINER, **layout)

    return find


def assert_same(one: Run, two: Run) -> None:
    expected = {"sparse/budget": len(LENGTHS) * (STEPS - 1), "dense/prefill": len(LENGTHS)}
    assert one.rows == expected
    assert two.rows == expected  # rows are counted once, not by every rank
    for first, second in zip(one.logprobs, two.logprobs, strict=True):
        assert largest_difference(first, second) < 1e-3
        assert [max(s, key=s.__getitem__) for s in first] == [max(s, key=s.__getitem__) for s in second]
    assert by_head(one.ranks) and by_head(two.ranks) == by_head(one.ranks)
    # pages are counted by the rank that selects them
    assert two.pages == one.pages == sum(rank.num_pages for rank in two.ranks)


def test_one_rank_spends_its_budgets(runs: Callable[..., Run]) -> None:
    one = runs("llama")
    selected = by_head(one.ranks)
    assert len(selected) == SPARSE_LAYERS and {len(heads) for heads in selected.values()} == {KV_HEADS}
    assert one.pages == PAGES_OF_A_HEAD * KV_HEADS * SPARSE_LAYERS
    assert len({*one.ranks[0].rows.values()}) == SPARSE_LAYERS  # each layer with a budget of its own
    assert len({head for heads in selected.values() for head in heads}) == KV_HEADS * SPARSE_LAYERS  # each its own


def test_tensor_parallel_selects_what_one_rank_selects(runs: Callable[..., Run]) -> None:
    one, two = runs("llama"), runs("llama", 2)
    assert_same(one, two)
    assert [rank.tensor_rank for rank in two.ranks] == [0, 1]
    assert {rank.num_pages for rank in two.ranks} == {PAGES_OF_A_HEAD * SPARSE_LAYERS}
    assert disagreements(two.ranks, KV_HEADS, alike=False) == []
    assert {*two.ranks[1].rows.values()} == {*one.ranks[0].rows.values()}  # the budgets, as one rank got them


def test_replicated_kv_heads_select_for_the_query_heads_of_their_rank(runs: Callable[..., Run]) -> None:
    one, two = runs("one KV head"), runs("one KV head", 2)
    assert_same(one, two)
    assert disagreements(two.ranks, 1) == []
    assert one.ranks[0].stored_tokens > 0
    # both hold the same keys of the one KV head, and choose from them for their own query head
    first, second = two.ranks
    assert first.stored == second.stored and first.stored_tokens == one.ranks[0].stored_tokens
    assert first.heads != second.heads
    assert len(disagreements(two.ranks, 2)) == 0  # as two heads they would not have to agree


def test_tensor_and_pipeline_parallel(runs: Callable[..., Run]) -> None:
    one, four = runs("llama"), runs("llama", 4)
    assert_same(one, four)
    assert sorted((rank.stage, rank.tensor_rank) for rank in four.ranks) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [len(rank.heads) for rank in sorted(four.ranks, key=lambda rank: rank.stage)] == [1, 1, 2, 2]
    assert disagreements(four.ranks, KV_HEADS, alike=False) == []


@pytest.mark.skipif(not os.environ.get("QUEST_SLOW_TESTS"), reason="vLLM-CPU compiles first: set QUEST_SLOW_TESTS=1")
@pytest.mark.timeout(1200)
def test_pipeline_parallel(tmp_path: Path) -> None:
    model = write_model(tmp_path, "llama")
    stages = {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp", "enforce_eager": False}
    later = {"additional_config": {"quest": {"dense_layers": [0, 1]}}}  # all of the first stage: the second selects
    one, two = run(model, **later), run(model, **stages, **later)
    assert_same(one, two)
    assert [len(rank.heads) for rank in two.ranks] == [0, 2]


def test_ray_is_refused_by_vllm_cpu(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="pip install ray")
    model = write_model(tmp_path, "llama")
    with pytest.raises(ValueError, match="current platform cpu does not support ray"):
        run(model, tensor_parallel_size=2, distributed_executor_backend="ray")
