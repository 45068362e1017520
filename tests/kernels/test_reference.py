"""The reference against dense attention, and the laws that every implementation must keep."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quest_vllm.ops import reference, torch_ops
from tests.kernels.paged import PagedCase, make_case

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
    scores = reference.score_pages(
        case.query,
        case.views.summaries,
        case.block_table,
        case.seq_lens,
        page_size=case.page_size,
        group_reduction=group_reduction,
    )
    budgets = torch.full_like(case.seq_lens, page_budget)
    return reference.select_pages(scores, case.seq_lens, budgets, page_size=case.page_size, max_page_budget=page_budget)


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
    scores = reference.score_pages(
        case.query,
        case.views.summaries,
        case.block_table,
        case.seq_lens,
        page_size=case.page_size,
        group_reduction="per_query_head",
    )
    block_size, group = case.views.keys.shape[2], case.query.shape[1] // case.views.keys.shape[1]
    for row, length in enumerate(case.seq_lens.tolist()):
        for position in range(length):
            block = case.block_table[row, position // block_size].long()
            keys = case.views.keys[block, :, position % block_size].repeat_interleave(group, dim=0)
            products = (case.query[row] * keys).sum(-1)
            bound = scores[row, :, position // case.page_size]
            assert (products <= bound + 1e-4 * bound.abs().clamp(min=1)).all()


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
