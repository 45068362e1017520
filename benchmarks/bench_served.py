"""Time per output token of a served model, ours against stock vLLM, in one run.

usage: bench_served.py MODEL [--context 7000] [--budget 512] [--requests 4] [--repeats 2] [--output FILE.json]

Starts one server at a time on this machine, stock and ours in turn, ``--repeats`` times each; every round sends the
same prompts at once and streams the answers. Times per output token are taken while every request decodes, so no
prefill is in them; times to first token are reported beside them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import platform
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI
from provenance import commit, cpu_model


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def served(model: str, context: int, sparse: bool, log: Path) -> Iterator[str]:
    """Run one server; yields its base URL once it is healthy."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, "--port", str(port)]
    command += ["--host", "127.0.0.1", "--enforce-eager", "--max-model-len", str(context + 512)]
    command += ["--no-enable-prefix-caching", "--max-num-seqs", "8", "--served-model-name", "m"]
    command += ["--attention-backend", "CUSTOM"] if sparse else []
    environment = {"VLLM_CPU_KVCACHE_SPACE": "4"} | dict(os.environ)
    with log.open("w") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, env=environment)
    try:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise RuntimeError(f"the server ended at start-up; see {log}")
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


async def one_request(
    client: AsyncOpenAI, prompt: list[int], tokens: int, budget: int | None
) -> tuple[float, list[float]]:
    """Returns when the request was sent and when each token came, in seconds."""
    extra: dict[str, Any] = {"ignore_eos": True}
    if budget is not None:
        extra["vllm_xargs"] = {"quest_token_budget": budget}
    start = time.perf_counter()
    stamps: list[float] = []
    stream = await client.completions.create(
        model="m", prompt=prompt, max_tokens=tokens, temperature=0, stream=True, extra_body=extra
    )
    async for _ in stream:
        stamps.append(time.perf_counter())
    return start, stamps


async def one_round(url: str, prompts: list[list[int]], tokens: int, budget: int | None) -> dict[str, list[float]]:
    client = AsyncOpenAI(base_url=url, api_key="-", timeout=600)
    await one_request(client, prompts[0][:64], 4, budget)
    results = await asyncio.gather(*(one_request(client, prompt, tokens, budget) for prompt in prompts))
    together = max(stamps[0] for _, stamps in results)  # from here on every request decodes
    until = min(stamps[-1] for _, stamps in results)
    common = [[stamp for stamp in stamps if together <= stamp <= until] for _, stamps in results]
    return {
        "time_to_first_token": [stamps[0] - start for start, stamps in results],
        "time_per_output_token": [
            later - earlier for stamps in common for earlier, later in itertools.pairwise(stamps)
        ],
    }


def main() -> None:
    """Run the rounds and write one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--context", type=int, default=7000)
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--logs", type=Path, default=Path(".cache/bench"))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    arguments.logs.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    prompts = [[rng.randint(1000, 40000) for _ in range(arguments.context)] for _ in range(arguments.requests)]
    rounds = []
    for repeat in range(arguments.repeats):
        for name, budget in (("stock", None), ("quest", arguments.budget)):
            with served(arguments.model, arguments.context, budget is not None, arguments.logs / f"{name}.log") as url:
                measured = asyncio.run(one_round(url, prompts, arguments.tokens, budget))
            rounds.append({"engine": name, "repeat": repeat, **measured})
            tpot = 1e3 * statistics.median(measured["time_per_output_token"])
            print(f"{name}: {tpot:.1f} ms per output token", flush=True)
    medians = {
        name: statistics.median(t for r in rounds if r["engine"] == name for t in r["time_per_output_token"])
        for name in ("stock", "quest")
    }
    document = {
        "benchmark": "served",
        "command": " ".join(sys.argv),
        "commit": commit(),
        "machine": {"cpu": cpu_model(), "cores": os.cpu_count(), "python": platform.python_version()},
        "versions": {name: version(name) for name in ("torch", "vllm", "quest-vllm")},
        "settings": {k: str(v) for k, v in vars(arguments).items()},
        "rounds": rounds,
        "median_time_per_output_token": medians,
        "speedup": medians["stock"] / medians["quest"],
    }
    print(f"speed-up {document['speedup']:.2f}x")
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
