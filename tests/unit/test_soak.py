"""What the soak calls flat, and what it calls clean."""

from __future__ import annotations

import asyncio
import copy
import sys
from typing import Any

import pytest

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import bleed
import soak
import soak_load

CLEAN: dict[str, Any] = {
    "findings": [],
    "statuses": {"200": 9, "400": 2},
    "healthy_after": True,
    "closing_audit": {
        "while_streams_run": {"errors": [], "live_pages_checked": 5, "pages_checked": 9},
        "at_rest": {"errors": [], "live_pages_checked": 0, "pages_checked": 9},
    },
    "counters": {
        "running_audit_wrong": 0,
        "running_audit_right": 7,
        "preemptions": 1,
        "prefix_cache_hit_tokens": 3,
        "rows_sparse": 2,
    },
    "memory": {"worker": {"flat": True}},
}


def samples(mib_per_hour: float, noise: float = 3.0) -> list[dict[str, Any]]:
    times = [10.0 * n for n in range(180)]
    return [
        {"seconds": t, "mib": {"worker": 1500 + mib_per_hour * t / 3600 + noise * (-1) ** n}}
        for n, t in enumerate(times)
    ]


def test_a_leak_is_told_from_noise() -> None:
    assert soak.judge_memory(samples(0), 300)["worker"]["flat"]
    leak = soak.judge_memory(samples(200), 300)["worker"]
    assert not leak["flat"] and leak["mib_per_hour"] == pytest.approx(200, rel=0.05)
    assert soak.judge_memory(samples(-400), 300)["worker"]["flat"]


def test_growth_in_the_warm_up_is_not_held_against_it() -> None:
    taken = samples(0)
    for sample in taken[:30]:
        sample["mib"]["worker"] -= 900
    assert soak.judge_memory(taken, 300)["worker"]["flat"]
    assert not soak.judge_memory(taken, 0)["worker"]["flat"]


def test_a_clean_soak_is_clean() -> None:
    assert soak.verdict(CLEAN) == []


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("findings",), [{"what": "incomplete"}], "lost or crossed"),
        (("statuses",), {"200": 1, "503": 1}, "500 or above"),
        (("statuses",), {"0": 1}, "or none"),
        (("healthy_after",), False, "not healthy"),
        (("closing_audit", "at_rest", "errors"), ["layer 1"], "closing audit found wrong"),
        (("closing_audit", "while_streams_run", "live_pages_checked"), 0, "saw no pages"),
        (("counters", "running_audit_wrong"), 1, "running audit found wrong"),
        (("counters", "preemptions"), 0, "no preemption"),
        (("memory", "worker", "flat"), False, "memory rose"),
    ],
)
def test_every_fault_is_said(place: tuple[str, ...], value: object, said: str) -> None:
    report = copy.deepcopy(CLEAN)
    entry = report
    for key in place[:-1]:
        entry = entry[key]
    entry[place[-1]] = value
    (problem,) = soak.verdict(report)
    assert said in problem


def test_metrics_are_summed_over_labels() -> None:
    text = """vllm:num_preemptions_total{engine="0",model_name="m"} 3.0
vllm:num_preemptions_total{engine="1",model_name="m"} 4.0
quest_decode_rows_total{path="sparse",reason="budget"} 5.0
quest_decode_rows_total{path="dense",reason="no_budget"} 6.0
"""
    found = soak.read_metrics(text)
    assert (found["preemptions"], found["rows_sparse"], found["rows_no_budget"]) == (7, 5, 6)


def test_another_requests_code_is_seen() -> None:
    load = soak_load.Load("http://127.0.0.1:9", "m", 4096, 0, {})
    code = ("amber", "falcon", "violin")
    load.check_text("stream", code, " The code is amber falcon violin. The code is amber falcon", {})
    load.check_text("stream", code, " The code is amber falcon violin. The code is amber falcon copper.", {})
    assert not load.tally.findings and not load.tally.suspects and load.tally.drifted == 1
    load.check_text("stream", code, " The code is amber falcon violin. The code is tiger lemon silver.", {})
    assert [finding["what"] for finding in load.tally.findings] == ["another request's code"]
    load.check_text("stream", code, " The code is tiger lemon silver.", {"prompt": "x"})
    assert len(load.tally.suspects) == 1


@pytest.mark.parametrize(
    ("budget", "alone", "found"),
    [
        (512, "amber falcon violin", 1),
        (None, "amber falcon violin", 1),
        (0, "amber falcon violin", 1),
        (512, "something else", 0),
        (64, "amber falcon violin", 0),
    ],
)
def test_only_what_load_did_is_a_finding(budget: int | None, alone: str, found: int) -> None:
    load = soak_load.Load("http://127.0.0.1:9", "m", 4096, 0, {})
    body = load.body(("amber", "falcon", "violin"), 9, budget) | {"stream": True}
    asked: list[dict[str, Any]] = []

    async def post(action: str, path: str, again: dict[str, Any]) -> dict[str, Any]:
        asked.append(again)
        return {"choices": [{"text": alone}]}

    load.post = post  # type: ignore[method-assign]
    load.check_text("stream", ("amber", "falcon", "violin"), " nothing of it", body)
    asyncio.run(load.ask_suspects_again())
    assert len(load.tally.findings) == found and len(load.tally.slips) == 1 - found
    assert asked[0]["prompt"] == body["prompt"] and "stream" not in asked[0]


def test_distance_of_answers() -> None:
    alone = bleed.Answer(("a", "b", "c"), (-0.1, -0.2, -0.3))
    assert alone.distance(bleed.Answer(("a", "b", "c"), (-0.1, -0.2001, -0.3))) == pytest.approx(1e-4)
    assert alone.distance(bleed.Answer(("a", "x", "y"), (-0.1, -0.2002, -3.0))) == pytest.approx(2e-4)  # a near tie
    assert alone.distance(bleed.Answer(("a", "x", "y"), (-0.1, -0.9, -3.0))) == float("inf")
    assert alone.distance(bleed.Answer(("a", "b", "c"), (-0.1, -0.5, -0.3))) == pytest.approx(0.3)
