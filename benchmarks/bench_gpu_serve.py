"""Throughput under ``vllm bench serve``: stock ``vllm serve`` (FLASH_ATTN) and ours (CUSTOM), one after the other.

usage: bench_gpu_serve.py [--shape 16x32768x256 ...] [--budget 2048] [--rounds 1] [--output FILE.json]

A Llama-3.1-8B shape with dummy weights, decode CUDA graphs, prefix cache off, requests sent all at once, temperature 0.
A shape is requests x tokens in x tokens out. Each server serves every shape, ``--rounds`` times; before a client
starts the clock it sends one request of the shape, which warms the kernels up. The KV cache holds fewer than 16
requests of 32K on 80 GB: the rest wait, at both servers. ``--model tiny`` tries the script itself on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine_case import LLAMA_8B, versions
from provenance import cpu_model, save

from quest_vllm.bench import server
from quest_vllm.errors import EvalUnavailable

SERVERS = {"stock": "FLASH_ATTN", "quest": "CUSTOM"}
LLAMA = LLAMA_8B | {"transformers_version": "5.0.0"}  # or transformers takes a large vocabulary for a broken tokenizer
MODELS: dict[str, dict[str, Any]] = {
    "llama-8b": LLAMA | {"num_hidden_layers": 32},
    "tiny": LLAMA
    | {"num_hidden_layers": 3, "hidden_size": 256, "intermediate_size": 512, "vocab_size": 4096}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
}
CLIENT_SECONDS, MEMORY_SECONDS = 240, 30
LATENCIES = ("ttft", "tpot", "itl", "e2el")
KEPT = ("duration", "completed", "failed", "total_input_tokens", "total_output_tokens", "request_throughput")
KEPT += ("output_throughput", "total_token_throughput", "max_output_tokens_per_s", "max_concurrent_requests", "ttfts")
COUNTERS = ("vllm:num_preemptions_total", "quest_decode_rows_total", "vllm:generation_tokens_total")


@dataclass(frozen=True)
class Shape:
    """What one client sends: so many requests of so many tokens in and out."""

    requests: int
    tokens_in: int
    tokens_out: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """``16x32768x256``; raises an argparse error for anything else."""
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", text):
            raise argparse.ArgumentTypeError(f"expected REQUESTSxIN_TOKENSxOUT_TOKENS, like 16x32768x256, got {text!r}")
        return cls(*map(int, text.split("x")))

    def __str__(self) -> str:
        return f"{self.requests}x{self.tokens_in}x{self.tokens_out}"


def write_model(folder: Path, config: dict[str, Any]) -> None:
    """A config.json, and a tokenizer with one word for each token id, so that texts keep their number of tokens.

    Words carry the space before them: vLLM refuses texts of more characters than its longest token allows.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    special = ["<unk>", "<s>", "</s>"]
    words = special + [f"\N{LOWER ONE EIGHTH BLOCK}w{number}" for number in range(len(special), config["vocab_size"])]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"unk_token": special[0], "bos_token": special[1], "eos_token": special[2]}
    longest = {"model_max_length": config["max_position_embeddings"]}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names, **longest}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def serve_command(arguments: argparse.Namespace, model: Path, backend: str) -> list[str]:
    """``vllm serve`` with everything equal but the attention backend."""
    compilation = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8, 12, 16]}
    longest = max(shape.tokens_in + shape.tokens_out for shape in arguments.shape)
    options: dict[str, object] = {
        "--attention-backend": backend,
        "--load-format": "dummy",
        "--served-model-name": "model",
        "--host": server.LOCAL,
        "--max-model-len": longest,
        "--max-num-seqs": 16,
        "--max-num-batched-tokens": 8192,
        "--gpu-memory-utilization": arguments.memory,
        "--compilation-config": json.dumps(compilation),
    }
    flags = [str(part) for option in options.items() for part in option]
    return [*server.stock_command(str(model)), *flags, "--no-enable-prefix-caching", "--disable-uvicorn-access-log"]


def client_command(shape: Shape, model: Path, port: int, result: Path, timeout: int) -> list[str]:
    """``vllm bench serve`` of one shape; it waits until the server answers."""
    options: dict[str, object] = {
        "--host": server.LOCAL,
        "--port": port,
        "--model": "model",
        "--tokenizer": model,
        "--dataset-name": "random",
        "--random-input-len": shape.tokens_in,
        "--random-output-len": shape.tokens_out,
        "--num-prompts": shape.requests,
        "--request-rate": "inf",
        "--temperature": 0,
        "--seed": 0,
        "--ready-check-timeout-sec": timeout,
        "--percentile-metrics": ",".join(LATENCIES),
        "--metric-percentiles": "50,90,95,99",
        "--result-dir": result.parent,
        "--result-filename": result.name,
    }
    flags = [str(part) for option in options.items() for part in option]
    vllm = [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve"]
    return [*vllm, *flags, "--ignore-eos", "--save-result", "--save-detailed", "--disable-tqdm"]


def environment(name: str, budget: int) -> dict[str, str]:
    """Of one server: stock's loads no plugin of ours."""
    base = server.machine_environment()
    return server.stock_environment(base) if name == "stock" else base | {"QUEST_TOKEN_BUDGET": str(budget)}


@contextlib.contextmanager
def client(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A running client, ended with the block."""
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, env=server.machine_environment())
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def finish(process: subprocess.Popen[bytes], result: Path, log: Path) -> dict[str, Any]:
    """What the client found. Raises :class:`EvalUnavailable` where it or one of its requests failed."""
    code = process.wait(CLIENT_SECONDS)
    if code or not result.exists():
        raise EvalUnavailable(f"vllm bench serve ended with code {code}; the end of {log}:\n{log.read_text()[-3000:]}")
    found = json.loads(result.read_text())
    if found["failed"]:
        raise EvalUnavailable(f"{found['failed']} requests failed: {[error for error in found['errors'] if error][:2]}")
    latencies = {key: value for key, value in found.items() if key.endswith("_ms")}
    return {key: found[key] for key in KEPT} | latencies


def read_metrics(url: str) -> dict[str, Any]:
    """Counters that say how the server got there, and how many tokens its KV cache holds."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as reply:
        lines = reply.read().decode().splitlines()
    seen: dict[str, Any] = {}
    for line in lines:
        if line.startswith(COUNTERS) and not line.endswith(" 0.0"):
            name, value = line.rsplit(" ", 1)
            seen[name] = float(value)
        if line.startswith("vllm:cache_config_info"):
            sizes = [re.search(rf'{key}="(\d+)"', line) for key in ("num_gpu_blocks", "block_size")]
            if all(sizes):
                seen["kv_cache_tokens"] = int(sizes[0][1]) * int(sizes[1][1])  # type: ignore[index]
    return seen


def wait_for_memory() -> None:
    """Until the previous server's GPU memory is free again; its processes take a moment to go."""
    if not shutil.which("nvidia-smi"):
        return
    own = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    query = ["nvidia-smi", "-i", own, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    end = time.monotonic() + MEMORY_SECONDS
    while time.monotonic() < end:
        used = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
        if used and used[0].isdigit() and int(used[0]) < 2048:
            return
        time.sleep(0.5)


def run_server(arguments: argparse.Namespace, model: Path, name: str) -> dict[str, Any]:
    """Start one server, run every shape against it, and stop it."""
    wait_for_memory()
    logs, port, begin = arguments.logs, arguments.port or server.free_port(), time.monotonic()
    jobs = [(shape, number) for number in range(arguments.rounds) for shape in arguments.shape]
    command = serve_command(arguments, model, SERVERS[name])
    record: dict[str, Any] = {"server": name, "backend": SERVERS[name], "command": command[1:], "runs": []}
    with contextlib.ExitStack() as stack:
        for place, (shape, number) in enumerate(jobs):
            result, log = model.parent / f"{name}-{place}.json", logs / f"{name}-client-{place}.log"
            # the first client starts with the server, so that its imports and prompts cost no time of their own
            sending = client_command(shape, model, port, result, arguments.start_timeout)
            process = stack.enter_context(client(sending, log))
            if place == 0:
                settings = (environment(name, arguments.budget), logs / f"{name}-server.log", arguments.start_timeout)
                running = stack.enter_context(server.started(command, *settings, port=port))
                record["start_seconds"] = time.monotonic() - begin
            found = finish(process, result, log)
            record["runs"].append({"shape": str(shape), "round": number, **found})
            print(f"{name} {shape}: {found['output_throughput']:.1f} output tokens a second", flush=True)
        record["metrics"] = read_metrics(running.url)
    return record


def errors_logged(logs: Path, most: int = 12) -> str:
    """The last lines of the servers' logs that name an error."""
    lines = [line for log in logs.glob("*-server.log") for line in log.read_text(errors="replace").splitlines()]
    return "\n".join([line[:300] for line in lines if "Error" in line][-most:])


def compare(stock: dict[str, Any], quest: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Ours against stock, by shape, medians of the rounds: throughput, and latencies as stock's over ours."""

    def middle(record: dict[str, Any], shape: str, key: str) -> float:
        return statistics.median(run[key] for run in record["runs"] if run["shape"] == shape)

    ratios: dict[str, dict[str, float]] = {}
    for shape in dict.fromkeys(run["shape"] for run in stock["runs"]):
        ratios[shape] = {
            key: middle(quest, shape, key) / middle(stock, shape, key)
            for key in ("output_throughput", "request_throughput")
        }
        for key in (f"{kind}_{latency}_ms" for latency in LATENCIES for kind in ("median", "p99")):
            ratios[shape][key] = middle(stock, shape, key) / middle(quest, shape, key)
    return ratios


def describe() -> dict[str, Any]:
    """Device, versions and command of this run."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"benchmark": "gpu_serve", "gpu": gpu, "cpu": cpu_model(), **versions()}


def main() -> None:
    """Run both servers and write one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=Shape.parse, nargs="+", default=[Shape(16, 32768, 256)])
    parser.add_argument("--budget", type=int, default=2048, help="tokens; our server's default budget")
    parser.add_argument("--rounds", type=int, default=1, help="how often each server serves every shape")
    parser.add_argument("--model", choices=MODELS, default="llama-8b")
    parser.add_argument("--memory", type=float, default=0.92, help="share of the GPU's memory that a server takes")
    parser.add_argument("--start-timeout", type=int, default=150, help="seconds until a server must answer")
    parser.add_argument("--port", type=int, default=0, help="0: a free one")
    parser.add_argument("--logs", type=Path, default=Path("build/bench-serve"), help="folder of the processes' output")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    arguments.logs.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        write_model(model, MODELS[arguments.model])
        try:
            records = {name: run_server(arguments, model, name) for name in SERVERS}
        except EvalUnavailable as error:
            sys.exit(f"{error}\n{errors_logged(arguments.logs)}")
    ratios = compare(records["stock"], records["quest"])
    for shape, values in ratios.items():
        print(shape, {key: round(value, 3) for key, value in values.items()}, flush=True)
    document = {**describe(), "model": arguments.model, "budget": arguments.budget}
    save({**document, "servers": list(records.values()), "quest_over_stock": ratios}, arguments.output)


if __name__ == "__main__":
    main()
