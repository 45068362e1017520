"""Row classes and the byte model."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from quest_vllm.config import QuestConfig
from quest_vllm.metadata import classify_rows, measure_traffic

CONFIG = QuestConfig()
row = st.tuples(st.integers(1, 4), st.integers(1, 5000), st.booleans(), st.sampled_from([0, 1, 48, 100, 512, 8192]))


def classify(rows: list[tuple[int, int, bool, int]]):
    query, length, prefilling, budget = (np.array(column) for column in zip(*rows, strict=True))
    seq_lens = np.maximum(length, query).astype(np.int32)
    return classify_rows(query.astype(np.int32), seq_lens, prefilling, budget.astype(np.int32), CONFIG), seq_lens


@given(st.lists(row, min_size=1, max_size=8))
def test_every_row_is_in_exactly_one_class(rows: list[tuple[int, int, bool, int]]) -> None:
    classes, _ = classify(rows)
    memberships = classes.sparse.astype(int) + sum(mask.astype(int) for mask in classes.dense_reasons.values())
    assert (memberships == 1).all()
    assert sum(count for _, _, count in classes.counts()) == len(rows)


@given(st.lists(row, min_size=1, max_size=8))
def test_sparse_rows_read_less_than_they_have(rows: list[tuple[int, int, bool, int]]) -> None:
    classes, seq_lens = classify(rows)
    assert (classes.page_budgets[classes.sparse] < classes.num_pages[classes.sparse]).all()
    traffic = measure_traffic(classes, seq_lens, CONFIG.page_size)
    assert traffic.pages_selected <= traffic.pages_available


def test_budget_of_512_reads_32_pages() -> None:
    classes, seq_lens = classify([(1, 4001, False, 512)])
    traffic = measure_traffic(classes, seq_lens, 16)
    assert (traffic.pages_selected, traffic.pages_available) == (32, 251)
    assert (traffic.tokens_attended, traffic.tokens_available) == (31 * 16 + 1, 4001)
    # 31 full pages, one token of the newest, and 251 summaries as large as a token's K+V
    assert (traffic.vectors_read, traffic.vectors_dense) == (31 * 16 + 1 + 251, 4001)


def test_reasons() -> None:
    classes, _ = classify([(1, 900, True, 64), (3, 900, False, 64), (1, 900, False, 0), (1, 40, False, 64)])
    assert sorted(reason for _, reason, _ in classes.counts()) == sorted(
        ["prefill", "speculative", "no_budget", "budget_covers_context"]
    )


def test_budget_below_the_forced_pages_is_raised_in_the_worker() -> None:
    classes, _ = classify([(1, 900, False, 1)])
    assert classes.page_budgets.tolist() == [3]
