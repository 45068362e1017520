"""Rounds made into cells, and the table that the terminal shows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from quest_vllm.bench.plan import Cell, Options, series_name
from quest_vllm.eval.report import columns

PERCENTILES = (50, 90, 99)
Round = Mapping[str, Any]


def percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    """Mean and percentiles in milliseconds, and how many values; None without one."""
    if not seconds:
        return None
    values = 1e3 * np.asarray(seconds)
    found = {f"p{p}": round(float(np.percentile(values, p)), 3) for p in PERCENTILES}
    return {"mean": round(float(values.mean()), 3), **found, "n": len(values)}


def summarise(options: Options, rounds: Sequence[Round]) -> list[dict[str, Any]]:
    """One entry a cell that has a finished round, in the order of the sweep."""
    by_cell: dict[Cell, list[Round]] = defaultdict(list)
    for record in rounds:
        if "error" not in record:
            by_cell[cell_of(record)].append(record)
    order = {budget: place for place, budget in enumerate((options.reference, *options.budgets))}
    cells = sorted(by_cell, key=lambda c: (c.context, c.batch, order.get(c.budget, 0)))
    return [_summary(options, cell, by_cell) for cell in cells]


def cell_of(record: Round) -> Cell:
    """The cell that a round belongs to."""
    return Cell(record["context"], record["batch"], record["budget"])


def _summary(options: Options, cell: Cell, by_cell: Mapping[Cell, list[Round]]) -> dict[str, Any]:
    rounds = by_cell[cell]
    entry: dict[str, Any] = {**cell._asdict(), "series": series_name(cell.budget), "rounds": len(rounds)}
    for name in ("ttft", "itl", "tpot"):
        entry[f"{name}_ms"] = percentiles([value for record in rounds for value in record[name]])
    rates = [record["output_tokens_per_second"] for record in rounds]
    entry["output_tokens_per_second"] = round(float(np.mean(rates)), 2)
    entry["chunks_per_token"] = round(sum(r["chunks"] for r in rounds) / sum(r["tokens"] for r in rounds), 3)
    sparse = rounds[0].get("sparse_attention")
    entry["mean_tokens_attended"] = sparse["mean_tokens_attended"] if sparse else None
    if cell.budget != options.reference:
        entry["speedup"] = _speedup(by_cell.get(cell._replace(budget=options.reference), []), rounds)
    return entry


def _speedup(reference: Sequence[Round], rounds: Sequence[Round]) -> dict[str, float] | None:
    """Ratio of median inter-token latencies, reference to ours: above 1 we are faster.

    ``low`` and ``high`` are the extremes over pairs of rounds of the same repeat; None where a side has no latency.
    """
    pairs = [(b["itl"], o["itl"]) for b in reference for o in rounds if b["repeat"] == o["repeat"]]
    ratios = [float(np.median(base) / np.median(ours)) for base, ours in pairs if base and ours]
    if not ratios:
        return None
    ratio = float(np.median(ratios))
    return {"itl": round(ratio, 3), "low": round(min(ratios), 3), "high": round(max(ratios), 3), "pairs": len(ratios)}


def render(options: Options, cells: Sequence[Mapping[str, Any]]) -> str:
    """The table."""
    against = series_name(options.reference)
    head = ["context", "batch", "series", "TTFT p50", "ITL p50", "p90", "p99", "TPOT p50", "out tok/s", f"vs {against}"]
    rows = [
        [
            str(cell["context"]),
            str(cell["batch"]),
            cell["series"],
            _shown(cell["ttft_ms"], "p50"),
            *(_shown(cell["itl_ms"], f"p{p}") for p in PERCENTILES),
            _shown(cell["tpot_ms"], "p50"),
            f"{cell['output_tokens_per_second']:.1f}",
            _ratio(cell.get("speedup")),
        ]
        for cell in cells
    ]
    title = (
        f"Milliseconds; ITL: between chunks while the whole batch decodes; vs {against}: ratio of ITL p50, >1 faster"
    )
    return f"{title}\n{columns([head, *rows])}{_notes(cells)}" if rows else "no cell was measured"


def _shown(values: Mapping[str, float] | None, name: str) -> str:
    return "-" if values is None else f"{values[name]:.1f}"


def _ratio(speedup: Mapping[str, float] | None) -> str:
    if speedup is None:
        return ""
    spread = f" [{speedup['low']:.2f}, {speedup['high']:.2f}]" if speedup["pairs"] > 1 else ""
    return f"{speedup['itl']:.2f}x{spread}"


def _notes(cells: Sequence[Mapping[str, Any]]) -> str:
    notes = ""
    if any(cell["itl_ms"] is None for cell in cells):
        notes += "\n-: at no moment did the whole batch decode; ask for more --tokens"
    if any(cell["chunks_per_token"] < 0.95 for cell in cells):
        notes += "\nsome chunks carried several tokens (speculation, or a busy client): read TPOT rather than ITL"
    return notes
