"""A policy of each row's own: the reference's laws, and the CPU implementations against it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quest_vllm.ops import cpu, reference
from quest_vllm.ops.api import load_ops
from tests.kernels.paged import PagedCase, make_case, places

LENGTHS = [0, 1, 33, 100, 583, 1300, 2000, 16 * 70 + 3]
NAMES = ["max", "mean", "mass", "window", "window", "max", "mean", "window"]
SCORED = [row for row, name in enumerate(NAMES) if name != "window"]


def window_of(length: int, budget: int, sink_pages: int, recent_pages: int, page_size: int = 16) -> list[int]:
    """The newest pages that a budget has room for beside the sinks; where it has no room for all, the newest first."""
    pages = -(-length // page_size)
    take = min(budget, pages)
    newest = min(take, max(recent_pages, take - sink_pages))
    return sorted({*range(take - newest), *range(pages - newest, pages)})


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 700), min_size=1, max_size=4),
    budget=st.integers(0, 50),
    sinks=st.integers(0, 3),
    recents=st.integers(0, 4),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("select", [reference.select_pages, cpu.select_pages])
def test_a_window_is_the_first_and_the_newest_pages(
    select: Any, lengths: list[int], budget: int, sinks: int, recents: int, seed: int
) -> None:
    scores = torch.randn(len(lengths), 2, 44, generator=torch.Generator().manual_seed(seed))
    rows = (torch.tensor(lengths, dtype=torch.int32), torch.full((len(lengths),), budget, dtype=torch.int32))
    options = {"page_size": 16, "sink_pages": sinks, "recent_pages": recents, "max_page_budget": 50}
    chosen = select(scores, *rows, policies=places(["window"] * len(lengths)), **options)
    for row, length in enumerate(lengths):
        want = window_of(length, budget, sinks, recents)
        assert len(want) == min(budget, -(-length // 16))
        assert chosen[row].tolist() == [want + [-1] * (50 - len(want))] * 2


def make(page_summary: str = "min_max", group: int = 4) -> PagedCase:
    return make_case(LENGTHS, num_kv_heads=2, group=group, head_dim=64, block_size=32, page_summary=page_summary)


def score(operation: Any, case: PagedCase, page_summary: str, reduction: str, **options: Any) -> torch.Tensor:
    tensors = (case.query, case.views.summaries, case.block_table, case.seq_lens)
    options |= {"page_summary": page_summary, "group_reduction": reduction, "bound_radius": 0.5, "scale": 0.125}
    return operation(*tensors, page_size=16, **options)


@pytest.mark.parametrize("page_summary", ["min_max", "key_codes"])
@pytest.mark.parametrize("operation", [reference.score_pages, cpu.score_pages])
def test_scores_are_those_of_a_server_with_that_reduction(operation: Any, page_summary: str) -> None:
    case = make(page_summary)
    mixed = score(operation, case, page_summary, "mass", policies=places(NAMES))
    for row in SCORED:
        alone = score(operation, case, page_summary, NAMES[row])[row]
        unit = reference.mass_scale_of(NAMES[row], 0.125, page_summary)
        torch.testing.assert_close(mixed[row], alone * unit, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("page_summary", ["min_max", "key_codes"])
def test_the_kernels_equal_the_reference(page_summary: str, group: int) -> None:
    case = make(page_summary, group)
    nan = case.block_table[5, 7].long()
    if page_summary == "min_max":  # a page of a row with "max" and one of a row with "mean"
        case.views.summaries[nan, 0, 1] = float("nan")
        case.views.summaries[case.block_table[6, 3].long(), 1, 0] = float("nan")
    options = {"policies": places(NAMES)}
    want = score(reference.score_pages, case, page_summary, "mass", **options)[SCORED]
    got = score(cpu.score_pages, case, page_summary, "mass", **options)[SCORED]
    assert bool(want.isnan().any()) == (page_summary == "min_max")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize("name", ["reference", "torch", "cpu"])
def test_rows_of_a_step_keep_to_themselves(name: str) -> None:
    case, ops = make("key_codes"), load_ops(name, "cpu")
    budgets = torch.tensor([9, 3, 3, 4, 20, 30, 3, 12], dtype=torch.int32)
    scoring: dict[str, Any] = {"page_summary": "key_codes", "group_reduction": "mass", "page_size": 16, "scale": 0.125}

    def decode(rows: slice, policies: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        caches = (case.views.keys, case.views.values, case.views.summaries)
        batch = (case.block_table[rows], case.seq_lens[rows], budgets[rows])
        taken = torch.zeros(len(batch[1]), 2, dtype=torch.int32)
        own = None if policies is None else policies[rows]
        return ops.quest_decode(case.query[rows], *caches, *batch, policies=own, taken=taken, **scoring), taken

    together, taken = decode(slice(None), places(NAMES))
    assert torch.equal(taken, torch.minimum(budgets, -(-case.seq_lens // 16))[:, None].expand(-1, 2))
    for row in range(len(NAMES)):
        alone, _ = decode(slice(row, row + 1), places(NAMES))
        assert torch.equal(alone[0], together[row])
    plain, _ = decode(slice(None), None)
    assert torch.equal(plain[2], together[2]), "a row with the server's own policy"
    crowded = [row for row in range(len(NAMES)) if budgets[row] < -(-int(case.seq_lens[row]) // 16)]
    assert all(not torch.equal(plain[row], together[row]) for row in crowded if NAMES[row] == "window")


def test_what_the_kernels_refuse() -> None:
    case = make()
    for bad, message in (([9] * 8, r"policies\[0\]: expected 0 to 5, got 9"), ([0], "policies: expected")):
        with pytest.raises(RuntimeError, match=message):
            score(cpu.score_pages, case, "min_max", "mass", policies=torch.tensor(bad, dtype=torch.int32))
