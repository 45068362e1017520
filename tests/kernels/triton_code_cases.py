"""The Triton kernels of key codes against the reference, collected by ``test_triton_ops.py``.

Codes have to be the reference's bytes. Scores may differ by the order of
a float32 sum: the tolerance is that of ``head_dim`` roundings of the largest logit.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import pytest
import torch

from quest_vllm.ops import key_codes, reference
from quest_vllm.ops import triton as ops
from tests.kernels.paged import PagedCase
from tests.kernels.triton_cases import (
    DTYPES,
    Shape,
    assert_close,
    build,
    device,  # noqa: F401
    rows_of,
    with_dtypes,
)

CODED = {"page_size": 16, "page_summary": "key_codes"}
SHAPES: list[Shape] = [  # num_kv_heads, group, head_dim, block_size, page_size
    (2, 3, 64, 32, 16),
    (1, 4, 128, 64, 16),
    (1, 1, 192, 16, 16),
    (1, 2, 256, 16, 16),
]


def coded(case: PagedCase) -> torch.Tensor:
    """Every page's bytes, ``[num_blocks, num_kv_heads, pages_per_block, 4 * head_dim]``, each NaN base the same one.

    PyTorch's bfloat16 of a NaN has other bits on other processors.
    """
    codes = key_codes.code_bytes(case.views.summaries).clone()
    dim = case.query.shape[-1]
    base = codes[..., :dim].contiguous().view(torch.bfloat16).float()
    bits = torch.where(base.isnan(), 0x7FC0, base.view(torch.int32) >> 16).to(torch.int16)
    codes[..., :dim] = bits.view(torch.uint8)
    return codes


def recode(case: PagedCase, slots: torch.Tensor, operation: Any) -> torch.Tensor:
    """The bytes after ``operation`` over a stale summary."""
    case.views.summaries.fill_(99.0)
    operation(case.views.keys, case.views.summaries, slots, **CODED)
    return coded(case)


def same_codes(case: PagedCase, slots: torch.Tensor | None = None) -> None:
    """Leaves the reference's codes in ``case``."""
    slots = case.slots() if slots is None else slots
    got = recode(case, slots, ops.update_page_summaries)
    want = recode(case, slots, reference.update_page_summaries)
    different = (got != want).any(dim=-1).nonzero().tolist()
    assert not different, f"(block, KV head, page) of other bytes: {different}"


def coded_scores(case: PagedCase, operation: Any, reduction: str, wide: bool = False, **options: Any) -> torch.Tensor:
    query = case.query.double() if wide else case.query
    settings = CODED | {"group_reduction": reduction, "scale": case.query.shape[-1] ** -0.5} | options
    result: torch.Tensor = operation(query, case.views.summaries, case.block_table, case.seq_lens, **settings)
    return result


def same_scores(case: PagedCase, reduction: str) -> None:
    want = coded_scores(case, reference.score_pages, reduction, wide=True)
    largest = want.masked_fill(want.isinf(), 0.0).abs().max()
    tolerance = float(torch.finfo(torch.float32).eps * (case.query.shape[-1] / 4 + largest * 4))
    assert_close(coded_scores(case, ops.score_pages, reduction), want, tolerance)


@pytest.mark.parametrize(("shape", "dtype"), with_dtypes(SHAPES))
def test_codes_equal_the_reference(device: torch.device, shape: Shape, dtype: torch.dtype) -> None:  # noqa: F811
    case = build(device, [0, 1, 45], shape, dtype)
    same_codes(case, torch.cat([case.slots(), torch.tensor([-1, -1], device=device)]))


@pytest.mark.parametrize("seed", range(12 if torch.cuda.is_available() else 6))
def test_codes_of_random_shapes_and_scales_equal_the_reference(device: torch.device, seed: int) -> None:  # noqa: F811
    """Keys of every magnitude, on grids (ties of the roundings), equal, and past what float8 holds."""
    chance = random.Random(seed)
    shape = (chance.choice([1, 2]), 1, chance.choice([64, 128, 256]), chance.choice([16, 32, 64]), 16)
    dtype = chance.choice(DTYPES)
    case = build(device, [chance.randrange(1, 70) for _ in range(2)], shape, dtype, seed)
    keys = case.views.keys
    exponents = torch.randint(-12, 11, (shape[2],), generator=torch.Generator().manual_seed(seed)).to(device)
    keys *= (2.0 ** exponents.float()).to(dtype)
    if seed % 3 == 1:
        grid = 2.0 ** chance.randrange(-8, 2)
        keys.copy_((keys.float() / grid).round() * grid + 0.0)  # never -0.0: which zero is the least is not defined
    if seed % 3 == 2:
        keys[..., :: chance.choice([3, 5, 8])] = chance.choice([0.0, 1.5, -300.0])
    same_codes(case)


def test_every_step_and_rest_of_float8_is_coded_the_same(device: torch.device) -> None:  # noqa: F811
    """Ranges and middles through all values of float8_e4m3fn, halfway between neighbours, and beside those."""
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    halves = (values[1:] + values[:-1]) / 2
    points = torch.cat([values, halves, halves * (1 + 2**-20), halves * (1 - 2**-20), torch.tensor([464.0, 1e4, 1e38])])
    case = build(device, [16 * 17], (1, 1, 64, 16, 16))
    keys = case.views.keys[case.block_table[0].long(), 0]  # [pages, 16, 64], a copy
    flat = torch.zeros(keys.shape[0] * 32, device=device)
    flat[: len(points)] = points.to(device)
    first, second = key_codes.split_pairs(keys.clone())
    first = torch.linspace(0, 1, 16, device=device)[None, :, None] * (4 * flat.view(-1, 1, 32))
    second = (flat * torch.where(torch.arange(len(flat), device=device) % 2 > 0, 1.0, -1.0)).view(-1, 1, 32)
    pairs = torch.stack([first, second.expand_as(first)], dim=-2)  # [pages, 16, 2, 32]
    quarters = pairs.unflatten(-1, (2, 16)).transpose(-3, -2)  # [pages, 16, 2, 2, 16]
    case.views.keys[case.block_table[0].long(), 0] = quarters.flatten(-3)
    same_codes(case)
    steps = coded(case)[case.block_table[0].long(), 0, 0, 64:96] & 127
    assert set(range(127)) <= set(steps.flatten().tolist())


@pytest.mark.parametrize("order", ["backward", "shuffled", "repeated"])
def test_codes_take_tokens_of_a_page_in_any_order(device: torch.device, order: str) -> None:  # noqa: F811
    case = build(device, [9])
    slots = case.slots()
    orders = {
        "backward": slots.flip(0),
        "shuffled": slots[torch.tensor([3, 8, 0, 5, 1, 7, 2, 6, 4], device=device)],
        "repeated": torch.cat([slots[4:], slots[-1:]]),
    }
    same_codes(case, orders[order])


def test_codes_of_infinite_and_nan_keys(device: torch.device) -> None:  # noqa: F811
    case = build(device, [40, 20], (1, 2, 64, 32, 16))
    keys = case.views.keys
    slot = int(case.slots()[3])
    for channel, value in ((5, float("nan")), (6, float("inf")), (7, float("-inf")), (8, 3e38)):
        keys[slot // 32, 0, slot % 32, channel] = value
    same_codes(case)
    want = coded_scores(case, reference.score_pages, "per_query_head")
    assert bool(want[0, :, 0].isnan().all())
    got = coded_scores(case, ops.score_pages, "per_query_head")
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5, equal_nan=True)


def test_only_pages_that_were_written_to_are_coded(device: torch.device) -> None:  # noqa: F811
    case = build(device, [40])
    case.views.summaries.fill_(99.0)
    before = coded(case)
    for slots in (torch.tensor([], dtype=torch.int64), torch.tensor([-1, -5])):
        ops.update_page_summaries(case.views.keys, case.views.summaries, slots.to(device), **CODED)
    assert torch.equal(coded(case), before)
    last = case.slots()[-1:]
    same_codes(case, last)
    assert int((coded(case) != before).any(dim=-1).sum()) == case.views.keys.shape[1]


@pytest.mark.parametrize(("shape", "dtype"), with_dtypes(SHAPES))
def test_coded_scores_match_the_reference(device: torch.device, shape: Shape, dtype: torch.dtype) -> None:  # noqa: F811
    case = build(device, [0, 1, 100, 33], shape, dtype)
    case.query *= 4
    same_codes(case)
    for reduction in ("mass", "per_query_head") if dtype != torch.bfloat16 else ("max", "mean", "mass"):
        same_scores(case, reduction)


def test_coded_scores_span_tiles_and_leave_the_tail_when_told_to(
    device: torch.device,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = sys.modules["quest_vllm.ops.triton.score_pages"]
    monkeypatch.setattr(module, "TARGET_PROGRAMS", 4)  # several tiles a program
    case = build(device, [16 * 70 + 1, 5], (1, 2, 64, 32, 16))
    same_codes(case)
    for reduction in ("max", "mass"):
        same_scores(case, reduction)
        want = coded_scores(case, reference.score_pages, reduction)
        out = torch.full_like(want, 7.0)
        coded_scores(case, ops.score_pages, reduction, out=out, fill_tail=False)
        assert_close(out, torch.where(want == float("-inf"), 7.0, want), 1e-4)


@pytest.mark.parametrize("reduction", ["max", "mean", "mass", "per_query_head"])
def test_a_spoiled_page_spoils_no_other(device: torch.device, reduction: str) -> None:  # noqa: F811
    case = build(device, [100, 300], (1, 3, 64, 64, 16))
    same_codes(case)
    clean = coded_scores(case, ops.score_pages, reduction)
    codes = key_codes.code_bytes(case.views.summaries)
    for row, page, start in ((0, 2, 64), (1, 17, 96)):  # a step, a rest
        codes[int(case.block_table[row, page // 4]), 0, page % 4, start : start + 4] = 0x7F
    dirty = coded_scores(case, ops.score_pages, reduction)
    assert dirty.isnan().nonzero()[:, [0, 2]].unique(dim=0).tolist() == [[0, 2], [1, 17]]
    if reduction == "mass":  # the spoiled page no longer counts in the rows' normalisers
        want = coded_scores(case, reference.score_pages, reduction)
        torch.testing.assert_close(dirty, want, atol=2e-5, rtol=2e-5, equal_nan=True)
    else:
        assert torch.equal(torch.where(dirty.isnan(), clean, dirty), clean)


def test_a_row_of_coded_pages_depends_on_nothing_but_itself(device: torch.device) -> None:  # noqa: F811
    case = build(device, [100, 17, 0, 60], dtype=torch.bfloat16)
    same_codes(case)
    together = coded_scores(case, ops.score_pages, "mass")
    for row in range(4):
        assert torch.equal(coded_scores(rows_of(case, [row]), ops.score_pages, "mass")[0], together[row])


def test_one_call_over_codes_is_the_chain(device: torch.device) -> None:  # noqa: F811
    case = build(device, [100, 17, 0, 60], dtype=torch.bfloat16)
    same_codes(case)
    budgets = torch.tensor([6, 4, 3, 20], dtype=torch.int32, device=device)
    caches = (case.views.keys, case.views.values, case.views.summaries)
    rows = (case.block_table, case.seq_lens)
    scale = 64**-0.5
    got = ops.quest_decode(
        case.query, *caches, *rows, budgets, scale=scale, group_reduction="mass", page_size=16, page_summary="key_codes"
    )
    scores = coded_scores(case, ops.score_pages, "mass")
    selected = ops.select_pages(scores, case.seq_lens, budgets, page_size=16, max_page_budget=20)
    want = ops.sparse_paged_attention(case.query, *caches[:2], *rows, selected, page_size=16, scale=scale)
    assert torch.equal(got, want)


def test_sizes_that_cannot_be_coded_are_refused(device: torch.device) -> None:  # noqa: F811
    narrow, long = build(device, [5], (1, 1, 80, 32, 16)), build(device, [5], (1, 1, 64, 32, 32))
    with pytest.raises(ValueError, match="head_dim: expected a multiple of 64 with page_summary key_codes, got 80"):
        coded_scores(narrow, ops.score_pages, "max")
    with pytest.raises(ValueError, match="page_size: expected 16 with page_summary key_codes, got 32"):
        ops.update_page_summaries(
            long.views.keys, long.views.summaries, long.slots(), page_size=32, page_summary="key_codes"
        )
    with pytest.raises(ValueError, match="page_summary: expected one of.*got 'means'"):
        coded_scores(narrow, ops.score_pages, "max", page_summary="means")
