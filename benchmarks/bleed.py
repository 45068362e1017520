"""Requests with unlike budgets in shared batches answer as they do alone.

    python benchmarks/bleed.py MODEL --pairs 1000 --output FILE

Starts ``quest-vllm serve`` in float32, where a batch's shape changes log-probabilities by about 1e-6, asks every prompt
at every budget alone, then sends pairs of unlike budgets, several pairs at a time and out of step with one another, so
that rows come, go and move. Of each answer, tokens and their log-probabilities must be those of the solo run. A pair
could only show a bleed if its two budgets answer differently alone: those are counted as telling. Exit code 1 if
anything differs.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import re
import signal
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
from provenance import commit, cpu_model, save

from quest_vllm.bench.server import machine_environment, quest_command, started

BUDGETS = (0, 48, 64, 128, 256)
TOLERANCE = 1e-3
"""Nats. Float32 over other batch shapes moves log-probabilities by less; another budget moves them by far more."""
WORDS = "river garden engine letter window market stone paper bridge cloud harbor meadow".split()


@dataclass(frozen=True)
class Answer:
    """Greedy tokens and their log-probabilities in nats."""

    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]

    def distance(self, other: Answer) -> float:
        """Largest difference of log-probabilities up to the first other token; infinite if that is no near tie."""
        for place, (mine, theirs) in enumerate(zip(self.tokens, other.tokens, strict=True)):
            if mine != theirs:
                gap = abs(self.logprobs[place] - other.logprobs[place])
                return gap if gap <= TOLERANCE else float("inf")
            if abs(self.logprobs[place] - other.logprobs[place]) > TOLERANCE:
                return abs(self.logprobs[place] - other.logprobs[place])
        return max(abs(a - b) for a, b in zip(self.logprobs, other.logprobs, strict=True))


class Asker:
    """Asks one server for short greedy answers."""

    def __init__(self, url: str, model: str, tokens: int, seed: int) -> None:
        self.model, self.tokens, self.random = model, tokens, random.Random(seed)
        self.client = httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None))

    def prompts(self, count: int, words: int) -> list[str]:
        """Texts of about ``words`` words whose facts lie where small budgets may not look."""
        texts = []
        for number in range(count):
            facts = [f"The {w} costs {self.random.randint(100, 999)}." for w in WORDS]
            filler = [self.random.choice(WORDS) for _ in range(self.random.randint(words // 2, words))]
            for fact in facts:
                filler.insert(self.random.randrange(len(filler)), f". {fact}")
            texts.append(f"Text {number}: {' '.join(filler)}. The {self.random.choice(WORDS)} costs")
        return texts

    async def ask(self, prompt: str, budget: int) -> Answer:
        """One greedy answer."""
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": self.tokens,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 1,
            "sparse_attention": {"token_budget": budget},
        }
        answer = await self.client.post("/v1/completions", json=body)
        answer.raise_for_status()
        found = answer.json()["choices"][0]["logprobs"]
        return Answer(tuple(found["tokens"]), tuple(found["token_logprobs"]))


Solo = dict[tuple[int, int], Answer]


def choose_pairs(solo: Solo, count: int, rng: random.Random) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Pairs of ``(prompt, budget)`` with unlike budgets."""
    keys = sorted(solo)
    pairs = []
    while len(pairs) < count:
        first, second = rng.choice(keys), rng.choice(keys)
        if first[1] != second[1]:
            pairs.append((first, second))
    return pairs


def is_telling(solo: Solo, first: tuple[int, int], second: tuple[int, int]) -> bool:
    """Whether either answer would differ at the other's budget."""
    swapped = ((first[0], second[1]), (second[0], first[1]))
    return any(
        solo[own].distance(solo[other]) > 10 * TOLERANCE for own, other in zip((first, second), swapped, strict=True)
    )


async def compare(asker: Asker, arguments: argparse.Namespace) -> dict[str, Any]:
    """Solo runs, then pairs in shared batches."""
    texts = asker.prompts(arguments.prompts, arguments.words)
    solo: Solo = {}
    for number, budget in itertools.product(range(len(texts)), BUDGETS):
        solo[number, budget] = await asker.ask(texts[number], budget)
    repeated = max(
        [solo[number, budget].distance(await asker.ask(texts[number], budget)) for number, budget in list(solo)[:10]]
    )
    before = await steps(asker.client)
    pairs = choose_pairs(solo, arguments.pairs, asker.random)
    waiting = iter(enumerate(pairs))
    differences: list[dict[str, Any]] = []
    distances: list[float] = []

    async def work(delay: float) -> None:
        await asyncio.sleep(delay)
        for number, pair in waiting:
            answers = await asyncio.gather(*(asker.ask(texts[prompt], budget) for prompt, budget in pair))
            for key, answer in zip(pair, answers, strict=True):
                distances.append(solo[key].distance(answer))
                if distances[-1] > TOLERANCE:
                    told = {"alone": solo[key].tokens, "in_batch": answer.tokens, "distance": str(distances[-1])}
                    differences.append({"pair": number, "prompt": key[0], "budget": key[1], "of": pair, **told})
            if number % 100 == 99:
                print(f"{number + 1} pairs, {len(differences)} differ", file=sys.stderr, flush=True)

    await asyncio.gather(*(work(0.07 * worker) for worker in range(arguments.at_once)))
    after = await steps(asker.client)
    return {
        "pairs": len(pairs),
        "telling_pairs": sum(is_telling(solo, *pair) for pair in pairs),
        "differences": differences,
        "largest_logprob_difference": max(distances),
        "largest_between_two_solo_runs": repeated,
        "mean_tokens_a_step": round((after[1] - before[1]) / max(1.0, after[0] - before[0]), 2),
    }


async def steps(client: httpx.AsyncClient) -> tuple[float, float]:
    """Engine steps so far, and tokens in them."""
    text = (await client.get("/metrics")).text
    name = r"^vllm:iteration_tokens_total_{}\{{[^}}]*\}} (\S+)$"
    steps_, tokens = (re.search(name.format(kind), text, re.M) for kind in ("count", "sum"))
    assert steps_ and tokens
    return float(steps_[1]), float(tokens[1])


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Command-line words."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--words", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--at-once", type=int, default=6, help="pairs at a time (default 6)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, default=Path(".cache/bench/bleed.log"))
    parser.add_argument("--output", type=Path)
    return parser.parse_args(words)


def main() -> int:
    """Run; see the module's docstring."""
    arguments, at = parse(), commit()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server is stopped either way
    flags = "--host 127.0.0.1 --enforce-eager --dtype float32 --max-model-len 4096 --max-num-seqs 16"
    command = [*quest_command(arguments.model), *flags.split(), "--served-model-name", "m"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "2", **machine_environment()}
    with started(command, environment, arguments.log, 600) as server:
        asker = Asker(server.url, "m", arguments.tokens, arguments.seed)
        found = asyncio.run(compare(asker, arguments))
    report = {
        "benchmark": "bleed",
        "command": " ".join(sys.argv),
        "commit": at,
        "machine": {"cpu": cpu_model(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("quest-vllm", "vllm", "torch")},
        "settings": {name: str(value) for name, value in vars(arguments).items()},
        "budgets": BUDGETS,
        "tolerance": TOLERANCE,
        **found,
    }
    print(json.dumps(report, indent=1)[:4000])
    save(report, arguments.output)
    return int(bool(found["differences"]) or not found["telling_pairs"])


if __name__ == "__main__":
    raise SystemExit(main())
