"""A run's records turned into one JSON document and the table that the terminal shows."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from quest_vllm.eval.plan import DECODE, DENSE, PREFILL, Plan
from quest_vllm.eval.scoring import agreement
from quest_vllm.eval.stats import bootstrap_mean
from quest_vllm.eval.text import CONTINUATION, TEXT

Record = Mapping[str, Any]
Pair = tuple[Record, Record]
"""A record and the dense record of the same item and mode."""
BLIND = 0.2
"""A dense score below this leaves a budget little to lose; the table says so."""
MODE_TITLES = {PREFILL: "question in prefill (dense)", DECODE: "question in decode (sparse)"}


def summarise(plan: Plan, records: Sequence[Record]) -> dict[str, Any]:
    """Cells (task, context, mode, budget) and means over them, each with its interval.

    Every change is paired: the same items at a budget and dense. Failed or missing items are left out and counted.
    """
    pairs = _pairs(records)
    tried = {_key(record) for record in records}
    keys = itertools.product((DECODE, PREFILL), plan.contexts, plan.tasks, plan.budgets)
    cells = [
        _cell(plan, (task, context, mode, budget), pairs)
        for mode, context, task, budget in keys
        if (task, context, mode, budget) in tried
    ]
    overall = [
        _overall(plan, mode, context, budget, pairs)
        for mode, context, budget in itertools.product((DECODE, PREFILL), plan.contexts, plan.budgets)
    ]
    return {"cells": cells, "overall": [row for row in overall if row["tasks"]]}


Key = tuple[str, int, str, int]


def _key(record: Record) -> Key:
    return record["task"], record["context"], record["mode"], record["budget"]


def _pairs(records: Sequence[Record]) -> dict[Key, list[Pair]]:
    """By cell: the items that both its budget and dense have finished, in order."""
    finished: dict[Key, dict[int, Record]] = defaultdict(dict)
    for record in records:
        if "error" not in record:
            finished[_key(record)][record["item"]] = record
    pairs = {}
    for (task, context, mode, budget), by_item in finished.items():
        dense = finished.get((task, context, mode, DENSE), {})
        both = sorted(by_item.keys() & dense.keys())
        pairs[task, context, mode, budget] = [(by_item[item], dense[item]) for item in both]
    return pairs


def _cell(plan: Plan, key: Key, all_pairs: Mapping[Key, list[Pair]]) -> dict[str, Any]:
    task, context, mode, budget = key
    pairs = all_pairs.get(key, [])
    cell: dict[str, Any] = {"task": task, "context": context, "mode": mode, "budget": budget}
    cell["missing"] = plan.items - len(pairs)
    if pairs:
        for name, (value, span) in _metrics(task, budget).items():
            cell[name] = bootstrap_mean([[value(*pair) for pair in pairs]], plan.seed, span).as_json()
    return cell


Metric = tuple[Callable[[Record, Record], float], float | None]


def _metrics(task: str, budget: int) -> dict[str, Metric]:
    """What a cell reports: name -> (value of a pair, the most that it can differ, None without bound)."""
    values: dict[str, Metric]
    if task == TEXT:
        values = {
            "nll": (lambda r, _: r["nll"], None),
            "kl": (lambda r, _: r["kl"], None),
            "top1_agreement": (lambda r, _: r["top1_agreement"], None),
        }
        compared: dict[str, Metric] = {"nll_change": (lambda r, dense: r["nll"] - dense["nll"], None)}
    else:
        values = {} if task == CONTINUATION else {"score": (lambda r, _: r["score"], None)}
        compared = {"agreement": (lambda r, dense: agreement(r["answer"], dense["answer"]), None)}
        if task != CONTINUATION:
            compared["score_change"] = (lambda r, dense: r["score"] - dense["score"], 1.0)
    return values if budget == DENSE else values | compared


def _overall(plan: Plan, mode: str, context: int, budget: int, all_pairs: Mapping[Key, list[Pair]]) -> dict[str, Any]:
    """The mean over tasks that have a score, items resampled within their task."""
    tasks = [task for task in plan.tasks if task not in (TEXT, CONTINUATION)]
    groups = [pairs for task in tasks if (pairs := all_pairs.get((task, context, mode, budget)))]
    row: dict[str, Any] = {"context": context, "mode": mode, "budget": budget, "tasks": len(groups)}
    if not groups:
        return row
    for name, (value, span) in _metrics("", budget).items():
        row[name] = bootstrap_mean([[value(*pair) for pair in pairs] for pairs in groups], plan.seed, span).as_json()
    return row


def budget_name(budget: int) -> str:
    """ "dense" for 0."""
    return "dense" if budget == DENSE else str(budget)


def render(plan: Plan, summary: Mapping[str, Any]) -> str:
    """The tables for the terminal: scores, mean change from dense, text."""
    blocks = [_score_table(plan, summary, mode) for mode in (DECODE, PREFILL)]
    blocks += [_change_table(summary, mode) for mode in (DECODE, PREFILL)]
    blocks += [_text_table(summary), _agreement_table(summary)]
    return "\n\n".join(block for block in blocks if block)


def columns(rows: Iterable[Sequence[str]]) -> str:
    """Rows aligned: the first column to the left, the others to the right."""
    rows = list(rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if not column else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _score_table(plan: Plan, summary: Mapping[str, Any], mode: str) -> str:
    cells = {_key(cell): cell for cell in summary["cells"] if cell["mode"] == mode and "score" in cell}
    rows = [
        [task, str(context), *(_score(cells.get((task, context, mode, budget))) for budget in plan.budgets)]
        for task in plan.tasks
        for context in plan.contexts
        if (task, context, mode, DENSE) in cells
    ]
    if not rows:
        return ""
    blind = sorted(
        {task for (task, _, _, budget), c in cells.items() if budget == DENSE and c["score"]["mean"] < BLIND}
    )
    note = (
        f"\ndense itself scores below {BLIND} somewhere, so no loss can show there: {', '.join(blind)}" if blind else ""
    )
    title = f"Score, {MODE_TITLES[mode]}; ! worse than dense by more than the 95% interval"
    return f"{title}\n{columns([['task', 'context', *map(budget_name, plan.budgets)], *rows])}{note}"


def _score(cell: Record | None) -> str:
    if cell is None:
        return "-"
    change = cell.get("score_change")
    mark = "!" if change and change["high"] < 0 else " "
    return f"{cell['score']['mean']:.2f}{mark}"


def _interval(estimate: Mapping[str, float], signed: bool = False) -> str:
    form = "{:+.3f}" if signed else "{:.3f}"
    mean, low, high = (form.format(estimate[key]) for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _change_table(summary: Mapping[str, Any], mode: str) -> str:
    rows = [
        [
            str(row["context"]),
            budget_name(row["budget"]),
            f"{row['score']['mean']:.3f}",
            _interval(row["score_change"], signed=True) if "score_change" in row else "",
            _interval(row["agreement"]) if "agreement" in row else "",
        ]
        for row in summary["overall"]
        if row["mode"] == mode and "score" in row
    ]
    if not rows:
        return ""
    head = ["context", "budget", "score", "change from dense [95%]", "same text as dense [95%]"]
    return f"Mean over tasks, {MODE_TITLES[mode]}\n{columns([head, *rows])}"


def _text_table(summary: Mapping[str, Any]) -> str:
    rows = [
        [
            str(cell["context"]),
            budget_name(cell["budget"]),
            f"{cell['nll']['mean']:.3f}",
            _interval(cell["nll_change"], signed=True) if "nll_change" in cell else "",
            _interval(cell["kl"]),
            f"{cell['top1_agreement']['mean']:.3f}",
        ]
        for cell in summary["cells"]
        if cell["task"] == TEXT and "nll" in cell
    ]
    head = ["context", "budget", "NLL", "change from dense [95%]", "KL to dense [95%]", "same top token"]
    title = "Running text, teacher-forced (nats a token); dense's KL: a second dense run"
    return f"{title}\n{columns([head, *rows])}" if rows else ""


def _agreement_table(summary: Mapping[str, Any]) -> str:
    rows = [
        [str(cell["context"]), budget_name(cell["budget"]), _interval(cell["agreement"])]
        for cell in summary["cells"]
        if cell["task"] == CONTINUATION and "agreement" in cell
    ]
    head = ["context", "budget", "same text as dense [95%]"]
    return f"Greedy continuation of running text\n{columns([head, *rows])}" if rows else ""
