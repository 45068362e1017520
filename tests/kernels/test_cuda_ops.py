"""The CUDA kernels against the reference, on a Hopper GPU: each stage alone, and the fused chain."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from quest_vllm.config import GROUP_REDUCTIONS
from quest_vllm.ops import cuda, reference
from quest_vllm.ops.api import load_ops
from quest_vllm.page_layout import split_chunks
from tests.kernels.paged import PagedCase, make_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a Hopper GPU"),
]

DEVICE = "cuda"
# KV heads, group, head_dim, page size, block size
SHAPES = [
    (2, 4, 128, 16, 16),
    (2, 2, 64, 16, 32),
    (1, 8, 128, 32, 64),
    (2, 3, 64, 16, 16),
    (1, 12, 128, 16, 16),
    (2, 1, 256, 16, 32),
    (1, 8, 256, 64, 128),
    (2, 16, 64, 16, 16),
]
SHAPE = SHAPES[0]
DTYPES = [torch.bfloat16, torch.float16]
LENGTHS = [0, 1, 100, 583, 1300, 16 * 70 + 3]
BUDGETS = [3, 3, 4, 9, 20, 200]  # pages; the last one covers its row
CLUSTERS = [1, 3, 4, 11, None]
compose_reference = load_ops("reference", "cpu").quest_decode


def on_gpu(case: PagedCase) -> PagedCase:
    """The same case on the GPU, its views into one cache as before."""
    cache = case.views.keys
    while cache._base is not None:
        cache = cache._base
    views = split_chunks(cache.to(DEVICE), case.query.shape[2], case.page_size)
    moved = {name: getattr(case, name).to(DEVICE) for name in ("query", "block_table", "seq_lens")}
    return dataclasses.replace(case, views=views, **moved)


def build(lengths: list[int] = LENGTHS, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = DTYPES[0]) -> PagedCase:
    heads, group, dim, page, block = shape
    case = make_case(
        lengths, num_kv_heads=heads, group=group, head_dim=dim, block_size=block, page_size=page, dtype=dtype
    )
    return on_gpu(case)


def ints(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def run(case: PagedCase, budgets: list[int], decode: Callable[..., torch.Tensor] = cuda.quest_decode, **options: Any):
    views = case.views
    caches = (views.keys, views.values, views.summaries)
    rows = (case.block_table, case.seq_lens, ints(budgets))
    return decode(case.query, *caches, *rows, page_size=case.page_size, scale=case.query.shape[2] ** -0.5, **options)


def in_float64(case: PagedCase) -> PagedCase:
    """The case's values in float64, NaN where nothing was written kept."""
    return dataclasses.replace(
        case,
        query=case.query.double(),
        views=dataclasses.replace(
            case.views,
            keys=case.views.keys.double(),
            values=case.views.values.double(),
            summaries=case.views.summaries.double(),
        ),
    )


def attending(selected: torch.Tensor, scale: float) -> Callable[[PagedCase], torch.Tensor]:
    """What the reference makes of a case when these pages are selected."""

    def attend(of: PagedCase) -> torch.Tensor:
        caches = (of.views.keys, of.views.values, of.block_table, of.seq_lens, selected)
        return reference.sparse_paged_attention(of.query, *caches, page_size=of.page_size, scale=scale)

    return attend


def assert_near(actual: torch.Tensor, case: PagedCase, want: Callable[[PagedCase], torch.Tensor]) -> None:
    """Within three times the error that the reference makes in the case's own dtype, against float64."""
    exact = want(in_float64(case))
    error = (want(case).double() - exact).abs().max()
    off = (actual.double() - exact).abs().max()
    assert off <= 3 * error + 1e-5, f"off by {off:.3g}, the reference by {error:.3g}"


def warp_counts(shape: tuple[int, ...], reduction: str) -> list[int]:
    """The variants that serve a shape."""
    rows = 1 if reduction == "per_query_head" else shape[1]
    return [8, 16] if shape[2] <= 128 and rows <= 8 else [8]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", GROUP_REDUCTIONS)
@pytest.mark.parametrize("radius", [1.0, 0.25])
def test_scores(shape: tuple[int, ...], dtype: torch.dtype, reduction: str, radius: float) -> None:
    case = build(shape=shape, dtype=dtype)
    options = {"page_size": case.page_size, "group_reduction": reduction, "bound_radius": radius, "scale": 0.09}
    rows = (case.block_table, case.seq_lens)
    exact = reference.score_pages(in_float64(case).query, in_float64(case).views.summaries, *rows, **options)
    for cluster in CLUSTERS:
        scores = cuda.score_pages(case.query, case.views.summaries, *rows, cluster_size=cluster, **options)
        assert torch.equal(scores.isfinite(), exact.isfinite())
        finite = exact.isfinite()
        # float32 sums of head_dim products, in another order
        torch.testing.assert_close(scores[finite], exact[finite].float(), rtol=1e-5, atol=5e-4)


DISTRIBUTIONS: dict[str, Callable[[int], torch.Tensor]] = {
    "normal": lambda n: torch.randn(2, 3, n),
    "ties": lambda n: (torch.randn(2, 3, n) * 2).round(),
    "constant": lambda n: torch.zeros(2, 3, n),
    "wide": lambda n: torch.exp(torch.randn(2, 3, n) * 30),
    "infinite": lambda n: torch.where(torch.rand(2, 3, n) < 0.3, float("inf"), torch.randn(2, 3, n)),
    "minus infinite": lambda n: torch.where(torch.rand(2, 3, n) < 0.6, float("-inf"), torch.randn(2, 3, n)),
    "nan": lambda n: torch.where(torch.rand(2, 3, n) < 0.1, float("nan"), torch.randn(2, 3, n)),
    "huge": lambda n: torch.randn(2, 3, n) * 3e38,
    "denormal": lambda n: torch.randn(2, 3, n) * 1e-44,
    "geometric": lambda n: (2.0 ** (-torch.arange(n) % 250 - 120).float()).expand(2, 3, n),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("pages", [40, 257, 5000, 65536])  # the last is a million tokens
def test_selection_equals_the_reference(name: str, pages: int) -> None:
    torch.manual_seed(pages)
    scores = DISTRIBUTIONS[name](pages).to(DEVICE).contiguous()
    lengths = ints([16 * pages, 16 * pages - 37])
    for wanted in (1, 2, 4, 30, pages // 3, pages - 1, pages) if pages < 65536 else (1, 512, pages // 3):
        rows = (lengths, ints([wanted, max(1, wanted - 1)]))
        want = reference.select_pages(scores, *rows, page_size=16, max_page_budget=wanted)
        for cluster in CLUSTERS:
            got = cuda.select_pages(scores, *rows, page_size=16, max_page_budget=wanted, cluster_size=cluster)
            assert torch.equal(got, want), (wanted, cluster)


@pytest.mark.parametrize("sink,recent", [(0, 1), (1, 2), (4, 8), (100, 100)])
def test_forced_pages(sink: int, recent: int) -> None:
    scores = torch.randn(3, 2, 60, device=DEVICE)
    rows = (ints([960, 500, 16]), ints([12, 3, 1]))
    forced = {"page_size": 16, "sink_pages": sink, "recent_pages": recent, "max_page_budget": 12}
    assert torch.equal(cuda.select_pages(scores, *rows, **forced), reference.select_pages(scores, *rows, **forced))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_attention(shape: tuple[int, ...], dtype: torch.dtype, softcap: float) -> None:
    case = build(shape=shape, dtype=dtype)
    scores = reference.score_pages(
        case.query, case.views.summaries, case.block_table, case.seq_lens, page_size=case.page_size
    )
    selected = reference.select_pages(
        scores, case.seq_lens, ints(BUDGETS), page_size=case.page_size, max_page_budget=scores.shape[2]
    )

    def attend(of: PagedCase, ops: Any = reference, **more: Any) -> torch.Tensor:
        rows = (of.views.keys, of.views.values, of.block_table, of.seq_lens, selected)
        return ops.sparse_paged_attention(of.query, *rows, page_size=of.page_size, scale=0.09, softcap=softcap, **more)

    for cluster in CLUSTERS:
        assert_near(attend(case, cuda, cluster_size=cluster), case, attend)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduction", GROUP_REDUCTIONS)
@pytest.mark.parametrize("radius", [1.0, 0.25])
def test_the_fused_launch_is_its_stages(shape: tuple[int, ...], reduction: str, radius: float) -> None:
    case = build(shape=shape)
    scoring = {"group_reduction": reduction, "bound_radius": radius}
    scale = case.query.shape[2] ** -0.5
    for cluster in CLUSTERS:
        scores = cuda.score_pages(
            case.query,
            case.views.summaries,
            case.block_table,
            case.seq_lens,
            page_size=case.page_size,
            scale=scale,
            cluster_size=cluster,
            **scoring,
        )
        width = scores.shape[2]
        want = reference.select_pages(
            scores, case.seq_lens, ints(BUDGETS), page_size=case.page_size, max_page_budget=width
        )
        covered = reference.num_pages(case.seq_lens, case.page_size) <= ints(BUDGETS)
        listed = (want[..., None] == torch.arange(width, device=DEVICE)).any(dim=2)

        def attend(of: PagedCase, selected: torch.Tensor = want) -> torch.Tensor:
            rows = (of.views.keys, of.views.values, of.block_table, of.seq_lens, selected)
            return reference.sparse_paged_attention(of.query, *rows, page_size=of.page_size, scale=scale)

        for warps in warp_counts(shape, reduction):
            chosen = torch.zeros(want.shape, dtype=torch.uint8, device=DEVICE)
            out = run(case, BUDGETS, chosen=chosen, cluster_size=cluster, warps=warps, **scoring)
            assert torch.equal(chosen[~covered].bool(), listed[~covered])
            assert not chosen[covered].any()  # a row that attends to everything chooses nothing
            assert_near(out, case, attend)
            assert not out[0].any()  # a row without tokens


def test_a_budget_that_covers_the_context_is_dense() -> None:
    case = build()

    def dense(of: PagedCase) -> torch.Tensor:
        rows = (of.views.keys, of.views.values, of.block_table, of.seq_lens)
        return reference.dense_paged_attention(of.query, *rows, scale=of.query.shape[2] ** -0.5)

    assert_near(run(case, [1000] * 6), case, dense)
    assert_near(run(case, [2**31 - 1] * 6), case, dense)


def test_no_budget_gives_zeros() -> None:
    assert not run(build(), [0] * 6).any()


def test_a_row_depends_on_nothing_but_itself() -> None:
    case = build()
    together = run(case, BUDGETS)
    order = [3, 1, 5, 0, 4, 2]
    mixed = dataclasses.replace(
        case, query=case.query[order], block_table=case.block_table[order], seq_lens=case.seq_lens[order]
    )
    assert torch.equal(run(mixed, [BUDGETS[i] for i in order]), together[order])
    assert torch.equal(run(case, [9, 9, 9, 9, 20, 9])[4], together[4])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("reduction", GROUP_REDUCTIONS)
def test_poison_stays_in_its_row(poison: float, reduction: str) -> None:
    case = build([300, 300, 150])
    clean = run(case, [4, 4, 4], group_reduction=reduction)
    block = int(case.block_table[1, 0])
    case.views.keys[block, :, 2] = poison
    case.views.values[block, :, 2] = poison
    cuda.update_page_summaries(case.views.keys, case.views.summaries, case.slots(), page_size=case.page_size)
    dirty = run(case, [4, 4, 4], group_reduction=reduction)
    assert torch.equal(dirty[[0, 2]], clean[[0, 2]])
    assert not dirty[1].isfinite().all()


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1], SHAPES[6]])
def test_summaries_equal_the_reference(shape: tuple[int, ...]) -> None:
    case = build([37, 200, 5, 64], shape)
    want = case.views.summaries.clone()
    case.views.summaries.fill_(7)
    cuda.update_page_summaries(case.views.keys, case.views.summaries, case.slots(), page_size=case.page_size)
    written = want.isfinite()
    assert torch.equal(case.views.summaries[written], want[written])


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1], SHAPES[6]])
@pytest.mark.parametrize("chunk", [1, 7, 150])
def test_writing_in_chunks(shape: tuple[int, ...], chunk: int) -> None:
    """Keys, values and summaries come out as if written at once; padding slots are passed over."""
    case = build([37, 200, 5, 64], shape)
    views, slots = case.views, case.slots()
    block_size = views.keys.shape[2]
    keys = views.keys[slots // block_size, :, slots % block_size]
    values = views.values[slots // block_size, :, slots % block_size]
    cache = torch.full((*views.keys.shape[:3], 2 * keys.shape[2]), float("nan"), dtype=keys.dtype, device=DEVICE)
    extra = torch.full_like(views.summaries, float("nan"))
    into = (cache[..., : keys.shape[2]].contiguous(), cache[..., keys.shape[2] :].contiguous(), extra)
    write = cuda.KvWriter(*into, page_size=case.page_size)
    for first in range(0, len(slots), chunk):
        part = slice(first, first + chunk)
        padded = torch.cat([slots[part], slots.new_full((3,), -1)])
        rows = [torch.cat([rows[part], rows.new_zeros(3, *rows.shape[1:])]) for rows in (keys, values)]
        write(*rows, padded)
    written = views.summaries.isfinite()
    assert torch.equal(extra[written], views.summaries[written])
    assert torch.equal(into[0][slots // block_size, :, slots % block_size], keys)
    assert torch.equal(into[1][slots // block_size, :, slots % block_size], values)


def test_a_captured_graph_follows_budgets_and_lengths() -> None:
    case = build([1300, 583, 1123, 100])
    budgets, out = ints([20, 9, 30, 3]), torch.empty_like(case.query)
    views = case.views

    def step() -> torch.Tensor:
        rows = (views.keys, views.values, views.summaries, case.block_table, case.seq_lens, budgets)
        return cuda.quest_decode(case.query, *rows, page_size=case.page_size, scale=0.09, out=out)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for values, lengths in (([20, 9, 30, 3], [1300, 583, 1123, 100]), ([5, 2**31 - 1, 0, 4], [1299, 17, 1000, 0])):
        budgets.copy_(ints(values))
        case.seq_lens.copy_(ints(lengths))
        graph.replay()
        replayed = out.clone()
        assert torch.equal(replayed, step())


def test_a_million_tokens() -> None:
    """Scores of a context that fits no shared memory; the needle's page is found."""
    pages, dim = 65536, 128
    cache = torch.zeros(pages, 1, 16, 2 * dim + 16, dtype=torch.bfloat16, device=DEVICE)
    views = split_chunks(cache, dim, 16)
    query = torch.ones(8, 4, dim, dtype=torch.bfloat16, device=DEVICE)
    needle = 43210
    views.keys[needle, 0, 5] = 3
    views.values[needle, 0, 5] = 1
    views.summaries[needle, 0, :, 1] = 3
    table = torch.arange(pages, dtype=torch.int32, device=DEVICE).expand(8, pages).contiguous()
    rows = (query, views.keys, views.values, views.summaries, table, ints([16 * pages] * 8), ints([64] * 8))
    for reduction in ("max", "mass"):
        out = cuda.quest_decode(*rows, page_size=16, scale=1.0, group_reduction=reduction)
        torch.testing.assert_close(out, torch.ones_like(out))


@pytest.mark.parametrize("change", ["dtype", "page_size", "rows"])
def test_what_the_kernels_cannot_serve_is_refused(change: str) -> None:
    good = {"head_dim": 128, "rows": 4, "page_size": 16, "block_size": 32, "dtype": torch.bfloat16}
    cuda.check_layer(**good)
    bad = {"dtype": torch.float32, "page_size": 8, "rows": 17}[change]
    with pytest.raises(cuda.KernelsUnavailable, match="expected"):
        cuda.check_layer(**{**good, change: bad})
