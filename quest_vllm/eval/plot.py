"""One figure of a run: mean score by budget, and KL by budget. Needs matplotlib, which nothing else here does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quest_vllm.eval.plan import DECODE, DENSE, PREFILL
from quest_vllm.eval.report import budget_name
from quest_vllm.eval.text import TEXT

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
STYLES = {DECODE: "-", PREFILL: "--"}


def plot_run(document: Mapping[str, Any], path: Path) -> bool:
    """Draw ``document`` into the PNG ``path``; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    budgets = list(document["settings"]["budgets"])
    overall = [row for row in document["summary"]["overall"] if "score" in row]
    text = [cell for cell in document["summary"]["cells"] if cell["task"] == TEXT and "kl" in cell]
    panels = [draw for rows, draw in ((overall, _draw_scores), (text, _draw_kl)) if rows]
    if not panels:
        return True
    figure = Figure(figsize=(5.6 * len(panels), 4.4), layout="constrained")
    for axis, draw in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axis, budgets, overall if draw is _draw_scores else text)
    figure.suptitle(f"{document['settings']['model']}: quality by token budget", fontsize=12)
    figure.savefig(path, dpi=144)
    return True


def _axis(axis: Any, budgets: Sequence[int]) -> None:
    axis.set_xticks(range(len(budgets)), [budget_name(budget) for budget in budgets])
    axis.set_xlabel("token budget")
    axis.grid(True, axis="y", color="#dddddd", linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _band(axis: Any, xs: Sequence[float], estimates: list[Mapping[str, float]], **line: Any) -> None:
    means = [estimate["mean"] for estimate in estimates]
    below = [estimate["mean"] - estimate["low"] for estimate in estimates]
    above = [estimate["high"] - estimate["mean"] for estimate in estimates]
    axis.errorbar(xs, means, yerr=[below, above], marker="o", markersize=4, capsize=3, linewidth=1.6, **line)


def _draw_scores(axis: Any, budgets: Sequence[int], rows: Sequence[Mapping[str, Any]]) -> None:
    contexts = sorted({row["context"] for row in rows})
    lines = sorted({(row["context"], row["mode"]) for row in rows})
    for number, (context, mode) in enumerate(lines):
        mine = [row for row in rows if (row["context"], row["mode"]) == (context, mode)]
        shift = 0.06 * (number - (len(lines) - 1) / 2)  # so that intervals do not hide one another
        _band(
            axis,
            [budgets.index(row["budget"]) + shift for row in mine],
            [row["score"] for row in mine],
            color=COLOURS[contexts.index(context) % len(COLOURS)],
            linestyle=STYLES[mode],
            label=f"{context} tokens, question in {mode}",
        )
    _axis(axis, budgets)
    axis.set_ylim(0, 1.02)
    axis.set_ylabel("mean score over tasks, 95% interval")
    axis.legend(frameon=False, fontsize=8)


def _draw_kl(axis: Any, budgets: Sequence[int], cells: Sequence[Mapping[str, Any]]) -> None:
    sparse = [budget for budget in budgets if budget != DENSE]
    for number, context in enumerate(sorted({cell["context"] for cell in cells})):
        mine = [cell for cell in cells if cell["context"] == context]
        xs = [sparse.index(cell["budget"]) for cell in mine]
        _band(axis, xs, [cell["kl"] for cell in mine], color=COLOURS[number % len(COLOURS)], label=f"{context} tokens")
    _axis(axis, sparse)
    axis.set_ylim(bottom=0)
    axis.set_ylabel("KL to dense, nats a token, 95% interval")
    axis.legend(frameon=False, fontsize=8)
