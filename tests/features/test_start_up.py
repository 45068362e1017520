"""Settings that never reach a sparse step on the CPU: what vLLM or the plugin says to them at start-up."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from quest_vllm.compat import UnsupportedVllm
from tests.features.conftest import audit, counted_rows, engine, largest_difference, logprobs, params

pytestmark = pytest.mark.engine


def test_fp8_kv_cache_is_refused(model_path: Path) -> None:
    refused = pytest.raises(UnsupportedVllm, match="kv_cache_dtype not supported.*start without")
    with refused, engine(model_path, kv_cache_dtype="fp8_e4m3"):
        pass


def test_sleep_mode_is_refused_by_vllm(model_path: Path) -> None:
    with pytest.raises(ValueError, match="[Ss]leep mode is not supported"), engine(model_path, enable_sleep_mode=True):
        pass


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"additional_config": {"quest": {"page_size": 64}}, "block_size": 32}, "got block size 32 with page_size 64"),
        ({"additional_config": {"quest": {"implementation": "triton"}}}, "needs tensors on cuda"),
    ],
)
def test_our_own_settings_that_cannot_work(model_path: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(Exception, match=said), engine(model_path, **settings):
        pass


def test_pipeline_stages_without_compilation_want_our_worker(model_path: Path) -> None:
    stages = {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp", "worker_cls": "other.Worker"}
    with pytest.raises(UnsupportedVllm, match="worker_cls: pipeline.*got other.Worker"), engine(model_path, **stages):
        pass


def test_async_scheduling_is_switched_off_by_vllm_and_sparse_decode_goes_on(model_path: Path) -> None:
    prompt: Any = {"prompt_token_ids": list(range(1000, 1300))}
    with engine(model_path, async_scheduling=True) as llm:
        assert llm.llm_engine.vllm_config.scheduler_config.async_scheduling is False
        with counted_rows() as rows:
            llm.generate([prompt], params(128, 4), use_tqdm=False)
        audit(llm, 30)
    assert rows["sparse/budget"] == 3


@pytest.mark.skipif(
    not os.environ.get("QUEST_SLOW_TESTS"), reason="compiles for two minutes and more: set QUEST_SLOW_TESTS=1"
)
@pytest.mark.timeout(1200)
def test_torch_compile(model_path: Path) -> None:
    prompt: Any = {"prompt_token_ids": list(range(1000, 1400))}

    def run(eager: bool) -> tuple[list[dict[int, float]], dict[str, int]]:
        with engine(model_path, enforce_eager=eager) as llm:
            compiled = llm.llm_engine.vllm_config.compilation_config.mode.name != "NONE"
            assert compiled is not eager
            with counted_rows() as rows:
                (output,) = llm.generate([prompt], params(128, 6, logprobs=5), use_tqdm=False)
            audit(llm, 30)
        return logprobs(output), rows

    (eager, eager_rows), (compiled, compiled_rows) = run(True), run(False)
    assert eager_rows == compiled_rows and compiled_rows["sparse/budget"] == 5
    assert largest_difference(eager, compiled) <= 0.2  # fused operations round once where eager ones round twice
