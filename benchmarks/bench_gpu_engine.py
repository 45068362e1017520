"""Time per output token of a whole model on a GPU: this plugin against FLASH_ATTN, dummy weights, decode CUDA graphs.

usage: bench_gpu_engine.py [--layers 32] [--max-model-len 133120] [--cases N] [--also JSON] [--output FILE.json]

Each backend runs in a process of its own, on the same GPU, one after the other. A case's time per output token is the
median duration of an engine step in which every row decodes; its time to first token is that of the first request of
the case, prefix cache off; where the prompt is short, hosts vary more than backends do, so it is the median of 60 more
requests. The case of 256 tokens shows what a long max_model_len costs a short request.

--also '{"dense_layers": [0, 1]}' measures this plugin once more with these server defaults, in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from engine_case import LLAMA_8B, add_ratios, describe, write_config
from provenance import save

SHORT = 4096  # tokens; a longer prefill takes seconds, and varies little
# context, batch, budget
CASES = ((256, 1, 2048), (32768, 1, 2048), (32768, 8, 2048), (131072, 1, 4096), (65536, 4, 2048))


def build_engine(arguments: argparse.Namespace, folder: str, backend: str) -> Any:
    """An in-process engine with dummy weights."""
    from vllm import LLM

    write_config(folder, LLAMA_8B, arguments.layers)
    return LLM(
        model=folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        attention_backend=backend,
        max_model_len=arguments.max_model_len,
        max_num_seqs=16,
        enable_prefix_caching=False,
        additional_config={"quest": arguments.also[0]} if arguments.also else {},
        gpu_memory_utilization=0.9,
        disable_log_stats=True,
        compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8]},
    )


def run_case(engine: Any, context: int, batch: int, budget: int | None, tokens: int) -> dict[str, Any]:
    """Prefill ``batch`` prompts, then time the steps in which all of them decode. Returns seconds."""
    from vllm import SamplingParams

    rng = random.Random(context)
    extra = None if budget is None else {"quest_token_budget": budget}
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, extra_args=extra)
    start, first_token = time.perf_counter(), 0.0
    for number in range(batch):
        ids = [rng.randint(10, 120000) for _ in range(context - tokens)]
        engine.add_request(f"{context}-{batch}-{number}-{start}", {"prompt_token_ids": ids}, sampling)
    steps: list[float] = []
    produced: dict[str, int] = {}
    while engine.has_unfinished_requests():
        begin = time.perf_counter()
        outputs = engine.step()
        took = time.perf_counter() - begin
        for output in outputs:
            produced[output.request_id] = len(output.outputs[0].token_ids)
        if outputs and not first_token:
            first_token = time.perf_counter() - start
        if len(produced) == batch and min(produced.values()) > 4 and len(outputs) == batch:
            steps.append(took)
    return {"time_per_output_token": statistics.median(steps), "time_to_first_token": first_token, "steps": len(steps)}


def child(arguments: argparse.Namespace) -> None:
    """Measure one backend and print a JSON line."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    sparse = arguments.child == "CUSTOM"
    with tempfile.TemporaryDirectory() as folder:
        engine = build_engine(arguments, folder, arguments.child).llm_engine
        run_case(engine, 4096, 1, 512 if sparse else None, 8)
        for context, batch, budget in CASES[: arguments.cases]:
            if context > arguments.max_model_len:
                continue
            own = budget if sparse else None
            measured = run_case(engine, context, batch, own, 64)
            if context <= SHORT:
                firsts = [run_case(engine, context, batch, own, 8)["time_to_first_token"] for _ in range(60)]
                low, measured["time_to_first_token"], high = statistics.quantiles(firsts, n=4)
                measured["time_to_first_token_quartiles"] = [low, high]
            record = {"backend": arguments.child, "context": context, "batch": batch, "budget": budget, **measured}
            print("CASE " + json.dumps(record), flush=True)


def device() -> dict[str, Any]:
    """What :func:`engine_case.describe` says of this machine."""
    import torch

    from quest_vllm.config import load_config
    from quest_vllm.ops.api import load_ops

    return describe(torch.cuda.get_device_name(), load_ops(load_config(None).implementation, "cuda").name)


def measure(
    arguments: argparse.Namespace, wanted: list[str], records: list[dict[str, Any]], document: dict[str, Any]
) -> None:
    """Run the child that is ``wanted``; add its cases to ``records``, a part of ``document``, and save that."""
    command = [sys.executable, __file__, *wanted, "--layers", str(arguments.layers)]
    command += ["--max-model-len", str(arguments.max_model_len), "--cases", str(arguments.cases)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            if line.startswith("CASE "):
                records.append(json.loads(line[5:]))
                add_ratios(records)
                print(records[-1], flush=True)
                save(document, arguments.output)
    if process.returncode:
        sys.exit(f"{wanted}: the engine ended with status {process.returncode}")


def main() -> None:
    """Run both backends and write one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--max-model-len", type=int, default=133120)
    parser.add_argument("--cases", type=int, default=len(CASES), help="run the first so many")
    parser.add_argument("--also", type=json.loads, action="append", default=[], metavar="JSON")
    parser.add_argument("--child", choices=["CUSTOM", "FLASH_ATTN"], help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return
    document: dict[str, Any] = {"benchmark": "gpu_engine", **device(), "cases": []}
    measure(arguments, ["--child", "FLASH_ATTN"], document["cases"], document)
    stock = list(document["cases"])
    measure(arguments, ["--child", "CUSTOM"], document["cases"], document)
    for settings in arguments.also:
        records = list(stock)
        document.setdefault("also", []).append({"settings": settings, "cases": records})
        measure(arguments, ["--child", "CUSTOM", "--also", json.dumps(settings)], records, document)


if __name__ == "__main__":
    main()
