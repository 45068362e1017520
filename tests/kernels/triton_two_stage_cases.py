"""The Triton kernels of the policy "two_stage" against the reference, collected by ``test_triton_ops.py``.

Products of keys and queries are exact in float32 whatever their dtype, so the scores of all of them are held to the
tolerance of a float32 sum's order: ``head_dim`` roundings of the largest logit.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import pytest
import torch

from quest_vllm.ops import reference
from quest_vllm.ops import triton as ops
from quest_vllm.ops.api import load_ops
from tests.kernels.paged import PagedCase, places
from tests.kernels.triton_cases import (
    SHAPES,
    Shape,
    assert_close,
    build,
    device,  # noqa: F401
    rows_of,
    score,
    select,
    with_dtypes,
)

LENGTHS = [0, 1, 300, 83, 200, 333]
NAMES = ["two_stage", "two_stage", "two_stage", "mass", "two_stage", "max"]
BUDGETS = [3, 3, 6, 4, 4, 4]  # pages


def ints(values: list[int], device: torch.device) -> torch.Tensor:  # noqa: F811
    return torch.tensor(values, dtype=torch.int32, device=device)


def coded(case: PagedCase) -> PagedCase:
    """The same with key codes for summaries."""
    caches = (case.views.keys, case.views.summaries)
    reference.update_page_summaries(*caches, case.slots(), page_size=16, page_summary="key_codes")
    return case


# score_pages


def check_log_sums(case: PagedCase, page_summary: str) -> None:
    rows, group = case.query.shape[0], case.query.shape[1]
    want, got = (torch.full((rows, group + 3), -7.0, device=case.query.device)[:, :group] for _ in range(2))
    arguments = (case.query, case.views.summaries, case.block_table, case.seq_lens)
    options: dict[str, Any] = {"page_size": 16, "group_reduction": "mass", "scale": 0.3, "page_summary": page_summary}
    reference.score_pages(*arguments, log_sums=want, **options)
    scores = ops.score_pages(*arguments, log_sums=got, **options)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    assert torch.equal(scores.nan_to_num(), ops.score_pages(*arguments, **options).nan_to_num())


@pytest.mark.parametrize("page_summary", ["min_max", "key_codes"])
def test_log_sums_equal_the_reference(
    device: torch.device,  # noqa: F811
    page_summary: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.modules["quest_vllm.ops.triton.score_pages"], "PAGES_PER_COMBINE_TILE", 32)
    case = build(device, [0, 1, 16 * 36 + 3], (1, 3, 64, 32, 16))
    check_log_sums(coded(case) if page_summary == "key_codes" else case, page_summary)


def test_log_sums_leave_nan_out(device: torch.device) -> None:  # noqa: F811
    case = build(device, [100, 300], (2, 3, 64, 32, 16))
    case.query[0, 1] = float("nan")
    case.views.summaries[case.block_table[1, 3].long(), 0, 1, 0, 5] = float("nan")
    check_log_sums(case, "min_max")


# shortlist_pages


def same_shortlist(scores: torch.Tensor, seq_lens: list[int], budgets: list[int], **options: Any) -> None:
    want, got = (select(scores, seq_lens, budgets, of.shortlist_pages, **options) for of in (reference, ops))
    assert torch.equal(got, want)


@pytest.mark.parametrize(("sink", "recent"), [(1, 2), (3, 4), (0, 0)])
def test_the_shortlist_equals_the_reference(device: torch.device, sink: int, recent: int) -> None:  # noqa: F811
    seq_lens = [0, 1, 16, 17, 160, 333, 640, 640, 640]
    scores = torch.randn(9, 2, 40, generator=torch.Generator().manual_seed(sink)).to(device)
    options: dict[str, Any] = {"sink_pages": sink, "recent_pages": recent, "max_page_budget": 40}
    policies = places(["two_stage"] * 7 + ["window", "mass"], device)
    for budgets in ([8] * 9, [0, 1, 2, 3, 4, 5, 40, 8, 8], [7, 7, 7, 9, 9, 21, 27, 8, 8], [2**31 - 1] * 9):
        same_shortlist(scores, seq_lens, budgets, policies=policies, **options)
    same_shortlist(scores, seq_lens, [12] * 9, policies=policies, **options | {"max_page_budget": 9})
    same_shortlist(scores, seq_lens, [8] * 9, **options)  # the server's own policy is then no "two_stage"


@pytest.mark.parametrize("values", [[0.0], [0.0, 1.0], [-0.0, 0.0, float("nan"), float("inf")], [float("-inf"), 1.0]])
def test_ties_of_a_shortlist_go_to_the_lower_page(device: torch.device, values: list[float]) -> None:  # noqa: F811
    pick = torch.randint(len(values), (3, 2, 50), generator=torch.Generator().manual_seed(3))
    policies = places(["two_stage"] * 3, device)
    same_shortlist(torch.tensor(values)[pick].to(device), [800, 800, 500], [17, 30, 11], policies=policies)


def test_a_shortlist_over_several_tiles(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(sys.modules["quest_vllm.ops.triton.shortlist_pages"], "MAX_TILE", 128)
    scores = torch.randn(1, 1, 700, generator=torch.Generator().manual_seed(4)).to(device)
    policies = places(["two_stage"], device)
    same_shortlist(scores, [16 * 700], [200], policies=policies)
    same_shortlist((scores * 4).round(), [16 * 700 - 5], [200], policies=policies)


def test_a_shortlist_leaves_other_rows_and_the_tail_when_told_to(device: torch.device) -> None:  # noqa: F811
    scores = torch.randn(4, 1, 20, generator=torch.Generator().manual_seed(5)).to(device)
    options: dict[str, Any] = {"policies": places(["two_stage", "mass", "window", "two_stage"], device)}
    out = torch.full((4, 1, 9), -7, dtype=torch.int32, device=device)
    rows: tuple[Any, ...] = (scores, [320] * 4, [8, 8, 8, 3])
    assert select(*rows, ops.shortlist_pages, out=out, fill_tail=False, **options) is out
    want = select(*rows, reference.shortlist_pages, **options)
    assert torch.equal(out, torch.where(want < 0, -7, want))
    assert (out >= 0).sum(-1).flatten().tolist() == [8, 0, 0, 0]  # the last one takes forced pages alone


# rerank_pages


Prepared = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def prepared(case: PagedCase, names: list[str], budgets: list[int]) -> Prepared:
    """Scores, log sums and shortlist by the reference, and the policies as operations take them."""
    on, width = case.query.device, case.block_table.shape[1] * (case.views.keys.shape[2] // case.page_size)
    policies, log_sums = places(names, on), torch.empty(case.query.shape[:2], device=on)
    scores = score(case, partial(reference.score_pages, policies=policies, log_sums=log_sums), "mass", 0.5)
    rows = {"page_size": case.page_size, "policies": policies, "max_page_budget": width}
    return scores, log_sums, reference.shortlist_pages(scores, case.seq_lens, ints(budgets, on), **rows), policies


def rerank(case: PagedCase, operation: Any, given: Prepared, wide: bool = False, **options: Any) -> torch.Tensor:
    query, keys = (t.double() if wide else t for t in (case.query, case.views.keys))
    scores = given[0].double() if wide else given[0].clone()
    options = {"page_size": case.page_size, "scale": case.query.shape[-1] ** -0.5} | options
    result: torch.Tensor = operation(scores, *given[1:3], query, keys, case.block_table, case.seq_lens, **options)
    return result


def check_rerank(case: PagedCase, names: list[str], budgets: list[int], **options: Any) -> torch.Tensor:
    """Returns the scores that the kernel gives."""
    given = prepared(case, names, budgets)
    want = rerank(case, reference.rerank_pages, given, wide=True, **options)
    largest = want.masked_fill(want.isinf(), 0.0).abs().max() + given[1].abs().max() + options.get("softcap", 0.0)
    tolerance = float(torch.finfo(torch.float32).eps * (case.query.shape[-1] / 4 + largest * 4))
    got = rerank(case, ops.rerank_pages, given, **options)
    assert_close(got, want, tolerance)
    told = {"policies": given[3], "page_budgets": ints(budgets, case.query.device)}
    covered = told["page_budgets"] >= -(-case.seq_lens // case.page_size)
    assert torch.equal(
        rerank(case, ops.rerank_pages, given, **options, **told), torch.where(covered[:, None, None], given[0], got)
    )
    return got


@pytest.mark.parametrize(("shape", "dtype"), with_dtypes([*SHAPES, (1, 16, 64, 64, 16), (2, 5, 128, 32, 16)]))
def test_scores_by_keys_match_the_reference(device: torch.device, shape: Shape, dtype: torch.dtype) -> None:  # noqa: F811
    case = build(device, LENGTHS, shape, dtype)
    case.query *= 2
    check_rerank(case, NAMES, BUDGETS)


def test_scores_by_keys_under_a_softcap(device: torch.device) -> None:  # noqa: F811
    case = build(device, LENGTHS, (1, 3, 64, 32, 16))
    case.query *= 20
    check_rerank(case, NAMES, BUDGETS, softcap=3.0)


def test_scores_by_keys_over_many_tiles(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    case = build(device, [16 * 130 + 1, 40, 700], (1, 2, 16, 32, 16))
    names = ["two_stage", "mass", "two_stage"]
    at_once = check_rerank(case, names, [40, 2, 9])
    monkeypatch.setattr(sys.modules["quest_vllm.ops.triton.rerank_pages"], "TARGET_PROGRAMS", 6)
    assert torch.equal(check_rerank(case, names, [40, 2, 9]), at_once)


def test_scores_by_keys_of_special_pages(device: torch.device) -> None:  # noqa: F811
    """NaN makes its own page's score NaN and leaves the others' alone; as the reference has it for infinities."""
    case = build(device, [300, 300, 300, 300, 300], (1, 3, 16, 32, 16))
    case.query.abs_()
    budgets = [6] * 5
    given = prepared(case, ["two_stage"] * 5, budgets)
    scores, log_sums, listed, policies = given
    for row, value in ((0, float("nan")), (1, float("inf")), (2, float("-inf"))):
        page = int(listed[row, 0, 4])
        case.views.keys[case.block_table[row, page // 2].long(), 0, page % 2 * 16 + 3, 5] = value
    case.query[3, 1] = float("nan")  # a head without a number
    log_sums[4] = float("inf")
    want, got = (rerank(case, of.rerank_pages, given) for of in (reference, ops))
    assert want.isnan().sum(-1).flatten().tolist() == [1, 0, 0, int((listed[3] >= 0).sum()), 0]
    assert want[1].isposinf().sum() == 1
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5, equal_nan=True)
    choose: dict[str, Any] = {"page_size": 16, "max_page_budget": 6, "policies": policies}
    rows = (case.seq_lens, ints(budgets, device))
    chosen = ops.select_pages(got, *rows, **choose)
    assert torch.equal(chosen, reference.select_pages(want, *rows, **choose))
    assert int(listed[0, 0, 4]) in chosen[0, 0].tolist()
    assert int((got[0] != scores[0]).sum()) == int((listed[0] >= 0).sum())


def test_told_the_budgets_it_reads_no_padding(device: torch.device) -> None:  # noqa: F811
    case = build(device, LENGTHS, (2, 3, 64, 32, 16), torch.bfloat16)
    scores, log_sums, listed, policies = prepared(case, NAMES, BUDGETS)
    unread = torch.where(listed < 0, 2**30, listed)  # what shortlist_pages left unwritten
    given = scores.clone()
    tensors = (log_sums, unread, case.query, case.views.keys, case.block_table, case.seq_lens)
    told = {"policies": policies, "page_budgets": ints(BUDGETS, device)}
    assert ops.rerank_pages(given, *tensors, page_size=16, scale=0.125, **told) is given
    assert torch.equal(given, rerank(case, ops.rerank_pages, (scores, log_sums, listed, policies)))
    changed = (given != scores).flatten(1).any(dim=1).tolist()
    assert changed == [False, False, True, False, True, False]


def test_a_row_that_takes_every_page_keeps_its_scores(device: torch.device) -> None:  # noqa: F811
    case = build(device, [100, 100, 100], (1, 2, 16, 32, 16))
    budgets = [7, 6, 2**31 - 1]
    given = prepared(case, ["two_stage"] * 3, budgets)
    for told in ({}, {"policies": given[3], "page_budgets": ints(budgets, device)}):
        ranked = rerank(case, ops.rerank_pages, given, **told)
        assert (ranked != given[0]).flatten(1).any(dim=1).tolist() == [False, True, False]


def test_nothing_to_rank(device: torch.device) -> None:  # noqa: F811
    case = build(device, [40, 33])
    scores, log_sums, listed, policies = prepared(case, ["two_stage", "mass"], [1, 1])
    assert (listed < 0).all()
    assert torch.equal(rerank(case, ops.rerank_pages, (scores, log_sums, listed, policies)), scores)
    assert torch.equal(rerank(case, ops.rerank_pages, (scores, log_sums, listed[..., :0], policies)), scores)
    none = rows_of(case, [])
    assert rerank(none, ops.rerank_pages, (scores[:0], log_sums[:0], listed[:0], policies[:0])).numel() == 0


# the chain


def decode(case: PagedCase, operation: Any, budgets: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and the number of pages attended to."""
    views = case.views
    taken = torch.full((len(budgets), views.keys.shape[1]), -1, dtype=torch.int32, device=budgets.device)
    rows = (views.keys, views.values, views.summaries, case.block_table, case.seq_lens, budgets)
    options = {"page_size": 16, "scale": case.query.shape[-1] ** -0.5, "group_reduction": "mass"} | options
    return operation(case.query, *rows, taken=taken, **options), taken


MIXED = ["two_stage", "two_stage", "window", "mass", "two_stage", "max", "two_stage", "two_stage"]
MIXED_LENGTHS = [0, 1, 300, 83, 583, 333, 200, 100]
MIXED_BUDGETS = [3, 3, 4, 4, 6, 5, 4, 2**31 - 1]


@pytest.mark.parametrize(("page_summary", "top_p"), [("min_max", 0.7), ("key_codes", None)])
def test_one_call_for_mixed_policies(device: torch.device, page_summary: str, top_p: float | None) -> None:  # noqa: F811
    case = build(device, MIXED_LENGTHS, (1, 3, 64, 32, 16))
    case.query *= 3
    case = coded(case) if page_summary == "key_codes" else case
    options: dict[str, Any] = {"page_summary": page_summary, "policies": places(MIXED, device), "softcap": 5.0}
    if top_p is not None:
        options["top_p"] = torch.tensor([top_p, 0.5, 1.0, 0.8, top_p, top_p, 1.0, top_p], device=device)
    budgets = ints(MIXED_BUDGETS, device)
    want, wanted = decode(case, load_ops("reference", "cpu").quest_decode, budgets, **options)
    got, taken = decode(case, ops.quest_decode, budgets, **options)
    assert torch.equal(taken, wanted)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    options["policies"] = places(["mass"] * 8, device)
    plain, _ = decode(case, load_ops("reference", "cpu").quest_decode, budgets, **options)
    assert not torch.allclose(plain[4], got[4], atol=1e-3)  # there is something to gain or lose


def test_a_row_of_two_stages_depends_on_nothing_but_itself(device: torch.device) -> None:  # noqa: F811
    case = build(device, [300, 17, 0, 583], dtype=torch.bfloat16)
    names, budgets = ["two_stage", "two_stage", "mass", "two_stage"], [6, 4, 3, 9]
    together, _ = decode(case, ops.quest_decode, ints(budgets, device), policies=places(names, device))
    for row in range(4):
        own = {"policies": places(names[row : row + 1], device)}
        alone, _ = decode(rows_of(case, [row]), ops.quest_decode, ints([budgets[row]], device), **own)
        assert torch.equal(alone[0], together[row])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("top_p", [False, True])
def test_a_captured_graph_follows_the_policies(device: torch.device, top_p: bool) -> None:  # noqa: F811
    case = coded(build(device, MIXED_LENGTHS, (2, 4, 128, 32, 16), torch.bfloat16))
    policies, budgets = places(["mass"] * 8, device), ints([4] * 8, device)
    shares = {"top_p": torch.full((8,), 0.8, device=device)} if top_p else {}
    options: dict[str, Any] = {"page_summary": "key_codes", "policies": policies, **shares}
    decode(case, ops.quest_decode, budgets, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, taken = decode(case, ops.quest_decode, budgets, **options)
    for names, sizes in ((["mass"] * 8, [4] * 8), (MIXED, MIXED_BUDGETS), (["two_stage"] * 8, [3] * 8)):
        policies.copy_(places(names, device))
        budgets.copy_(ints(sizes, device))
        graph.replay()
        want, wanted = decode(case, ops.quest_decode, budgets, **options)
        assert torch.equal(out, want) and torch.equal(taken, wanted)
