"""Key codes in the CUDA kernels against the reference, on a Hopper GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quest_vllm.config import GROUP_REDUCTIONS
from quest_vllm.ops import cuda, key_codes, reference
from tests.kernels.paged import PagedCase
from tests.kernels.test_cuda_ops import (
    BUDGETS,
    CLUSTERS,
    DEVICE,
    assert_near,
    build,
    in_float64,
    ints,
    run,
    warp_counts,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a Hopper GPU"),
]

# KV heads, group, head_dim, page size, block size
SHAPES = [(2, 4, 128, 16, 16), (2, 2, 64, 16, 32), (1, 8, 128, 16, 64), (2, 1, 256, 16, 32), (1, 7, 64, 16, 16)]
CODES: dict[str, Any] = {"page_summary": "key_codes"}
ODD = [0, 1, 100, 583, 1300, 16 * 70 + 3]


def encode(case: PagedCase) -> PagedCase:
    """The case with codes in the place of minima and maxima."""
    reference.update_page_summaries(
        case.views.keys, case.views.summaries, case.slots(), page_size=case.page_size, **CODES
    )
    return case


def summarised(page_summary: str, lengths: list[int], shape: tuple[int, ...]) -> PagedCase:
    """A case on the GPU with either kind of summaries."""
    case = build(lengths, shape)
    return encode(case) if page_summary == "key_codes" else case


def rounding(case: PagedCase, scale: float) -> float:
    """The most that a score may be off.

    A product of query and step comes of five float16 roundings, each of at most the step times the sum of both
    channels' magnitudes, and counts up to three times.
    """
    coded = key_codes.code_bytes(case.views.summaries).clone()
    coded[..., coded.shape[-1] // 2 :] = 255
    heads = coded.shape[1]
    query = case.query.double().abs().unflatten(1, (heads, -1)).amax(dim=0)  # [heads, group, head_dim]
    both = query.unflatten(-1, (2, 2, -1)).sum(dim=-2, keepdim=True).expand(-1, -1, 2, 2, -1).flatten(2)
    _, own = key_codes.split_logits(both, coded.transpose(0, 1).flatten(1, 2), scale)
    return float(own[own.isfinite()].max()) * 2.5 * 2.0**-11


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_codes_equal_the_reference(shape: tuple[int, ...], chunk: int) -> None:
    case = build([37, 200, 5, 64], shape)
    views, slots = case.views, case.slots()
    block_size = views.keys.shape[2]
    keys = views.keys[slots // block_size, :, slots % block_size]
    keys[..., ::3] = (keys[..., ::3] * 4).round() / 4  # ties
    keys[..., 5] = 3.0
    keys[: len(slots) // 4] *= 300  # past what float8 holds
    into = [torch.zeros_like(cache) for cache in (views.keys, views.values, views.summaries)]
    write = cuda.KvWriter(*into, page_size=16, **CODES)
    for first in range(0, len(slots), chunk):
        part = slice(first, first + chunk)
        write(keys[part], keys[part], slots[part])
    alone, want = torch.zeros_like(into[2]), torch.zeros_like(into[2])
    cuda.update_page_summaries(into[0], alone, slots, page_size=16, **CODES)
    reference.update_page_summaries(into[0], want, slots, page_size=16, **CODES)
    for coded in (into[2], alone):
        assert torch.equal(key_codes.code_bytes(coded), key_codes.code_bytes(want))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduction", GROUP_REDUCTIONS)
@pytest.mark.parametrize("size", [1e-3, 1.0, 200.0])
def test_scores(shape: tuple[int, ...], reduction: str, size: float) -> None:
    case = encode(build(ODD, shape))
    case.query.mul_(size)
    options = {"page_size": 16, "group_reduction": reduction, "scale": 0.09, **CODES}
    rows = (case.block_table, case.seq_lens)
    exact = reference.score_pages(in_float64(case).query, case.views.summaries, *rows, **options)
    finite = exact.isfinite()
    for cluster in CLUSTERS:
        scores = cuda.score_pages(case.query, case.views.summaries, *rows, cluster_size=cluster, **options)
        assert torch.equal(scores.isfinite(), finite)
        off = (scores - exact)[finite].abs().max()
        assert off <= rounding(case, 0.09) + 1e-5 * exact[finite].abs().max() + 1e-5, off


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduction", GROUP_REDUCTIONS)
def test_the_fused_launch_is_its_stages(shape: tuple[int, ...], reduction: str) -> None:
    case = encode(build(ODD, shape))
    scale = case.query.shape[2] ** -0.5
    rows = (case.query, case.views.summaries, case.block_table, case.seq_lens)
    for cluster in CLUSTERS:
        scores = cuda.score_pages(
            *rows, page_size=16, scale=scale, cluster_size=cluster, group_reduction=reduction, **CODES
        )
        width = scores.shape[2]
        want = reference.select_pages(scores, case.seq_lens, ints(BUDGETS), page_size=16, max_page_budget=width)
        covered = reference.num_pages(case.seq_lens, 16) <= ints(BUDGETS)
        listed = (want[..., None] == torch.arange(width, device=DEVICE)).any(dim=2)

        def attend(of: PagedCase, selected: torch.Tensor = want) -> torch.Tensor:
            caches = (of.views.keys, of.views.values, of.block_table, of.seq_lens, selected)
            return reference.sparse_paged_attention(of.query, *caches, page_size=16, scale=scale)

        for warps in warp_counts(shape, reduction):
            chosen = torch.zeros(want.shape, dtype=torch.uint8, device=DEVICE)
            out = run(
                case, BUDGETS, chosen=chosen, cluster_size=cluster, warps=warps, group_reduction=reduction, **CODES
            )
            assert torch.equal(chosen[~covered].bool(), listed[~covered])
            assert_near(out, case, attend)


def test_a_row_depends_on_nothing_but_itself() -> None:
    case = encode(build(ODD))
    options = {"group_reduction": "mass", "cluster_size": 4, "warps": 8, **CODES}
    together = run(case, BUDGETS, **options)
    for row in range(1, len(ODD)):
        rows = (case.block_table[row : row + 1], case.seq_lens[row : row + 1], ints(BUDGETS[row : row + 1]))
        caches = (case.views.keys, case.views.values, case.views.summaries)
        alone = cuda.quest_decode(case.query[row : row + 1], *caches, *rows, page_size=16, scale=128**-0.5, **options)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("reduction", ["max", "mean", "per_query_head"])
def test_poison_stays_in_its_page(poison: float, reduction: str) -> None:
    case = encode(build([300, 300]))
    options = {"page_size": 16, "group_reduction": reduction, "scale": 0.09, **CODES}
    rows = (case.block_table, case.seq_lens)
    clean = cuda.score_pages(case.query, case.views.summaries, *rows, **options)
    case.views.keys[int(case.block_table[1, 0]), :, 2] = poison
    cuda.update_page_summaries(case.views.keys, case.views.summaries, case.slots(), page_size=16, **CODES)
    dirty = cuda.score_pages(case.query, case.views.summaries, *rows, **options)
    assert torch.equal(dirty[0], clean[0])
    assert torch.equal(dirty[1, :, 1:], clean[1, :, 1:])
    if poison != poison:
        assert dirty[1, :, 0].isnan().all()
