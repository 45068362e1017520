"""Sizes and views of the summaries inside a KV block."""

from __future__ import annotations

import pytest
import torch

from quest_vllm.page_layout import split_chunks, summary_bytes_per_token


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("page_size", [16, 32])
def test_overhead_is_one_page_sizeth(head_dim: int, page_size: int) -> None:
    assert summary_bytes_per_token(head_dim, 2, page_size) * page_size == 2 * head_dim * 2


def test_views_share_the_chunk_without_overlap() -> None:
    cache = torch.zeros(3, 2, 32, 2 * 64 + 8)
    views = split_chunks(cache, 64, 16)
    views.keys.fill_(1)
    views.values.fill_(2)
    views.summaries.fill_(3)
    assert views.summaries.shape == (3, 2, 2, 2, 64)
    counts = [int((cache == value).sum()) for value in (1, 2, 3)]
    assert counts == [3 * 2 * 32 * 64, 3 * 2 * 32 * 64, 3 * 2 * 2 * 2 * 64]
    assert sum(counts) == cache.numel()


def test_a_block_must_hold_whole_pages() -> None:
    with pytest.raises(ValueError, match="block_size.*16.*24"):
        split_chunks(torch.zeros(1, 1, 24, 136), 64, 16)


def test_a_chunk_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="at least"):
        split_chunks(torch.zeros(1, 1, 32, 128), 64, 16)
