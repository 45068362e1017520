"""KV cache saved by one engine and loaded by another: page summaries travel inside the blocks."""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quest_vllm import layers
from quest_vllm.compat import UnsupportedVllm
from tests.features.conftest import audit, counted_rows, engine, largest_difference, logprobs, params

pytestmark = pytest.mark.engine

STEPS = 5


def test_save_restart_load(model_path: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    prompts: list[Any] = [{"prompt_token_ids": [rng.randint(1000, 40000) for _ in range(n)]} for n in (420, 333)]

    def run(role: str) -> tuple[list[Any], dict[str, int]]:
        transfer = {
            "kv_connector": "ExampleConnector",
            "kv_role": role,
            "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
        }
        with engine(model_path, kv_transfer_config=transfer, max_num_batched_tokens=1024) as llm:
            with counted_rows() as rows:
                outputs = llm.generate(prompts, params(128, STEPS, logprobs=5), use_tqdm=False)
            # pages that were loaded, not computed, must carry the summaries of their keys
            report = audit(llm, 30)
        assert report.live_pages_checked >= 30 * (420 + 333) // 16
        return outputs, rows

    saved, _ = run("kv_producer")
    assert any(tmp_path.iterdir())
    loaded, rows = run("kv_consumer")
    assert [output.num_cached_tokens for output in saved] == [0, 0]
    assert [output.num_cached_tokens for output in loaded] == [416, 320]
    assert rows["sparse/budget"] == 2 * (STEPS - 1)
    for before, after in zip(saved, loaded, strict=True):
        # the prompt's last tokens are computed in another batch shape: a page at the budget's edge may change places
        assert largest_difference(logprobs(before), logprobs(after)) <= 0.5


@pytest.mark.parametrize(
    ("connector", "said"),
    [
        ("OffloadingConnector", "CPU Offloading is currently only supported on CUDA-alike and XPU GPUs"),
        ("SimpleCPUOffloadConnector", "priority_range"),
    ],
)
def test_connectors_that_vllm_cpu_cannot_start(model_path: Path, connector: str, said: str) -> None:
    transfer = {
        "kv_connector": connector,
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"cpu_bytes_to_use": 100_000_000, "block_size": 32},
    }
    with pytest.raises(Exception, match=said), engine(model_path, kv_transfer_config=transfer):
        pass


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("LMCacheConnectorV1", None),
        ("LMCacheMPConnector", {}),
        (
            "MultiConnector",
            {"connectors": [{"kv_connector": "ExampleConnector"}, {"kv_connector": "LMCacheConnectorV1"}]},
        ),
    ],
)
def test_connectors_that_leave_summaries_behind_are_refused(name: str, extra: dict[str, Any] | None) -> None:
    transfer = SimpleNamespace(kv_connector=name, kv_connector_extra_config=extra)
    with pytest.raises(UnsupportedVllm, match="does not support the KV connector LMCache.*page summaries"):
        layers.refuse_connectors(transfer)
    whole_blocks = SimpleNamespace(kv_connector="ExampleConnector", kv_connector_extra_config=None)
    layers.refuse_connectors(whole_blocks)
    layers.refuse_connectors(None)


@pytest.mark.skipif(
    importlib.util.find_spec("lmcache") is None, reason="pip install --no-deps lmcache, and what it imports"
)
def test_lmcache_is_refused_at_start_up(model_path: Path) -> None:
    """In a process of its own: LMCache imports numba, and vLLM 0.32 then starts no other engine (tests/conftest.py)."""
    start = (
        "import sys; from vllm import LLM; LLM(sys.argv[1], attention_backend='CUSTOM', enforce_eager=True,"
        "max_model_len=1024, block_size=32, max_num_seqs=2,"
        "kv_transfer_config={'kv_connector': 'LMCacheConnectorV1', 'kv_role': 'kv_both'})"
    )
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", start, str(model_path)],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 1, done.stdout[-2000:]
    assert "UnsupportedVllm: quest_vllm does not support the KV connector LMCacheConnectorV1" in done.stderr
