"""Key codes: what a page's bytes say of its keys, and the C++ kernels against the reference, byte for byte."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quest_vllm.ops import cpu, key_codes, reference, torch_ops
from quest_vllm.ops.key_codes import code_bytes, encode, page_logits, split_pairs
from quest_vllm.page_layout import split_chunks
from tests.kernels.test_cpu_ops import LAYOUTS, assert_close, make_case

DIM = 64


def keys_of(seed: int, pages: int = 3, spread: float = 1.0) -> torch.Tensor:
    return torch.randn(pages, 16, DIM, generator=torch.Generator().manual_seed(seed)) * spread


def estimates(keys: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
    """Every estimated key, ``[pages, 16, D]``, read off the scores of one-hot queries."""
    coded = encode(keys, written)
    shared, own = key_codes.split_logits(torch.eye(DIM), coded, 1.0)  # [D, pages], [D, pages, 16]
    return (shared[..., None] + own).permute(1, 2, 0)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**16), st.floats(0.01, 50), st.integers(1, 16))
def test_a_coded_channel_is_within_half_a_step_and_the_other_within_half_its_range(
    seed: int, spread: float, count: int
) -> None:
    keys = keys_of(seed, spread=spread)
    written = torch.full((3,), count)
    error = (estimates(keys, written) - keys)[:, :count].abs().amax(1)  # [pages, D]
    extent = keys[:, :count].amax(1) - keys[:, :count].amin(1)
    magnitude = keys[:, :count].abs().amax(1)
    (first, second), (wide, narrow) = split_pairs(error), split_pairs(extent)
    coded = torch.where(narrow > wide, second, first)
    other = torch.where(narrow > wide, first, second)
    # (hi - lo) / 8, and what rounding costs: 1/16 of the step four times over, 2^-8 of the base, FP8's smallest numbers
    limit, scale = torch.maximum(wide, narrow), torch.maximum(*split_pairs(magnitude))
    assert (coded <= limit * (1 / 8 + 1 / 16) + scale * 2**-8 + 0.005).all()
    assert (other <= torch.minimum(wide, narrow) / 2 + scale / 16 + 0.005).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**16))
def test_a_page_of_one_token_scores_its_key(seed: int) -> None:
    """No range, so base and rest are the key: bfloat16 and FP8 rounding is all that is lost."""
    keys, query = keys_of(seed), torch.randn(3, 4, DIM, generator=torch.Generator().manual_seed(seed + 1))
    one = torch.ones(3, dtype=torch.int64)
    found = page_logits(query, encode(keys, one)[:, None], one[:, None], scale=0.125)[..., 0]
    exact = torch.einsum("pgd,pd->pg", query, keys[:, 0]) * 0.125
    allowed = torch.einsum("pgd,pd->pg", query.abs(), keys[:, 0].abs() / 16 + 0.001) * 0.125
    assert ((found - exact).abs() <= allowed).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 16))
def test_rows_past_the_written_ones_say_nothing(seed: int, count: int) -> None:
    keys, written = keys_of(seed), torch.full((3,), count)
    other = keys.clone()
    other[:, count:] = float("nan")
    assert torch.equal(encode(keys, written), encode(other, written))


def test_tokens_that_the_request_lacks_have_no_mass() -> None:
    """A page may have been coded with more rows than a request has: drafts that were refused."""
    keys, query = keys_of(0), torch.randn(3, 2, DIM)
    coded = encode(keys, torch.full((3,), 16))[:, None]
    shared, own = key_codes.split_logits(query, coded, 1.0)
    for count in (1, 7, 16):
        found = page_logits(query, coded, torch.full((3, 1), count), scale=1.0)
        torch.testing.assert_close(found, shared + own[..., :count].logsumexp(-1))
    assert page_logits(query, coded, torch.zeros(3, 1, dtype=torch.int64), scale=1.0).isneginf().all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**16), st.sampled_from([float("nan"), float("inf"), float("-inf")]))
def test_a_key_that_is_no_number_spoils_its_page_alone(seed: int, value: float) -> None:
    keys, written = keys_of(seed), torch.full((3,), 16)
    spoilt = keys.clone()
    spoilt[1, 5, 9] = value
    clean, found = encode(keys, written), encode(spoilt, written)
    assert torch.equal(found[[0, 2]], clean[[0, 2]]) and not torch.equal(found[1], clean[1])
    if value != value:
        assert page_logits(torch.ones(3, 1, DIM), found[:, None], written[:, None], scale=1.0)[1].isnan().all()


def test_one_key_among_sixteen_is_found_where_the_box_and_the_mean_lose_it() -> None:
    """Fifteen keys of each page are noise of alternating sign; one of page 1 points along the query."""
    signs = torch.where((torch.arange(16)[:, None] + torch.arange(DIM)) % 2 == 0, 2.0, -2.0)
    keys = signs.repeat(3, 1, 1)
    query = torch.ones(1, DIM)
    keys[1, 6] = 1.0
    low, high = keys.amin(1), keys.amax(1)
    assert ((query.clamp(min=0) @ high.T)[0].argmax() != 1) and torch.equal(high[0], high[1]) and low[0, 0] == -2
    scores = page_logits(query, encode(keys, torch.full((3,), 16))[None], torch.full((1, 3), 16), scale=1.0)
    assert int(scores[0].argmax()) == 1


@pytest.mark.parametrize(
    ("dim", "page_size", "said"), [(80, 16, "head_dim.*64.*got 80"), (64, 32, "page_size.*got 32")]
)
@pytest.mark.parametrize("ops", [reference, torch_ops, cpu])
def test_shapes_that_cannot_be_coded_are_refused(ops: Any, dim: int, page_size: int, said: str) -> None:
    case = make_case([40], dim=dim, page_size=page_size)
    options: dict[str, Any] = {"page_size": page_size, "page_summary": "key_codes"}
    with pytest.raises((ValueError, RuntimeError), match=said):
        ops.update_page_summaries(case.key_cache, case.summaries, case.slots, **options)
    with pytest.raises((ValueError, RuntimeError), match=said):
        ops.score_pages(case.query, case.summaries, case.block_table, case.seq_lens, **options)


@pytest.mark.parametrize("group_reduction", ["max", "mean", "per_query_head"])
def test_a_score_is_the_log_of_a_mass_whatever_joins_the_heads(group_reduction: str) -> None:
    """What top_p adds up: with one head to a group the three are the same."""
    keys, scale = keys_of(3, pages=1), 0.125
    views = split_chunks(torch.zeros(1, 1, 16, 2 * DIM + DIM // 8), DIM, 16)
    views.keys[0, 0] = keys[0]
    reference.update_page_summaries(
        views.keys, views.summaries, torch.arange(16), page_size=16, page_summary="key_codes"
    )
    query, table = torch.randn(1, 1, DIM), torch.zeros(1, 1, dtype=torch.int32)
    options = {"page_size": 16, "group_reduction": group_reduction, "scale": scale, "page_summary": "key_codes"}
    score = reference.score_pages(query, views.summaries, table, torch.tensor([16], dtype=torch.int32), **options)
    wanted = (estimates(keys, torch.tensor([16]))[0] @ query[0, 0] * scale).logsumexp(0)
    found = score * reference.mass_scale_of(group_reduction, scale, "key_codes")
    torch.testing.assert_close(found.flatten(), wanted.view(1), rtol=1e-4, atol=1e-4)


def test_an_unknown_summary_is_refused() -> None:
    case = make_case([40])
    for ops in (reference, cpu):
        with pytest.raises(
            (ValueError, RuntimeError), match="page_summary: expected .*min_max.*key_codes.*, got .?means"
        ):
            ops.update_page_summaries(case.key_cache, case.summaries, case.slots, page_size=16, page_summary="means")


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize(("kv_format", "dtype"), LAYOUTS)
def test_summaries_are_the_references_bytes(kv_format: str, dtype: torch.dtype, dim: int) -> None:
    case = make_case([1, 0, 130, 16, 47], kv_format=kv_format, dtype=dtype, dim=dim)
    case.keys[case.block_table[2, 0], 0, 3] = float("inf")
    case.keys[case.block_table[2, 0], 0, 20, ::3] = float("nan")
    case.keys[case.block_table[2, 1], 1] *= 1e-3  # FP8's subnormal numbers
    case.keys[case.block_table[2, 1], 0] *= 1e3  # and saturation
    case.key_cache.copy_(cpu.pack_keys(case.keys, kv_format))
    slots = torch.cat([case.slots.flip(0), torch.tensor([-1, -1])])
    options: dict[str, Any] = {"page_size": 16, "page_summary": "key_codes"}
    expected, vectorised = case.summaries.clone(), case.summaries.clone()
    reference.update_page_summaries(case.keys, expected, slots, **options)
    torch_ops.update_page_summaries(case.keys, vectorised, slots, **options)
    cpu.update_page_summaries(case.key_cache, case.summaries, slots, kv_format=kv_format, **options)
    assert torch.equal(bits(vectorised), bits(expected))
    found, wanted = code_bytes(case.summaries.clone()), code_bytes(expected)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("group_reduction", reference.GROUP_REDUCTIONS)
@pytest.mark.parametrize("group", [1, 3, 4, 5, 12])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scores(dtype: torch.dtype, group: int, group_reduction: str) -> None:
    for dim in (64, 192):
        case = make_case([0, 1, 2107, 16, 200], dtype=dtype, group=group, dim=dim)
        options: dict[str, Any] = {"page_size": 16, "page_summary": "key_codes"}
        reference.update_page_summaries(case.keys, case.summaries, case.slots, **options)
        options |= {"group_reduction": group_reduction, "scale": case.scale}
        rest = (case.summaries, case.block_table, case.seq_lens)
        actual = cpu.score_pages(case.query, *rest, **options)
        low = reference.score_pages(case.query, *rest, **options)
        exact = reference.score_pages(case.query.double(), *rest, **options)
        valid = torch.isfinite(low)
        assert torch.equal(torch.isneginf(actual), ~valid)
        assert_close(actual[valid], exact[valid].double(), low[valid], factor=8)


def test_scores_of_one_row_do_not_depend_on_another() -> None:
    case = make_case([300, 77, 1000], group=3)
    options: dict[str, Any] = {"page_size": 16, "page_summary": "key_codes"}
    cpu.update_page_summaries(case.key_cache, case.summaries, case.slots, **options)
    options |= {"group_reduction": "mass", "scale": case.scale}
    together = cpu.score_pages(case.query, case.summaries, case.block_table, case.seq_lens, **options)
    for row in range(3):
        one = slice(row, row + 1)
        alone = cpu.score_pages(case.query[one], case.summaries, case.block_table[one], case.seq_lens[one], **options)
        assert torch.equal(alone[0], together[row])


def test_a_page_without_numbers_scores_nan_and_leaves_the_others() -> None:
    case = make_case([400], kv_heads=1, group=3)
    case.keys[case.block_table[0, 1], 0, 5, 7] = float("nan")
    case.key_cache.copy_(case.keys)
    options: dict[str, Any] = {"page_size": 16, "page_summary": "key_codes"}
    cpu.update_page_summaries(case.key_cache, case.summaries, case.slots, **options)
    options |= {"group_reduction": "mass", "scale": case.scale}
    rest = (case.query, case.summaries, case.block_table, case.seq_lens)
    actual, expected = cpu.score_pages(*rest, **options), reference.score_pages(*rest, **options)
    assert expected[0, 0].isnan().nonzero().flatten().tolist() == [4]
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5, equal_nan=True)
