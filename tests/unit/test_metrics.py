"""Metrics: the table, sums over live and dead processes in both of vLLM's modes, and latencies over HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from quest_vllm import budget, metrics, metrics_files
from quest_vllm.budget import ABSENT, XARG, set_budget_limits
from quest_vllm.config import QuestConfig
from quest_vllm.errors import QuestConfigError, QuestValueError
from quest_vllm.metrics import BUDGET_CLASSES, METRICS, ROW_KINDS, WorkerMetrics, budget_class, get_worker_metrics
from quest_vllm.metrics_files import (
    ENV_PROMETHEUS_DIR,
    ENV_RUN_DIR,
    VALUE_FILE_BYTES,
    FilesCollector,
    ensure_metrics_dir,
    metrics_dir,
)
from quest_vllm.server.middleware import QuestMiddleware

WORKER = """
import os
from quest_vllm.metrics import get_worker_metrics
m = get_worker_metrics()
m.rows("sparse", "budget", 3); m.rows("dense", "prefill", 1); m.pages(8, 40); m.kv_bytes(100, 400)
m.tokens(30, 90); m.kv_memory(160, 10); m.kv_memory(1600, 100); m.audited("right", 6)
m.budget(512, 3); m.stage_seconds("score", 0.5)
os._exit(1)
"""


@pytest.fixture(autouse=True)
def server_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A server of its own for each test: no directory of another's, no recorder left from another."""
    monkeypatch.delenv(ENV_PROMETHEUS_DIR, raising=False)
    monkeypatch.setenv(ENV_RUN_DIR, str(tmp_path / "run"))
    monkeypatch.setattr(budget, "_limits", None)
    metrics._worker_metrics.cache_clear()
    metrics._latency_metrics.cache_clear()
    yield tmp_path / "run"
    metrics._worker_metrics.cache_clear()
    metrics._latency_metrics.cache_clear()


def _scrape(collector: Any) -> dict[str, float]:
    registry = CollectorRegistry(auto_describe=True)
    registry.register(collector)
    lines = generate_latest(registry).decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def _run_worker(**environ: str) -> None:
    done = subprocess.run([sys.executable, "-c", WORKER], env={**os.environ, **environ}, timeout=60)
    assert done.returncode == 1


def _expected(processes: int) -> dict[str, float]:
    return {
        'quest_decode_rows_total{path="sparse",reason="budget"}': 3 * processes,
        'quest_decode_rows_total{path="dense",reason="prefill"}': processes,
        'quest_decode_rows_total{path="dense",reason="no_budget"}': 0,
        "quest_pages_selected_total": 8 * processes,
        "quest_pages_available_total": 40 * processes,
        "quest_tokens_attended_total": 30 * processes,
        "quest_tokens_available_total": 90 * processes,
        'quest_kv_cache_bytes{part="kv"}': 1600 * processes,
        'quest_kv_cache_bytes{part="summaries"}': 100 * processes,
        'quest_audit_pages_total{result="right"}': 6 * processes,
        'quest_audit_pages_total{result="wrong"}': 0,
        "quest_kv_bytes_read_total": 100 * processes,
        "quest_kv_bytes_dense_total": 400 * processes,
        'quest_token_budget_bucket{le="256.0"}': 0,
        'quest_token_budget_bucket{le="512.0"}': 3 * processes,
        'quest_token_budget_bucket{le="+Inf"}': 3 * processes,
        "quest_token_budget_count": 3 * processes,
        "quest_token_budget_sum": 1536 * processes,
        'quest_stage_seconds_total{stage="score"}': 0.5 * processes,
    }


def test_one_api_server_sums_live_and_dead_workers() -> None:
    collector = FilesCollector(metrics_dir())
    assert _scrape(collector) == {}
    _run_worker()
    _run_worker()
    get_worker_metrics().rows("sparse", "budget", 10)
    expected = _expected(2)
    expected['quest_decode_rows_total{path="sparse",reason="budget"}'] += 10
    assert expected.items() <= _scrape(collector).items()


def test_several_api_servers_read_the_same_numbers_with_prometheus_clients_own_collector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "prometheus"
    directory.mkdir()
    monkeypatch.setenv(ENV_PROMETHEUS_DIR, str(directory))
    _run_worker()
    _run_worker()
    assert _expected(2).items() <= _scrape(_prometheus_collector(directory)).items()


def _prometheus_collector(directory: Path) -> Any:
    return MultiProcessCollector(None, str(directory))  # type: ignore[no-untyped-call]


def test_every_metric_of_the_table_is_shown_before_its_first_value() -> None:
    WorkerMetrics(metrics_dir())
    metrics.LatencyMetrics(metrics_dir())
    shown = _scrape(FilesCollector(metrics_dir()))
    assert set(shown.values()) == {0.0}
    for name, spec in METRICS.items():
        assert name.startswith("quest_") and spec.help
        assert any(key.startswith(name + ("_count" if spec.buckets else "")) for key in shown)
    for path, reason in ROW_KINDS:
        assert f'quest_decode_rows_total{{path="{path}",reason="{reason}"}}' in shown


@given(st.lists(st.tuples(st.integers(1, 10**6), st.integers(1, 50)), max_size=20))
def test_histogram_counts_every_observation_once(observations: list[tuple[int, int]]) -> None:
    files: dict[str, float] = {}
    recorder = object.__new__(metrics.Recorder)
    recorder._files = {"histogram": _DictFile(files)}  # type: ignore[dict-item]
    for tokens, count in observations:
        recorder.observe("quest_token_budget", tokens, count=count)
    buckets = {json.loads(key)[2]["le"]: value for key, value in files.items() if "_bucket" in key}
    bounds = [*map(float, METRICS["quest_token_budget"].buckets), float("inf")]
    below = 0.0
    for low, high in zip([0.0, *bounds], bounds, strict=False):
        expected = sum(count for tokens, count in observations if low < tokens <= high)
        assert buckets.get("+Inf" if high == float("inf") else str(high), 0) == expected
        below += expected
    assert below == sum(count for _, count in observations)


BOUNDS = METRICS["quest_tokens_reached"].buckets


@given(st.lists(st.integers(1, 10**6) | st.sampled_from([int(b) + d for b in BOUNDS for d in (0, 1)]), min_size=1))
def test_observations_made_together_fall_where_each_falls(tokens: list[int]) -> None:
    together, one_by_one = (object.__new__(WorkerMetrics) for _ in range(2))
    found: list[dict[str, float]] = [{}, {}]
    for worker, files in zip((together, one_by_one), found, strict=True):
        worker._recorder = object.__new__(metrics.Recorder)
        worker._recorder._files = {"histogram": _DictFile(files)}  # type: ignore[dict-item]
    together.reached(np.array(tokens).reshape(1, -1))
    for value in tokens:
        one_by_one._recorder.observe("quest_tokens_reached", value)
    assert found[0] == pytest.approx(found[1])


class _DictFile:
    def __init__(self, values: dict[str, float]) -> None:
        self._values = values

    def add(self, key: str, amount: float) -> None:
        self._values[key] = self._values.get(key, 0.0) + amount


def test_a_fork_writes_a_file_of_its_own() -> None:
    get_worker_metrics().rows("sparse", "budget", 1)
    child = os.fork()
    if child == 0:
        get_worker_metrics().rows("sparse", "budget", 1)
        os._exit(0)
    os.waitpid(child, 0)
    get_worker_metrics().rows("sparse", "budget", 1)
    scraped = _scrape(FilesCollector(metrics_dir()))
    assert scraped['quest_decode_rows_total{path="sparse",reason="budget"}'] == 3


def test_unknown_label_count_is_an_error() -> None:
    with pytest.raises(ValueError, match="argument"):
        metrics.Recorder(metrics_dir()).add("quest_decode_rows_total", 1, ("sparse",))


def test_directory_is_named_once_and_inherited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENV_RUN_DIR)
    monkeypatch.setattr(metrics_files, "remove_at_exit", lambda path: None)
    ensure_metrics_dir()
    named = os.environ[ENV_RUN_DIR]
    assert not Path(named).exists()
    ensure_metrics_dir()
    assert os.environ[ENV_RUN_DIR] == named
    assert metrics_dir(str(tmp_path)) == tmp_path / Path(named).name


def test_directory_that_cannot_be_made_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(QuestConfigError, match=r"metrics_dir: expected.*file"):
        metrics_dir(str(tmp_path / "file"))


def test_no_file_of_values_grows(server_directory: Path) -> None:
    server_directory.mkdir()
    for recorder in (WorkerMetrics(server_directory), metrics.LatencyMetrics(server_directory)):
        for file in recorder._recorder._files.values():
            assert 0 < file._file._used < 0.6 * VALUE_FILE_BYTES
    assert {path.stat().st_size for path in server_directory.iterdir()} == {VALUE_FILE_BYTES}


FULL_DISK = """
import pathlib, sys
import numpy as np
from quest_vllm.errors import QuestConfigError
from quest_vllm.metrics import LatencyMetrics, WorkerMetrics
from quest_vllm.page.trace import CAPACITY, TraceWriter, traced_rows
from quest_vllm.tally import TallyWriter, read_tally
directory = pathlib.Path(sys.argv[1])
worker, http, tally, trace = (kind(directory) for kind in (WorkerMetrics, LatencyMetrics, TallyWriter, TraceWriter))
try:
    with (directory / "filler").open("wb") as filler:
        while filler.write(bytes(65536)):
            filler.flush()
except OSError as error:
    assert error.errno == 28, error
for value in (64, 4096, 10**6):
    worker.budget(value, 1); worker.rows("sparse", "budget", 1); http.first_token("<=512", value)
for number in range(1, 4097):
    tally.add(number, 1, 2, 3)
assert read_tally(directory, 4096).tokens == 3
for _ in range(CAPACITY):
    trace.record(2, traced_rows(np.array([5], np.int32)), np.array([100], np.int32), np.zeros((1, 1, 1), np.int32), 16)
try:
    WorkerMetrics(directory)
except QuestConfigError as error:
    print(error)
"""


def test_a_disk_that_fills_up_stops_a_start_and_nothing_that_runs(tmp_path: Path) -> None:
    mount = f"mount -t tmpfs -o size=8m none {tmp_path}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    command = f'{mount} && exec "$0" -c "$1" {tmp_path}'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", command, sys.executable, FULL_DISK], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert "metrics_dir: expected a directory with room for 128 KiB" in done.stdout and "No space left" in done.stdout


def test_two_servers_that_share_a_folder_keep_their_numbers_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "shared"
    for name in ("one", "two"):
        monkeypatch.setenv(ENV_RUN_DIR, str(tmp_path / name))
        _run_worker(QUEST_METRICS_DIR=str(shared))
    assert sorted(path.name for path in shared.iterdir()) == ["one", "two"]
    for name in ("one", "two"):
        monkeypatch.setenv(ENV_RUN_DIR, str(tmp_path / name))
        scraped = _scrape(FilesCollector(metrics_dir(str(shared))))
        assert scraped['quest_decode_rows_total{path="sparse",reason="budget"}'] == 3


def test_directory_goes_with_the_process_that_named_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENV_RUN_DIR)
    code = "from quest_vllm.metrics import get_worker_metrics as g; g().rows('sparse', 'budget', 1)"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)}, check=True, timeout=60)
    assert list(tmp_path.glob("quest_vllm-*")) == []


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(0, "dense"), (48, "<=512"), (512, "<=512"), (513, "<=1024"), (2048, "<=2048"), (4096, "<=4096"), (4097, ">4096")],
)
def test_budget_class(tokens: int, expected: str) -> None:
    assert budget_class(tokens) == expected and expected in BUDGET_CLASSES


def _body(value: str) -> bytes:
    return b'{"prompt": "x", "vllm_xargs": {"%s": %s}}' % (XARG.encode(), value.encode())


def _serve(body: bytes, messages: list[dict[str, Any]], path: str = "/v1/completions") -> tuple[bytes, list[Any]]:
    """Run the middleware around an app that reads its body and answers ``messages``."""
    seen, sent = [], []
    halves = [
        {"type": "http.request", "body": body[:9], "more_body": True},
        {"type": "http.request", "body": body[9:], "more_body": False},
    ]

    async def receive() -> Any:
        return halves.pop(0) if halves else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (message := await receive())["type"] == "http.request":
            seen.append(message["body"])
            if not message["more_body"]:
                break
        for message in messages:
            if message.get("type") == "test.client.leaves":
                assert (await receive())["type"] == "http.disconnect"
            else:
                await send(message)

    scope = {"type": "http", "method": "POST", "path": path}
    asyncio.run(QuestMiddleware(app)(scope, receive, send))
    return b"".join(seen), sent


def _answer(status: int, content_type: bytes, chunks: list[bytes]) -> list[dict[str, Any]]:
    start = {"type": "http.response.start", "status": status, "headers": [(b"Content-Type", content_type)]}
    bodies = [{"type": "http.response.body", "body": chunk, "more_body": True} for chunk in chunks]
    return [start, *bodies, {"type": "http.response.body", "body": b"", "more_body": False}]


ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'
STREAM = [
    ROLE,
    *[b'data: {"choices":[{"text":"a"}]}\n\n'] * 4,
    b'data: {"choices":[],"usage":{}}\n\n',
    b"data: [DONE]\n\n",
]


def _counts() -> dict[str, float]:
    return {key: value for key, value in _scrape(FilesCollector(metrics_dir())).items() if "_count" in key and value}


def test_a_streamed_answer_is_timed_by_budget_class_and_passes_unchanged() -> None:
    set_budget_limits(QuestConfig(), 8192)
    answer = _answer(200, b"text/event-stream; charset=utf-8", STREAM)
    assert _serve(_body("1000"), answer) == (_body("1000"), answer)
    label = '{budget_class="<=1024"}'
    assert _counts() == {
        f"quest_time_to_first_token_seconds_count{label}": 1,
        f"quest_inter_token_latency_seconds_count{label}": 3,
        f"quest_e2e_latency_seconds_count{label}": 1,
    }


def test_an_answer_in_one_piece_has_only_an_end_to_end_time() -> None:
    set_budget_limits(QuestConfig(token_budget=0), 8192)
    _serve(b'{"prompt": "x"}', _answer(200, b"application/json", [b'{"choices": []}']))
    assert _counts() == {'quest_e2e_latency_seconds_count{budget_class="dense"}': 1}


def test_a_broken_off_answer_is_not_timed_to_its_end() -> None:
    answer = _answer(200, b"text/event-stream", STREAM)
    _serve(_body("512"), [*answer[:3], {"type": "test.client.leaves"}, *answer[3:]])
    assert _counts() == {'quest_time_to_first_token_seconds_count{budget_class="<=512"}': 1}


def test_refused_and_foreign_requests_are_not_timed() -> None:
    _serve(_body("512"), _answer(400, b"application/json", [b"{}"]))
    _serve(b'{"input": "x"}', _answer(200, b"application/json", [b"{}"]), path="/v1/embeddings")
    assert _counts() == {}


def test_stat_logger_sets_limits_and_registers_one_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm")
    from types import SimpleNamespace

    from quest_vllm import runtime, stat_logger

    registry = CollectorRegistry(auto_describe=True)
    monkeypatch.setattr(stat_logger, "REGISTRY", registry)
    monkeypatch.setattr(stat_logger, "_registered", None)
    monkeypatch.setattr(runtime, "_active", None)
    config = SimpleNamespace(
        additional_config={"quest": {"token_budget": 1024}}, model_config=SimpleNamespace(max_model_len=4096)
    )
    for _ in range(2):
        logger: Any = stat_logger.QuestStatLogger(config, [0])
    logger.record(None, None, mm_cache_stats=None, engine_idx=0)
    logger.log_engine_initialized()
    logger.log()
    get_worker_metrics().rows("sparse", "budget", 5)
    assert b'quest_decode_rows_total{path="sparse",reason="budget"} 5.0' in generate_latest(registry)
    assert budget.get_budget_limits().parse(ABSENT) == 1024
    with pytest.raises(QuestValueError, match="4096"):
        budget.get_budget_limits().parse(4097)
