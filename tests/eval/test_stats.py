"""Intervals, and the tables made of them."""

from __future__ import annotations

import numpy as np
import pytest

from quest_vllm.eval.plan import Plan, Unit
from quest_vllm.eval.report import render, summarise
from quest_vllm.eval.stats import bootstrap_mean


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        estimate = bootstrap_mean([rng.normal(0.3, 1.0, 40)], seed=trial)
        covered += estimate.low <= 0.3 <= estimate.high
    assert 0.90 <= covered / 200 <= 0.98


def test_pairing_makes_the_interval_narrow() -> None:
    rng = np.random.default_rng(1)
    dense = rng.normal(0, 5, 60)
    sparse = dense - 0.1 + rng.normal(0, 0.05, 60)
    change = bootstrap_mean([sparse - dense])
    assert change.high < 0 and change.high - change.low < 0.05
    assert abs(change.mean + 0.1) < 0.03


def test_groups_weigh_the_same_whatever_their_size() -> None:
    estimate = bootstrap_mean([[1.0] * 30, [0.0] * 10])
    assert (estimate.mean, estimate.n) == (0.5, 40)


def test_no_change_seen_is_not_proof_of_none() -> None:
    assert bootstrap_mean([[0.0] * 30], span=1.0) == bootstrap_mean([[0.0] * 15, [0.0] * 15], span=1.0)
    estimate = bootstrap_mean([[0.0] * 30], span=1.0)
    assert (estimate.low, estimate.high) == (-0.1, 0.1)
    assert bootstrap_mean([[0.0] * 2], span=1.0).low == -1.0
    assert bootstrap_mean([[2.0] * 30]).high == 2.0


def test_an_empty_estimate_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one group"):
        bootstrap_mean([[], []])


PLAN = Plan(("needle_single", "text"), (2048,), 4, ("prefill",), (0, 256), seed=0)


def records() -> list[dict[str, object]]:
    made: list[dict[str, object]] = []
    for unit in PLAN.units(only_decode=("text",)):
        record: dict[str, object] = dict(unit._asdict())
        sparse = unit.budget == 256
        if unit.task == "text":
            record |= {"nll": 2.0 + 0.1 * sparse, "kl": 0.05 * sparse, "top1_agreement": 1 - 0.1 * sparse}
        else:
            wrong = sparse and unit.item < 2
            record |= {"score": float(not wrong), "answer": "no" if wrong else "yes"}
        made.append(record)
    return made


def test_summary_holds_the_paired_changes() -> None:
    cells = {(cell["task"], cell["budget"]): cell for cell in summarise(PLAN, records())["cells"]}
    needle, text = cells["needle_single", 256], cells["text", 256]
    assert needle["score"]["mean"] == 0.5
    assert needle["score_change"]["mean"] == -0.5
    assert needle["agreement"]["mean"] == 0.5
    assert needle["missing"] == 0
    assert text["mode"] == "decode"
    assert (text["kl"]["mean"], text["nll_change"]["mean"], text["top1_agreement"]["mean"]) == (0.05, 0.1, 0.9)
    assert "score_change" not in cells["needle_single", 0] and "nll_change" not in cells["text", 0]


def test_failed_items_are_left_out_of_both_sides() -> None:
    rows = records()
    for row in rows:
        if Unit(*(row[f] for f in Unit._fields)) == Unit("needle_single", 2048, 0, "prefill", 0):
            row.clear()
            row |= {**Unit("needle_single", 2048, 0, "prefill", 0)._asdict(), "error": "lost"}
    cells = {(cell["task"], cell["budget"]): cell for cell in summarise(PLAN, rows)["cells"]}
    assert cells["needle_single", 256]["missing"] == cells["needle_single", 0]["missing"] == 1
    assert cells["needle_single", 256]["score_change"]["n"] == 3


def test_the_table_shows_scores_and_marks_losses() -> None:
    rows = records()
    for row in rows:
        if row["task"] == "needle_single" and row["budget"] == 256:
            row |= {"score": 0.25 if row["item"] else 0.0, "answer": "no"}
    table = render(PLAN, summarise(PLAN, rows))
    assert "needle_single" in table and "1.00" in table and "0.19!" in table
    assert "KL to dense" in table and "0.050 [0.050, 0.050]" in table
