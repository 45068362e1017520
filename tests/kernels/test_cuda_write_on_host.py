"""csrc/cuda/write_kv.cu run on a CPU, a warp at a time: what it stores, without a GPU.

Warps run one after the other, forwards and backwards: none may rely on what another of the same launch has stored. So
do a warp's lanes between two of its meeting points: none may rely there on what another has stored since.
"""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from quest_vllm.ops import cuda, cuda_build, key_codes, reference
from quest_vllm.ops.cuda_params import WriteParams
from tests.kernels.cuda_on_host import build
from tests.kernels.paged import make_case

CODES: dict[str, Any] = {"page_summary": "key_codes"}


@pytest.fixture(scope="module", params=cuda_build.HEAD_DIMS)
def kernel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """The kernel for one head dimension, as a host function."""
    library = build("write_kv.cpp", request.param, tmp_path_factory.mktemp("host"))

    def write(params: WriteParams, backwards: int = 0, parts: int = 0) -> None:
        """Launch; ``parts`` warps share a token of a KV head, 0: as many as on a GPU."""
        assert library.write_kv_on_host(ctypes.byref(params), backwards, parts) == 0

    write.parts_of = lambda params: library.write_kv_parts(ctypes.byref(params))
    return request.param, write


@pytest.mark.parametrize("backwards", [0, 1])
@pytest.mark.parametrize("page_size,block_size", [(16, 64), (64, 128)])
@pytest.mark.parametrize("chunk", [1, 150])
def test_keys_values_and_summaries(kernel, page_size: int, block_size: int, chunk: int, backwards: int) -> None:
    head_dim, write = kernel
    case = make_case(
        [37, 90, 5, 64],
        group=1,
        head_dim=head_dim,
        block_size=block_size,
        page_size=page_size,
        dtype=torch.bfloat16,
    )
    views, slots = case.views, case.slots()
    keys = views.keys[slots // block_size, :, slots % block_size]
    values = views.values[slots // block_size, :, slots % block_size]
    into = [torch.full_like(cache, float("nan")) for cache in (views.keys, views.values, views.summaries)]
    for first in range(0, len(slots), chunk):
        part = slice(first, first + chunk)
        padded = torch.cat([slots[part], slots.new_full((2,), -1)])
        rows = [torch.cat([rows[part], rows.new_zeros(2, *rows.shape[1:])]) for rows in (keys, values)]
        params = cuda.KvWriter(*into, page_size=page_size).fill(*rows, padded)
        write(params, backwards)
    written = views.summaries.isfinite()
    assert torch.equal(into[2][written], views.summaries[written])
    assert torch.equal(into[0][slots // block_size, :, slots % block_size], keys)
    assert torch.equal(into[1][slots // block_size, :, slots % block_size], values)


def test_summaries_alone_read_the_cache(kernel) -> None:
    head_dim, write = kernel
    case = make_case([37, 90], group=1, head_dim=head_dim, block_size=32, page_size=16, dtype=torch.bfloat16)
    want, slots = case.views.summaries.clone(), case.slots()  # parameters hold pointers, not tensors
    case.views.summaries.fill_(7)
    params = cuda.summary_params(case.views.keys, case.views.summaries, slots, page_size=16)
    write(params)
    written = want.isfinite()
    assert torch.equal(case.views.summaries[written], want[written])


def coarse(keys: torch.Tensor) -> torch.Tensor:
    """Keys among which are ties, and channels that do not move."""
    keys[..., ::3] = (keys[..., ::3] * 4).round() / 4
    keys[..., 5] = 3.0
    return keys


@pytest.mark.parametrize("parts", [1, 2, 4, 0])
@pytest.mark.parametrize("chunk,spread", [(1, 1.0), (7, 900.0), (50, 0.002)])
def test_key_codes_are_the_references_bytes(kernel, chunk: int, spread: float, parts: int) -> None:
    head_dim, write = kernel
    case = make_case([18, 5, 16], group=1, head_dim=head_dim, block_size=64, page_size=16, dtype=torch.bfloat16)
    slots, keys = case.slots(), coarse(case.views.keys.mul_(spread))
    given = keys[slots // 64, :, slots % 64]
    into = [torch.zeros_like(cache) for cache in (keys, case.views.values, case.views.summaries)]
    want = torch.zeros_like(case.views.summaries)
    writer = cuda.KvWriter(*into, page_size=16, **CODES)
    for first in range(0, len(slots), chunk):
        part = slice(first, first + chunk)
        write(writer.fill(given[part], given[part], slots[part]), parts=parts)
        reference.update_page_summaries(into[0], want, slots[part], page_size=16, **CODES)
        assert torch.equal(key_codes.code_bytes(into[2]), key_codes.code_bytes(want))


@pytest.mark.parametrize("backwards", [0, 1])
@pytest.mark.parametrize("requests,padding", [(1, 0), (1, 3), (33, 1)])
@pytest.mark.parametrize("new", [1, 3])
def test_key_codes_of_a_decode_step(kernel, requests: int, padding: int, new: int, backwards: int) -> None:
    """The last tokens of each request, ``padding`` empty slots behind each; pages hold rows of earlier calls too."""
    head_dim, write = kernel
    lengths = [3 + 5 * row % 64 for row in range(requests)]  # every place in a page, pages that begin and that end
    case = make_case(lengths, group=1, head_dim=head_dim, block_size=32, page_size=16, dtype=torch.bfloat16)
    views, rows = case.views, case.slots().split(lengths)
    slots = torch.stack([torch.cat([own[-new:], own.new_full((padding,), -1)]) for own in rows]).flatten()
    coarse(views.keys)
    blocks, places = slots.clamp(min=0) // 32, slots.clamp(min=0) % 32
    key, value = views.keys[blocks, :, places], views.values[blocks, :, places]
    stored = slots >= 0
    into = [cache.clone() for cache in (views.keys, views.values, views.summaries)]
    for cache in into[:2]:  # what is new is not in the cache yet
        cache[blocks[stored], :, places[stored]] = float("nan")
    params = cuda.KvWriter(*into, page_size=16, **CODES).fill(key, value, slots)
    write(params, backwards)
    reference.update_page_summaries(views.keys, views.summaries, slots[stored], page_size=16, **CODES)
    for cache, want in zip(into, (views.keys, views.values, views.summaries), strict=True):
        assert torch.equal(cache.view(torch.int16), want.view(torch.int16))


def test_key_codes_alone_read_the_cache(kernel) -> None:
    head_dim, write = kernel
    case = make_case([37, 90], group=1, head_dim=head_dim, block_size=32, page_size=16, dtype=torch.bfloat16)
    slots, summaries = case.slots(), case.views.summaries
    want = summaries.clone()
    write(cuda.summary_params(case.views.keys, summaries, slots, page_size=16, **CODES))
    reference.update_page_summaries(case.views.keys, want, slots, page_size=16, **CODES)
    assert torch.equal(summaries.view(torch.int16), want.view(torch.int16))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_key_codes_of_poison(kernel, poison: float) -> None:
    head_dim, write = kernel
    case = make_case([37], group=1, head_dim=head_dim, block_size=64, page_size=16, dtype=torch.bfloat16)
    slots, summaries = case.slots(), case.views.summaries
    case.views.keys[int(slots[0]) // 64, :, 18, ::5] = poison  # in the second of three pages
    want = summaries.clone()
    write(cuda.summary_params(case.views.keys, summaries, slots, page_size=16, **CODES))
    reference.update_page_summaries(case.views.keys, want, slots, page_size=16, **CODES)
    assert torch.equal(summaries.view(torch.int16), want.view(torch.int16))


@pytest.mark.parametrize("tokens,parts", [(1, 8), (66, 8), (67, 4), (264, 2), (265, 1), (8192, 1)])
def test_warps_share_a_page_while_all_fit(kernel, tokens: int, parts: int) -> None:
    head_dim, write = kernel
    cache = torch.zeros(1, 8, 16, head_dim, dtype=torch.bfloat16)
    summaries, slots = torch.zeros(1, 8, 1, 2, head_dim, dtype=torch.bfloat16), torch.zeros(tokens, dtype=torch.int64)
    params = cuda.summary_params(cache, summaries, slots, page_size=16, **CODES)
    assert write.parts_of(params) == min(parts, head_dim // 16)
    assert write.parts_of(cuda.summary_params(cache, summaries, slots, page_size=16)) == 1
