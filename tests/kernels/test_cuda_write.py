"""Keys, values and key codes in one launch on a Hopper GPU, by each number of warps that may share a page."""

from __future__ import annotations

import pytest
import torch

from quest_vllm.ops import cuda, reference
from tests.kernels.test_cuda_ops import build

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a Hopper GPU"),
]


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("requests", [1, 8, 66, 67, 264, 265])  # of eight KV heads: eight warps, four, two, one
def test_decode_steps(head_dim: int, requests: int) -> None:
    """Each step's codes need the keys of the launch before, and nothing past a request's last token changes."""
    steps = 2
    case = build([steps + 5 * row % 64 for row in range(requests)], (8, 1, head_dim, 16, 32))
    views, lengths = case.views, case.seq_lens.tolist()
    ends = [own[-steps:] for own in case.slots().split(lengths)]
    rows = torch.stack(ends, dim=1)  # [steps, requests]
    into = [cache.clone() for cache in (views.keys, views.values, views.summaries)]
    for cache in into[:2]:
        cache[rows.flatten() // 32, :, rows.flatten() % 32] = float("nan")
    write = cuda.KvWriter(*into, page_size=16, page_summary="key_codes")
    for slots in rows:
        key, value = (cache[slots // 32, :, slots % 32] for cache in (views.keys, views.values))
        write(key, value, slots)
    reference.update_page_summaries(views.keys, views.summaries, rows.flatten(), page_size=16, page_summary="key_codes")
    for cache, want in zip(into, (views.keys, views.values, views.summaries), strict=True):
        assert torch.equal(cache.view(torch.int16), want.view(torch.int16))
