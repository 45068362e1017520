"""Steps that are counted together are counted as if each had been counted by itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quest_vllm import accounting, step_log
from quest_vllm.accounting import LayerGroup, adaptive_rows, record_step
from quest_vllm.config import MASS_POLICIES, POLICIES, QuestConfig
from quest_vllm.metadata import classify_rows
from quest_vllm.metrics_files import FilesCollector
from quest_vllm.step_log import LAG, Step, StepLog, joined
from quest_vllm.tally import read_tally
from quest_vllm.token_rows import step_rows

GROUP = LayerGroup(30, 2, 2, 64, 2, 16, True)
Request = tuple[int, int, bool, int, float, str]
# query tokens, tokens stored before, in prefill, token budget, top_p, policy
request = st.tuples(
    st.integers(0, 4),
    st.integers(0, 900),
    st.booleans(),
    st.sampled_from([0, 64, 512]),
    st.sampled_from([0.5, 1.0]),
    st.sampled_from(MASS_POLICIES),
)


def step(requests: list[Request]) -> Step:
    query, stored, prefilling, budgets, top_ps, names = (np.array(column) for column in zip(*requests, strict=True))
    query_start = np.concatenate([[0], np.cumsum(query)]).astype(np.int32)
    rows = step_rows(query_start, (query + stored).astype(np.int32), prefilling.astype(bool))
    own = budgets.astype(np.int32)[rows.requests]
    shares = top_ps.astype(np.float32)[rows.requests]
    policies = np.array([POLICIES.index(name) for name in names], np.int32)[rows.requests]
    sizes = (rows.query_lens, rows.seq_lens, prefilling[rows.requests])
    classes = classify_rows(*sizes, own, QuestConfig(), shares, policies)
    return classes, rows, own


class Sums:
    """Stands for the worker's metrics: every number that arrives, summed by its name and labels."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, ...], float] = {}

    def __getattr__(self, name: str) -> Callable[..., None]:
        def add(*arguments: float | str) -> None:
            labels = tuple(str(a) for a in arguments if isinstance(a, str) or name == "budget")[: -1 or None]
            numbers = [a for a in arguments if not isinstance(a, str)]
            if name == "budget":
                labels, numbers = (str(arguments[0]),), [arguments[1]]
            for place, number in enumerate(numbers):
                key = (name, str(place), *labels)
                self.found[key] = self.found.get(key, 0) + float(number)

        return add


@given(st.lists(st.lists(request, min_size=1, max_size=5), min_size=1, max_size=6))
def test_joined_steps_count_as_the_sum_of_the_steps(batches: list[list[Request]]) -> None:
    steps = [step(batch) for batch in batches]
    sums = []
    for counted in (steps, [joined(steps)]):
        recorded = Sums()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(accounting, "get_worker_metrics", lambda recorded=recorded: recorded)
            for one in counted:
                record_step(GROUP, *one)
        sums.append({key: value for key, value in recorded.found.items() if value})
    assert sums[0] == sums[1]


def sparse_rows(directory: Path) -> float:
    """``quest_decode_rows_total`` of sparse rows."""
    found = [
        sample.value
        for metric in FilesCollector(directory).collect()
        for sample in metric.samples
        if sample.name == "quest_decode_rows_total" and sample.labels["path"] == "sparse"
    ]
    return sum(found)


def test_steps_are_counted_by_themselves_a_little_later(run_dir: Path) -> None:
    log, one = StepLog(GROUP), step([(1, 800, False, 64, 1.0, "mass"), (1, 20, False, 64, 1.0, "mass")])
    for round_number in (1, 2):  # the thread goes on after it has counted
        for _ in range(3):
            log.add(*one)
        end = time.monotonic() + 100 * LAG
        while sparse_rows(run_dir) < 3 * round_number and time.monotonic() < end:
            time.sleep(LAG / 4)
        assert sparse_rows(run_dir) == 3 * round_number


def test_a_step_that_cannot_be_counted_is_said_and_stops_nothing(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log, one = StepLog(GROUP), step([(1, 800, False, 64, 1.0, "mass")])
    with monkeypatch.context() as patch, caplog.at_level("ERROR", logger="vllm.quest_vllm"):
        patch.setattr("quest_vllm.step_log.record_step", lambda *_: 1 / 0)
        log.add(*one)
        end = time.monotonic() + 100 * LAG
        while not caplog.records and time.monotonic() < end:
            time.sleep(LAG / 4)
    assert "could not be counted" in caplog.text
    log.add(*one)
    log.count()
    assert sparse_rows(run_dir) == 1


def test_what_adaptive_rows_took_is_counted_at_once(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_log, "LAG", 60.0)
    log, one = StepLog(GROUP), step([(1, 800, False, 512, 0.5, "mass"), (1, 900, False, 512, 0.5, "mass")])
    adaptive = adaptive_rows(GROUP, one[0], one[1].seq_lens, np.array([3, 0], np.int32))
    assert adaptive is not None
    counts, arrived = torch.zeros(30, 4, 2, dtype=torch.int32), threading.Event()

    def wait() -> None:
        assert arrived.wait(60)
        counts[:, [1, 3]] = torch.tensor([[10, 20], [4, 4]], dtype=torch.int32)

    log.add(*one)
    log.add_reached(adaptive, np.array([1, 3]), counts, wait)
    assert read_tally(run_dir, 3) is None
    arrived.set()
    end = time.monotonic() + 30
    while read_tally(run_dir, 3) is None and time.monotonic() < end:
        time.sleep(0.01)
    assert sparse_rows(run_dir) == 0  # steps still come many at once
    log.count()  # waits for the thread's own
    assert sparse_rows(run_dir) == 2
    found = read_tally(run_dir, 3)
    assert found is not None and (found.steps, found.pages) == (pytest.approx(1), pytest.approx(15))
    assert found.tokens == pytest.approx(15 * 16 - (51 * 16 - 801))


def test_steps_are_counted_while_what_rows_took_keeps_coming(run_dir: Path) -> None:
    log, one = StepLog(GROUP), step([(1, 800, False, 512, 0.5, "mass"), (1, 900, False, 512, 0.5, "mass")])
    adaptive = adaptive_rows(GROUP, one[0], one[1].seq_lens, np.array([0, 0], np.int32))
    assert adaptive is not None
    places, counts, ended = np.array([0, 1]), torch.full((30, 2, 2), 4, dtype=torch.int32), threading.Event()

    def wait() -> None:  # the next step's counts are noted before this one's have come
        time.sleep(0.001)
        if not ended.is_set():
            log.add_reached(adaptive, places, counts, wait)

    log.add(*one)
    log.add_reached(adaptive, places, counts, wait)
    end = time.monotonic() + 100 * LAG
    while sparse_rows(run_dir) < 2 and time.monotonic() < end:
        time.sleep(LAG / 4)
    ended.set()
    assert sparse_rows(run_dir) == 2
