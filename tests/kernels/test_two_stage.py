"""The policy "two_stage" as it is served: pages around the end of the budget, ranked again by their keys."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from quest_vllm.ops import reference
from quest_vllm.ops.api import Ops, load_ops
from quest_vllm.ops.reference import num_pages
from quest_vllm.policies import BoundPolicy, DecodeStep, KeyCodesPolicy, OraclePolicy, TwoStagePolicy
from tests.kernels.paged import PagedCase, make_case, places

LENGTHS = [0, 1, 100, 583, 1300, 16 * 70 + 3]
BUDGETS = [3, 3, 4, 9, 20, 200]  # pages; the last one covers its row
SCALE = 1 / math.sqrt(64)
IMPLEMENTATIONS = ["reference", "torch", "cpu"]


def first_stage(ops: Ops, summary: str) -> BoundPolicy | KeyCodesPolicy:
    """What is served without a second one."""
    return KeyCodesPolicy(ops, "mass") if summary == "key_codes" else BoundPolicy(ops, "mass", 0.5)


def step_of(case: PagedCase, budgets: list[int]) -> DecodeStep:
    """The case as a policy sees it; all budgets in pages."""
    views = case.views
    return DecodeStep(
        query=case.query,
        key_cache=views.keys,
        summaries=views.summaries,
        block_table=case.block_table,
        seq_lens=case.seq_lens,
        page_budgets=torch.tensor(budgets, dtype=torch.int32),
        page_size=case.page_size,
        max_page_budget=max(budgets),
        scale=SCALE,
    )


def chosen_pages(
    ops: Ops, case: PagedCase, budgets: list[int], policies: list[str], summary: str, **options: Any
) -> torch.Tensor:
    """What the operations choose of a case, ``[num_reqs, num_kv_heads, max_page_budget]``."""
    views, page_budgets = case.views, torch.tensor(budgets, dtype=torch.int32)
    rows: dict[str, Any] = {"page_size": case.page_size, "policies": places(policies)}
    scoring: dict[str, Any] = {"group_reduction": "mass", "bound_radius": 0.5, "scale": SCALE, "page_summary": summary}
    log_sums = torch.empty(case.query.shape[:2])
    tables = (case.block_table, case.seq_lens)
    scores = ops.score_pages(case.query, views.summaries, *tables, log_sums=log_sums, **scoring, **rows)
    assert ops.choose_pages is not None
    widest = {"max_page_budget": max(budgets), "scale": SCALE}
    given = (scores, log_sums, case.query, views.keys, *tables, page_budgets)
    return ops.choose_pages(*given, **widest, **rows, **options)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("summary", ["min_max", "key_codes"])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.4])
def test_what_is_served_is_the_policy_that_is_measured(implementation: str, summary: str, top_p: float) -> None:
    case, ops = make_case(LENGTHS, page_summary=summary), load_ops(implementation, "cpu")
    shares = {} if top_p == 1 else {"top_p": torch.full((len(LENGTHS),), top_p)}
    served = chosen_pages(ops, case, BUDGETS, ["two_stage"] * len(LENGTHS), summary, **shares)
    policy = TwoStagePolicy(first_stage(ops, summary), top_p=top_p)
    assert torch.equal(served, policy.choose(step_of(case, BUDGETS)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_it_holds_more_mass_than_one_stage_and_no_more_than_the_oracle(implementation: str) -> None:
    """On key codes, whose estimates err both ways. Boxes' are too high: exact masses lose to them."""
    case, ops = make_case(LENGTHS, page_summary="key_codes"), load_ops(implementation, "cpu")
    budgets = [3, 3, 4, 9, 20, 15]
    masses = OraclePolicy(ops).scores(step_of(case, budgets)).exp().nan_to_num()

    def held(selected: torch.Tensor) -> torch.Tensor:
        return (masses.gather(2, selected.clamp(min=0).long()) * (selected >= 0)).sum(-1)

    two = held(chosen_pages(ops, case, budgets, ["two_stage"] * len(LENGTHS), "key_codes"))
    one = held(chosen_pages(ops, case, budgets, ["mass"] * len(LENGTHS), "key_codes"))
    best = held(OraclePolicy(ops).choose(step_of(case, budgets)))
    assert (two <= best + 1e-5).all()
    assert (two >= one - 1e-5).all() and (two[4:] > one[4:]).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_neighbours_of_other_policies_change_nothing(implementation: str) -> None:
    case, ops = make_case(LENGTHS, page_summary="key_codes"), load_ops(implementation, "cpu")
    mixed = ["two_stage", "window", "mass", "two_stage", "max", "two_stage"]
    together = chosen_pages(ops, case, BUDGETS, mixed, "key_codes")
    for policy in set(mixed):
        alone = chosen_pages(ops, case, BUDGETS, [policy] * len(mixed), "key_codes")
        for row, own in enumerate(mixed):
            assert own != policy or torch.equal(together[row], alone[row]), (row, own)


def test_the_shortlist_lies_around_the_end_of_the_budget() -> None:
    """Of ten pages' budgets among thirty: ranks 5 to 14, forced pages first; and never a forced page.

    A row whose budget takes all its pages, or forced ones alone, has none.
    """
    ops, lengths = load_ops("reference", "cpu"), torch.tensor([480, 480, 150, 48], dtype=torch.int32)
    scores = torch.rand(4, 2, 30)
    budgets = torch.tensor([10, 4, 10, 3], dtype=torch.int32)
    rows = {"page_size": 16, "policies": places(["two_stage"] * 4)}
    listed = reference.shortlist_pages(scores, lengths, budgets, max_page_budget=10, **rows)
    assert listed.shape == (4, 2, 11)
    for row, (begin, end) in enumerate([(5, 15), (3, 6), (0, 0), (0, 0)]):
        wide = ops.select_pages(scores, lengths, torch.full_like(budgets, end), max_page_budget=30, **rows)
        known = ops.select_pages(scores, lengths, torch.full_like(budgets, begin), max_page_budget=30, **rows)
        for head in range(2):
            want = set(wide[row, head].tolist()) - set(known[row, head].tolist())
            assert set(listed[row, head].tolist()) - {-1} == want - {-1}


def test_a_shortlist_of_the_largest_budget_and_of_other_policies() -> None:
    lengths = torch.tensor([100, 400, 400, 400], dtype=torch.int32)
    budgets = torch.tensor([2**31 - 1, 20, 2**31 - 1, 24], dtype=torch.int32)
    names = ["two_stage", "mass", "window", "two_stage"]
    options: dict[str, Any] = {"page_size": 16, "max_page_budget": 25}
    listed = reference.shortlist_pages(torch.randn(4, 2, 26), lengths, budgets, policies=places(names), **options)
    counts = (listed >= 0).sum(-1)[:, 0].tolist()
    assert counts == [0, 0, 0, 25 - 12]
    assert (reference.shortlist_pages(torch.randn(4, 2, 26), lengths, budgets, **options) < 0).all()


def test_only_listed_pages_are_read_and_scored_again() -> None:
    case = make_case([583])
    total = int(num_pages(case.seq_lens, 16)[0])
    scores = torch.randn(1, 2, case.block_table.shape[1] * 2)
    shortlist = torch.tensor([[[2, 7, total - 1], [4, -1, -1]]], dtype=torch.int32)
    keys, log_sums = case.views.keys, torch.zeros(1, 4)
    blocks = case.block_table[0].long()
    read = {0: {2, 7, total - 1}, 1: {4}}
    for head in range(2):
        for page in set(range(total)) - read[head]:
            keys[blocks[page // 2], head, page % 2 * 16 : page % 2 * 16 + 16] = float("nan")
    tables = (case.block_table, case.seq_lens)
    again = reference.rerank_pages(scores, log_sums, shortlist, case.query, keys, *tables, page_size=16, scale=SCALE)
    for head in range(2):
        for page in range(scores.shape[2]):
            if page not in read[head]:
                assert again[0, head, page] == scores[0, head, page]
                continue
            tokens = range(16 * page, min(16 * page + 16, 583))
            own = torch.stack([keys[blocks[t // 32], head, t % 32] for t in tokens])
            logits = case.query[0, 2 * head : 2 * head + 2].double() @ own.double().T * SCALE
            torch.testing.assert_close(again[0, head, page].double(), logits.exp().sum().log(), rtol=1e-5, atol=1e-5)
