"""The tables of docs/characterisation.md: from measured JSON, newest first, nothing claimed where there is no gap."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("transformers")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
VALUES = {
    "dense": (0, {"kl": [0.0, 0.0], "text_nll": [2.0, 2.2]}),
    "original": (128, {"kl": [0.5, 0.7], "text_nll": [2.5, 2.9]}),
    "key codes, mass": (128, {"kl": [0.14, 0.16], "text_nll": [2.1, 2.3]}),
    "oracle": (128, {"kl": [0.1, 0.1], "text_nll": [2.0, 2.2]}),
}


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    plot, measure = importlib.import_module("plot_characterisation"), importlib.import_module("measure_policies")
    results = [measure.result(name, budget, values) for name, (budget, values) in VALUES.items()]
    measure.add_gap_closed(results)
    measure.add_minus_dense(results)
    for one in results[1:]:
        one["bytes_per_layer_and_step"] = 300 if one["policy"] == "oracle" else 100
    document = {"benchmark": "page_policies", "model": "small", "context": 4096, "results": results}
    for sweep in ("gap", "long"):
        for folder, name in (("cpu", f"2026-01-01-{sweep}-small.json"), ("h100", f"2026-01-02-{sweep}-small.json")):
            path = tmp_path / "benchmarks/results" / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(document))
    monkeypatch.setattr(plot, "ROOT", tmp_path)
    monkeypatch.setattr(plot.render_results, "ROOT", tmp_path)
    return plot


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_gap_table_says_what_was_measured_and_how_much_of_the_gap_is_closed(tables: Any) -> None:
    lines = tables.swept_table("gap", *tables.SWEPT["gap"])
    by_policy = {cells_of(line)[2]: cells_of(line) for line in lines[2:]}
    assert list(by_policy) == ["original", "key codes, mass", "oracle"]
    ours = by_policy["key codes, mass"]
    assert ours[0] == "[small](../benchmarks/results/h100/2026-01-02-gap-small.json), 4K, 2 texts"
    assert ours[1] == "128" and ours[3] == "100%" and by_policy["oracle"][3] == "300%"
    assert ours[4].startswith("0.150 (") and ours[5].startswith("90% (")
    assert ours[6] == ours[7] == ""  # no questions


def test_texts_and_questions_of_separate_runs_both_show(tables: Any) -> None:
    path = tables.ROOT / "benchmarks/results/h100/2026-01-03-gap-small-needles.json"
    document = json.loads((path.parent / "2026-01-02-gap-small.json").read_text())
    for one in document["results"]:
        one["needle_hits"] = one.pop("kl")
        one.pop("gap_closed", None)
        one["values"] = {"needle_nll": [0.1]}
    path.write_text(json.dumps(document))
    measured = {cells_of(line)[0].split(", ")[-1] for line in tables.swept_table("gap", *tables.SWEPT["gap"])[2:]}
    assert measured == {"2 texts", "1 questions"}


def test_the_long_table_is_paired_with_dense(tables: Any) -> None:
    by_policy = {cells_of(line)[2]: cells_of(line) for line in tables.swept_table("long", *tables.SWEPT["long"])[2:]}
    assert by_policy["key codes, mass"][4] == "0.100 (0.100 to 0.100)"
    assert by_policy["oracle"][4] == "0.000 (0.000 to 0.000)"
    assert by_policy["original"][4] == "0.600 (0.500 to 0.700)"


def test_no_share_is_claimed_of_a_gap_that_is_none(tables: Any) -> None:
    results = [
        {"policy": name, "budget": 128, "kl": {"mean": 1.0, "low": 0.5, "high": 1.5}, "gap_closed": {"kl": 0.5}}
        for name in ("original", "key codes, mass", "oracle")
    ]
    assert tables.closed(results, 128, "key codes, mass", "kl") == "no gap"
