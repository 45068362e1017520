"""What "two_stage" adds to the C++ operations, against the reference, in every packing of vLLM-CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quest_vllm.ops import cpu, reference
from tests.kernels.paged import places
from tests.kernels.test_cpu_ops import LAYOUTS, Case, assert_close, make_case

LENGTHS = [0, 1, 333, 16, 700]


@pytest.fixture(autouse=True, scope="module")
def _library() -> None:
    try:
        cpu.load()
    except cpu.KernelsUnavailable as error:
        pytest.skip(f"no C++ kernels: {error}")


def first_stage(case: Case, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores, normalisers and shortlists of ``width``, all made up; the shortlists of rows in turn long and short."""
    generator = torch.Generator().manual_seed(3)
    num_reqs, heads = len(case.seq_lens), case.keys.shape[1]
    max_pages = case.block_table.shape[1] * (case.keys.shape[2] // case.page_size)
    scores = torch.randn(num_reqs, heads, max_pages, generator=generator)
    log_sums = 3 * torch.randn(num_reqs, case.query.shape[1], generator=generator)
    budgets = torch.tensor([width, width // 3] * num_reqs)[:num_reqs].int()
    options: dict[str, Any] = {"page_size": case.page_size, "max_page_budget": width, "sink_pages": 0}
    listed = reference.select_pages(scores.flip(-1), case.seq_lens, budgets, recent_pages=1, **options)
    return scores, log_sums, listed


def rerank(case: Case, *first: torch.Tensor, rows: slice = slice(None), softcap: float = 0.0) -> torch.Tensor:
    """The operation under test, of some rows."""
    batch = (case.query[rows], case.key_cache, case.block_table[rows], case.seq_lens[rows])
    options: dict[str, Any] = {"page_size": case.page_size, "scale": case.scale, "softcap": softcap}
    return cpu.rerank_pages(*(tensor[rows] for tensor in first), *batch, kv_format=case.kv_format, **options)


def expected(case: Case, *first: torch.Tensor, dtype: torch.dtype, softcap: float = 0.0) -> torch.Tensor:
    """The reference's, with queries and keys of ``dtype``."""
    scores, log_sums, listed = first
    if dtype == torch.float64:
        scores, log_sums = scores.double(), log_sums.double()
    batch = (case.query.to(dtype), case.keys.to(dtype), case.block_table, case.seq_lens)
    options: dict[str, Any] = {"page_size": case.page_size, "scale": case.scale, "softcap": softcap}
    return reference.rerank_pages(scores, log_sums, listed, *batch, **options)


def check(case: Case, width: int, softcap: float = 0.0) -> None:
    first = first_stage(case, width)
    actual = rerank(case, *first, softcap=softcap)
    low, exact = (expected(case, *first, dtype=dtype, softcap=softcap) for dtype in (case.query.dtype, torch.float64))
    assert actual.dtype == torch.float32
    assert_close(actual, exact, low)
    listed = torch.zeros(actual.shape[0], actual.shape[1], actual.shape[2] + 1, dtype=torch.bool)
    listed.scatter_(-1, first[2].long() % listed.shape[2], True)  # what is absent: a last page
    assert torch.equal(actual != first[0], listed[..., :-1])


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize(("dim", "group"), [(64, 3), (80, 4), (96, 8), (128, 1), (128, 5), (256, 2), (64, 12)])
@pytest.mark.parametrize(("kv_format", "dtype"), LAYOUTS)
def test_scores(kv_format: str, dtype: torch.dtype, dim: int, group: int, softcap: float) -> None:
    check(make_case(LENGTHS, kv_format=kv_format, dtype=dtype, dim=dim, group=group), 23, softcap)


@pytest.mark.parametrize("page_size", [32, 64, 128])
@pytest.mark.parametrize(("kv_format", "dtype"), LAYOUTS)
def test_scores_of_larger_pages(kv_format: str, dtype: torch.dtype, page_size: int) -> None:
    case = make_case([1, 900, 1111], kv_format=kv_format, dtype=dtype, group=4, block_size=128, page_size=page_size)
    check(case, 12)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_infinite_and_nan_keys_and_normalisers(value: float, softcap: float, group: int) -> None:
    case = make_case([100, 16, 1300], kv_heads=2, group=group)
    case.query.abs_()
    for row, page, token in ((0, 2, 3), (0, 6, 1), (1, 0, 15), (2, 70, 8)):
        block, start = case.block_table[row, page // 4].long(), page % 4 * 16
        for keys in (case.keys, case.key_cache):
            keys[block, 0, start + token] = value
            keys[block, 1, start : start + 16] = value  # of the other head, the whole page
    scores, log_sums, listed = first_stage(case, 90)
    for sums in (log_sums, torch.full_like(log_sums, float("inf")), torch.zeros_like(log_sums)):
        actual = rerank(case, scores, sums, listed, softcap=softcap)
        want = expected(case, scores, sums, listed, dtype=torch.float32, softcap=softcap)
        assert softcap or not want[0, 1, 2].isfinite()
        torch.testing.assert_close(actual, want, atol=2e-5, rtol=2e-5, equal_nan=True)


@pytest.mark.parametrize(("kv_format", "dtype"), LAYOUTS)
def test_a_row_does_not_depend_on_its_neighbours(kv_format: str, dtype: torch.dtype) -> None:
    case = make_case([900, 3, 2555, 31], kv_format=kv_format, dtype=dtype, group=4, dim=128)
    first = first_stage(case, 100)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together = rerank(case, *first)
        torch.set_num_threads(1)
        assert torch.equal(rerank(case, *first), together)
        for row in range(4):
            assert torch.equal(rerank(case, *first, rows=slice(row, row + 1))[0], together[row])
    finally:
        torch.set_num_threads(threads)


def test_pages_past_the_end_and_padding_are_skipped() -> None:
    case = make_case([100, 40], group=2)
    scores, log_sums, _ = first_stage(case, 3)
    listed = torch.tensor([[[0, 3, 6], [2, -1, -1]], [[0, 2, -1], [-1, -1, -1]]], dtype=torch.int32)
    stray = torch.cat([torch.full((2, 2, 2), 99999, dtype=torch.int32), listed], dim=-1)
    stray[:, :, 1] = 7
    strided = (scores.transpose(1, 2).contiguous().transpose(1, 2), log_sums, stray.mT.contiguous().mT)
    assert torch.equal(rerank(case, *strided), rerank(case, scores, log_sums, listed))
    untouched = rerank(case, scores, log_sums, torch.full_like(listed, -1))
    assert torch.equal(untouched, scores) and untouched.data_ptr() != scores.data_ptr()


def test_empty_batch() -> None:
    case = make_case([40])
    first, nobody = first_stage(case, 4), slice(0, 0)
    assert rerank(case, *first, rows=nobody).shape == (0, 2, first[0].shape[2])
    lengths = case.seq_lens[nobody]
    listed = cpu.shortlist_pages(first[0][nobody], lengths, lengths, page_size=16, max_page_budget=4)
    assert listed.shape == (0, 2, 5)


@pytest.mark.parametrize("kind", ["random", "ties", "special", "equal"])
@pytest.mark.parametrize(("sink_pages", "recent_pages"), [(1, 2), (0, 0), (0, 1), (3, 4)])
def test_shortlists(kind: str, sink_pages: int, recent_pages: int) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [0, 1, 16, 17, 300, 4000, 4096, 2500, 150, 48]
    scores = torch.randn(len(lengths), 3, 256, generator=generator) * 10
    if kind == "ties":
        scores = scores.round() / 4
    elif kind == "equal":
        scores = torch.zeros_like(scores)
    elif kind == "special":
        special = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e-40, -1e-40, 3e38])
        scores = special[torch.randint(0, 8, scores.shape, generator=generator)]
    rows = ["two_stage"] * len(lengths), ["two_stage", "mass", "two_stage", "window", "max"] * 2
    mixed = [5, 0, 1, 2, 3, 100, 17, 2**31 - 1, 2**30, -4]
    for budgets in (*([budget] * len(lengths) for budget in (1, 2, 3, 4, 9, 10, 64, 171, 300)), mixed):
        options: dict[str, Any] = {"page_size": 16, "sink_pages": sink_pages, "recent_pages": recent_pages}
        batch = (scores, torch.tensor(lengths, dtype=torch.int32), torch.tensor(budgets, dtype=torch.int32))
        for policies in (*map(places, rows), None):
            for width in (100, 256, 300):
                options |= {"max_page_budget": width, "policies": policies}
                assert torch.equal(cpu.shortlist_pages(*batch, **options), reference.shortlist_pages(*batch, **options))


@pytest.mark.parametrize("page_summary", ["min_max", "key_codes"])
def test_scores_come_with_their_normalisers(page_summary: str) -> None:
    case = make_case([0, 1, 2100, 16, 4200], group=3)
    summaries, tables = case.summaries, (case.block_table, case.seq_lens)
    options: dict[str, Any] = {"page_size": 16, "page_summary": page_summary}
    reference.update_page_summaries(case.keys, summaries, case.slots, **options)
    if page_summary == "min_max":
        summaries[case.block_table[2, 1].long(), 0, 3] = float("nan")
        summaries[case.block_table[4, 40].long(), 1, 0, 1] = float("inf")
        case.query.abs_()
    names = places(["two_stage", "two_stage", "two_stage", "mass", "two_stage"])
    options |= {"group_reduction": "mass", "bound_radius": 0.5, "scale": case.scale, "policies": names}
    wider = torch.full((5, 8), -7.0)  # strided
    actual, want = wider[:, 1:7], torch.empty(5, 6)
    scores = cpu.score_pages(case.query, summaries, *tables, log_sums=actual, **options)
    masses = reference.score_pages(case.query, summaries, *tables, log_sums=want, **options)
    torch.testing.assert_close(actual, want, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(scores, masses, atol=2e-5, rtol=2e-5, equal_nan=True)
    assert not actual[0].any() and (page_summary == "key_codes" or want[4, 3:].isposinf().all())
    alone = cpu.score_pages(case.query, summaries, *tables, **options)
    torch.testing.assert_close(alone, scores, atol=0, rtol=0, equal_nan=True)
    assert (wider[:, [0, 7]] == -7).all()


def test_bad_arguments_say_what_was_expected_and_what_came() -> None:
    case = make_case([100])
    scores, sums, listed = torch.zeros(1, 2, 12), torch.zeros(1, 2), torch.zeros(1, 2, 3, dtype=torch.int32)
    arguments = [scores, sums, listed, case.query, case.key_cache, case.block_table, case.seq_lens]

    def fails(message: str, position: int, value: torch.Tensor, **options: object) -> None:
        changed = [*arguments[:position], value, *arguments[position + 1 :]]
        given: dict[str, Any] = {"page_size": 16, "scale": 1.0, **options}
        with pytest.raises(RuntimeError, match=message):
            cpu.rerank_pages(*changed, **given)

    outside = case.block_table.clone()
    outside[0, 1] = case.key_cache.shape[0]
    fails("block_table.0, 1.: expected a block id from 0 to 4, got 5", 5, outside)
    fails("seq_lens.0.: expected 0 to 192 .the blocks.*, got 193", 6, case.seq_lens + 93)
    fails("seq_lens.0.: expected 0 to 96 .the pages.*, got 100", 0, scores[:, :, :6])
    fails("page_scores: expected dtype Float, got Double", 0, scores.double())
    fails("page_scores: expected size 2 at dimension 1, got shape .1, 1, 12.", 0, scores[:, :1])
    fails("page_scores: expected a tensor on cpu, got meta", 0, scores.to("meta"))
    fails("log_sums: expected dtype Float, got Double", 1, sums.double())
    fails("log_sums: expected size 2 at dimension 1, got shape .1, 1.", 1, sums[:, :1])
    fails("log_sums: expected the last 1 dimensions to be contiguous", 1, torch.zeros(1, 4)[:, ::2])
    fails("shortlist: expected dtype Int, got Long", 2, listed.long())
    fails("shortlist: expected 3 dimensions, got shape .1, 2.", 2, listed[:, :, 0])
    fails("shortlist: expected size 1 at dimension 0, got shape .2, 2, 3.", 2, listed.expand(2, 2, 3))
    fails("shortlist: expected size 2 at dimension 1, got shape .1, 1, 3.", 2, listed[:, :1])
    fails("query: expected dtype Float, got Half", 3, case.query.half())
    fails("key_cache: expected 4 dimensions", 4, case.key_cache[0])
    fails("page_size: expected a multiple of 16 .* got 24", 2, listed, page_size=24)
    fails("kv_format: expected amx, vec, vec16 or rows, got neon", 2, listed, kv_format="neon")
    fails("kv_format amx: expected dtype BFloat16, got Float", 2, listed, kv_format="amx")
    rows = (case.seq_lens, case.seq_lens)
    for options, message in (
        ({"policies": torch.tensor([6], dtype=torch.int32)}, r"policies\[0\]: expected 0 to 5, got 6"),
        ({"max_page_budget": -1}, "max_page_budget: expected 0 or more, got -1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            cpu.shortlist_pages(scores, *rows, **{"page_size": 16, "max_page_budget": 4, **options})
    with pytest.raises(RuntimeError, match="log_sums: expected size 2 at dimension 1, got shape .1, 3."):
        cpu.score_pages(
            case.query, case.summaries, case.block_table, case.seq_lens, page_size=16, log_sums=torch.zeros(1, 3)
        )
