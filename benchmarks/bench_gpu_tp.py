"""Several GPUs of one host: time per output token under tensor parallelism, this plugin against FLASH_ATTN, and checks.

usage: bench_gpu_tp.py --gpus N [--layers 8] [--parts main,scaling,checks] [--quick] [--output FILE.json]

main: a Llama-3.1-70B shape with dummy weights at tensor parallel N, 128K of context, batches 1, 4 and 16, budgets 2K
and 4K, decode CUDA graphs. scaling: batches 1 and 4 at 1, 2, 4, ... < N GPUs. checks: check_tp.py.

Every layer costs the same, so fewer layers than 80 are enough, and are in the result; layers that --dense-layers keeps
dense weigh more among few. Each backend's engine runs alone, in a process group of its own. It
prefills as many prompts as the smallest batch has, each alone: the median so far is the time to first token. Then the
batch decodes them from the prefix cache, each from its own pages, with every budget. The larger batches follow, with
the prompts that they add. A case's time per output token is the median interval between the outputs of successive
steps in which all of its rows decode.

The result is saved after every case. Without a GPU the script rehearses itself with a tiny shape on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import check_tp
from engine_case import LLAMA_8B, LLAMA_70B, add_ratios, describe, write_config
from process_group import TIME_OUT, last_lines, run_group
from provenance import save

TINY: dict[str, Any] = LLAMA_8B | {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
}
SETTLE = 4  # intervals at the beginning that do not count
SAME = ("gpus", "context", "batch")


@dataclass(frozen=True)
class Plan:
    """What one engine measures. ``batches`` are ascending."""

    backend: str
    gpus: int
    layers: int
    context: int
    batches: tuple[int, ...]
    budgets: tuple[int, ...]
    steps: int
    dense_layers: tuple[int, ...]
    custom_all_reduce: bool
    cuda: bool

    @property
    def sparse(self) -> bool:
        """Whether this is the plugin's engine."""
        return self.backend == "CUSTOM"

    @property
    def room(self) -> int:
        """Tokens that a request adds to its prompt at most."""
        return self.steps + SETTLE + 2


def engine_settings(plan: Plan) -> dict[str, Any]:
    """Arguments of an ``LLM`` beside the model."""
    settings: dict[str, Any] = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "tensor_parallel_size": plan.gpus,
        "max_model_len": plan.context,
        "max_num_seqs": plan.batches[-1],
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "disable_custom_all_reduce": not plan.custom_all_reduce,
        "seed": 0,
        "additional_config": {"quest": {"dense_layers": [*plan.dense_layers]}},
    }
    if plan.gpus > 1:
        settings["distributed_executor_backend"] = "mp"
    if plan.cuda:
        graphs = sorted({1, 2, *plan.batches})
        return settings | {
            "attention_backend": plan.backend,
            "max_num_batched_tokens": 8192,
            "gpu_memory_utilization": 0.92,
            "compilation_config": {
                "mode": 0,
                "cudagraph_mode": "FULL_DECODE_ONLY",
                "cudagraph_capture_sizes": graphs,
            },
        }
    blocks = 2 + plan.batches[-1] * (-(-plan.context // 32) + 1)
    tiny = {"enforce_eager": True, "block_size": 32, "max_num_batched_tokens": 1024, "num_gpu_blocks_override": blocks}
    return settings | tiny | ({"attention_backend": "CUSTOM"} if plan.sparse else {})


def worker_facts(worker: Any) -> dict[str, Any]:
    """GPU and kernels of one rank; for ``collective_rpc``."""
    import torch

    from quest_vllm import compat

    layers = compat.cached_layers(worker).values()
    ops = {(layer.impl._layer_ops(layer) if hasattr(layer.impl, "_layer_ops") else layer.impl._ops) for layer in layers}
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "implementation": ", ".join(sorted(found.name for found in ops)),
        "dense_layers": next(([*layer.impl.config.dense_layers] for layer in layers), None),
        "model_runner": type(worker.model_runner).__module__,
        "memory_used": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
    }


def sampling(tokens: int, budget: int | None) -> Any:
    """Greedy, of a fixed length."""
    from vllm import SamplingParams

    extra = None if budget is None else {"quest_token_budget": budget}
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, extra_args=extra)


def finish(engine: Any) -> list[Any]:
    """Step until nothing is left to do; the last output of each request."""
    last: dict[str, Any] = {}
    while engine.has_unfinished_requests():
        last |= {output.request_id: output for output in engine.step()}
    return list(last.values())


def prefill(engine: Any, number: int, prompt: list[int]) -> float:
    """Seconds from the request to its first token; its pages stay in the prefix cache."""
    start = time.perf_counter()
    engine.add_request(f"prefill-{number}", {"prompt_token_ids": prompt}, sampling(1, None))
    finish(engine)
    return time.perf_counter() - start


def decode(engine: Any, plan: Plan, prompts: list[list[int]], budget: int | None) -> tuple[list[float], int]:
    """Seconds between steps of all ``prompts``, and the fewest tokens that one of them found in the prefix cache."""
    for number, prompt in enumerate(prompts):
        name = f"decode-{len(prompts)}-{budget}-{number}"
        engine.add_request(name, {"prompt_token_ids": prompt}, sampling(plan.room, budget))
    intervals: list[float] = []
    rows, last, cached = 0, 0.0, plan.context
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter()
        if not outputs:
            continue
        if len(outputs) == rows == len(prompts):
            intervals.append(now - last)
        cached = min([cached, *(output.num_cached_tokens or 0 for output in outputs)])
        rows, last = len(outputs), now
    return intervals[SETTLE:], cached


def measure(plan: Plan, report: Any) -> None:
    """Start the engine, measure every case and hand each to ``report``."""
    from vllm import LLM

    with tempfile.TemporaryDirectory() as folder:
        write_config(folder, LLAMA_70B if plan.cuda else TINY, plan.layers)
        begin = time.perf_counter()
        llm = LLM(model=folder, **engine_settings(plan))
    report({"start_up": time.perf_counter() - begin, "ranks": llm.collective_rpc(worker_facts)})
    engine = llm.llm_engine
    cache = engine.vllm_config.cache_config
    capacity = cache.num_gpu_blocks * cache.block_size
    batches = [batch for batch in plan.batches if batch * (plan.context + cache.block_size) <= capacity]
    report({"kv_cache_tokens": capacity, "batches_without_room": [b for b in plan.batches if b not in batches]})
    rng, vocabulary = random.Random(1), (LLAMA_70B if plan.cuda else TINY)["vocab_size"]
    length = plan.context - plan.room
    warm_up = [rng.randrange(3, vocabulary) for _ in range(min(20000, length))]  # several chunks
    engine.add_request("warm-up", {"prompt_token_ids": warm_up}, sampling(8, 512 if plan.sparse else None))
    finish(engine)
    prompts: list[list[int]] = []
    first_token: list[float] = []
    same = {key: getattr(plan, key) for key in ("backend", "gpus", "layers", "context")}
    for batch in batches:
        while len(prompts) < batch:
            prompts.append([rng.randrange(3, vocabulary) for _ in range(length)])
            first_token.append(prefill(engine, len(prompts), prompts[-1]))
            report({"first_tokens": first_token})
        for budget in plan.budgets if plan.sparse else (None,):
            intervals, cached = decode(engine, plan, prompts, budget)
            measured = {
                "time_per_output_token": statistics.median(intervals),
                "quartiles": statistics.quantiles(intervals, n=4),
                "steps": len(intervals),
                "time_to_first_token": statistics.median(first_token),
                "dense_layers": plan.dense_layers if plan.sparse else None,
                "cached_tokens": cached,
                "prompt_tokens": length,
            }
            report({**same, "batch": batch, "budget": budget, **measured})
    engine.engine_core.shutdown()


def child(text: str) -> None:
    """Measure the plan that ``text`` holds as JSON; every report is a line of the file that it names."""
    values = json.loads(text)
    reports = Path(values.pop("reports"))
    plan = Plan(**values | {key: tuple(values[key]) for key in ("batches", "budgets", "dense_layers")})

    def report(record: dict[str, Any]) -> None:
        with reports.open("a") as file:
            file.write(json.dumps(record) + "\n")

    measure(plan, report)


class Results:
    """The document, written anew whenever something is added."""

    def __init__(self, output: Path | None, head: dict[str, Any]) -> None:
        self.output, self.head = output, head
        self.cases: list[dict[str, Any]] = []
        self.engines: list[dict[str, Any]] = []
        self.checks: dict[str, Any] = {}
        self._lock = threading.RLock()

    def take(self, engine: dict[str, Any], record: dict[str, Any]) -> None:
        """A child's report: a case, or something about its engine."""
        with self._lock:
            if "time_per_output_token" in record:
                self.cases.append(record)
                add_ratios(self.cases, SAME)
                print("CASE " + json.dumps(record), flush=True)
            else:
                engine |= record
                if times := record.get("first_tokens"):
                    print(f"PREFILL {engine.get('backend')}, prompt {len(times)}: {times[-1]:.2f} s", flush=True)
                if ranks := record.get("ranks"):
                    self.head["gpu"] = ranks[0]["gpu"]
                    self.head["implementation"] = ranks[0]["implementation"] or self.head.get("implementation", "")
            self.write()

    def write(self) -> None:
        """Save what there is."""
        with self._lock:
            document = {"benchmark": "gpu_tp", **self.head, "cases": self.cases, "scaling": scaling(self.cases)}
            save(document | {"checks": self.checks, "engines": self.engines}, self.output)


def scaling(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How much shorter a token's time gets from the fewest GPUs that ran a case to more, beside the stock backend's."""
    found = []
    for case in cases:
        same = [
            c for c in cases if all(c[key] == case[key] for key in ("backend", "layers", "context", "batch", "budget"))
        ]
        first = min(same, key=lambda c: c["gpus"])
        if first is not case:
            gain = first["time_per_output_token"] / case["time_per_output_token"]
            kept = {key: case[key] for key in ("backend", "context", "batch", "budget", "gpus")}
            found.append({**kept, "from_gpus": first["gpus"], "gain": gain})
    stock = {(c["batch"], c["gpus"]): c["gain"] for c in found if c["backend"] != "CUSTOM"}
    for entry in found:
        if entry["backend"] == "CUSTOM" and (base := stock.get((entry["batch"], entry["gpus"]))):
            entry["gain_over_stock"] = entry["gain"] / base
    return found


def merge(files: list[Path], output: Path | None) -> None:
    """Join the results of runs of some parts each, on one machine at one commit, into one document."""
    documents = [json.loads(file.read_text()) for file in files]
    for key in ("gpu", "commit"):
        found = {document[key] for document in documents if document[key]}  # checks alone name no GPU
        if len(found) > 1:
            raise SystemExit(f"--merge: expected one {key} in all files, got {', '.join(sorted(found))}")
    results = Results(output, {})
    for document in reversed(documents):
        parts = ("benchmark", "cases", "scaling", "checks", "engines")
        results.head |= {key: value for key, value in document.items() if key not in parts and value != ""}
    for document in documents:
        results.cases += document["cases"]
        results.engines += document["engines"]
        results.checks |= document["checks"]
    results.head["command"] = "; ".join(document["command"] for document in documents)
    add_ratios(results.cases, SAME)
    results.write()


def run_plan(plan: Plan, results: Results, limit: float, own: Sequence[int] | None = None) -> dict[str, Any]:
    """Run a plan in a process group of its own and take up its reports as they come; all but the cases is returned.

    ``own``: the GPUs that it sees; None: all.
    """
    engine: dict[str, Any] = asdict(plan)
    results.engines.append(engine)
    with tempfile.TemporaryDirectory() as folder:
        reports, log = Path(folder, "reports"), Path(folder, "log")
        reports.touch()
        seen = 0

        def watch() -> None:
            nonlocal seen
            lines = reports.read_text().split("\n")[:-1]
            for line in lines[seen:]:
                results.take(engine, json.loads(line))
            seen = len(lines)

        values = json.dumps(asdict(plan) | {"reports": str(reports)})
        begin = time.monotonic()
        command = [sys.executable, str(Path(__file__).resolve()), "--child", values]
        variables = environment(plan.cuda) | ({} if own is None else {"CUDA_VISIBLE_DEVICES": ",".join(map(str, own))})
        status = run_group(command, variables, log, limit, watch)
        engine |= {"seconds": round(time.monotonic() - begin, 1), "exit_status": status}
        print(f"ENGINE {plan.backend} on {plan.gpus}: exit {status} after {time.monotonic() - begin:.0f} s", flush=True)
        if status:
            engine["log"] = last_lines(log, 30)
            print(last_lines(log), flush=True)
    results.write()
    return engine


def run_main(arguments: argparse.Namespace, results: Results) -> None:
    """Both backends on all GPUs; where the first ends before it starts, once more with all sums left to NCCL."""
    batches = tuple(arguments.batches)
    first, _ = plans(arguments, arguments.gpus, batches)
    engine = run_plan(first, results, arguments.limit)
    if "start_up" not in engine and engine["exit_status"] != TIME_OUT and first.custom_all_reduce and first.gpus > 1:
        print("once more, without vLLM's custom all-reduce", flush=True)
        arguments.no_custom_all_reduce = True
        run_plan(plans(arguments, arguments.gpus, batches)[0], results, arguments.limit)
    run_plan(plans(arguments, arguments.gpus, batches)[1], results, arguments.limit)


def run_scaling(arguments: argparse.Namespace, results: Results) -> None:
    """Both backends on fewer GPUs, with the batches that one GPU holds."""
    fewer = tuple(batch for batch in arguments.batches if batch <= 4) or tuple(arguments.batches[:1])
    for gpus in (2**power for power in range(10) if 2**power < arguments.gpus):
        both = plans(arguments, gpus, fewer)
        beside = arguments.side_by_side and 2 * gpus <= arguments.gpus
        places = [range(gpus), range(gpus, 2 * gpus)] if beside else [None, None]
        with ThreadPoolExecutor(2 if beside else 1) as pool:
            list(pool.map(lambda plan, own: run_plan(plan, results, arguments.limit, own), both, places))


def environment(cuda: bool) -> dict[str, str]:
    """Variables of an engine whose workers are processes; what the caller set stays."""
    found = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    defaults = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_HOST_IP": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        # no NVLink multicast: hosts may forbid it, and what is compared does not need it
        "NCCL_NVLS_ENABLE": "0",
        "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
        "NVSHMEM_DISABLE_NVLS": "1",
        "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    }
    if not cuda:
        defaults |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    return {**defaults, **found}


def plans(arguments: argparse.Namespace, gpus: int, batches: tuple[int, ...]) -> list[Plan]:
    """FLASH_ATTN's and this plugin's, on so many GPUs."""
    cuda = arguments.cuda
    return [
        Plan(
            backend=backend,
            gpus=gpus,
            layers=arguments.layers,
            context=arguments.context,
            batches=batches,
            budgets=tuple(arguments.budgets),
            steps=arguments.steps,
            dense_layers=tuple(arguments.dense_layers),
            custom_all_reduce=not arguments.no_custom_all_reduce,
            cuda=cuda,
        )
        for backend in ("FLASH_ATTN", "CUSTOM")
    ]


def numbers(text: str) -> list[int]:
    """ "1,4" -> [1, 4]."""
    return [int(part) for part in text.split(",")]


def parse() -> argparse.Namespace:
    """Command line, with what it leaves open filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=1, help="how many GPUs, all in one tensor parallel group")
    parser.add_argument("--layers", type=int, help="of the shape's 80")
    parser.add_argument("--batches", type=numbers, help="such as 1,4,16")
    parser.add_argument("--budgets", type=numbers)
    parser.add_argument("--context", type=int)
    parser.add_argument("--steps", type=int, help="decode steps that count, of each case")
    parser.add_argument("--dense-layers", type=numbers, default=[], help="layers that never select; default none")
    parser.add_argument("--parts", default="main,scaling,checks", help="of main, scaling and checks")
    parser.add_argument("--check", default="", help="only checks whose name has this in it, such as real")
    parser.add_argument("--model", type=Path, help="also check a real model, whose heads the GPUs divide")
    parser.add_argument("--side-by-side", action="store_true", help="scaling: both engines at once, where GPUs suffice")
    parser.add_argument("--no-custom-all-reduce", action="store_true", help="leave all sums to NCCL")
    parser.add_argument("--quick", action="store_true", help="a smoke run: 4 layers, 8K, batches 1 and 4")
    parser.add_argument("--limit", type=float, default=600, help="seconds an engine may take; its first start is slow")
    parser.add_argument(
        "--merge", type=Path, nargs="+", metavar="FILE", help="measure nothing: join these into --output"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.child or arguments.merge:
        return arguments
    import torch

    arguments.cuda = torch.cuda.is_available()
    if arguments.cuda and not 1 <= arguments.gpus <= torch.cuda.device_count():
        parser.error(f"--gpus: expected 1 to {torch.cuda.device_count()}, got {arguments.gpus}")
    small = arguments.quick or not arguments.cuda
    defaults = {"layers": 4, "batches": [1, 4], "budgets": [512], "context": 8192, "steps": 16}
    if not small:
        defaults = {"layers": 8, "batches": [1, 4, 16], "budgets": [2048, 4096], "context": 131072, "steps": 40}
    elif not arguments.cuda:
        defaults |= {"context": 1024, "budgets": [128], "steps": 8}
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    arguments.batches.sort()
    return arguments


def main() -> int:
    """Run the parts one after the other; 1 where an engine ended early or a check failed."""
    arguments = parse()
    if arguments.child:
        child(arguments.child)
        return 0
    if arguments.merge:
        merge(arguments.merge, arguments.output)
        return 0
    wanted = arguments.parts.split(",")
    head = {
        "model": "Llama-3.1-70B shape" if arguments.cuda else "tiny shape",
        "shape_layers": 80,
        "side_by_side": arguments.side_by_side,
    }
    results = Results(arguments.output, head | {"gpus": arguments.gpus, "layers": arguments.layers} | describe("", ""))
    if "main" in wanted:
        run_main(arguments, results)
    if "scaling" in wanted:
        run_scaling(arguments, results)
    if "checks" in wanted:
        check_tp.run(arguments, results, environment(arguments.cuda))
    results.write()
    started = {(engine["backend"], engine["gpus"]): engine["exit_status"] == 0 for engine in results.engines}
    return 0 if all([*started.values(), *(verdict["ok"] for verdict in results.checks.values())]) else 1


if __name__ == "__main__":
    sys.exit(main())
