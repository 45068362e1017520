"""Which layers should stay dense: `quest-vllm calibrate`'s own procedure on the Hugging Face reference, without vLLM.

usage: calibrate_reference.py MODEL [--device cuda] [--budget B] [--context N] [--places N] [--output FILE.json]

Also: what the same bytes are worth when layers that lose more get more of them (`spread`); serving cannot do that yet.

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
from measure_policies import TextTask, codes
from policy_texts import Text, places, texts
from provenance import commit, save

from quest_vllm.config import QuestConfig
from quest_vllm.eval.calibrate import ORIGINAL, Candidate, Task, calibrate, difference
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

    def kl(self, dense_layers: Sequence[int], budget: int) -> list[float]:
        """See :class:`quest_vllm.eval.calibrate.LayerKl`."""
        return self._kl(replace(self.candidate.run(budget), dense_layers=tuple(dense_layers)), budget)

    def kl_spread(self, layer_pages: Sequence[int]) -> list[float]:
        """KL to dense of each text where every layer has a number of pages of its own."""
        return self._kl(replace(self.candidate.run(0), dense_layers=(), layer_pages=tuple(layer_pages)), 0)

    def kl_alone(self, layer: int, budget: int) -> list[float]:
        """See :class:`quest_vllm.eval.calibrate.LayerKl`."""
        return self.kl([other for other in self.layers if other != layer], budget)

    def _kl(self, run: Run, budget: int) -> list[float]:
        return [value for task in self._tasks for value in task.measure(run, (budget,))[0]["kl"]]


def spread(losses: Sequence[float], pages: int, least: int) -> list[int]:
    """Share ``len(losses) * pages`` pages among layers that lose ``losses`` at ``pages`` each; ``least`` for each.

    A layer's loss falls about as its budget to the power of -1.5 (docs/characterisation.md), so their sum is least
    where budgets go with losses to the power of 1 / (1 + 1.5). Raises ``ValueError`` where ``pages`` is below that.
    """
    if pages < least:
        raise ValueError(f"pages: expected at least {least}, got {pages}")
    weights = [max(loss, 0.0) ** 0.4 for loss in losses]
    free, total = len(losses) * (pages - least), sum(weights)
    exact = [free * weight / total for weight in weights] if total else [free / len(losses)] * len(losses)
    shares = [int(share) for share in exact]
    by_rest = sorted(range(len(losses)), key=lambda layer: shares[layer] - exact[layer])
    for layer in by_rest[: free - sum(shares)]:
        shares[layer] += 1
    return [least + share for share in shares]


@contextlib.contextmanager
def probe_of(windows: Sequence[Text], *, model: ReferenceModel, batch: int) -> Iterator[ReferenceProbe]:
    """A :data:`quest_vllm.eval.calibrate.OpenProbe` once model and batch are given."""
    yield ReferenceProbe(model, windows, batch)


def judge(probe: ReferenceProbe, layer_pages: list[int], budget: int) -> dict[str, Any]:
    """Pages spread over the layers against as many in each, both without dense layers, on the probe's texts.

    Beside them: the first two layers dense and the whole budget in the others, which reads more.
    """
    uniform = Candidate((), budget, tuple(probe.kl([], budget)))
    others = {
        "spread": Candidate((), budget, tuple(probe.kl_spread(layer_pages))),
        "first_two_dense": Candidate(ORIGINAL, budget, tuple(probe.kl(ORIGINAL, budget))),
    }
    judged: dict[str, Any] = {"layer_pages": layer_pages, "uniform": asdict(bootstrap_mean([uniform.kl]))}
    for name, other in others.items():
        judged[name] = asdict(bootstrap_mean([other.kl]))
        judged[f"{name}_less_uniform"] = asdict(difference(other, uniform))
    return judged


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
    losses = list(found["evidence"]["kl_of_each_layer_sparse_alone"].values())
    page_size = task.config.page_size
    pages = spread(losses, arguments.budget // page_size, task.config.min_token_budget // page_size + 1)
    with probe_of(task.held_back, model=model, batch=arguments.batch) as probe:
        judged = judge(probe, pages, arguments.budget)
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
        "no_dense_layer_at_this_budget": judged,
    }
    save(document, arguments.output)
    print({"no_dense_layer_at_this_budget": judged})
    print({name: one["kl"] | {"budget": one["budget"]} for name, one in found["evidence"]["held_back"].items()})


if __name__ == "__main__":
    main()
