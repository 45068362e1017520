"""A long mixed load on a real server: nothing fails, nothing is lost or crossed, memory stays, every summary is right.

    python benchmarks/soak.py MODEL --minutes 30 --output FILE

Starts ``quest-vllm serve`` with a KV cache too small for its load (so that it preempts), with the running audit on, and
drives it with streams, whole answers, chats, several answers to a prompt, clients that leave, shared prefixes, budgets
from 0 to the longest, and malformed requests (soak_load.py says what is checked of each). Memory is judged from the end
of a warm-up, which begins with prompts of many lengths: oneDNN keeps a compiled kernel for every number of tokens in a
step and every shape of linear layer, 1024 at most, which is hundreds of MiB that would look like a leak
(measure_linear_memory.py). At the end, with streams running, every page summary in the KV cache is compared with its
keys. Exit code 1 if anything was found.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from provenance import commit, cpu_model, save
from soak_load import ACTIONS, Load, Tally, schema_fields

from quest_vllm.bench.server import machine_environment, quest_command, started

HERE = Path(__file__).resolve().parent
SAMPLE_SECONDS = 10.0
STEP_TOKENS = 256
FLAT_MIB, FLAT_SHARE = 16.0, 0.02
METRICS = {
    "preemptions": "vllm:num_preemptions_total",
    "prefix_cache_hit_tokens": "vllm:prefix_cache_hits_total",
    "generation_tokens": "vllm:generation_tokens_total",
    "rows_sparse": 'quest_decode_rows_total{path="sparse",reason="budget"}',
    "rows_no_budget": 'quest_decode_rows_total{path="dense",reason="no_budget"}',
    "rows_covered": 'quest_decode_rows_total{path="dense",reason="budget_covers_context"}',
    "rows_unsupported": 'quest_decode_rows_total{path="dense",reason="unsupported"}',
    "running_audit_right": 'quest_audit_pages_total{result="right"}',
    "running_audit_wrong": 'quest_audit_pages_total{result="wrong"}',
}
Sample = dict[str, float]


def resident(process: psutil.Process) -> Sample:
    """Resident MiB of a process and its descendants, by name and pid."""
    found = {}
    for one in (process, *process.children(recursive=True)):
        try:
            found[f"{one.name()}/{one.pid}"] = round(one.memory_info().rss / 2**20, 1)
        except psutil.NoSuchProcess:
            continue
    return found


def growth(seconds: Sequence[float], mib: Sequence[float]) -> dict[str, float | bool]:
    """Least-squares line through samples: MiB an hour, and over the samples' span; flat within the tolerance.

    Flat: the line rises by no more than 16 MiB, or 2% of the mean, over the span.
    """
    times, values = np.asarray(seconds, float), np.asarray(mib, float)
    slope = float(np.polyfit(times, values, 1)[0])
    risen = slope * float(times[-1] - times[0])
    allowed = max(FLAT_MIB, FLAT_SHARE * float(values.mean()))
    return {
        "mean_mib": round(float(values.mean()), 1),
        "mib_per_hour": round(3600 * slope, 2),
        "risen_mib": round(risen, 2),
        "allowed_mib": round(allowed, 2),
        "flat": risen <= allowed,
    }


def judge_memory(samples: Sequence[dict[str, Any]], warm_up: float) -> dict[str, Any]:
    """:func:`growth` of every process that lived from the end of the warm-up (seconds) to the last sample."""
    after = [sample for sample in samples if sample["seconds"] >= warm_up]
    if len(after) < 3:
        return {}
    names = set.intersection(*(set(sample["mib"]) for sample in after))
    seconds = [sample["seconds"] for sample in after]
    return {name: growth(seconds, [sample["mib"][name] for sample in after]) for name in sorted(names)}


def read_metrics(text: str) -> dict[str, float]:
    """Values of :data:`METRICS`, labels that vLLM adds left out of sight."""
    found = {}
    for key, wanted in METRICS.items():
        name, _, labels = wanted.partition("{")
        pattern = rf"^{re.escape(name)}(?:{{([^}}]*)}})? (\S+)$"
        rows = re.findall(pattern, text, re.M)
        found[key] = sum(float(value) for shown, value in rows if labels.rstrip("}") in shown)
    return found


async def watch(process: psutil.Process, samples: list[dict[str, Any]], start: float, tally: Tally) -> None:
    """Sample memory, and say how it goes, until cancelled."""
    while True:
        samples.append({"seconds": round(time.monotonic() - start, 1), "mib": resident(process)})
        print(
            f"{samples[-1]}, {tally.done.total()} actions, {len(tally.suspects)} suspects, {tally.findings[-2:]}",
            file=sys.stderr,
            flush=True,
        )
        await asyncio.sleep(SAMPLE_SECONDS)


async def audit(client: httpx.AsyncClient) -> dict[str, Any]:
    """The whole audit, of every worker together."""
    answer = await client.post("/collective_rpc", json={"method": "quest_audit"})
    answer.raise_for_status()
    reports = answer.json()["results"]
    return {key: sum((report[key] for report in reports), [] if key == "errors" else 0) for key in reports[0]}


async def close_with_audit(load: Load) -> dict[str, Any]:
    """Audit while streams decode, and once more when all is quiet."""
    count, begun = 4, [asyncio.Event() for _ in range(4)]
    streams = [asyncio.create_task(load.stream(load.most_tokens, event.set)) for event in begun]
    waiting = asyncio.gather(*(event.wait() for event in begun))
    await asyncio.wait([waiting, asyncio.gather(*streams, return_exceptions=True)], return_when="FIRST_COMPLETED")
    running = await audit(load.client)
    for problem in await asyncio.gather(*streams, return_exceptions=True):
        if isinstance(problem, BaseException):
            load.tally.find("stream", f"lost in the closing audit: {problem!r}")
    return {"streams": count, "while_streams_run": running, "at_rest": await audit(load.client)}


async def drive(url: str, pid: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole soak against a healthy server; returns the report's measured part."""
    process, samples = psutil.Process(pid), []
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        model = (await client.get("/v1/models")).json()["data"][0]
        fields = schema_fields((await client.get("/openapi.json")).json())
    load = Load(url, model["id"], model["max_model_len"], arguments.seed, fields, arguments.most_tokens)
    await load.touch_sizes(arguments.touch, STEP_TOKENS)
    start = time.monotonic()
    watcher = asyncio.create_task(watch(process, samples, start, load.tally))
    end = start + 60 * arguments.minutes
    await asyncio.gather(*(load.run(lambda: time.monotonic() > end) for _ in range(arguments.clients)))
    watcher.cancel()
    seconds = time.monotonic() - start
    closing = await close_with_audit(load)
    await load.ask_suspects_again()
    counters = read_metrics((await load.client.get("/metrics")).text)
    healthy = (await load.client.get("/health")).status_code == 200
    await load.client.aclose()
    tally = load.tally
    return {
        "seconds": round(seconds, 1),
        "actions": dict(sorted(tally.done.items())),
        "statuses": dict(sorted(tally.statuses.items())),
        "answer_tokens": tally.tokens,
        "answers_that_vary_their_code": tally.drifted,
        "answers_without_their_code": tally.slips,
        "findings": tally.findings,
        "counters": counters,
        "closing_audit": closing,
        "healthy_after": healthy,
        "memory": judge_memory(samples, arguments.warm_up * seconds),
        "memory_samples": samples,
    }


def verdict(report: dict[str, Any]) -> list[str]:
    """What must be true and is not; empty for a clean soak."""
    audits = report["closing_audit"]
    counters = report["counters"]
    checks = {
        "requests failed, were lost or crossed": not report["findings"],
        "an HTTP status of 500 or above, or none": all(0 < int(status) < 500 for status in report["statuses"]),
        "the server is not healthy after": report["healthy_after"],
        "the closing audit found wrong summaries": not audits["while_streams_run"]["errors"]
        and not audits["at_rest"]["errors"],
        "the closing audit saw no pages": audits["while_streams_run"]["live_pages_checked"] > 0
        and audits["at_rest"]["pages_checked"] > 0,
        "the running audit found wrong summaries": counters["running_audit_wrong"] == 0,
        "the running audit saw no pages": counters["running_audit_right"] > 0,
        "no preemption happened": counters["preemptions"] > 0,
        "no prefix was reused": counters["prefix_cache_hit_tokens"] > 0,
        "no sparse row was decoded": counters["rows_sparse"] > 0,
        "memory rose": all(entry["flat"] for entry in report["memory"].values()),
    }
    return [what for what, holds in checks.items() if not holds]


def serve_command(model: str, arguments: argparse.Namespace) -> list[str]:
    """The server under test."""
    flags = "--host 127.0.0.1 --enforce-eager --max-model-len 4096 --max-num-seqs 12 "
    flags += f"--max-num-batched-tokens {STEP_TOKENS}"
    command = [*quest_command(model), *flags.split(), "--num-gpu-blocks-override", str(arguments.blocks)]
    command += ["--enable-request-id-headers", "--quest-audit", "20", "--served-model-name", Path(model).name]
    return [*command, "--worker-extension-cls", "soak_worker.Auditor"]


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Command-line words."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=100, help="KV blocks of the server (default 100)")
    parser.add_argument("--warm-up", type=float, default=0.5, help="share of the time before memory is judged")
    parser.add_argument("--touch", type=int, default=500, help="prompts of many lengths before the load (default 500)")
    parser.add_argument("--most-tokens", type=int, default=320, help="of an answer (default 320)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, default=Path(".cache/bench/soak.log"))
    parser.add_argument("--output", type=Path)
    return parser.parse_args(words)


def main() -> int:
    """Run; see the module's docstring."""
    arguments, at = parse(), commit()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server is stopped either way
    paths = [str(HERE), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **machine_environment(), "VLLM_SERVER_DEV_MODE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    with started(serve_command(arguments.model, arguments), environment, arguments.log, 600) as server:
        measured = asyncio.run(drive(server.url, server.process.pid, arguments))
        server.process.send_signal(signal.SIGTERM)
        code = server.process.wait(120)
    report = {
        "benchmark": "soak",
        "command": " ".join(sys.argv),
        "commit": at,
        "machine": {"cpu": cpu_model(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("quest-vllm", "vllm", "torch")},
        "settings": {name: str(value) for name, value in vars(arguments).items()},
        "mix": ACTIONS,
        **measured,
        "exit_code_on_sigterm": code,
        "errors_in_log": len(re.findall(r" ERROR ", arguments.log.read_text(errors="replace"))),
    }
    problems = verdict(report) + ([f"SIGTERM ended it with {code}"] if code else [])
    report["verdict"] = problems or "clean"
    save(report, arguments.output)
    print(json.dumps({**report, "memory_samples": "in the file", "findings": report["findings"][:5]}, indent=1))
    return int(bool(problems))


if __name__ == "__main__":
    raise SystemExit(main())
