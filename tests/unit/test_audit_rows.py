"""Which prefixes of a page's rows its summary fits: the audit's short cut against trying all of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quest_vllm.audit import _fitting_rows, summarise_rows
from quest_vllm.config import QuestConfig

BLOCKS, HEADS, PAGES, SIZE, DIM = 2, 2, 2, 16, 64


@pytest.mark.parametrize("page_summary", ["min_max", "key_codes"])
@settings(max_examples=20, deadline=None)
@given(
    rows=st.lists(st.integers(0, SIZE), min_size=PAGES, max_size=PAGES), spoil=st.booleans(), seed=st.integers(0, 99)
)
def test_fitting_rows_are_those_that_trying_every_count_finds(
    page_summary: str, rows: list[int], spoil: bool, seed: int
) -> None:
    """Page i of every block was summarised when it held ``rows[i]`` rows (0: never); ``spoil``: one of them wrongly."""
    config = QuestConfig(page_summary=page_summary)
    keys = torch.randn(BLOCKS, HEADS, PAGES * SIZE, DIM, generator=torch.Generator().manual_seed(seed))
    by_page = keys.unflatten(2, (PAGES, SIZE))
    every = torch.stack([summarise_rows(by_page, count, config) for count in range(1, SIZE + 1)], dim=3)
    stored = torch.stack([every[:, :, page, max(count, 1) - 1] * (count > 0) for page, count in enumerate(rows)], dim=2)
    if spoil:
        stored[0, 1, 0, 3] += 1
    wanted = (stored.unsqueeze(3) == every).all(-1)
    written = (stored != 0).any(-1)
    fits = _fitting_rows(keys, stored, written, config)
    # where all rows fit, nothing asks whether fewer do
    full = wanted[..., -1]
    assert torch.equal(fits[..., -1], full)
    assert torch.equal(fits[written & ~full], wanted[written & ~full])
    assert not fits[~written].any()
