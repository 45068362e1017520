"""The reference against dense attention, and the laws that every implementation must keep."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quest_vllm.ops import reference, torch_ops
from tests.kernels.paged import PagedCase, make_case
from tests.kernels.top_p import assert_top_p_law

cases = st.builds(
    make_case,
    st.lists(st.integers(0, 150), min_size=1, max_size=3),
    num_kv_heads=st.integers(1, 2),
    group=st.sampled_from([1, 3, 4]),
    head_dim=st.sampled_from([16, 80]),
    block_size=st.sampled_from([32, 64]),
    page_size=st.sampled_from([16, 32]),
    seed=st.integers(0, 2**16),
)


def choose(case: PagedCase, page_budget: int, group_reduction: str = "max") -> torch.Tensor:
    scores = score(case, group_reduction=group_reduction)
    budgets = torch.full_like(case.seq_lens, page_budget)
    return reference.select_pages(scores, case.seq_lens, budgets, page_size=case.page_size, max_page_budget=page_budget)


def score(case: PagedCase, operation=reference.score_pages, **options) -> torch.Tensor:
    rest = (case.block_table, case.seq_lens)
    return operation(case.query, case.views.summaries, *rest, page_size=case.page_size, **options)


def attend(case: PagedCase, selected: torch.Tensor, operation=reference.sparse_paged_attention) -> torch.Tensor:
    return operation(
        case.query,
        case.views.keys,
        case.views.values,
        case.block_table,
        case.seq_lens,
        selected,
        page_size=case.page_size,
        scale=case.query.shape[-1] ** -0.5,
    )


def contiguous_attention(case: PagedCase) -> torch.Tensor:
    """Dense attention by torch's own kernel, over gathered rows."""
    block_size = case.views.keys.shape[2]
    output = torch.zeros_like(case.query)
    for row, length in enumerate(case.seq_lens.tolist()):
        if length == 0:
            continue
        positions = torch.arange(length)
        blocks = case.block_table[row].long()[positions // block_size]
        keys, values = (c[blocks, :, positions % block_size] for c in (case.views.keys, case.views.values))
        output[row] = torch.nn.functional.scaled_dot_product_attention(
            case.query[row][None, :, None],
            keys.transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            enable_gqa=True,
        )[0, :, 0]
    return output


@settings(max_examples=40, deadline=None)
@given(cases)
def test_page_score_bounds_every_key_of_the_page(case: PagedCase) -> None:
    scores = score(case, group_reduction="per_query_head")
    block_size, group = case.views.keys.shape[2], case.query.shape[1] // case.views.keys.shape[1]
    for row, length in enumerate(case.seq_lens.tolist()):
        for position in range(length):
            block = case.block_table[row, position // block_size].long()
            keys = case.views.keys[block, :, position % block_size].repeat_interleave(group, dim=0)
            products = (case.query[row] * keys).sum(-1)
            bound = scores[row, :, position // case.page_size]
            assert (products <= bound + 1e-4 * bound.abs().clamp(min=1)).all()


def pages_of(case: PagedCase, row: int) -> np.ndarray:
    """A request's summaries in float64, ``[num_kv_heads, pages, 2, head_dim]``, page after page."""
    per_block = case.views.summaries.shape[2]
    pages = -(-int(case.seq_lens[row]) // case.page_size)
    rows = [case.views.summaries[case.block_table[row, p // per_block].item(), :, p % per_block] for p in range(pages)]
    stacked = torch.stack(rows, dim=1) if rows else torch.zeros(case.views.keys.shape[1], 0, 2, case.query.shape[2])
    return stacked.double().numpy()


def brute_force(case: PagedCase, reduction: str, radius: float, scale: float) -> list[list[list[float]]]:
    """Scores from the definition, a number at a time: ``[row][score head][page]``."""
    found = []
    for row in range(len(case.seq_lens)):
        bounds = []
        boxes, queries = pages_of(case, row), case.query[row].double().numpy()
        group = len(queries) // len(boxes)
        for head, query in enumerate(queries):
            centres = boxes[head // group].mean(axis=1)
            halves = (boxes[head // group][:, 1] - boxes[head // group][:, 0]) / 2
            bounds.append([c @ query + radius * (h @ np.abs(query)) for c, h in zip(centres, halves, strict=True)])
        step = 1 if reduction == "per_query_head" else group
        groups = [bounds[first : first + step] for first in range(0, len(bounds), step)]
        found.append([[reduce_page(g, page, reduction, scale) for page in range(len(g[0]))] for g in groups])
    return found


def reduce_page(bounds: list[list[float]], page: int, reduction: str, scale: float) -> float:
    if reduction == "mass":
        weights = [[math.exp(scale * bound) for bound in head] for head in bounds]
        return math.log(sum(head[page] / math.fsum(head) for head in weights))
    if reduction == "mean":
        return math.fsum(head[page] for head in bounds) / len(bounds)
    return max(head[page] for head in bounds)


@settings(max_examples=40, deadline=None)
@given(cases, st.sampled_from(reference.GROUP_REDUCTIONS), st.sampled_from([0.0, 0.25, 0.8, 1.0]))
def test_scores_equal_a_brute_force(case: PagedCase, reduction: str, radius: float) -> None:
    scale = case.query.shape[-1] ** -0.5
    scores = score(case, group_reduction=reduction, bound_radius=radius, scale=scale)
    for row, heads in enumerate(brute_force(case, reduction, radius, scale)):
        for head, expected in enumerate(heads):
            actual = scores[row, head]
            np.testing.assert_allclose(actual[: len(expected)], expected, rtol=1e-4, atol=1e-4)
            assert torch.isneginf(actual[len(expected) :]).all()


def test_the_full_radius_splits_the_query_as_quest_does_and_others_by_their_weight() -> None:
    query = torch.tensor([1.5, -2.0, 0.0, float("inf"), float("-inf"), 3e38, -3e38])
    low, high = reference.split_query(query, 1.0)
    assert torch.equal(low, query.clamp(max=0)) and torch.equal(high, query.clamp(min=0))
    for radius in (0.0, 0.25, 0.75):
        wide = query[query.isfinite()].double()
        low, high = reference.split_query(wide.float(), radius)
        torch.testing.assert_close(low, ((wide - radius * wide.abs()) / 2).float())
        torch.testing.assert_close(high, ((wide + radius * wide.abs()) / 2).float())


@settings(max_examples=25, deadline=None)
@given(cases, st.floats(0.01, 4.0), st.sampled_from([0.0, 0.25, 1.0]))
def test_mass_sums_to_the_group(case: PagedCase, scale: float, radius: float) -> None:
    group = case.query.shape[1] // case.views.keys.shape[1]
    mass = score(case, group_reduction="mass", bound_radius=radius, scale=scale).exp().sum(dim=-1)
    expected = torch.where(case.seq_lens > 0, float(group), 0.0)[:, None].expand_as(mass)
    torch.testing.assert_close(mass, expected, rtol=1e-4, atol=0)


def test_mass_keeps_pages_apart_that_would_underflow() -> None:
    case = make_case([160], group=1)
    case.query *= 100
    scores = score(case, group_reduction="mass")[0, :, :10]
    assert (scores.min(dim=-1).values < -200).all()
    assert scores.isfinite().all()
    assert all(len(set(row.tolist())) == 10 for row in scores)


@pytest.mark.parametrize("radius", [0.25, 1.0])
def test_a_nan_page_spoils_no_other_page(radius: float) -> None:
    case = make_case([100], num_kv_heads=1, group=3)
    case.query.abs_()
    kept = [0, 1, 3, 4, 5, 6]
    page = case.views.summaries[case.block_table[0, 1].item(), 0, 0]
    page[:] = -1e6  # no mass: what the others score without this page
    expected = score(case, group_reduction="mass", bound_radius=radius, scale=0.1)[0, 0]
    page[:] = float("nan")
    scores = score(case, group_reduction="mass", bound_radius=radius, scale=0.1)[0, 0]
    assert scores[2].isnan()
    assert torch.equal(scores[kept], expected[kept])


def test_mass_of_infinite_logits() -> None:
    inf = float("inf")
    swallowed = reference.group_mass(torch.tensor([[1.0, inf, 2.0], [0.0, 1.0, -inf]]))
    assert swallowed[1].isnan()  # ranks first
    torch.testing.assert_close(swallowed[[0, 2]], torch.tensor([-math.log1p(math.e), -inf]))
    nothing = reference.group_mass(torch.full((2, 3), -inf))
    assert torch.isneginf(nothing).all()


@pytest.mark.parametrize("radius", [-0.1, 1.5, float("nan")])
def test_a_radius_out_of_range_is_refused(radius: float) -> None:
    with pytest.raises(ValueError, match=f"bound_radius: expected a number from 0 to 1, got {radius}"):
        score(make_case([20]), bound_radius=radius)


@settings(max_examples=25, deadline=None)
@given(cases, st.sampled_from(reference.GROUP_REDUCTIONS))
def test_budget_that_covers_the_context_equals_dense(case: PagedCase, group_reduction: str) -> None:
    selected = choose(case, case.block_table.shape[1] * case.views.summaries.shape[2], group_reduction)
    torch.testing.assert_close(attend(case, selected), contiguous_attention(case), atol=2e-5, rtol=2e-5)


@settings(max_examples=25, deadline=None)
@given(cases, st.integers(3, 6), st.randoms())
def test_a_row_does_not_depend_on_its_place_or_neighbours(case: PagedCase, budget: int, random) -> None:
    order = list(range(len(case.seq_lens)))
    random.shuffle(order)
    moved = PagedCase(case.query[order], case.views, case.block_table[order], case.seq_lens[order], case.page_size)
    assert torch.equal(choose(case, budget)[order], choose(moved, budget))
    alone = PagedCase(case.query[:1], case.views, case.block_table[:1], case.seq_lens[:1], case.page_size)
    assert torch.equal(attend(case, choose(case, budget))[:1], attend(alone, choose(alone, budget)))


@settings(max_examples=25, deadline=None)
@given(cases, st.integers(1, 8))
def test_selection_takes_the_budget_and_its_forced_pages(case: PagedCase, budget: int) -> None:
    selected = choose(case, budget)
    for row, length in enumerate(case.seq_lens.tolist()):
        pages = -(-length // case.page_size)
        for chosen in selected[row].tolist():
            kept = [page for page in chosen if page >= 0]
            assert len(kept) == min(budget, pages)
            assert kept == sorted(set(kept))
            assert chosen == kept + [-1] * (budget - len(kept))
            if budget >= 3:
                assert {0, pages - 1, pages - 2} & set(range(pages)) <= set(kept)


top_ps = st.floats(0.02, 0.999)


def rows_of(case: PagedCase, budget: int) -> tuple[torch.Tensor, torch.Tensor]:
    return case.seq_lens, torch.full_like(case.seq_lens, budget)


@settings(max_examples=40, deadline=None)
@given(cases, top_ps, st.integers(1, 9), st.sampled_from(["mass", "max", "per_query_head"]))
def test_top_p_takes_as_few_pages_as_hold_that_share(case: PagedCase, wanted: float, budget: int, how: str) -> None:
    scores, scale = score(case, group_reduction=how, scale=0.2), 1.0 if how == "mass" else 0.2
    options = {"page_size": case.page_size, "max_page_budget": budget}
    whole = reference.select_pages(scores, *rows_of(case, budget), **options)
    top_p = torch.full((len(case.seq_lens),), wanted)
    chosen = reference.select_pages(scores, *rows_of(case, budget), top_p=top_p, mass_scale=scale, **options)
    assert_top_p_law(case, scores.double() * scale, whole, chosen, top_p)


@settings(max_examples=20, deadline=None)
@given(cases, st.lists(top_ps, min_size=2, max_size=4), st.integers(1, 9))
def test_top_p_takes_more_pages_the_larger_it_is(case: PagedCase, wanted: list[float], budget: int) -> None:
    scores, options = score(case), {"page_size": case.page_size, "max_page_budget": budget, "mass_scale": 0.1}
    whole = reference.select_pages(scores, *rows_of(case, budget), **options)
    taken = torch.zeros(scores.shape[:2], dtype=torch.int64)
    for p in sorted(wanted):
        top_p = torch.full((len(case.seq_lens),), p)
        now = (reference.select_pages(scores, *rows_of(case, budget), top_p=top_p, **options) >= 0).sum(-1)
        assert (now >= taken).all()
        taken = now
    one = torch.ones(len(case.seq_lens))
    assert torch.equal(reference.select_pages(scores, *rows_of(case, budget), top_p=one, **options), whole)
    assert (taken <= (whole >= 0).sum(-1)).all()


@settings(max_examples=20, deadline=None)
@given(cases, top_ps, st.integers(1, 9))
def test_top_p_of_a_row_changes_no_other_row(case: PagedCase, wanted: float, budget: int) -> None:
    scores, options = score(case), {"page_size": case.page_size, "max_page_budget": budget, "mass_scale": 0.1}
    lengths, budgets = rows_of(case, budget)
    top_p = torch.linspace(wanted, 1.0, len(lengths))
    together = reference.select_pages(scores, lengths, budgets, top_p=top_p, **options)
    for row in range(len(lengths)):
        one = slice(row, row + 1)
        alone = reference.select_pages(scores[one], lengths[one], budgets[one], top_p=top_p[one], **options)
        assert torch.equal(together[one], alone)


def test_top_p_of_one_and_mass_that_is_not_finite_spend_the_budget() -> None:
    scores = torch.tensor([0.0, -50.0, -60.0, -70.0, -80.0, -90.0]).log_softmax(-1).expand(5, 1, 6).clone()
    scores[2, 0, 3] = float("nan")
    scores[3, 0, 4] = float("inf")
    scores[4, 0] = float("-inf")
    lengths, budgets = torch.full((5,), 96, dtype=torch.int32), torch.full((5,), 5, dtype=torch.int32)
    options = {"page_size": 16, "max_page_budget": 5, "recent_pages": 1}
    top_p = torch.tensor([0.5, 1.0, 0.5, 0.5, 0.5])
    chosen = reference.select_pages(scores, lengths, budgets, top_p=top_p, **options)[:, 0].tolist()
    assert chosen[:3] == [[0, 5, -1, -1, -1], [0, 1, 2, 3, 5], [0, 1, 2, 3, 5]]
    assert [len([page for page in row if page >= 0]) for row in chosen[3:]] == [5, 5]


def test_update_ignores_padding_and_stale_summaries() -> None:
    case = make_case([40])
    views = case.views
    expected = views.summaries.clone()
    slots = torch.cat([torch.tensor([-1, -1]), case.slots()])
    views.summaries.fill_(1e9)
    reference.update_page_summaries(views.keys, views.summaries, slots, page_size=case.page_size)
    written = views.summaries < 1e8
    assert torch.equal(views.summaries[written], expected[written])
    assert int(written.sum()) == 3 * 2 * 2 * 64  # pages x heads x (min, max) x head_dim


def test_update_covers_earlier_rows_of_a_page_filled_in_chunks() -> None:
    case = make_case([40])
    views, slots = case.views, case.slots()
    expected = views.summaries.clone()
    views.summaries.fill_(float("nan"))
    for chunk in slots.split(7):
        reference.update_page_summaries(views.keys, views.summaries, chunk, page_size=case.page_size)
    assert torch.equal(views.summaries.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_ties_go_to_the_lower_page_and_nan_ranks_first() -> None:
    scores = torch.zeros(1, 1, 10)
    lengths, budgets = torch.tensor([160], dtype=torch.int32), torch.tensor([5], dtype=torch.int32)
    chosen = reference.select_pages(scores, lengths, budgets, page_size=16, max_page_budget=6)
    assert chosen.tolist() == [[[0, 1, 2, 8, 9, -1]]]
    scores[0, 0, 5] = float("nan")
    chosen = reference.select_pages(scores, lengths, budgets, page_size=16, max_page_budget=6)
    assert chosen.tolist() == [[[0, 1, 5, 8, 9, -1]]]


def test_unknown_group_reduction_is_refused() -> None:
    case = make_case([20])
    with pytest.raises(ValueError, match="group_reduction.*'median'"):
        choose(case, 4, "median")


@settings(max_examples=25, deadline=None)
@given(cases, st.integers(1, 6), st.sampled_from(["max", "per_query_head"]))
def test_plain_torch_path_equals_the_reference(case: PagedCase, budget: int, group_reduction: str) -> None:
    selected = choose(case, budget, group_reduction)
    torch.testing.assert_close(
        attend(case, selected, torch_ops.sparse_paged_attention), attend(case, selected), atol=2e-5, rtol=2e-5
    )
    expected = case.views.summaries.clone()
    case.views.summaries.fill_(float("nan"))
    torch_ops.update_page_summaries(case.views.keys, case.views.summaries, case.slots(), page_size=case.page_size)
    assert torch.equal(case.views.summaries.nan_to_num(7.0), expected.nan_to_num(7.0))
