"""What ``measure_policies.py`` compares: policies, each with what a server's configuration would hold beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from hf_reference import Run

from quest_vllm.config import QuestConfig
from quest_vllm.eval.calibrate import ORIGINAL
from quest_vllm.model_settings import read_settings
from quest_vllm.ops.api import Ops
from quest_vllm.policies import (
    BoundPolicy,
    DecodeStep,
    HeavyHitterPolicy,
    KeyCodesPolicy,
    OraclePolicy,
    PagePolicy,
    SharedPoolPolicy,
    SplitBoxPolicy,
    TwoStagePolicy,
    WindowPolicy,
)

CONTEXT = 4096  # tokens of a prefix


@dataclass(frozen=True)
class Candidate:
    """A policy with what a server's configuration would hold beside it."""

    name: str
    policy: PagePolicy
    sink_pages: int = 1
    recent_pages: int = 2
    page_size: int = 16
    only_budget: int | None = None
    share: float = 1.0
    dense_layers: tuple[int, ...] = ()
    layer_shares: tuple[tuple[int, float], ...] = ()

    def budgets(self, every: Sequence[int]) -> tuple[int, ...]:
        """The sweep's budgets, or the policy's own."""
        return (self.only_budget,) if self.only_budget else tuple(every)

    def spent(self, budget: int) -> int:
        """Tokens attended to at ``budget``: a ``share`` of it, where choosing them costs the rest."""
        return round(budget * self.share)

    def run(self, budget: int) -> Run:
        """One pass at ``budget`` tokens."""
        forced = (self.sink_pages, self.recent_pages)
        run = Run(self.policy, self.page_size, self.spent(budget), *forced, self.dense_layers)
        return run.spread(dict(self.layer_shares)) if self.layer_shares else run

    def kv_bytes(self, budget: int, num_kv_heads: int, num_q_heads: int, dim: int, context: int = CONTEXT) -> int:
        """Bytes a layer and step at ``context`` tokens in 16-bit elements."""
        per_query_head = getattr(self.policy, "group_reduction", "") == "per_query_head"
        units = num_q_heads if per_query_head else num_kv_heads
        page_bytes, pages = self.page_size * 4 * dim, context // self.page_size
        return units * self.policy.bytes_read(pages, -(-self.spent(budget) // self.page_size), page_bytes, 4 * dim)


def original(ops: Ops, page_size: int = 16) -> Candidate:
    """Quest as published: the bound, nothing forced but the current page."""
    return Candidate("original", BoundPolicy(ops, "max", 1.0), 0, 1, page_size)


def box(ops: Ops, page_size: int = 16) -> Candidate:
    """What the server does with minima and maxima when nobody sets more."""
    config = boxes(page_size)
    policy = BoundPolicy(ops, config.group_reduction, config.bound_radius)
    return Candidate(f"box, radius {config.bound_radius:g}", policy, config.sink_pages, config.recent_pages, page_size)


def boxes(page_size: int) -> QuestConfig:
    """The server's defaults with minima and maxima."""
    return QuestConfig(page_size=page_size, page_summary="min_max").resolved()


def codes(ops: Ops, reduction: str, page_size: int = 16) -> Candidate:
    """Key codes, at the bytes of a box."""
    return Candidate(f"key codes, {reduction}", KeyCodesPolicy(ops, reduction), page_size=page_size)


def two_stage(ops: Ops, page_size: int = 16) -> Candidate:
    """What a request with the policy "two_stage" is served with."""
    return Candidate("two-stage", TwoStagePolicy(KeyCodesPolicy(ops, "mass")), page_size=page_size)


def bound(ops: Ops, reduction: str, radius: float, sink: int = 1, recent: int = 2, page_size: int = 16) -> Candidate:
    """A policy from summaries alone, named by its settings."""
    name = f"{reduction} radius {radius:g}, {sink} sink {recent} recent"
    return Candidate(name, BoundPolicy(ops, reduction, radius), sink, recent, page_size)


def radius_sweep(ops: Ops, page_size: int) -> list[Candidate]:
    """Reduction by radius, the same pages forced."""
    found = [original(ops, page_size), Candidate("oracle", OraclePolicy(ops), page_size=page_size)]
    grid = {"max": (0.25, 0.5, 1.0), "mean": (0.5,), "mass": (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)}
    return found + [bound(ops, reduction, a, page_size=page_size) for reduction, radii in grid.items() for a in radii]


def forced_sweep(ops: Ops, page_size: int) -> list[Candidate]:
    """Forced pages, the box's score."""
    base = box(ops).policy
    assert isinstance(base, BoundPolicy)
    score = (base.group_reduction, base.bound_radius)
    pairs = ((0, 1), (1, 1), (0, 2), (1, 2), (1, 3), (1, 4), (2, 2), (2, 4))
    return [bound(ops, *score, sink, recent, page_size) for sink, recent in pairs]


def selector_sweep(ops: Ops, page_size: int) -> list[Candidate]:
    """From the original to the oracle."""
    first = box(ops, page_size).policy
    assert isinstance(first, BoundPolicy)
    joined = BoundPolicy(ops, "mass", first.bound_radius)
    twice = [(f"two-stage {n}x", TwoStagePolicy(joined, n, certain=0)) for n in (2, 4)]
    return [
        original(ops, page_size),
        bound(ops, "max", 1.0, page_size=page_size),
        box(ops, page_size),
        bound(ops, "mass", 0.25, page_size=page_size),
        bound(ops, "per_query_head", first.bound_radius, page_size=page_size),
        *(Candidate(name, policy, page_size=page_size) for name, policy in twice),
        Candidate("oracle", OraclePolicy(ops), page_size=page_size),
    ]


def split_sweep(ops: Ops, page_size: int) -> list[Candidate]:
    """Several boxes a page; two in FP8 take one's bytes in 16 bits."""
    grid = ((2, 0.5, "max"), (2, 0.25, "max"), (2, 0.5, "mass"), (4, 0.5, "max"), (4, 0.5, "mass"))
    split = [
        Candidate(f"{n} boxes, {how} radius {a:g}", SplitBoxPolicy(ops, n, a, how), page_size=page_size)
        for n, a, how in grid
    ]
    oracle = Candidate("oracle", OraclePolicy(ops), page_size=page_size)
    return [original(ops, page_size), box(ops, page_size), *split, oracle]


class Counted:
    """A policy that adds up how many pages it takes, over layers, rows and heads."""

    one_budget = True  # it cannot tell rows of different ones apart

    def __init__(self, policy: PagePolicy) -> None:
        self.policy = policy
        self.pages = self.choices = self.all_pages = self.all_choices = 0

    @property
    def page_summary(self) -> str:
        """What the policy reads of a page."""
        return getattr(self.policy, "page_summary", "min_max")

    def choose(self, step: DecodeStep) -> torch.Tensor:
        """See :class:`quest_vllm.policies.PagePolicy`."""
        selected = self.policy.choose(step)
        self.pages += int((selected >= 0).sum())
        self.choices += selected.shape[0] * selected.shape[1]
        return selected

    def bytes_read(self, num_pages: int, page_budget: int, page_bytes: int, summary_bytes: int) -> int:
        """See :class:`quest_vllm.policies.PagePolicy`; at the mean of the pages taken."""
        mean = round(self.all_pages / self.all_choices) if self.all_choices else page_budget
        return self.policy.bytes_read(num_pages, mean, page_bytes, summary_bytes)

    def take_mean(self) -> float:
        """Mean pages of a row and head since the last call."""
        mean = self.pages / self.choices
        self.all_pages, self.all_choices = self.all_pages + self.pages, self.all_choices + self.choices
        self.pages = self.choices = 0
        return mean


def top_p_sweep(ops: Ops, page_size: int) -> list[Candidate]:
    """The box's score with shares of a budget of 1024, and the fixed budgets that cost about the same."""
    config = boxes(page_size)
    score = (config.group_reduction, config.bound_radius)
    shares = [(f"top_p {p:g}", Counted(BoundPolicy(ops, *score, top_p=p)), None) for p in (1.0, 0.98, 0.95, 0.9, 0.8)]
    fixed = [(f"budget {tokens}", Counted(BoundPolicy(ops, *score)), tokens) for tokens in (512, 384, 256)]
    return counted(config, (*shares, *fixed))


def top_p_codes_sweep(ops: Ops, page_size: int) -> list[Candidate]:
    """:func:`top_p_sweep` with what is served by default, and with its two stages."""
    first = KeyCodesPolicy(ops, "mass")
    shares = [(f"top_p {p:g}", Counted(KeyCodesPolicy(ops, "mass", top_p=p)), None) for p in (1.0, 0.98, 0.95, 0.9)]
    shares += [(f"two-stage, top_p {p:g}", Counted(TwoStagePolicy(first, top_p=p)), None) for p in (0.98, 0.95, 0.9)]
    fixed = [(f"budget {tokens}", Counted(KeyCodesPolicy(ops, "mass")), tokens) for tokens in (512, 384, 256)]
    return counted(QuestConfig(page_size=page_size), (*shares, *fixed))


def top_p_oracle_sweep(ops: Ops, page_size: int) -> list[Candidate]:
    """The same law with exact masses: what a better estimate would make of it."""
    config = boxes(page_size)
    score = (config.group_reduction, config.bound_radius)
    shares = [(f"oracle top_p {p:g}", Counted(OraclePolicy(ops, p)), None) for p in (1.0, 0.95)]
    shares += [(f"top_p {p:g}", Counted(BoundPolicy(ops, *score, top_p=p)), None) for p in (1.0, 0.95)]
    fixed = [
        ("oracle budget 512", Counted(OraclePolicy(ops)), 512),
        ("budget 512", Counted(BoundPolicy(ops, *score)), 512),
    ]
    return counted(config, (*shares, *fixed))


def counted(config: QuestConfig, found: Sequence[tuple[str, Counted, int | None]]) -> list[Candidate]:
    """Candidates of ``(name, policy, budget of its own)``, with the configuration's forced pages."""
    forced = (config.sink_pages, config.recent_pages, config.page_size)
    return [Candidate(name, policy, *forced, tokens) for name, policy, tokens in found]


def code_sweep(ops: Ops, page_size: int) -> list[Candidate]:
    """Key codes, at the box's bytes."""
    coded = [codes(ops, how, page_size) for how in ("max", "mass")]
    oracle = Candidate("oracle", OraclePolicy(ops), page_size=page_size)
    return [original(ops, page_size), box(ops, page_size), *coded, oracle]


def characterise_sweep(ops: Ops, page_size: int) -> list[Candidate]:
    """One policy of each kind; eviction in tokens, as published, the rest in pages."""
    return [
        Candidate("window", WindowPolicy(ops), page_size=page_size),
        Candidate("h2o-like", HeavyHitterPolicy(), page_size=1),
        original(ops, page_size),
        box(ops, page_size),
        codes(ops, "mass", page_size),
        Candidate("oracle", OraclePolicy(ops), page_size=page_size),
    ]


def gap_sweep(ops: Ops, page_size: int) -> list[Candidate]:
    """What is served: by default, in two stages with the same pages in the end, and so at the default's bytes."""
    served, twice = codes(ops, "mass", page_size), two_stage(ops, page_size)
    return [
        original(ops, page_size),
        box(ops, page_size),
        served,
        twice,
        replace(
            twice, name="two-stage, all keys of 4x", policy=TwoStagePolicy(KeyCodesPolicy(ops, "mass"), 4, certain=0)
        ),
        # keys of as many pages are half as many bytes as the keys and values of those pages
        replace(twice, name="two-stage, two thirds of the pages", share=2 / 3),
        Candidate("oracle", OraclePolicy(ops), page_size=page_size),
    ]


def pool_sweep(ops: Ops, page_size: int) -> list[Candidate]:
    """A layer's budget in one pool beside a budget for each head, by what is served and by exact masses."""
    served, oracle = codes(ops, "mass", page_size), Candidate("oracle", OraclePolicy(ops), page_size=page_size)
    assert isinstance(served.policy, KeyCodesPolicy)
    return [
        served,
        replace(served, name="key codes, one pool", policy=SharedPoolPolicy(served.policy)),
        oracle,
        replace(oracle, name="oracle, one pool", policy=SharedPoolPolicy(OraclePolicy(ops))),
    ]


def long_sweep(ops: Ops, page_size: int) -> list[Candidate]:
    """What is served by default and by request, between the original and the oracle."""
    oracle = Candidate("oracle", OraclePolicy(ops), page_size=page_size)
    served = codes(ops, "mass", page_size)
    others = [original(ops, page_size), box(ops, page_size), codes(ops, "max", page_size), two_stage(ops, page_size)]
    return [served, *others, oracle]


def layer_sweep(ops: Ops, page_size: int) -> list[Candidate]:
    """What is served, and with the original's two dense layers, whose bytes come on top of the budget."""
    served = codes(ops, "mass", page_size)
    return [served, replace(served, name="first two layers dense", dense_layers=ORIGINAL)]


def shares_in(path: Path) -> tuple[tuple[int, float], ...]:
    """The layer_shares of a calibration, YAML or this project's JSON."""
    return QuestConfig(**read_settings(path)).layer_shares


SWEEPS: dict[str, Callable[[Ops, int], list[Candidate]]] = {
    "radius": radius_sweep,
    "forced": forced_sweep,
    "selectors": selector_sweep,
    "split": split_sweep,
    "top_p": top_p_sweep,
    "top_p_codes": top_p_codes_sweep,
    "top_p_oracle": top_p_oracle_sweep,
    "codes": code_sweep,
    "characterise": characterise_sweep,
    "gap": gap_sweep,
    "pool": pool_sweep,
    "long": long_sweep,
    "layers": layer_sweep,
}
