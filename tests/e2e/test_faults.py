"""Faults on a real server: a full disk, a dead worker and the restart after it, SIGTERM under load, bad starts.

The shared server dies here: tests/conftest.py puts this module behind the others.
"""

from __future__ import annotations

import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.e2e.conftest import GRACE_SECONDS, KEY, MODEL_NAME, QUEST, Server, run_server, server_environment, small_disk
from tests.e2e.test_server import prompt_ids, xargs

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def restarted(server: Server, command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The same command again, on the same port, as a supervisor does it."""
    server.process.wait(GRACE_SECONDS)
    port = int(server.url.rpartition(":")[2])
    with run_server(command, tmp_path_factory.mktemp("restarted") / "log", port, KEY) as running:
        yield running


def ask(server: Server, budget: int, seed: int = 0, **fields: Any) -> Any:
    """Eight tokens behind a prompt of 700."""
    body = {"ignore_eos": True, "sparse_attention": {"token_budget": budget, **fields}}
    return server.client().completions.create(
        model=MODEL_NAME, prompt=prompt_ids(700, seed), max_tokens=8, extra_body=body
    )


def worker_of(server: Server) -> psutil.Process:
    """The process that runs the model."""
    (worker,) = [
        process
        for process in psutil.Process(server.process.pid).children(recursive=True)
        if "Worker" in " ".join(process.cmdline())
    ]
    return worker


def test_a_full_disk_changes_nothing(server: Server, disk: Path) -> None:
    inside = Path(f"/proc/{server.process.pid}/root{disk}")
    if not small_disk(disk):
        pytest.skip("this machine lets nobody mount a small disk")
    with pytest.raises(OSError, match="No space left"), (inside / "filler").open("wb") as filler:
        while filler.write(bytes(4096)):
            filler.flush()
    before = server.metrics()['quest_decode_rows_total{path="sparse",reason="budget"}']
    assert ask(server, 128).usage.sparse_attention["pages_selected"] == 7 * 8
    assert 0 < ask(server, 256, top_p=0.5).usage.sparse_attention["mean_tokens_attended"] <= 256
    assert server.metrics()['quest_decode_rows_total{path="sparse",reason="budget"}'] == before + 2 * 7
    for policy in ("window", "two_stage"):
        assert ask(server, 128, policy=policy).usage.sparse_attention["policy"] == policy


def test_start_ups_that_cannot_be(server: Server, model_path: Path, tmp_path: Path) -> None:
    """In one test, because they run side by side: each is a start of vLLM."""
    (tmp_path / "broken.yaml").write_text("token_budget: [")
    (tmp_path / "latin.yaml").write_bytes(b"# caf\xe9\n")
    port = server.url.rpartition(":")[2]
    wanted: list[tuple[list[str], dict[str, str], int, str]] = [
        ([str(model_path), "--port", port], {}, 1, "Address already in use"),
        ([str(tmp_path / "nowhere")], {}, 1, str(tmp_path / "nowhere")),
        ([str(model_path)], {"QUEST_CONFIG": str(tmp_path / "nowhere.yaml")}, 2, "cannot read the YAML file"),
        ([str(model_path)], {"QUEST_CONFIG": str(tmp_path / "broken.yaml")}, 2, "cannot read the YAML file"),
        ([str(model_path)], {"QUEST_CONFIG": str(tmp_path / "latin.yaml")}, 2, "cannot read the YAML file"),
        ([str(model_path)], {"QUEST_METRICS_DIR": "/proc/nowhere"}, 2, "metrics_dir: expected a directory"),
        ([str(model_path)], {"QUEST_POLICY": "max", "QUEST_GROUP_REDUCTION": "mean"}, 2, "policy: expected one of"),
        ([str(model_path)], {"QUEST_POLICY": "two_stage", "QUEST_PAGE_SUMMARY": "min_max"}, 2, "got 'two_stage'"),
    ]

    def start(words: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*QUEST, "serve", *words, "--host", "127.0.0.1"],
            env=server_environment() | environment,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )

    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda case: start(case[0], case[1]), wanted))
    for (_, _, code, words), done in zip(wanted, runs, strict=True):
        said = done.stdout + done.stderr
        assert done.returncode == code and words in said, (words, done.returncode, said[-1500:])


def test_a_killed_worker_ends_the_server_with_words(server: Server) -> None:
    begun, outcome = threading.Event(), list[str]()
    children = psutil.Process(server.process.pid).children(recursive=True)

    def stream() -> None:
        chunks = server.client().completions.create(
            model=MODEL_NAME, prompt=prompt_ids(600), max_tokens=2000, stream=True, extra_body=xargs(128)
        )
        try:
            for _ in chunks:
                begun.set()
            outcome.append("complete")
        except (openai.APIError, httpx.HTTPError) as error:
            outcome.append(str(error))

    reader = threading.Thread(target=stream)
    reader.start()
    assert begun.wait(60)
    worker_of(server).kill()
    assert server.process.wait(GRACE_SECONDS) == 1
    reader.join(10)
    assert not reader.is_alive() and outcome[0] != "complete"
    assert "the engine died" in server.log.read_text()
    assert not psutil.wait_procs(children, timeout=30)[1], "processes left behind"


def test_a_supervisors_restart_serves_again(restarted: Server) -> None:
    assert ask(restarted, 128).usage.sparse_attention["pages_selected"] == 7 * 8
    assert restarted.metrics()['quest_decode_rows_total{path="sparse",reason="budget"}'] == 7


def test_sigterm_under_load_lets_streams_end(restarted: Server) -> None:
    begun = [threading.Event() for _ in range(6)]

    def stream(number: int) -> tuple[int, str | None]:
        body = xargs((0, 128, 512)[number % 3]) | {"ignore_eos": True}
        chunks = restarted.client().completions.create(
            model=MODEL_NAME, prompt=prompt_ids(500, number), max_tokens=60, stream=True, extra_body=body
        )
        count, reason = 0, None
        for chunk in chunks:
            begun[number].set()
            count += 1
            reason = chunk.choices[0].finish_reason or reason
        return count, reason

    with ThreadPoolExecutor(len(begun)) as pool:
        streams = [pool.submit(stream, number) for number in range(len(begun))]
        assert all(event.wait(60) for event in begun)
        restarted.process.terminate()
        ends = [future.result(GRACE_SECONDS) for future in streams]
    assert ends == [(60, "length")] * len(begun)
    assert restarted.process.wait(GRACE_SECONDS) == 0
    with pytest.raises(OSError):
        urllib.request.urlopen(f"{restarted.url}/health", timeout=5)
