"""Which layers should stay dense: `quest-vllm calibrate`'s own procedure on the Hugging Face reference, without vLLM.

usage: calibrate_reference.py MODEL [--device cuda] [--budget B] [--context N] [--places N] [--output FILE.json]

The layers are chosen on prose (Opticks) and judged on what is held back: the Python manual. KL is to dense attention,
mean over the decoded tokens of a text; pages are chosen as the server's defaults say, with key codes where they can.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from hf_reference import ReferenceModel, Run, window_of
from measure_policies import TextTask
from policy_sweeps import codes
from policy_texts import Text, places, texts
from provenance import commit, save

from quest_vllm.config import QuestConfig
from quest_vllm.eval.calibrate import ORIGINAL, Candidate, Shares, Task, calibrate, difference
from quest_vllm.eval.stats import bootstrap_mean


class ReferenceProbe:
    """:class:`quest_vllm.eval.calibrate.LayerKl` by the reference, ``batch`` texts in a pass."""

    def __init__(self, model: ReferenceModel, windows: Sequence[Text], batch: int) -> None:
        self.candidate = codes(model.ops, "mass")
        attention = [layer.self_attn for layer in model.model.model.layers]
        self.layers = [number for number, module in enumerate(attention) if window_of(module) is None]
        size = self.candidate.page_size
        batches = [list(windows[start : start + batch]) for start in range(0, len(windows), batch)]
        self._tasks = [TextTask(model, some, size, 1, False) for some in batches]

    def kl(self, dense_layers: Sequence[int], budget: int, shares: Shares | None = None) -> list[float]:
        """See :class:`quest_vllm.eval.calibrate.LayerKl`."""
        run: Run = self.candidate.run(budget)
        run = run if shares is None else run.spread(shares)
        run = replace(run, dense_layers=tuple(dense_layers))
        return [value for task in self._tasks for value in task.measure(run, (budget,))[0]["kl"]]

    def kl_alone(self, layer: int, budget: int) -> list[float]:
        """See :class:`quest_vllm.eval.calibrate.LayerKl`."""
        return self.kl([other for other in self.layers if other != layer], budget)


@contextlib.contextmanager
def probe_of(windows: Sequence[Text], *, model: ReferenceModel, batch: int) -> Iterator[ReferenceProbe]:
    """A :data:`quest_vllm.eval.calibrate.OpenProbe` once model and batch are given."""
    yield ReferenceProbe(model, windows, batch)


def judge(probe: ReferenceProbe, budget: int) -> dict[str, Any]:
    """The first two layers dense, their bytes on top of the budget, against no dense layer, on the probe's texts."""
    alike = Candidate((), budget, tuple(probe.kl([], budget)))
    first_two = Candidate(ORIGINAL, budget, tuple(probe.kl(ORIGINAL, budget)))
    return {
        "no_dense_layer": asdict(bootstrap_mean([alike.kl])),
        "first_two_dense": asdict(bootstrap_mean([first_two.kl])),
        "first_two_dense_less_none": asdict(difference(first_two, alike)),
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--budget", type=int, default=512, help="tokens a layer")
    parser.add_argument("--context", type=int, default=4096, help="tokens of a prefix, a multiple of 64")
    parser.add_argument("--places", type=int, default=64, help="texts, half of them held back")
    parser.add_argument("--rows", type=int, default=32, help="decoded tokens of a text, up to 64")
    parser.add_argument("--max-dense", type=int, default=4, help="most dense layers tried")
    parser.add_argument("--batch", type=int, default=8, help="texts in a pass")
    parser.add_argument("--bos", action="store_true", help="begin every text with the model's first token (Gemma)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and cache")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def main() -> None:
    """Calibrate, print what `quest-vllm calibrate` says, and write one JSON document."""
    arguments = parse()
    torch.set_num_threads(1)
    model = ReferenceModel(arguments.model, getattr(torch, arguments.dtype), arguments.device)
    start = [model.model.config.bos_token_id] if arguments.bos else []
    length, rows = arguments.context, arguments.rows
    chosen = texts(model.encode, length, rows, start, places(arguments.places, length + rows))
    head_dim = model.shape[2]
    config = QuestConfig()
    if why := config.why_boxes(head_dim):
        raise SystemExit(f"only key codes are calibrated here: {why}")
    task = Task(config.resolved(), arguments.budget, length, arguments.max_dense, chosen)
    found: dict[str, Any] = calibrate(
        functools.partial(probe_of, model=model, batch=arguments.batch), task, lambda line: print(line, flush=True)
    )
    with probe_of(task.held_back, model=model, batch=arguments.batch) as probe:
        judged = judge(probe, arguments.budget)
    document = {
        "benchmark": "calibration",
        "model": arguments.model.name,
        "command": " ".join(sys.argv),
        "commit": commit(short=True),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(arguments.device) if model.masked else arguments.device,
        "dtype": arguments.dtype,
        "context": length,
        "budget": arguments.budget,
        "rows_per_text": rows,
        "texts": {text.name: text.sha256 for text in chosen},
        "policy": {"page_summary": task.config.page_summary, "group_reduction": task.config.group_reduction},
        **found,
        "dense_layers_at_the_same_budget": judged,
    }
    save(document, arguments.output)
    print({"dense_layers_at_the_same_budget": judged})
    print({name: one["kl"] | {"budget": one["budget"]} for name, one in found["evidence"]["held_back"].items()})


if __name__ == "__main__":
    main()
