"""One figure of a run: change of the mean score by budget and mode, KL by budget. Only this needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quest_vllm.eval.plan import DECODE, DENSE, PREFILL
from quest_vllm.eval.text import TEXT

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
GREY = "#666666"
Row = Mapping[str, Any]


def plot_run(document: Mapping[str, Any], path: Path) -> bool:
    """Draw ``document`` into the PNG ``path``; False where matplotlib is not installed.

    Nothing is drawn where no sparse budget has a result.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    settings, summary = document["settings"], document["summary"]
    budgets = [budget for budget in settings["budgets"] if budget != DENSE]
    modes = [mode for mode in (DECODE, PREFILL) if _changes(summary, mode)]
    kl = [cell for cell in summary["cells"] if cell["task"] == TEXT and "kl" in cell and cell["budget"] != DENSE]
    count = len(modes) + bool(kl)
    if not count:
        return True
    figure = Figure(figsize=(4.6 * count, 4.0), layout="constrained")
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for axis, mode in zip(axes, modes, strict=False):
        _draw_changes(axis, budgets, summary, mode)
    _share_limits(axes[: len(modes)])
    if kl:
        _draw_kl(axes[-1], budgets, kl)
    scored = len(
        [task for task in settings["tasks"] if any(c["task"] == task and "score" in c for c in summary["cells"])]
    )
    tasks = f"{scored} tasks, " if scored else ""
    figure.suptitle(
        f"{Path(settings['model']).name}: {tasks}{settings['items']} items each, 95% intervals", fontsize=11
    )
    figure.savefig(path, dpi=144)
    return True


def _changes(summary: Row, mode: str) -> list[Row]:
    return [row for row in summary["overall"] if row["mode"] == mode and "score_change" in row]


def _share_limits(axes: Sequence[Any]) -> None:
    if axes:
        limits = [axis.get_ylim() for axis in axes]
        for axis in axes:
            axis.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))


def _dress(axis: Any, budgets: Sequence[int], title: str) -> None:
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xticks(range(len(budgets)), [str(budget) for budget in budgets])
    axis.set_xlim(-0.35, len(budgets) - 0.65)
    axis.set_xlabel("token budget")
    axis.grid(True, axis="y", color="#e4e4e4", linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _line(
    axis: Any, budgets: Sequence[int], rows: Sequence[Row], metric: str, place: tuple[int, int], label: str
) -> None:
    """One context's line with its intervals; ``place`` is (number, of how many), which shifts it a little sideways."""
    number, count = place
    shift = 0.07 * (number - (count - 1) / 2)
    estimates = [row[metric] for row in rows]
    axis.errorbar(
        [budgets.index(row["budget"]) + shift for row in rows],
        [estimate["mean"] for estimate in estimates],
        yerr=[
            [max(0.0, estimate["mean"] - estimate["low"]) for estimate in estimates],
            [max(0.0, estimate["high"] - estimate["mean"]) for estimate in estimates],
        ],
        color=COLOURS[number % len(COLOURS)],
        marker="o",
        markersize=4.5,
        capsize=3,
        linewidth=1.6,
        elinewidth=1.2,
        label=label,
    )


def _draw_changes(axis: Any, budgets: Sequence[int], summary: Row, mode: str) -> None:
    rows = _changes(summary, mode)
    dense = {r["context"]: r["score"]["mean"] for r in summary["overall"] if (r["mode"], r["budget"]) == (mode, DENSE)}
    contexts = sorted({row["context"] for row in rows})
    axis.axhline(0, color=GREY, linewidth=1.2, linestyle=":")
    for number, context in enumerate(contexts):
        mine = [row for row in rows if row["context"] == context]
        label = f"{context} tokens (dense scores {dense[context]:.2f})"
        _line(axis, budgets, mine, "score_change", (number, len(contexts)), label)
    _dress(axis, budgets, f"Score, question in {mode}")
    axis.set_ylabel("change from dense, mean over tasks")
    axis.legend(frameon=False, fontsize=8, loc="lower left")


def _draw_kl(axis: Any, budgets: Sequence[int], cells: Sequence[Row]) -> None:
    contexts = sorted({cell["context"] for cell in cells})
    for number, context in enumerate(contexts):
        mine = [cell for cell in cells if cell["context"] == context]
        _line(axis, budgets, mine, "kl", (number, len(contexts)), f"{context} tokens")
    _dress(axis, budgets, "Running text, decode")
    axis.set_ylim(bottom=0)
    axis.set_ylabel("KL to dense, nats a token")
    axis.legend(frameon=False, fontsize=8, loc="upper left")
