"""Draws what each way to choose keys keeps, reads and costs, from committed JSON. usage: plot_characterisation.py

Reads benchmarks/results/cpu/*-characterise-MODEL-*.json (measure_policies.py --sweep characterise), *-gap-*.json,
*-long-*.json and *-pool-*.json of any machine (--sweep gap, long and pool), the newest attention timings on a CPU and
an H100, and writes docs/img/characterisation-quality.png, docs/img/characterisation-cost.png, and the tables between
the markers of docs/characterisation.md. Needs matplotlib.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import render_results
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = render_results.ROOT
PAGE = ROOT / "docs/characterisation.md"
MODELS = {"smollm2": "SmolLM2-135M", "qwen": "Qwen2.5-Coder-0.5B", "gemma": "Gemma 3 270M"}
BITS = 16  # of an element of the cache
PAGE_TOKENS = 16


@dataclass(frozen=True)
class Way:
    """How one policy is drawn, and what it keeps in memory."""

    title: str
    colour: str
    marker: str


WAYS = {
    "window": Way("window: sink + newest", "#999999", "v"),
    "h2o-like": Way("H2O-like eviction (tokens)", "#e69f00", "^"),
    "original": Way("original Quest", "#d55e00", "s"),
    "box, radius 0.5": Way("box, radius 0.5", "#56b4e9", "D"),
    "key codes, mass": Way("key codes, mass", "#0072b2", "o"),
    "oracle": Way("oracle (reads every key)", "#009e73", "*"),
}
DENSE_COLOUR = "#333333"
DEFAULT = "key codes, mass"
Result = dict[str, Any]


@dataclass
class Measured:
    """A model's results on texts and on needles: the documents they are from, by kind."""

    title: str
    documents: dict[str, tuple[Result, str]] = field(default_factory=dict)

    def results(self, metric: str) -> list[Result]:
        """Every result that has ``metric``, dense first."""
        return [one for document, _ in self.documents.values() for one in document["results"] if metric in one]

    def share_read(self, one: Result) -> float:
        """Bytes of the cache that a sparse layer reads in a step, over dense attention's."""
        document = next(d for d, _ in self.documents.values() if one in d["results"])
        whole = next(r for r in document["results"] if r["policy"] == "oracle" and r["budget"] == one["budget"])
        # the oracle reads all keys and the budget's values: (context + budget) halves of a token's bytes
        dense = whole["bytes_per_layer_and_step"] * 2 * document["context"] / (document["context"] + one["budget"])
        return float(one["bytes_per_layer_and_step"] / dense)


def load() -> list[Measured]:
    """What there is of each model."""
    found = []
    for name, title in MODELS.items():
        model = Measured(title)
        for kind in ("texts", "needles"):
            if loaded := render_results.newest(f"cpu/*-characterise-{name}-{kind}-*.json"):
                model.documents[kind] = loaded
        if model.documents:
            found.append(model)
    return found


def draw_metric(axis: Axes, model: Measured, metric: str, scale: float) -> None:
    """One line a policy, its 95% interval as a bar, over the share of dense attention's bytes that it reads."""
    for policy, way in WAYS.items():
        points = [one for one in model.results(metric) if one["policy"] == policy]
        if points:
            x = [100 * model.share_read(one) for one in points]
            y = [scale * one[metric]["mean"] for one in points]
            below = [scale * (one[metric]["mean"] - one[metric]["low"]) for one in points]
            above = [scale * (one[metric]["high"] - one[metric]["mean"]) for one in points]
            style = {"color": way.colour, "marker": way.marker, "markersize": 6, "linewidth": 1.3, "capsize": 2}
            axis.errorbar(x, y, yerr=[below, above], label=way.title, **style)
    axis.set_xscale("log")
    axis.set_xticks([3, 5, 10, 20, 40, 60], ["3%", "5%", "10%", "20%", "40%", "60%"])
    axis.minorticks_off()
    axis.grid(alpha=0.25)


def draw_quality(models: list[Measured]) -> Figure:
    """Two rows: KL to dense on running text, needles found."""
    figure = Figure(figsize=(4.3 * len(models), 7.4), layout="constrained")
    axes = figure.subplots(2, len(models), squeeze=False)
    for column, model in enumerate(models):
        above, below = axes[0][column], axes[1][column]
        draw_metric(above, model, "kl", 1.0)
        above.set_yscale("log")
        above.set_title(f"{model.title}: {describe(model, 'texts')}", fontsize=10)
        draw_metric(below, model, "needle_hits", 100.0)
        for dense in [one for one in model.results("needle_hits") if one["policy"] == "dense"]:
            below.axhline(100 * dense["needle_hits"]["mean"], color=DENSE_COLOUR, linestyle="--", linewidth=1)
        below.set_ylim(-4, 104)
        below.set_title(describe(model, "needles"), fontsize=10)
        below.set_xlabel("bytes of the cache read, of dense attention's")
        for axis, kind in ((above, "texts"), (below, "needles")):
            if kind not in model.documents:
                axis.axis("off")
    axes[0][0].set_ylabel("KL to dense, nats a token (lower is better)")
    axes[1][0].set_ylabel("needles answered, % (dashed: dense)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(models), frameon=False)
    return figure


def describe(model: Measured, kind: str) -> str:
    """How much was measured."""
    if kind not in model.documents:
        return f"{kind}: not measured"
    document = model.documents[kind][0]
    count = len(document["results"][0]["values"]["kl" if kind == "texts" else "needle_hits"])
    what = f"{count} texts" if kind == "texts" else f"{count} needles"
    return f"{what}, {render_results.size(document['context'])}"


@dataclass(frozen=True)
class Times:
    """Attention of one layer, in microseconds: ``bars`` by policy, None where nothing was measured."""

    title: str
    bars: dict[str, float | None]


def cpu_times() -> list[Times]:
    """From the newest CPU timings that have key codes."""
    loaded = newest_with("cpu/*-ops*.json", lambda document: "sparse_codes" in document["decode"][-1]["steps"])
    if loaded is None:
        return []
    document, _ = loaded
    title = f"CPU, {document['environment']['threads']} thread, %s x{document['shape']['num_reqs']}, budget 1K"
    found = []
    for case in document["decode"]:
        steps = {name: step["min_us"] for name, step in case["steps"].items()}
        if "sparse_codes" in steps:
            bars = {"dense": steps["dense"], "attend alone": steps["attend"]}
            bars |= {"box": steps["sparse"], "key codes": steps["sparse_codes"]}
            found.append(Times(title % render_results.size(case["context"]), bars))
    return found


def gpu_times() -> list[Times]:
    """From the newest chain on a GPU."""
    loaded = render_results.newest("h100/*-chain.json")
    if loaded is None:
        return []
    found = []
    for case in loaded[0]["cases"]:
        launch = case["cuda"]["in_graph"]
        attend = launch * sum(case["stages"][stage] for stage in ("inputs", "attend", "merge"))
        codes = case.get("cuda_key_codes", {}).get("in_graph")
        shape = f"{render_results.size(case['context'])} x{case['batch']}, budget {render_results.size(case['budget'])}"
        bars = {"dense": case["fa3"]["in_graph"], "attend alone": attend, "box": launch, "key codes": codes}
        found.append(Times(f"H100, {shape}", bars))
    return found


def newest_with(pattern: str, wanted: Any) -> tuple[Result, str] | None:
    """The newest file of a kind that ``wanted`` accepts."""
    for path in reversed(render_results.in_order(pattern)):
        document = json.loads(path.read_text())
        if wanted(document):
            return document, str(path.relative_to(ROOT))
    return None


BARS = {"dense": DENSE_COLOUR, "attend alone": "#e69f00", "box": "#56b4e9", "key codes": "#0072b2"}


def draw_cost(context: int = 32768, budget: int = 2048) -> Figure:
    """Memory that each way keeps for a long context, and the time of one layer's attention beside dense."""
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    memory, *others = figure.subplots(1, 3, width_ratios=[1, 1.1, 1.5])
    kept = {"dense": 1.0, "window": budget / context, "H2O-like": budget / context, "Quest: box or codes": 1 + 1 / 16}
    colours = [DENSE_COLOUR, WAYS["window"].colour, WAYS["h2o-like"].colour, WAYS["key codes, mass"].colour]
    bars = memory.bar(list(kept), [100 * share for share in kept.values()], color=colours)
    memory.bar_label(bars, fmt="%.1f%%", fontsize=9)
    memory.set_title(f"KV memory of {render_results.size(context)} tokens, budget {render_results.size(budget)}")
    memory.set_ylabel("of the dense cache")
    memory.tick_params(axis="x", labelrotation=15)
    for axis, times in zip(others, (cpu_times(), gpu_times()), strict=True):
        draw_times(axis, times)
    others[0].set_title("attention of one layer, CPU")
    others[1].set_title("attention of one layer, H100")
    others[0].set_ylabel("time, of dense attention's")
    handles = list(others[1].get_legend_handles_labels()[0])
    figure.legend(handles, list(BARS), loc="outside lower center", ncols=4, frameon=False)
    return figure


def draw_times(axis: Axes, found: list[Times]) -> None:
    """Groups of bars, each group one shape, dense 1."""
    for number, (name, colour) in enumerate(BARS.items()):
        heights = [(times.bars[name] or 0) / (times.bars["dense"] or 1) for times in found]
        places = [group + 0.2 * (number - 1.5) for group in range(len(found))]
        axis.bar(places, heights, 0.19, color=colour, label=name)
    labels = [times.title.split(", ", 1)[1].replace("1 thread, ", "").replace(", budget ", "\n") for times in found]
    axis.set_xticks(range(len(found)), labels, fontsize=8)
    axis.set_xlabel("context x batch, budget below", fontsize=9)
    axis.grid(axis="y", alpha=0.25)


def quality_table() -> list[str]:
    """One line a model, budget and policy."""
    lines = ["| model | budget | policy | bytes read | KL to dense | needles answered | NLL of the answer |"]
    lines.append("|---|---|---|---|---|---|---|")
    for model in load():
        for dense in [one for one in model.results("needle_hits") if one["policy"] == "dense"]:
            cells = f"{number(dense, 'needle_hits', 100)} | {number(dense, 'needle_nll')}"
            lines.append(f"| {model.title} | all | dense | 100% | 0 | {cells} |")
        budgets = sorted({one["budget"] for one in model.results("kl") + model.results("needle_hits")} - {0})
        for budget in budgets:
            for policy, way in WAYS.items():
                lines += table_line(model, budget, policy, way)
    return lines


def table_line(model: Measured, budget: int, policy: str, way: Way) -> list[str]:
    """One line, or none where the model has no such result."""
    own = {
        metric: next((o for o in model.results(metric) if (o["policy"], o["budget"]) == (policy, budget)), None)
        for metric in ("kl", "needle_hits", "needle_nll")
    }
    present = [one for one in own.values() if one]
    if not present:
        return []
    share = " / ".join(dict.fromkeys(f"{100 * model.share_read(one):.0f}%" for one in present))
    cells = [
        number(own["kl"], "kl"),
        number(own["needle_hits"], "needle_hits", 100),
        number(own["needle_nll"], "needle_nll"),
    ]
    return [f"| {model.title} | {budget} | {way.title} | {share} | {' | '.join(cells)} |"]


def number(one: Result | None, metric: str, percent: int = 0) -> str:
    """A mean and its interval."""
    if one is None:
        return ""
    mean, low, high = (one[metric][part] for part in ("mean", "low", "high"))
    if percent:
        return f"{100 * mean:.0f}% ({100 * low:.0f} to {100 * high:.0f})"
    return f"{mean:.3f} ({low:.3f} to {high:.3f})"


def gap_table() -> list[str]:
    """Of the way from the original to the oracle, how much each of ours goes."""
    lines = ["| model | budget | policy | KL | NLL of the answer |", "|---|---|---|---|---|"]
    for model in load():
        for budget in sorted({one["budget"] for one in model.results("kl") + model.results("needle_nll")} - {0}):
            for policy in ("box, radius 0.5", "key codes, mass"):
                cells = [closed(model.results(metric), budget, policy, metric) for metric in ("kl", "needle_nll")]
                lines.append(f"| {model.title} | {budget} | {WAYS[policy].title} | {' | '.join(cells)} |")
    return lines


def closed(results: list[Result], budget: int, policy: str, metric: str) -> str:
    """The share of the gap closed and its interval; nothing where original and oracle cannot be told apart."""
    rows = {one["policy"]: one for one in results if one["budget"] == budget}
    if policy not in rows or metric not in rows[policy].get("gap_closed", {}):
        return ""
    if rows["original"][metric]["low"] <= rows["oracle"][metric]["high"]:
        return "no gap"
    low, high = rows[policy]["gap_closed_95"][metric]
    return f"{100 * rows[policy]['gap_closed'][metric]:.0f}% ({100 * low:.0f} to {100 * high:.0f})"


def swept(sweep: str) -> list[Result]:
    """The newest document of each model, context and what was measured (texts, questions, both), of any machine."""
    found: dict[tuple[str, ...], Result] = {}
    for path in render_results.in_order(f"*/*-{sweep}-*.json"):
        document = json.loads(path.read_text())
        if document.get("benchmark") == "page_policies":
            measured = sorted(document["results"][0]["values"])
            found[document["model"], f"{document['context']:9d}", *measured] = document | {
                "path": str(path.relative_to(ROOT))
            }
    return [found[key] for key in sorted(found)]


def measured_on(document: Result) -> str:
    """The model with its source, and how much was measured."""
    values = document["results"][0]["values"]
    counts = [f"{len(values[m])} {what}" for m, what in (("kl", "texts"), ("needle_nll", "questions")) if m in values]
    link = f"[{document['model']}](../{document['path']})"
    return f"{link}, {render_results.size(document['context'])}, {' and '.join(counts)}"


def policies_of(document: Result) -> list[Result]:
    """Every result but dense's, by budget, in the order of the sweep."""
    return sorted((one for one in document["results"] if one["budget"]), key=lambda one: one["budget"])


def bytes_beside_default(document: Result, one: Result) -> str:
    """Bytes read in a layer and step, as a share of what the default policy reads at the same budget."""
    base = next(r for r in policies_of(document) if (r["policy"], r["budget"]) == (DEFAULT, one["budget"]))
    return f"{100 * one['bytes_per_layer_and_step'] / base['bytes_per_layer_and_step']:.0f}%"


def swept_table(sweep: str, columns: str, cells_of: Callable[[Result, Result], list[str]]) -> list[str]:
    """One line a model, budget and policy of a sweep; ``cells_of``: what a document and a result of it say."""
    titles = f"| model, context | budget | policy | {columns} |"
    lines = [titles, "|---" * (titles.count("|") - 1) + "|"]
    for document in swept(sweep):
        for one in policies_of(document):
            cells = [measured_on(document), str(one["budget"]), one["policy"], *cells_of(document, one)]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def gap_cells(document: Result, one: Result) -> list[str]:
    """How much of the way from the original to the oracle a policy goes."""
    key = (document["results"], one["budget"], one["policy"])
    closed_gaps = (closed(*key, "kl"), closed(*key, "needle_nll"))
    return [bytes_beside_default(document, one), shown(one, "kl"), *closed_gaps, shown(one, "needle_hits", 100)]


def long_cells(_: Result, one: Result) -> list[str]:
    """What is lost against dense, paired."""
    lost = one["minus_dense"]
    return [shown(one, "kl"), shown(lost, "text_nll"), shown(lost, "needle_nll"), shown(lost, "needle_hits", 100)]


def pool_cells(_: Result, one: Result) -> list[str]:
    """What a policy loses."""
    return [shown(one, "kl"), shown(one, "needle_nll"), shown(one, "needle_hits", 100)]


SWEPT = {
    "gap": ("bytes | KL to dense | KL gap closed | NLL gap closed | answered", gap_cells),
    "long": ("KL to dense | NLL of the text | NLL of the answer | answered", long_cells),
    "pool": ("KL to dense | NLL of the answer | answered", pool_cells),
}


def shown(of: Result, metric: str, percent: int = 0) -> str:
    """:func:`number`, or nothing where ``of`` lacks the metric."""
    return number(of if metric in of else None, metric, percent)


def time_table() -> list[str]:
    """Microseconds of each shape."""
    lines = [f"| shape | {' | '.join(BARS)} |", "|---" * (len(BARS) + 1) + "|"]
    for times in cpu_times() + gpu_times():
        cells = [f"{value:.0f}" if value else "not measured" for value in times.bars.values()]
        lines.append(f"| {times.title} | {' | '.join(cells)} |")
    return lines


def replace(text: str, name: str, lines: list[str]) -> str:
    """``text`` with ``lines`` between the markers of ``name``."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    head, rest = text.split(begin)
    _, tail = rest.split(end)
    return "\n".join([head + begin, "", *lines, "", end + tail])


def main() -> None:
    """Draw both figures and write the tables."""
    models = load()
    if not models:
        raise SystemExit("no results: run benchmarks/measure_policies.py MODEL --sweep characterise")
    draw_quality(models).savefig(ROOT / "docs/img/characterisation-quality.png", dpi=110)
    draw_cost().savefig(ROOT / "docs/img/characterisation-cost.png", dpi=110)
    text = PAGE.read_text()
    tables = {"gap": gap_table(), "quality": quality_table(), "times": time_table()}
    tables |= {f"swept-{sweep}": swept_table(sweep, *how) for sweep, how in SWEPT.items()}
    for name, lines in tables.items():
        text = replace(text, name, lines)
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
