"""One evaluation from its options to its files: resume, measure, report."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from quest_vllm.errors import QuestValueError
from quest_vllm.eval.http_runner import Endpoint, run_units
from quest_vllm.eval.library import Library
from quest_vllm.eval.plan import DECODE, PREFILL, EvalUnavailable, Plan, ResultStore, Unit
from quest_vllm.eval.plot import plot_run
from quest_vllm.eval.progress import Progress
from quest_vllm.eval.prompts import load_codec
from quest_vllm.eval.report import render, summarise
from quest_vllm.eval.text import CONTINUATION, TEXT, TextSource, load_text

ASK_THE_SERVER = "the server's own"
RAW, REPORT, FIGURE = "items.jsonl", "results.json", "results.png"


@dataclass(frozen=True)
class Options:
    """Everything that the command line says. Modes None: what the runner can do."""

    target: str
    plan: Plan
    output: Path
    concurrency: int = 8
    tokenizer: str | None = None
    model_name: str | None = None
    api_key: str = "-"
    timeout: float = 600.0
    chat_template: bool = False
    text: Path | None = None
    text_tokens: int = 64
    engine_args: dict[str, Any] | None = None

    @property
    def is_url(self) -> bool:
        """Whether the target is a server."""
        return self.target.startswith(("http://", "https://"))


@dataclass(frozen=True)
class Outcome:
    """What a run left behind: its document, and how many units failed."""

    document: dict[str, Any]
    failed: int


def evaluate(options: Options, command: str) -> Outcome:
    """Run what is not done yet and write all files.

    Raises :class:`QuestValueError` for options that cannot be, :class:`EvalUnavailable` for a target that cannot.
    """
    source = _text_source(options)
    if options.is_url:
        facts, store = asyncio.run(_over_http(options, source))
    else:
        from quest_vllm.eval.engine_runner import run_in_process

        facts, store = run_in_process(options, source)
    store.close()
    return _report(options, command, facts, store)


def _text_source(options: Options) -> TextSource | None:
    """The running text; known even where no task reads it, so that such a task may be added to a finished run."""
    try:
        return load_text(options.text)
    except QuestValueError:
        if options.text is not None or {TEXT, CONTINUATION} & set(options.plan.tasks):
            raise
        return None


def _report(options: Options, command: str, facts: dict[str, Any], store: ResultStore) -> Outcome:
    records = store.records(planned(options.plan))
    summary = summarise(options.plan, records)
    document = {
        "benchmark": "eval",
        "command": command,
        "settings": settings(options, facts),
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


def planned(plan: Plan) -> list[Unit]:
    """Every unit of ``plan``; running text is read in decode, a continuation has no question."""
    return list(plan.units(only_decode=(TEXT,), only_prefill=(CONTINUATION,)))


def identity(options: Options, model: str, source: TextSource | None, policy: object) -> dict[str, Any]:
    """What two records must share to be compared: the resume file holds it."""
    return {
        "model": model,
        "seed": options.plan.seed,
        "chat_template": options.chat_template,
        "text": f"{source.name} {source.sha256}" if source else None,
        "text_tokens": options.text_tokens,
        "policy": policy,
    }


def settings(options: Options, facts: dict[str, Any]) -> dict[str, Any]:
    """The plan and whatever the runner found out, for the JSON."""
    plan = options.plan
    return {
        "budgets": list(plan.budgets),
        "tasks": list(plan.tasks),
        "contexts": list(plan.contexts),
        "items": plan.items,
        "modes": list(plan.modes),
        "concurrency": options.concurrency,
        "decoding": "greedy",
        **facts,
    }


def environment() -> dict[str, Any]:
    """Versions and machine."""
    versions = {}
    for name in ("quest-vllm", "vllm", "torch", "transformers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
    }


def pending(store: ResultStore, units: Sequence[Unit]) -> list[Unit]:
    """Units without a result; says so where some have one."""
    left = [unit for unit in units if not store.is_done(unit)]
    if len(left) < len(units):
        print(f"resuming: {len(units) - len(left)} of {len(units)} measurements are in {store.path}", file=sys.stderr)
    return left


async def _over_http(options: Options, source: TextSource | None) -> tuple[dict[str, Any], ResultStore]:
    plan = options.plan
    if TEXT in plan.tasks:
        raise QuestValueError(f"--tasks: {TEXT} forces tokens in decode and needs a model in process, got a URL")
    if DECODE in plan.modes:
        raise QuestValueError(
            f"--question: expected {PREFILL} for a URL (decode needs a model in process), got {DECODE}"
        )
    async with Endpoint(options.target, options.api_key, options.timeout, options.model_name) as endpoint:
        await endpoint.describe()
        codec = load_codec(options.tokenizer or _tokenizer_of(endpoint), options.chat_template)
        library = Library(codec, plan, source, options.text_tokens)
        library.check()
        _check_lengths(library, endpoint.max_model_len)
        if any(plan.budgets) and not await endpoint.honours_budgets(codec.encode("a")):
            raise EvalUnavailable(
                f"{endpoint.url}: expected HTTP 400 for the token budget -1, got another answer: this server ignores "
                "budgets, so every column would be the same. Serve the model with `quest-vllm serve`, or ask for "
                "--budgets dense"
            )
        store = ResultStore(options.output / RAW, identity(options, endpoint.model, source, ASK_THE_SERVER))
        units = planned(plan)
        left = pending(store, units)
        with Progress(len(units), len(units) - len(left)) as progress:
            await run_units(endpoint, left, library, store, options.concurrency, progress.advance)
    facts = {"runner": "http", "url": endpoint.url, "max_model_len": endpoint.max_model_len}
    return {**identity(options, endpoint.model, source, ASK_THE_SERVER), **facts}, store


def _tokenizer_of(endpoint: Endpoint) -> str:
    """The model's folder as the server names it, where that is on this machine; else the model's name."""
    return endpoint.root or endpoint.model


def _check_lengths(library: Library, longest: int | None) -> None:
    plan = library.plan
    if longest is None:
        return
    needed = max(plan.contexts) + library.longest_answer()
    if needed > longest:
        raise QuestValueError(
            f"--context: expected at most {longest - library.longest_answer()} (the server's max_model_len of "
            f"{longest} less the answer), got {max(plan.contexts)}"
        )
    if max(plan.budgets) > longest:
        raise QuestValueError(
            f"--budgets: expected at most the server's max_model_len of {longest}, got {max(plan.budgets)}"
        )
