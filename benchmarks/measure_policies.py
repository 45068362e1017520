"""How much of dense attention each choice of pages keeps: KL on running text, and needles, at equal budgets.

usage: measure_policies.py MODEL --sweep NAME [--texts even|odd|all|none] [--places N] [--needles N] [--device cuda]
                           [--output FILE.json]

A quick reference outside vLLM: prefixes of 4K tokens are prefilled densely; the 64 tokens after each (or a question
and its answer) are decoded under teacher forcing through the same operations that serve (on a GPU, through their
PyTorch form), with each policy in turn and all its budgets at once. ``kl`` is KL(dense || policy) of the next token,
``text_nll`` the negative log-likelihood of the text's own next token, mean over rows, then texts; ``needle_nll`` that
of an answer's tokens, ``needle_hits`` the share of answers that greedy decoding would give. ``gap_closed`` is how much
of the way from the original to the oracle a policy goes, ``minus_dense`` the paired difference to dense attention.
Intervals are 95% bootstrap, over texts and over questions. Texts of even index choose a default, those of odd index
confirm it; ``--places`` takes so many others instead, whose prefixes overlap but whose decoded tokens do not.

Sweeps: radius (reduction x radius), forced (sink and recent pages), selectors (original, box, two-stage, oracle), split
(several small boxes a page), codes (two bits a key of half the channels), top_p (adaptive budgets under a ceiling of
1024, and fixed budgets beside them; by the box), top_p_codes (by key codes), top_p_oracle (with exact masses),
characterise (one of each kind, a window and eviction among them), gap (what is served and two stages on it, from the
original to the oracle), pool (a layer's budget shared by its heads, by what is served and by exact masses), long (what
is served at a budget of 2048), layers (what is served, with two dense layers, and with --settings spread over the
layers as a calibration says; ``minus_served``: the paired difference to the first).
"""

from __future__ import annotations

import argparse
import functools
import random
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hf_reference import Prefix, ReferenceModel, Run
from policy_sweeps import CONTEXT, SWEEPS, Candidate, Counted, shares_in
from policy_texts import Question, Text, needles, places, texts
from provenance import commit, save

from quest_vllm.policies import HeavyHitterPolicy

ROWS, KEYS = 64, 8
BUDGETS = (128, 256, 512)
SWEEP_BUDGETS = {"top_p": (1024,), "top_p_codes": (1024,), "top_p_oracle": (1024,), "long": (2048,)}
METRICS = ("kl", "text_nll", "needle_nll", "needle_hits")
SAVE_EVERY = 20.0  # seconds


@functools.cache
def resamples(count: int, draws: int = 2000) -> torch.Tensor:
    """``[draws, count]`` int64: which of ``count`` items each bootstrap sample holds; always the same ones."""
    rng = random.Random(0)
    return torch.tensor([rng.choices(range(count), k=count) for _ in range(draws)])


def inner_95(drawn: torch.Tensor) -> tuple[float, float]:
    """Where the middle 95% of ``drawn [draws]`` begin and end."""
    ordered = drawn.sort().values
    return float(ordered[len(ordered) // 40]), float(ordered[-len(ordered) // 40 - 1])


def interval(values: list[float]) -> dict[str, float]:
    """Mean and its 95% bootstrap interval; the seed is fixed, so policies share their resamples."""
    low, high = inner_95(torch.tensor(values, dtype=torch.float64)[resamples(len(values))].mean(1))
    return {"mean": statistics.fmean(values), "low": low, "high": high}


Values = dict[str, list[float]]


class TextTask:
    """KL of the rows of each of some texts, and the likelihood of their own tokens."""

    def __init__(
        self, model: ReferenceModel, chosen: list[Text], page_size: int, most: int, keep_attended: bool
    ) -> None:
        self.model, self.rows = model, [text.rows for text in chosen]
        rows = sum(map(len, self.rows)) * most
        self.prefix: Prefix = model.prefill_texts([text.prefix for text in chosen], rows, keep_attended)
        self.next = torch.tensor([rows[1:] for rows in self.rows], device=model.device)[..., None]
        self.dense = self._log_probs(Run(None, page_size), [0])[0]

    def _log_probs(self, run: Run, budgets: Sequence[int]) -> list[torch.Tensor]:
        """For each budget ``[texts, rows, vocabulary]`` float32."""
        continued = [rows for rows in self.rows for _ in budgets]
        logits = self.model.decode(self.prefix, continued, run, list(budgets) * len(self.rows))
        return [torch.stack(logits[i :: len(budgets)]).log_softmax(-1) for i in range(len(budgets))]

    def measure(self, run: Run, budgets: Sequence[int]) -> list[Values]:
        """For each budget one value a metric and text: the mean over the rows."""
        return [
            {
                "kl": (self.dense.exp() * (self.dense - found)).sum(-1).mean(-1).tolist(),
                "text_nll": (-found[:, :-1].gather(2, self.next).mean((1, 2))).tolist(),
            }
            for found in ([self.dense] if run.policy is None else self._log_probs(run, budgets))
        ]


class NeedleTask:
    """Every needle of one prefix, each asked for by itself."""

    def __init__(
        self, model: ReferenceModel, prefix: list[int], questions: list[Question], most: int, keep_attended: bool
    ) -> None:
        self.model, self.questions = model, questions
        rows = sum(len(question.tokens) for question in questions)
        self.prefix = model.prefill(prefix, rows * most, keep_attended)

    def measure(self, run: Run, budgets: Sequence[int]) -> list[Values]:
        """For each budget two values a question."""
        asked, count = [question.tokens for question in self.questions], len(self.questions)
        each = [budget for budget in budgets for _ in range(count)]
        logits = self.model.decode(self.prefix, asked * len(budgets), run, each)
        return [self._score(logits[i * count : (i + 1) * count]) for i in range(len(budgets))]

    def _score(self, logits: list[torch.Tensor]) -> Values:
        found: Values = {"needle_nll": [], "needle_hits": []}
        for question, rows in zip(self.questions, logits, strict=True):
            wanted = torch.tensor(question.tokens[-question.answer :], device=rows.device)
            log_probs = rows[-question.answer - 1 : -1].log_softmax(-1)
            found["needle_nll"].append(-float(log_probs.gather(1, wanted[:, None]).mean()))
            found["needle_hits"].append(float((log_probs.argmax(-1) == wanted).all()))
        return found


def tasks(
    model: ReferenceModel,
    chosen: list[list[Text]],
    hidden: Iterable[tuple[list[int], list[Question]]],
    page_size: int,
    most: int,
    keep_attended: bool,
) -> Iterator[Any]:
    """One after the other: a prefix is hundreds of megabytes. A pass has up to ``most`` budgets."""
    for some in chosen:
        yield TextTask(model, some, page_size, most, keep_attended)
    for prefix, questions in hidden:
        yield NeedleTask(model, prefix, questions, most, keep_attended)


@dataclass(frozen=True)
class Cell:
    """A candidate's name at one budget, and its values by metric, one a text or question."""

    name: str
    budget: int
    values: Values


def passes(candidate: Candidate, budgets: Sequence[int]) -> list[tuple[Run, tuple[int, ...]]]:
    """The passes that a candidate takes: one for all budgets where its policy can, and each one's budgets."""
    own = candidate.budgets(budgets)
    alone = getattr(candidate.policy, "one_budget", False) or bool(candidate.layer_shares)
    together = [(b,) for b in own] if alone else [own]
    return [(candidate.run(some[0]), some) for some in together]


def measure(
    candidates: list[Candidate], stream: Iterator[Any], page_size: int, budgets: Sequence[int] = BUDGETS
) -> Iterator[list[Cell]]:
    """After each prefix, what there is so far: a cell for each candidate and budget, the first of them dense."""
    plan: list[tuple[Run, tuple[int, ...], list[Cell]]] = [(Run(None, page_size), (0,), [Cell("dense", 0, {})])]
    for candidate in candidates:
        for run, some in passes(candidate, budgets):
            spent = tuple(map(candidate.spent, some))
            plan.append((run, spent, [Cell(candidate.name, budget, {}) for budget in some]))
    started = time.monotonic()
    for number, task in enumerate(stream):
        for run, spent, cells in plan:
            for cell, found in zip(cells, task.measure(run, spent), strict=True):
                for metric, values in found.items():
                    cell.values.setdefault(metric, []).extend(values)
            if isinstance(run.policy, Counted):
                cells[0].values.setdefault("mean_pages", []).append(run.policy.take_mean())
        print(f"prefix {number}: {len(plan)} passes in {time.monotonic() - started:.1f} s", flush=True)
        started = time.monotonic()
        yield [cell for _, _, cells in plan for cell in cells]


def result(name: str, budget: int, values: dict[str, list[float]]) -> dict[str, Any]:
    """One line of the JSON."""
    rounded = {metric: [round(value, 5) for value in found] for metric, found in values.items()}
    means = {metric: interval(found) for metric, found in values.items() if found}
    return {"policy": name, "budget": budget} | means | {"values": rounded}


def gap_interval(worst: list[float], found: list[float], best: list[float]) -> list[float]:
    """95% bootstrap interval of the share of the gap closed; texts or questions are drawn, for all three alike."""
    drawn = torch.tensor([worst, found, best], dtype=torch.float64)[:, resamples(len(found))].sum(-1)
    gap = drawn[0] - drawn[2]
    shares = ((drawn[0] - drawn[1]) / gap)[gap != 0]
    return list(inner_95(shares)) if len(shares) else []


def add_gap_closed(results: list[dict[str, Any]]) -> None:
    """How much of the way from the original to the oracle each policy goes, where both were run."""
    by_key = {(r["policy"], r["budget"]): r for r in results}
    for one in results:
        worst, best = by_key.get(("original", one["budget"])), by_key.get(("oracle", one["budget"]))
        if worst and best:
            for metric in METRICS:
                if metric in one and worst[metric]["mean"] != best[metric]["mean"]:
                    gap = worst[metric]["mean"] - best[metric]["mean"]
                    one.setdefault("gap_closed", {})[metric] = (worst[metric]["mean"] - one[metric]["mean"]) / gap
                    values = [r["values"][metric] for r in (worst, one, best)]
                    one.setdefault("gap_closed_95", {})[metric] = gap_interval(*values)


def add_minus_dense(results: list[dict[str, Any]]) -> None:
    """The paired difference of each policy to dense attention, the first of ``results``."""
    for one in results[1:]:
        one["minus_dense"] = minus(one, results[0], METRICS[1:])


def add_minus_served(results: list[dict[str, Any]]) -> None:
    """The paired difference of each policy to the first one, at the same budget."""
    served = {one["budget"]: one for one in results if one["policy"] == results[1]["policy"]}
    for one in results[1:]:
        if one["policy"] != results[1]["policy"]:
            one["minus_served"] = minus(one, served[one["budget"]], METRICS)


def minus(one: dict[str, Any], other: dict[str, Any], metrics: Sequence[str]) -> dict[str, dict[str, float]]:
    """Paired differences, by metric, with their intervals."""
    pairs = {
        metric: zip(one["values"][metric], other["values"][metric], strict=True) for metric in metrics if metric in one
    }
    return {metric: interval([found - exact for found, exact in pair]) for metric, pair in pairs.items()}


def show(one: dict[str, Any]) -> str:
    """One line for people."""
    parts = [f"{one['policy']:32s} {one['budget']:5d}"]
    parts += [f"{m} {one[m]['mean']:.4f}" for m in (*METRICS, "mean_pages") if m in one]
    parts += [f"{m} gap {100 * share:.0f}%" for m, share in one.get("gap_closed", {}).items()]
    return "  ".join(parts)


def results_of(cells: list[Cell], candidates: list[Candidate], shape: tuple[int, int, int], context: int) -> list[Any]:
    """The JSON's results: dense first."""
    sizes = {candidate.name: candidate for candidate in candidates}
    results = [result(cell.name, cell.budget, cell.values) for cell in cells]
    add_gap_closed(results)
    add_minus_dense(results)
    for one in results[1:]:
        one["bytes_per_layer_and_step"] = sizes[one["policy"]].kv_bytes(one["budget"], *shape, context)
    return results


def choose_texts(model: ReferenceModel, arguments: argparse.Namespace, start: list[int]) -> list[Text]:
    """What --texts or --places asks for."""
    length, rows = arguments.context, arguments.rows
    if arguments.texts == "none":
        return []
    if arguments.places:
        return texts(model.encode, length, rows, start, places(arguments.places, length + rows))
    step = {"even": slice(0, None, 2), "odd": slice(1, None, 2), "all": slice(None)}[arguments.texts]
    return texts(model.encode, length, rows, start)[step]


def describe(arguments: argparse.Namespace, chosen: list[Text]) -> dict[str, Any]:
    """What was measured, and on what."""
    cuda = arguments.device.startswith("cuda")
    return {
        "benchmark": "page_policies",
        "model": arguments.model.name,
        "command": " ".join(sys.argv),
        "commit": commit(short=True),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(arguments.device) if cuda else arguments.device,
        "dtype": arguments.dtype,
        "context": arguments.context,
        "rows_per_text": arguments.rows,
        "page_size": arguments.page_size,
        "dense_layers": list(Run(None).dense_layers),
        "texts": {text.name: text.sha256 for text in chosen},
        "texts_overlap": "prefixes of neighbouring places overlap, decoded tokens do not" if arguments.places else "no",
        "needle_questions": arguments.needles * KEYS,
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--sweep", choices=SWEEPS, required=True)
    parser.add_argument("--texts", choices=("even", "odd", "all", "none"), default="all")
    parser.add_argument("--places", type=int, default=0, help="texts at so many places of two of the sources instead")
    parser.add_argument("--rows", type=int, default=ROWS, help="decoded tokens of a text, up to 64")
    parser.add_argument("--batch", type=int, default=1, help="texts in a pass; several are faster on a GPU")
    parser.add_argument("--settings", type=Path, help="with --sweep layers: a file of `quest-vllm calibrate`")
    parser.add_argument("--needles", type=int, default=0, help=f"prefixes of {KEYS} needles each")
    parser.add_argument("--seed", type=int, default=0, help="of the first of them")
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--context", type=int, default=CONTEXT, help="tokens of a prefix, a multiple of 64")
    parser.add_argument("--bos", action="store_true", help="begin every text with the model's first token (Gemma)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and cache")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def main() -> None:
    """Run a sweep, print it and write one JSON document."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    model = ReferenceModel(arguments.model, getattr(torch, arguments.dtype), arguments.device)
    start = [model.model.config.bos_token_id] if arguments.bos else []
    chosen = choose_texts(model, arguments, start)
    candidates = SWEEPS[arguments.sweep](model.ops, arguments.page_size)
    if arguments.settings:
        candidates.append(replace(candidates[0], name="spread by loss", layer_shares=shares_in(arguments.settings)))
    document = describe(arguments, chosen)
    remembers = any(isinstance(candidate.policy, HeavyHitterPolicy) for candidate in candidates)
    seeds = range(arguments.seed, arguments.seed + arguments.needles)
    hidden = (needles(model.encode, arguments.context, KEYS, seed, start=start)[:2] for seed in seeds)
    budgets = SWEEP_BUDGETS.get(arguments.sweep, BUDGETS)
    batches = [chosen[i : i + arguments.batch] for i in range(0, len(chosen), arguments.batch)]
    stream = tasks(model, batches, hidden, arguments.page_size, len(budgets), remembers)
    saved, results = time.monotonic(), []
    for number, cells in enumerate(measure(candidates, stream, arguments.page_size, budgets)):
        if number + 1 == len(batches) + len(seeds) or time.monotonic() - saved > SAVE_EVERY:
            results = results_of(cells, candidates, model.shape, arguments.context)
            if arguments.sweep == "layers":
                add_minus_served(results)
            # a run that was stopped says how far it came
            done = {metric: len(found) for metric, found in cells[0].values.items()}
            save(document | {"measured": done, "results": results}, arguments.output)
            saved = time.monotonic()
    print("\n".join(map(show, results)))


if __name__ == "__main__":
    main()
