"""The Triton kernels against the reference, collected by ``test_triton_ops.py``.

Tolerances are measured: three times the error, against float64, of the reference computed wholly in the tensors' own
dtype (the interpreter truncates to bfloat16 where hardware rounds, so twice wouldn't do), and a few float32 roundings
of the largest value for another order of summation.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from quest_vllm.ops import reference
from quest_vllm.ops import triton as ops
from quest_vllm.page_layout import PageViews
from tests.kernels.paged import PagedCase, make_case, places

Operation = Callable[..., torch.Tensor]
Shape = tuple[int, int, int, int, int]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES: list[Shape] = [  # num_kv_heads, group, head_dim, block_size, page_size
    (2, 1, 64, 32, 16),
    (1, 3, 80, 32, 32),
    (2, 4, 96, 64, 16),
    (1, 8, 128, 64, 64),
    (1, 2, 256, 16, 16),
]


def with_dtypes(shapes: list[Shape]) -> list[tuple[Shape, torch.dtype]]:
    """Every shape in every dtype on a GPU; in the interpreter, which is slow, every shape in one of them."""
    if torch.cuda.is_available():
        return list(itertools.product(shapes, DTYPES))
    return list(zip(shapes, itertools.cycle(DTYPES), strict=False))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def to(case: PagedCase, device: torch.device) -> PagedCase:
    """Move a case, keeping the cache's strides."""
    keys, values, summaries = case.views.keys, case.views.values, case.views.summaries
    flat = torch.as_strided(keys, (keys.untyped_storage().nbytes() // keys.itemsize,), (1,), 0).to(device)
    moved = [flat.as_strided(v.shape, v.stride(), v.storage_offset()) for v in (keys, values, summaries)]
    views = dataclasses.replace(case.views, keys=moved[0], values=moved[1], summaries=moved[2])
    return PagedCase(
        case.query.to(device), views, case.block_table.to(device), case.seq_lens.to(device), case.page_size
    )


def build(
    device: torch.device,
    seq_lens: list[int],
    shape: Shape = SHAPES[0],
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> PagedCase:
    num_kv_heads, group, head_dim, block_size, page_size = shape
    case = make_case(
        seq_lens,
        num_kv_heads=num_kv_heads,
        group=group,
        head_dim=head_dim,
        block_size=block_size,
        page_size=page_size,
        dtype=dtype,
        seed=seed,
    )
    return to(case, device)


def score(
    case: PagedCase,
    operation: Operation,
    group_reduction: str = "max",
    bound_radius: float = 1.0,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    dtype = dtype or case.query.dtype
    return operation(
        case.query.to(dtype),
        case.views.summaries.to(dtype),
        case.block_table,
        case.seq_lens,
        page_size=case.page_size,
        group_reduction=group_reduction,
        bound_radius=bound_radius,
        scale=case.query.shape[-1] ** -0.5,
    )


def attend(
    case: PagedCase,
    selected: torch.Tensor,
    operation: Operation,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> torch.Tensor:
    wide = (lambda t: t.to(dtype)) if dtype else (lambda t: t)
    return operation(
        wide(case.query),
        wide(case.views.keys),
        wide(case.views.values),
        case.block_table,
        case.seq_lens,
        selected,
        page_size=case.page_size,
        scale=case.query.shape[-1] ** -0.5,
        **options,
    )


def measured_tolerance(
    exact: torch.Tensor,
    compute: Callable[[], torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> float:
    """From the largest error, against ``exact``, of the reference with every intermediate in the inputs' dtype."""
    with monkeypatch.context() as patch:
        patch.setattr(reference, "_wide", lambda tensor: tensor)
        error = (compute().double() - exact.double()).nan_to_num(0, 0, 0).abs().max()
    largest = exact.masked_fill(exact.isinf(), 0.0).abs().max()
    return float(3 * error + 4 * torch.finfo(torch.float32).eps * largest)


def assert_close(actual: torch.Tensor, exact: torch.Tensor, tolerance: float) -> None:
    """Say where the worst element is and by how much it is off."""
    error = (actual.double() - exact.double()).abs()
    error = torch.where(actual.double() == exact.double(), 0.0, error)  # equal infinities
    worst = int(error.argmax())
    at = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
    assert error.flatten()[worst] <= tolerance, (
        f"worst at {at}: got {actual[at]}, expected {exact[at]}, error {error[at]:.3g}, tolerance {tolerance:.3g}"
    )


def select(
    scores: torch.Tensor,
    seq_lens: list[int],
    budgets: list[int],
    operation: Operation,
    **options: Any,
) -> torch.Tensor:
    settings = {"page_size": 16, "sink_pages": 1, "recent_pages": 2, "max_page_budget": max(budgets)} | options
    lengths, rows = (torch.tensor(v, dtype=torch.int32, device=scores.device) for v in (seq_lens, budgets))
    return operation(scores, lengths, rows, **settings)


def same_selection(scores: torch.Tensor, seq_lens: list[int], budgets: list[int], **options: Any) -> None:
    expected = select(scores, seq_lens, budgets, reference.select_pages, **options)
    assert torch.equal(select(scores, seq_lens, budgets, ops.select_pages, **options), expected)


# update_page_summaries


@pytest.mark.parametrize(("shape", "dtype"), with_dtypes(SHAPES))
def test_summaries_equal_the_reference(device: torch.device, shape: Shape, dtype: torch.dtype) -> None:
    case = build(device, [0, 1, 45], shape, dtype)
    expected = case.views.summaries.clone()
    case.views.summaries.fill_(99.0)  # a reused block's stale summary
    slots = torch.cat([case.slots(), torch.tensor([-1, -1], device=device)])
    ops.update_page_summaries(case.views.keys, case.views.summaries, slots, page_size=case.page_size)
    pages = case.slots().unique() // case.page_size
    got, want = (s.transpose(1, 2).flatten(0, 1)[pages] for s in (case.views.summaries, expected))
    assert torch.equal(got, want)


@pytest.mark.parametrize("order", ["forward", "backward", "shuffled", "repeated"])
def test_summaries_take_tokens_of_a_page_in_any_order(device: torch.device, order: str) -> None:
    case = build(device, [9])
    expected = case.views.summaries.clone()
    case.views.summaries.fill_(99.0)
    slots = case.slots()
    orders = {
        "forward": slots,
        "backward": slots.flip(0),
        "shuffled": slots[torch.tensor([3, 8, 0, 5, 1, 7, 2, 6, 4], device=device)],
        "repeated": torch.cat([slots[4:], slots[-1:]]),
    }
    ops.update_page_summaries(case.views.keys, case.views.summaries, orders[order], page_size=16)
    page = slots[0] // 16
    got, want = (s.transpose(1, 2).flatten(0, 1)[page] for s in (case.views.summaries, expected))
    assert torch.equal(got, want)


def test_summaries_of_untouched_pages_and_of_no_token_stay(device: torch.device) -> None:
    case = build(device, [40])
    case.views.summaries.fill_(99.0)
    for slots in (torch.tensor([], dtype=torch.int64), torch.tensor([-1, -5])):
        ops.update_page_summaries(case.views.keys, case.views.summaries, slots.to(device), page_size=16)
    assert bool((case.views.summaries == 99.0).all())
    ops.update_page_summaries(case.views.keys, case.views.summaries, case.slots()[-1:], page_size=16)
    assert int((case.views.summaries != 99.0).sum()) == case.views.keys.shape[1] * 2 * case.views.keys.shape[3]


def test_nan_and_inf_keys_reach_the_summary(device: torch.device) -> None:
    case = build(device, [20])
    slot = int(case.slots()[3])
    case.views.keys[slot // 32, 0, slot % 32, 5] = float("nan")
    case.views.keys[slot // 32, 0, slot % 32, 6] = float("inf")
    expected = case.views.summaries.clone()
    reference.update_page_summaries(case.views.keys, expected, case.slots(), page_size=16)
    ops.update_page_summaries(case.views.keys, case.views.summaries, case.slots(), page_size=16)
    assert torch.allclose(case.views.summaries, expected, rtol=0, atol=0, equal_nan=True)


# score_pages


@pytest.mark.parametrize(("shape", "dtype"), with_dtypes(SHAPES))
@pytest.mark.parametrize(
    ("group_reduction", "radius"),
    [("max", 1.0), ("max", 0.25), ("mean", 0.0), ("mass", 1.0), ("mass", 0.25), ("per_query_head", 0.5)],
)
def test_scores_match_the_reference(
    device: torch.device,
    shape: Shape,
    dtype: torch.dtype,
    group_reduction: str,
    radius: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = build(device, [0, 1, 100, 33], shape, dtype)
    policy = (group_reduction, radius)
    exact = score(case, reference.score_pages, *policy, torch.float64).double()
    tolerance = measured_tolerance(exact, lambda: score(case, reference.score_pages, *policy), monkeypatch)
    assert_close(score(case, ops.score_pages, *policy), exact, tolerance)


@pytest.mark.parametrize("group_reduction", ["max", "mass"])
def test_scores_span_many_tiles_and_leave_the_tail_when_told_to(
    device: torch.device, group_reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["quest_vllm.ops.triton.score_pages"]
    monkeypatch.setattr(module, "LSE_TILE", 2)
    monkeypatch.setattr(module, "PAGES_PER_COMBINE_TILE", 32)
    case = build(device, [16 * 330 + 1, 5], (1, 2, 16, 32, 16))
    want = score(case, reference.score_pages, group_reduction)
    assert_close(score(case, ops.score_pages, group_reduction), want, 1e-4)
    out = torch.full_like(want, 7.0)
    arguments = (case.query, case.views.summaries, case.block_table, case.seq_lens)
    settings: dict[str, Any] = {"page_size": 16, "group_reduction": group_reduction, "scale": 0.25}
    ops.score_pages(*arguments, out=out, fill_tail=False, **settings)
    assert_close(out, torch.where(want == float("-inf"), 7.0, want), 1e-4)


def test_mass_in_a_larger_scratch_full_of_rubbish_is_the_same(device: torch.device) -> None:
    case = build(device, [400, 0, 33], (2, 3, 64, 32, 16))
    want = score(case, ops.score_pages, "mass")
    scratch = ops.mass_scratch(5, 6, 200, device=device)
    scratch.logits.fill_(float("nan"))
    scratch.lse.fill_(float("inf"))
    arguments = (case.query, case.views.summaries, case.block_table, case.seq_lens)
    got = ops.score_pages(*arguments, page_size=16, group_reduction="mass", scale=0.125, scratch=scratch)
    assert torch.equal(got, want)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_infinite_and_nan_pages_under_mass(device: torch.device, value: float) -> None:
    case = build(device, [100, 0, 1100], (1, 3, 16, 64, 16))
    case.query.abs_()
    for row, page in ((0, 2), (2, 66)):
        case.views.summaries[case.block_table[row, page // 4].long(), 0, page % 4] = value
    expected = score(case, reference.score_pages, "mass", 0.25)
    assert expected[0, 0, 2].isnan() or expected[0, 0, 2] == float("-inf")
    got = score(case, ops.score_pages, "mass", 0.25)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5, equal_nan=True)


@pytest.mark.parametrize("group", [1, 3])
def test_rows_with_a_reduction_of_their_own(device: torch.device, group: int) -> None:
    case = build(device, [100, 0, 1100, 600, 16], (1, group, 16, 64, 16))
    for row, page in ((0, 2), (2, 66), (3, 4)):
        case.views.summaries[case.block_table[row, page // 4].long(), 0, page % 4] = float("nan")
    names = ("max", "mean", "mean", "mass", "max")
    policies = places(names, device)
    want, got = (score(case, partial(of.score_pages, policies=policies), "mass") for of in (reference, ops))
    assert want[[0, 2, 3]].isnan().any(dim=-1).all()
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5, equal_nan=True)


def test_radius_out_of_range_is_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match="bound_radius: expected a number from 0 to 1, got 1.5"):
        score(build(device, [5]), ops.score_pages, "max", 1.5)


def test_unknown_reduction_is_named(device: torch.device) -> None:
    with pytest.raises(ValueError, match="median"):
        score(build(device, [5]), ops.score_pages, "median")


# select_pages


@pytest.mark.parametrize(("sink", "recent"), [(1, 2), (0, 1), (3, 4), (0, 0)])
def test_selection_equals_the_reference(device: torch.device, sink: int, recent: int) -> None:
    seq_lens = [0, 1, 16, 17, 160, 333, 640]
    scores = torch.randn(7, 2, 40, generator=torch.Generator().manual_seed(sink)).to(device)
    for budgets in ([8] * 7, [0, 1, 2, 3, 4, 5, 40], [40] * 7, [1] * 7):
        same_selection(scores, seq_lens, budgets, sink_pages=sink, recent_pages=recent)


@pytest.mark.parametrize(("sink", "recent"), [(1, 2), (0, 1), (3, 4), (0, 0)])
def test_windows_beside_rows_that_choose(device: torch.device, sink: int, recent: int) -> None:
    seq_lens = [0, 1, 16, 17, 160, 333, 640, 640]
    scores = torch.randn(8, 2, 40, generator=torch.Generator().manual_seed(sink)).to(device)
    names = ["window"] * 7 + ["max"]
    policies = places(names, device)
    options: dict[str, Any] = {"sink_pages": sink, "recent_pages": recent, "policies": policies}
    for budgets in ([8] * 8, [0, 1, 2, 3, 4, 5, 40, 8], [1] * 8):
        same_selection(scores, seq_lens, budgets, **options)


@pytest.mark.parametrize("values", [[0.0], [-0.0, 0.0], [1.0, 2.0], [-3.0, 5.0, float("-inf")], [float("inf"), 1.0]])
def test_ties_go_to_the_lower_page(device: torch.device, values: list[float]) -> None:
    pick = torch.randint(len(values), (1, 2, 50), generator=torch.Generator().manual_seed(1))
    same_selection(torch.tensor(values)[pick].to(device), [800], [17])


def test_nan_ranks_as_infinity_and_stays_in_its_row(device: torch.device) -> None:
    scores = torch.randn(3, 1, 30, generator=torch.Generator().manual_seed(2)).to(device)
    scores[1, 0, 3::2] = float("nan")
    scores[1, 0, 4] = float("inf")
    same_selection(scores, [480, 480, 300], [8, 8, 8])


def test_selection_over_several_tiles(device: torch.device) -> None:
    pages = 2 * 1024 + 3
    scores = torch.randn(1, 1, pages, generator=torch.Generator().manual_seed(3)).to(device)
    same_selection(scores, [16 * pages], [300])
    same_selection((scores * 4).round(), [16 * pages - 5], [300])


def test_selection_reads_nothing_past_the_end(device: torch.device) -> None:
    scores = torch.randn(1, 1, 30).to(device)
    scores[..., 10:] = float("nan")
    same_selection(scores, [160], [5])


def test_budget_wider_than_the_table(device: torch.device) -> None:
    same_selection(torch.randn(2, 1, 4).to(device), [64, 20], [9, 9])


@pytest.mark.parametrize("kind", ["flat", "peaked", "ties", "special"])
def test_selection_under_top_p_equals_the_reference(device: torch.device, kind: str) -> None:
    generator = torch.Generator().manual_seed(4)
    seq_lens = [0, 17, 333, 640, 1990]
    scores = torch.randn(5, 1, 125, generator=generator) * (20 if kind == "peaked" else 3)
    if kind == "ties":
        scores = scores.round()
    elif kind == "special":
        scores[2, 0, 3], scores[3, 0, 4], scores[4, 0, :] = float("nan"), float("inf"), float("-inf")
    scores = scores.to(device)
    top_p = torch.tensor([0.31, 0.31, 0.5703, 1.0, 0.9499], device=device)
    for budget in (40, 125):
        same_selection(scores, seq_lens, [budget] * 5, top_p=top_p, mass_scale=0.3)


def test_top_p_over_several_tiles(device: torch.device) -> None:
    pages = 2 * 1024 + 3
    scores = torch.randn(1, 1, pages, generator=torch.Generator().manual_seed(3)).to(device)
    options = {"top_p": torch.tensor([0.7003], device=device), "mass_scale": 2.0}
    same_selection((scores * 4).round() / 4, [16 * pages - 5], [300], **options)


def test_what_top_p_leaves_of_a_budget_is_padding(device: torch.device) -> None:
    case = build(device, [300, 180], dtype=torch.bfloat16)
    caches = (case.views.keys, case.views.values, case.views.summaries)
    rows = (case.block_table, case.seq_lens, torch.tensor([12, 9], dtype=torch.int32, device=device))
    top_p = torch.tensor([0.6, 1.0], device=device)
    options: dict[str, Any] = {"page_size": case.page_size, "scale": 64**-0.5, "top_p": top_p}
    counts = torch.full((5, 2, case.views.keys.shape[1]), -1, dtype=torch.int32, device=device)
    got = ops.quest_decode(case.query, *caches, *rows, taken=counts[3], **options)
    scores = score(case, ops.score_pages, "max", 1.0)
    selected = ops.select_pages(
        scores, *rows[1:], page_size=case.page_size, max_page_budget=12, top_p=top_p, mass_scale=64**-0.5
    )
    taken = (selected >= 0).sum(-1)
    assert (taken[0] < 12).all() and (taken[1] == 9).all()
    assert torch.equal(counts[3], taken.int()) and (counts[[0, 1, 2, 4]] == -1).all()
    assert torch.equal(got, attend(case, selected, ops.sparse_paged_attention))


# sparse_paged_attention


def selection(case: PagedCase, width: int, per_query_head: bool = False, seed: int = 0) -> torch.Tensor:
    """A random selection of up to ``width`` pages a row, ascending, -1 padded."""
    generator = torch.Generator().manual_seed(seed)
    heads = case.query.shape[1] if per_query_head else case.views.keys.shape[1]
    selected = torch.full((len(case.seq_lens), heads, width), -1, dtype=torch.int32)
    for row, length in enumerate(case.seq_lens.tolist()):
        pages = -(-length // case.page_size)
        for head in range(heads):
            chosen = torch.randperm(pages, generator=generator)[: max(0, width - row % 2)].sort().values
            selected[row, head, : len(chosen)] = chosen.int()
    return selected.to(case.query.device)


def check_attention(case: PagedCase, selected: torch.Tensor, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    exact = attend(case, selected, reference.sparse_paged_attention, torch.float64, **options)
    tolerance = measured_tolerance(
        exact, lambda: attend(case, selected, reference.sparse_paged_attention, **options), monkeypatch
    )
    actual = attend(case, selected, ops.sparse_paged_attention, **options)
    assert actual.dtype == case.query.dtype
    assert_close(actual, exact, tolerance)


@pytest.mark.parametrize(("shape", "dtype"), with_dtypes(SHAPES))
@pytest.mark.parametrize("per_query_head", [False, True])
def test_attention_matches_the_reference(
    device: torch.device,
    shape: Shape,
    dtype: torch.dtype,
    per_query_head: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = build(device, [0, 1, 100, 83], shape, dtype)
    check_attention(case, selection(case, 4, per_query_head), monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_merges_many_splits(
    device: torch.device,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = build(device, [1100, 257, 3], (1, 2, 64, 32, 16), dtype)
    check_attention(case, selection(case, 70), monkeypatch)


def test_attention_over_more_splits_than_a_merge_tile(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    case = build(device, [256 * 17 + 9], (1, 1, 16, 32, 16))
    check_attention(case, selection(case, 300), monkeypatch)


def test_attention_softcap(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    case = build(device, [70, 5])
    case.query.mul_(20)
    check_attention(case, selection(case, 5), monkeypatch, softcap=3.0)


def test_no_token_gives_zeros(device: torch.device) -> None:
    case = build(device, [0, 40, 40])
    selected = selection(case, 3)
    selected[1] = -1
    output = attend(case, selected, ops.sparse_paged_attention)
    assert not output[:2].any()
    assert output[2].any()
    assert not attend(case, selected[..., :0], ops.sparse_paged_attention).any()


def test_preallocated_buffers_and_budgets_change_nothing(device: torch.device) -> None:
    case = build(device, [600, 64, 0])
    selected = selection(case, 21)
    want = attend(case, selected, ops.sparse_paged_attention)
    scratch = ops.attention_scratch(5, case.query.shape[1], 64, 40, page_size=16, device=device)
    scratch.partial.fill_(float("nan"))
    scratch.lse.fill_(float("nan"))
    out = torch.full_like(case.query, 5.0)
    budgets = torch.tensor([21, 21, 21], dtype=torch.int32, device=device)
    got = attend(case, selected, ops.sparse_paged_attention, out=out, scratch=scratch, page_budgets=budgets)
    assert got is out
    assert torch.equal(out, want)


# the chain


def chain(case: PagedCase, budgets: list[int]) -> torch.Tensor:
    scores = score(case, ops.score_pages, "mass", 0.25)
    rows = torch.tensor(budgets, dtype=torch.int32, device=scores.device)
    selected = ops.select_pages(scores, case.seq_lens, rows, page_size=case.page_size, max_page_budget=max(budgets))
    return attend(case, selected, ops.sparse_paged_attention)


def rows_of(case: PagedCase, rows: list[int]) -> PagedCase:
    views: PageViews = case.views
    return PagedCase(case.query[rows], views, case.block_table[rows], case.seq_lens[rows], case.page_size)


def test_a_row_depends_on_nothing_but_itself(device: torch.device) -> None:
    case = build(device, [300, 17, 0, 180], dtype=torch.bfloat16)
    budgets = [6, 4, 3, 20]
    together = chain(case, budgets)
    for row in range(4):
        assert torch.equal(chain(rows_of(case, [row]), [budgets[row]])[0], together[row])
    assert torch.equal(chain(rows_of(case, [3, 1, 0, 2]), [20, 4, 6, 3]), together[[3, 1, 0, 2]])


def test_one_call_is_the_chain(device: torch.device) -> None:
    case = build(device, [300, 17, 0, 180], dtype=torch.bfloat16)
    budgets = [6, 4, 3, 20]
    caches = (case.views.keys, case.views.values, case.views.summaries)
    rows = (case.block_table, case.seq_lens, torch.tensor(budgets, dtype=torch.int32, device=device))
    out = torch.full_like(case.query, float("nan"))
    scoring = {"group_reduction": "mass", "bound_radius": 0.25}  # those of `chain`
    got = ops.quest_decode(case.query, *caches, *rows, page_size=case.page_size, scale=64**-0.5, out=out, **scoring)
    assert got is out
    assert torch.equal(out, chain(case, budgets))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poison_stays_in_its_row(device: torch.device, poison: float) -> None:
    case = build(device, [100, 100, 50])
    clean = chain(case, [4, 4, 4])
    block = int(case.block_table[1, 0])
    case.views.keys[block, :, 2] = poison
    case.views.values[block, :, 2] = poison
    ops.update_page_summaries(case.views.keys, case.views.summaries, case.slots(), page_size=16)
    dirty = chain(case, [4, 4, 4])
    assert torch.equal(dirty[[0, 2]], clean[[0, 2]])
    assert not dirty[1].isfinite().all()


def test_a_budget_that_covers_the_context_is_dense(device: torch.device) -> None:
    case = build(device, [300, 17, 0, 180])
    want = reference.dense_paged_attention(
        case.query, case.views.keys, case.views.values, case.block_table, case.seq_lens, scale=64**-0.5
    )
    assert_close(chain(case, [19] * 4), want, 2e-6)
