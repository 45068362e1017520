"""One sweep from its options to its files."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quest_vllm.bench.measure import StreamingEndpoint, run_round
from quest_vllm.bench.plan import STOCK, Cell, Options, series_name
from quest_vllm.bench.plot import plot_sweep
from quest_vllm.bench.prompts import Prompts
from quest_vllm.bench.server import (
    machine_environment,
    quest_command,
    serve_flags,
    started,
    stock_command,
    stock_environment,
)
from quest_vllm.bench.summary import render, summarise
from quest_vllm.errors import EvalUnavailable, QuestValueError
from quest_vllm.eval.http_runner import RequestFailed
from quest_vllm.eval.plan import DENSE
from quest_vllm.eval.progress import Progress
from quest_vllm.eval.prompts import load_codec
from quest_vllm.eval.run import environment
from quest_vllm.eval.text import TextSource, load_text

REPORT, FIGURES = "results.json", ("results.png", "results.svg")
WARM_UP_TOKENS = 4
FAILURES_IN_A_ROW = 3


@dataclass
class Sweep:
    """A sweep in progress."""

    options: Options
    source: TextSource
    progress: Progress
    rounds: list[dict[str, Any]] = field(default_factory=list)
    servers: dict[str, dict[str, Any]] = field(default_factory=dict)
    model: str = ""
    in_a_row: int = 0

    @property
    def failed(self) -> int:
        """Rounds that failed."""
        return sum("error" in record for record in self.rounds)

    @property
    def complete(self) -> bool:
        """Whether every round was tried."""
        return len(self.rounds) == self.options.rounds


def bench(options: Options, command: str) -> Sweep:
    """Run a sweep and write all files, also of a sweep that was broken off.

    Raises :class:`QuestValueError` for options that cannot be, and :class:`EvalUnavailable` where a server cannot be
    used.
    """
    source = load_text(options.text)
    sweep = Sweep(options, source, Progress(options.rounds))
    try:
        with sweep.progress:
            _drive(sweep)
    finally:
        if sweep.rounds:
            _report(sweep, command)
    return sweep


def _drive(sweep: Sweep) -> None:
    """All rounds. Against stock, the two servers take turns, so that both see the machine's good and bad minutes."""
    options = sweep.options
    if not options.with_stock:
        with _target(sweep) as url:
            asyncio.run(_measure(sweep, url, options.budgets, range(options.repeats)))
        return
    for repeat in range(options.repeats):
        with _reference(sweep) as url:
            asyncio.run(_measure(sweep, url, (STOCK,), [repeat]))
        with _target(sweep) as url:
            asyncio.run(_measure(sweep, url, options.budgets, [repeat]))


@contextlib.contextmanager
def _target(sweep: Sweep) -> Iterator[str]:
    options = sweep.options
    if options.is_url:
        yield options.target
        return
    with _start(sweep, "quest", quest_command(options.target), machine_environment()) as url:
        yield url


@contextlib.contextmanager
def _reference(sweep: Sweep) -> Iterator[str]:
    options = sweep.options
    if options.against != "stock":
        yield options.against
        return
    model = options.target
    if options.is_url:
        model = asyncio.run(_model_of(options))
    with _start(sweep, "stock", stock_command(model), stock_environment(machine_environment())) as url:
        yield url


@contextlib.contextmanager
def _start(sweep: Sweep, name: str, command: list[str], variables: dict[str, str]) -> Iterator[str]:
    options = sweep.options
    flags = serve_flags(options.contexts, options.batches, options.tokens)
    command = [*command, *flags, *options.serve_args]
    shown = command[2:] if command[1] == "-m" else command
    sweep.servers.setdefault(name, {})["command"] = " ".join(shown)
    with started(command, variables, options.output / f"{name}.log", options.start_timeout) as server:
        yield server.url


async def _model_of(options: Options) -> str:
    """The folder or name of the model that the target serves, to start stock vLLM with."""
    async with StreamingEndpoint(options.target, options.api_key, options.timeout, options.model_name) as endpoint:
        await endpoint.describe()
        return endpoint.root or endpoint.model


async def _measure(sweep: Sweep, url: str, budgets: tuple[int, ...], repeats: Sequence[int]) -> None:
    """Rounds of one server."""
    options = sweep.options
    stock = budgets == (STOCK,)
    named = options.model_name if url == options.target else None
    async with StreamingEndpoint(url, options.api_key, options.timeout, named) as endpoint:
        await endpoint.describe()
        codec = load_codec(options.tokenizer or endpoint.root or endpoint.model)
        prompts = Prompts(codec, sweep.source, options.seed)
        _check_lengths(options, endpoint.max_model_len)
        if not stock:
            sweep.model = endpoint.root or endpoint.model
            await _check_budgets(endpoint, budgets, codec.encode("a"))
        await _note_server(sweep, endpoint, "stock" if stock else "quest")
        await _warm_up(endpoint, prompts, Cell(min(options.contexts), 1, DENSE), budgets)
        for repeat in repeats:
            for cell in options.cells(budgets):
                await _one(sweep, endpoint, cell, repeat, prompts.of(cell, repeat))


async def _one(
    sweep: Sweep, endpoint: StreamingEndpoint, cell: Cell, repeat: int, prompts: Sequence[list[int]]
) -> None:
    record = {**cell._asdict(), "series": series_name(cell.budget), "repeat": repeat}
    try:
        record |= await run_round(endpoint, prompts, sweep.options.tokens, cell.budget)
        sweep.in_a_row = 0
    except RequestFailed as problem:
        record["error"] = str(problem)
        sweep.in_a_row += 1
    sweep.rounds.append(record)
    sweep.progress.advance()
    if sweep.in_a_row >= FAILURES_IN_A_ROW:
        raise EvalUnavailable(f"{sweep.in_a_row} rounds in a row failed, the last with {record['error']}")


async def _warm_up(endpoint: StreamingEndpoint, prompts: Prompts, cell: Cell, budgets: tuple[int, ...]) -> None:
    """One short answer a budget, so that no round pays for what is built at first use."""
    for number, budget in enumerate(budgets):
        (prompt,) = prompts.of(cell, -1 - number)
        try:
            await endpoint.stream(prompt, WARM_UP_TOKENS, budget)
        except RequestFailed as problem:
            raise EvalUnavailable(f"{endpoint.url}: the first request failed: {problem}") from None


async def _note_server(sweep: Sweep, endpoint: StreamingEndpoint, name: str) -> None:
    version = await endpoint.get("/version")
    facts = {"model": endpoint.model, "root": endpoint.root, "max_model_len": endpoint.max_model_len}
    facts["vllm"] = version.get("version") if isinstance(version, dict) else None
    facts["sparse_attention"] = await endpoint.get("/v1/sparse_attention") if name == "quest" else None
    sweep.servers.setdefault(name, {"url": endpoint.url}).update(facts)


def _check_lengths(options: Options, longest: int | None) -> None:
    room = None if longest is None else longest - options.tokens
    if room is not None and max(options.contexts) > room:
        raise QuestValueError(
            f"--context: expected at most {room} (the server's max_model_len of {longest} less --tokens "
            f"{options.tokens}), got {max(options.contexts)}"
        )


async def _check_budgets(endpoint: StreamingEndpoint, budgets: tuple[int, ...], prompt: list[int]) -> None:
    """Refuse budgets that the server refuses, and a server that ignores them."""
    told = await endpoint.get("/v1/sparse_attention")
    if isinstance(told, dict) and told.get("object") == "sparse_attention":
        low, high = told["token_budget"]["min"], told["token_budget"]["max"]
        for budget in budgets:
            if budget and not low <= budget <= high:
                raise QuestValueError(
                    f"--budgets: expected dense, or {low} to {high} on this server (GET /v1/sparse_attention), "
                    f"got {budget}"
                )
    elif any(budgets) and not await endpoint.honours_budgets(prompt):
        raise EvalUnavailable(
            f"{endpoint.url}: expected HTTP 400 for the token budget -1, got another answer: this server ignores "
            "budgets, so every series would be the same. Serve the model with `quest-vllm serve`, or ask for "
            "--budgets dense"
        )


def _report(sweep: Sweep, command: str) -> None:
    options = sweep.options
    cells = summarise(options, sweep.rounds)
    document = {
        "benchmark": "bench",
        "command": command,
        "complete": sweep.complete,
        "settings": _settings(sweep),
        "environment": {**environment(), **machine()},
        "servers": sweep.servers,
        "cells": cells,
        "rounds": sweep.rounds,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / REPORT
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(render(options, cells))
    print(f"\nraw results: {path}")
    figures = [options.output / name for name in FIGURES]
    if plot_sweep(document, figures):
        print(f"plot: {', '.join(map(str, figures))}")
    else:
        print("no plot: matplotlib is not installed (pip install matplotlib)")


def _settings(sweep: Sweep) -> dict[str, Any]:
    options = sweep.options
    return {
        "model": sweep.model or options.target,
        "contexts": list(options.contexts),
        "batches": list(options.batches),
        "budgets": list(options.budgets),
        "against": series_name(options.reference),
        "tokens": options.tokens,
        "repeats": options.repeats,
        "seed": options.seed,
        "text": f"{sweep.source.name} {sweep.source.sha256}",
        "serve_args": list(options.serve_args),
        "decoding": "greedy, ignore_eos",
    }


def machine() -> dict[str, Any]:
    """Processor and GPUs of this machine, the client's."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    found: dict[str, Any] = {"cpu": names[0] if names else None, "gpus": []}
    if shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        shown = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=30)
        found["gpus"] = shown.stdout.split("\n")[:-1] if shown.returncode == 0 else []
    return found
