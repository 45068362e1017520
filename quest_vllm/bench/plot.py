"""One figure of a sweep: inter-token latency and time to first token over context, a column a batch size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quest_vllm.eval.plot import COLOURS, GREY

ROWS = (("itl_ms", "inter-token latency, ms"), ("ttft_ms", "time to first token, ms"))
Cells = Sequence[Mapping[str, Any]]


def plot_sweep(document: Mapping[str, Any], paths: Sequence[Path]) -> bool:
    """Draw ``document`` into each of ``paths`` (the suffix says how); False where matplotlib is not installed."""
    try:
        figure = draw_sweep(document)
    except ImportError:
        return False
    if document["cells"]:
        for path in paths:
            figure.savefig(path, dpi=144)
    return True


def draw_sweep(document: Mapping[str, Any]) -> Any:
    """The figure of ``document``. Raises ImportError where matplotlib is not installed."""
    from matplotlib.figure import Figure

    cells = document["cells"]
    batches = sorted({cell["batch"] for cell in cells})
    series = list(dict.fromkeys(cell["series"] for cell in cells))
    figure = Figure(figsize=(max(5.0, 3.8 * len(batches)), 6.4), layout="constrained")
    axes = figure.subplots(len(ROWS), max(1, len(batches)), squeeze=False, sharey="row")
    for column, batch in enumerate(batches):
        for row, (metric, _) in enumerate(ROWS):
            axis = axes[row][column]
            _draw(axis, [cell for cell in cells if cell["batch"] == batch], series, metric)
            _dress(axis, sorted({cell["context"] for cell in cells}))
        axes[0][column].set_title(f"batch {batch}", fontsize=10, loc="left")
        axes[-1][column].set_xlabel("context, tokens")
    for row, (_, label) in enumerate(ROWS):
        axes[row][0].set_ylabel(label)
        axes[row][0].set_ylim(bottom=0)  # when all columns are drawn: they share it, and it ends the scaling
    if any(cell[ROWS[0][0]] for cell in cells):
        axes[0][0].legend(frameon=False, fontsize=8, title="token budget", title_fontsize=8, handlelength=4)
    figure.suptitle(f"{Path(document['settings']['model']).name}: median, and up to the 90th percentile", fontsize=11)
    return figure


def _draw(axis: Any, cells: Cells, series: Sequence[str], metric: str) -> None:
    for number, name in enumerate(series):
        mine = [cell for cell in cells if cell["series"] == name and cell[metric]]
        if not mine:
            continue
        medians = [cell[metric]["p50"] for cell in mine]
        axis.errorbar(
            [cell["context"] for cell in mine],
            medians,
            yerr=[[0.0] * len(mine), [cell[metric]["p90"] - m for cell, m in zip(mine, medians, strict=True)]],
            color=GREY if name in ("stock", "dense") else COLOURS[number % len(COLOURS)],
            linestyle={"stock": "--", "dense": "-"}.get(name, "-"),
            marker="o",
            markersize=4,
            capsize=3,
            linewidth=1.6,
            elinewidth=1.0,
            label=name,
        )


def _dress(axis: Any, contexts: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(contexts, [f"{c // 1024}K" if c % 1024 == 0 else str(c) for c in contexts])
    axis.minorticks_off()
    axis.grid(True, axis="y", color="#e4e4e4", linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
