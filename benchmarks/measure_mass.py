"""What ``top_p`` means: the share of attention mass that page scores promise, against the share that pages really hold.

usage: measure_mass.py MODEL [--texts N] [--layer-step N] [--output FILE.json]

Prefixes of 4K tokens are prefilled densely and 64 tokens after each decoded densely under teacher forcing; in every
sparse layer, row and KV head the law of ``top_p`` is applied to the scores that serve, and the exact mass of the pages
that it takes is read off the keys. ``share`` is that mass over the mass of the budget's pages (``top_p`` promises it),
``share_of_all`` over that of the whole context; ``temperature`` multiplies the log of the estimated mass (1: served).
Also what a threshold on the share of the whole context would take (law "context").
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hf_reference import ReferenceModel, Run, every_page
from policy_texts import texts
from provenance import commit, save

from quest_vllm.config import QuestConfig
from quest_vllm.ops.api import Ops
from quest_vllm.ops.reference import group_mass, mass_scale_of, num_pages
from quest_vllm.policies import BoundPolicy, DecodeStep
from quest_vllm.policies.oracle import page_logits

CONTEXT, ROWS = 4096, 64
TOP_PS = (0.8, 0.9, 0.95, 0.98)
TEMPERATURES = (0.75, 1.0, 1.25)
BUDGETS = (512, 1024, 2048)
REDUCTIONS = ("max", "mass")
LAWS = ("budget", "context")


@dataclass
class Recorder:
    """A policy that attends to everything and keeps, for every law, what it would have taken."""

    ops: Ops
    layer_step: int
    found: dict[tuple[Any, ...], list[torch.Tensor]] = field(default_factory=dict)
    calls: int = 0

    def choose(self, step: DecodeStep) -> torch.Tensor:
        """See :class:`quest_vllm.policies.PagePolicy`."""
        self.calls += 1
        if self.calls % self.layer_step == 0:
            self._record(step)
        return every_page(step)

    def bytes_read(self, *_: int) -> int:
        """Not asked."""
        raise NotImplementedError

    def _record(self, step: DecodeStep) -> None:
        pages = num_pages(step.seq_lens, step.page_size)
        width = int(pages.max())
        exact = group_mass(page_logits(step))[..., :width].softmax(-1)
        index = torch.arange(width)
        forced = (index < step.sink_pages) | (index >= pages[:, None] - step.recent_pages)
        for reduction in REDUCTIONS:
            policy = BoundPolicy(self.ops, reduction, QuestConfig().bound_radius)
            scores = policy.scores(step)[..., :width]
            log_mass = scores * mass_scale_of(reduction, step.scale)
            first = torch.where(forced[:, None] & (scores > float("-inf")), float("inf"), scores)
            order = first.sort(dim=-1, descending=True, stable=True).indices
            self._apply(reduction, log_mass.gather(-1, order), log_mass, exact.gather(-1, order))

    def _apply(self, reduction: str, ranked: torch.Tensor, log_mass: torch.Tensor, exact: torch.Tensor) -> None:
        for budget in BUDGETS:
            count = budget // 16
            held = exact[..., :count].cumsum(-1)
            for temperature in TEMPERATURES:
                inside = (ranked[..., :count] * temperature).double()
                within = {"budget": inside.logsumexp(-1), "context": (log_mass * temperature).double().logsumexp(-1)}
                for law in LAWS:
                    share = (inside - within[law][..., None]).exp().cumsum(-1)
                    for p in TOP_PS:
                        taken = ((share < p).sum(-1) + 1).clamp(3, count)
                        mass = held.gather(-1, taken[..., None] - 1)[..., 0]
                        values = torch.stack([taken.float(), mass / held[..., -1], mass]).flatten(1)
                        self.found.setdefault((reduction, budget, temperature, law, p), []).append(values)


def result(key: tuple[Any, ...], found: list[torch.Tensor]) -> dict[str, Any]:
    """One line of the JSON."""
    taken, share, of_all = torch.cat(found, dim=1)
    names = ("group_reduction", "budget", "temperature", "law", "top_p")
    return dict(zip(names, key, strict=True)) | {
        "mean_pages": round(float(taken.mean()), 2),
        "share": round(float(share.mean()), 4),
        "share_10th_percentile": round(float(share.sort().values[len(share) // 10]), 4),
        "share_of_all": round(float(of_all.mean()), 4),
        "at_ceiling": round(float((taken == key[1] // 16).float().mean()), 4),
        "at_floor": round(float((taken == 3).float().mean()), 4),
    }


def main() -> None:
    """Measure, print what is served, write one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--texts", type=int, default=4, help="how many, spread over those of policy_texts.py")
    parser.add_argument("--layer-step", type=int, default=1, help="record one sparse layer in so many")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = ReferenceModel(arguments.model)
    chosen = texts(model.encode, CONTEXT, ROWS)
    chosen = chosen[:: max(1, len(chosen) // arguments.texts)][: arguments.texts]
    recorder = Recorder(model.ops, arguments.layer_step)
    for text in chosen:
        model.decode(model.prefill(text.prefix, ROWS), [text.rows], Run(recorder))
        print(text.name, flush=True)
    results = [result(key, found) for key, found in recorder.found.items()]
    document = {
        "benchmark": "top_p_mass",
        "model": arguments.model.name,
        "command": " ".join(sys.argv),
        "commit": commit(short=True),
        "context": CONTEXT,
        "bound_radius": QuestConfig().bound_radius,
        "texts": {text.name: text.sha256 for text in chosen},
        "rows": len(chosen) * ROWS,
        "results": results,
    }
    save(document, arguments.output)
    for one in results:
        if one["temperature"] == 1.0 and one["budget"] == 1024:
            print(json.dumps(one))


if __name__ == "__main__":
    main()
