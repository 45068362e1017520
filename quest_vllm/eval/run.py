"""One evaluation from its options to its files: measure, report."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from quest_vllm.errors import QuestValueError
from quest_vllm.eval.plot import plot_run
from quest_vllm.eval.report import render, summarise
from quest_vllm.eval.session import Options, Session
from quest_vllm.eval.text import CONTINUATION, TEXT, TextSource, load_text

REPORT, FIGURE = "results.json", "results.png"


@dataclass(frozen=True)
class Outcome:
    """What a run left behind: its document, and how many units failed."""

    document: dict[str, Any]
    failed: int


def evaluate(options: Options, command: str) -> Outcome:
    """Run what is not done yet and write all files.

    Raises :class:`QuestValueError` for options that cannot be, and :class:`~quest_vllm.errors.EvalUnavailable` for
    a target that cannot be used.
    """
    source = _text_source(options)
    if options.is_url:
        from quest_vllm.eval.http_runner import run_over_http as runner
    else:
        from quest_vllm.eval.engine_runner import run_in_process as runner
    facts, session = runner(options, source)
    session.store.close()
    return _report(options, command, facts, session)


def _text_source(options: Options) -> TextSource | None:
    """The running text; known even where no task reads it, so that such a task may be added to a finished run."""
    try:
        return load_text(options.text)
    except QuestValueError:
        if options.text is not None or {TEXT, CONTINUATION} & set(options.plan.tasks):
            raise
        return None


def _report(options: Options, command: str, facts: dict[str, Any], session: Session) -> Outcome:
    records = session.store.records(session.planned)
    summary = summarise(options.plan, records)
    document = {
        "benchmark": "eval",
        "command": command,
        "settings": _settings(options, session, facts),
        "environment": environment(),
        "summary": summary,
        "items": records,
    }
    path = options.output / REPORT
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(render(options.plan, summary))
    print(f"\nraw results: {path}")
    if plot_run(document, options.output / FIGURE):
        print(f"plot: {options.output / FIGURE}")
    else:
        print("no plot: matplotlib is not installed (pip install matplotlib, then run the same command again)")
    return Outcome(document, sum("error" in record for record in records))


def _settings(options: Options, session: Session, facts: dict[str, Any]) -> dict[str, Any]:
    plan = options.plan
    return {
        **session.identity,
        "budgets": list(plan.budgets),
        "tasks": list(plan.tasks),
        "contexts": list(plan.contexts),
        "items": plan.items,
        "modes": list(plan.modes),
        "concurrency": options.concurrency,
        "decoding": "greedy",
        **facts,
    }


def _commit() -> str | None:
    """The commit of this package's checkout; None where it is installed without one."""
    package = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "-C", str(package), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
        listed = subprocess.run(
            ["git", "-C", str(package), "ls-files", "--error-unmatch", "run.py"], capture_output=True, check=False
        )
    except OSError:
        return None
    return found.stdout.strip() if found.returncode == 0 and listed.returncode == 0 else None


def environment() -> dict[str, Any]:
    """Versions and machine."""
    versions = {}
    for name in ("quest-vllm", "vllm", "torch", "transformers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "commit": _commit(),
        "versions": versions,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
    }
