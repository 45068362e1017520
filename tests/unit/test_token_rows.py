"""A step cut into rows, and what a verify step puts on the device."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from quest_vllm.token_rows import StepRows, VerifyBuffers, step_rows, uniform_width

# query tokens, tokens stored before, in prefill
request = st.tuples(st.integers(0, 5), st.integers(0, 300), st.booleans())
TABLE_WIDTH = 24


def cut(requests: list[tuple[int, int, bool]]) -> StepRows:
    query, stored, prefilling = (np.array(column) for column in zip(*requests, strict=True))
    query_start = np.concatenate([[0], np.cumsum(query)]).astype(np.int32)
    return step_rows(query_start, (query + stored).astype(np.int32), prefilling.astype(bool))


@given(st.lists(request, min_size=1, max_size=8))
def test_every_decode_token_is_a_row_and_every_prefill_chunk_is_one(requests: list[tuple[int, int, bool]]) -> None:
    rows, place, expected = cut(requests), 0, []
    for number, (query, stored, prefilling) in enumerate(requests):
        if prefilling and query:
            expected.append((number, place, query, stored + query, 0, stored))
        elif not prefilling:
            expected += [(number, place + i, 1, stored + i + 1, query - 1 - i, stored) for i in range(query)]
        place += query
    columns = (rows.requests, rows.starts, rows.query_lens, rows.seq_lens, rows.lags, rows.stored)
    assert [tuple(map(int, row)) for row in zip(*columns, strict=True)] == expected
    assert rows.places(np.ones(len(expected), bool)).tolist() == list(range(place))


def test_places_and_requests_of_some_rows() -> None:
    rows = cut([(3, 60, False), (4, 7, True), (1, 90, False), (2, 30, False)])
    sparse = np.array([False, False, True, False, True, False, False])
    assert rows.served(sparse).tolist() == [True, True, True, False, True, False, False]
    assert rows.places(~sparse).tolist() == [0, 1, 3, 4, 5, 6, 8, 9]


def test_uniform_width() -> None:
    assert uniform_width(np.array([0, 4, 8, 12])) == 4
    assert uniform_width(np.array([0, 4, 8, 8, 8])) == 4  # padding of a graph
    assert uniform_width(np.array([0, 4, 4, 8])) == 0
    assert uniform_width(np.array([0, 4, 6])) == 0
    assert uniform_width(np.array([0, 1, 2])) == 1
    assert uniform_width(np.array([0])) == 0


def test_verify_buffers_hold_each_token_as_a_row_of_its_own() -> None:
    buffers, width = VerifyBuffers(32, TABLE_WIDTH, torch.device("cpu")), 4

    def addresses() -> list[int]:
        fixed = [t for t in vars(buffers).values() if isinstance(t, torch.Tensor)]
        return [t.data_ptr() for t in (*fixed, buffers.page_budgets.tensor, buffers.top_ps.tensor)]

    before = addresses()
    for lengths, budgets in (([100, 370, 64, 0], [5, 0, 3, 0]), ([9, 12], [0, 7]), ([40], [3])):
        num_reqs = len(lengths)
        table = torch.randint(0, 99, (num_reqs, TABLE_WIDTH + 2), dtype=torch.int32)
        buffers.page_budgets.put(np.repeat(np.array(budgets, np.int32), width))
        blocks = -(-max(lengths) // 16)
        buffers.fill(width, torch.tensor(lengths, dtype=torch.int32), table, blocks)
        for row, (length, budget) in enumerate(zip(lengths, budgets, strict=True)):
            assert int(buffers.dense_lens[row]) == (1 if budget else length)
            for token in range(width):
                place = row * width + token
                assert bool(buffers.sparse[place]) == bool(budget)
                assert int(buffers.seq_lens[place]) == (length - width + 1 + token if budget else 0)
                assert buffers.block_table[place, :blocks].tolist() == table[row, :blocks].tolist()
    assert addresses() == before
