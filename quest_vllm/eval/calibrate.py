"""What each layer should read: measured, at equal bytes, and judged on text that had no part in the choice.

1. Every layer alone is made sparse, all others dense: its KL to dense is what its selection loses.
2. Candidates are the worst 0, 1, 2, ... layers kept dense. A dense layer reads the whole context, so the others get
   a smaller budget: every candidate reads as many bytes as the plain budget in all layers does.
3. The fewest dense layers win from which no further one improves the KL by more than its interval.
4. The other layers' pages are spread by what each loses alone, as many in all; that stays if it improves the KL by more
   than its interval.
5. The choice, no dense layer, and layers 0 and 1 (the original's) are measured again on held-back text.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from quest_vllm.config import QuestConfig
from quest_vllm.errors import QuestValueError
from quest_vllm.eval.stats import Estimate, bootstrap_mean

ORIGINAL = (0, 1)
"""The dense layers of the original Quest."""
LOSS_POWER = 0.4
"""A layer's loss falls about as its budget to the power of -1.5 (docs/characterisation.md), so the sum of losses is
least where budgets go with losses to the power of 1 / (1 + 1.5)."""
Shares = Mapping[int, float]


def shares_of(losses: Mapping[int, float]) -> Shares:
    """``layer_shares`` for layers that lose ``losses`` (KL, by layer) at equal budgets; their mean is 1."""
    weights = {layer: max(loss, 0.0) ** LOSS_POWER for layer, loss in losses.items()}
    total = sum(weights.values())
    return {layer: round(weight * len(weights) / total, 3) if total else 1.0 for layer, weight in weights.items()}


def equal_bytes_budget(config: QuestConfig, budget: int, context: int, layers: int, dense: int) -> int:
    """The budget of the other layers when ``dense`` of ``layers`` read all of ``context``, whole pages, at equal bytes.

    Equal to ``budget`` in every layer, summaries (one vector pair a page) included. 0 or less: not affordable.
    """
    summaries = -(-context // config.page_size)
    left = layers * (budget + summaries) - dense * context
    affordable = left // (layers - dense) - summaries if layers > dense else 0
    return affordable // config.page_size * config.page_size


class LayerKl(Protocol):
    """Measures KL to dense on fixed windows of text, for any set of sparse layers and any budget."""

    layers: list[int]
    """All that could be sparse."""

    def kl(self, dense_layers: Sequence[int], budget: int, shares: Shares | None = None) -> list[float]:
        """KL to dense of each window with ``dense_layers`` dense and all others at ``budget`` tokens.

        ``shares`` of the others spread that over them, see :mod:`quest_vllm.layer_shares`; None: alike.
        """
        ...

    def kl_alone(self, layer: int, budget: int) -> list[float]:
        """KL to dense of each window with ``layer`` alone at ``budget`` tokens."""
        ...


OpenProbe = Callable[[Sequence[Any]], contextlib.AbstractContextManager[LayerKl]]
"""Makes one for windows of text; what it needs lives as long."""


@dataclass(frozen=True)
class Candidate:
    """Dense layers, the budget that the others get at equal bytes, how it is spread, and KL to dense by window."""

    dense_layers: tuple[int, ...]
    budget: int
    kl: tuple[float, ...]
    shares: Shares | None = None

    def as_json(self) -> dict[str, Any]:
        """For the evidence."""
        mean = bootstrap_mean([self.kl])
        spread = {} if self.shares is None else {"layer_shares": dict(self.shares)}
        return {"dense_layers": list(self.dense_layers), "budget": self.budget, **spread, "kl": _shown(mean)}


def _shown(estimate: Estimate) -> dict[str, float]:
    return {
        key: round(value, 5) for key, value in (("mean", estimate.mean), ("low", estimate.low), ("high", estimate.high))
    }


def difference(first: Candidate, second: Candidate) -> Estimate:
    """KL of ``first`` less that of ``second`` on the same windows; below zero: the first is better."""
    return bootstrap_mean([[a - b for a, b in zip(first.kl, second.kl, strict=True)]])


def choose(candidates: Sequence[Candidate]) -> Candidate:
    """The first candidate, then each later one that beats the best so far by more than its interval."""
    best = candidates[0]
    for candidate in candidates[1:]:
        if difference(candidate, best).high < 0:
            best = candidate
    return best


@dataclass(frozen=True)
class Task:
    """What to calibrate for. ``windows`` are split in two halves: to choose on, and held back."""

    config: QuestConfig
    budget: int
    context: int
    max_dense: int
    windows: Sequence[Any]

    @property
    def to_choose_on(self) -> Sequence[Any]:
        """The first half of the windows."""
        return self.windows[: len(self.windows) // 2]

    @property
    def held_back(self) -> Sequence[Any]:
        """The other half."""
        return self.windows[len(self.windows) // 2 :]


def calibrate(open_probe: OpenProbe, task: Task, say: Callable[[str], object]) -> dict[str, Any]:
    """Measure and choose; returns ``settings`` and ``evidence``, plain data for YAML."""
    with open_probe(task.to_choose_on) as probe:
        nearly_all = task.context - task.config.page_size
        floor = bootstrap_mean([probe.kl([], nearly_all)]).mean
        say(f"all layers at budget {nearly_all}, nearly all pages: KL {floor:.5f} (rounding of other kernels, mostly)")
        alone = {}
        for layer in probe.layers:
            alone[layer] = bootstrap_mean([probe.kl_alone(layer, task.budget)])
            say(f"layer {layer} sparse alone: KL {alone[layer].mean:.5f}")
        ranked = sorted(probe.layers, key=lambda layer: -alone[layer].mean)
        candidates = [measure(probe, task, ranked[:count]) for count in range(task.max_dense + 1)]
        affordable = [candidate for candidate in candidates if candidate is not None]
        if not affordable:
            raise QuestValueError(f"--budget: expected at least {task.config.min_token_budget}, got {task.budget}")
        for candidate in affordable:
            say(f"dense layers {list(candidate.dense_layers)}: budget {candidate.budget}, KL {_mean(candidate):.5f}")
        fewest = choose(affordable)
        shares = shares_of({layer: alone[layer].mean for layer in probe.layers if layer not in fewest.dense_layers})
        spread = measure(probe, task, fewest.dense_layers, shares)
        assert spread is not None  # at the bytes of the fewest
        say(f"the same pages, spread by loss: KL {_mean(spread):.5f}")
        chosen = choose([fewest, spread])
    with open_probe(task.held_back) as probe:
        held_back = _held_back(probe, task, chosen)
    return {
        "settings": {"dense_layers": list(chosen.dense_layers), "layer_shares": dict(chosen.shares or {})},
        "evidence": {
            "kl_with_nearly_all_pages": round(floor, 5),
            "kl_of_each_layer_sparse_alone": {layer: round(alone[layer].mean, 5) for layer in probe.layers},
            "candidates_at_equal_bytes": [candidate.as_json() for candidate in (*affordable, spread)],
            "held_back": held_back,
        },
    }


def measure(probe: LayerKl, task: Task, dense_layers: Sequence[int], shares: Shares | None = None) -> Candidate | None:
    """A candidate, or None where its bytes leave the other layers less than the smallest budget."""
    dense = tuple(sorted(set(dense_layers) & set(probe.layers)))
    budget = equal_bytes_budget(task.config, task.budget, task.context, len(probe.layers), len(dense))
    if budget < task.config.min_token_budget:
        return None
    return Candidate(dense, budget, tuple(probe.kl(dense, budget, shares)), shares)


def _mean(candidate: Candidate) -> float:
    return bootstrap_mean([candidate.kl]).mean


def _held_back(probe: LayerKl, task: Task, chosen: Candidate) -> dict[str, Any]:
    """The choice against no dense layer and the original's, every layer alike, on text that did not choose."""
    rivals: dict[str, Sequence[int]] = {"no_dense_layer": (), "original": ORIGINAL}
    if chosen.shares is not None and chosen.dense_layers:
        rivals["alike"] = chosen.dense_layers
    ours = measure(probe, task, chosen.dense_layers, chosen.shares)
    assert ours is not None  # the same bytes were affordable before
    shown: dict[str, Any] = {"chosen": ours.as_json()}
    for name, layers in rivals.items():
        rival = measure(probe, task, layers)
        if rival is not None:
            shown[name] = {**rival.as_json(), "kl_of_chosen_less_this": _shown(difference(ours, rival))}
    return shown
