"""Row classes and the byte model."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from quest_vllm.config import POLICIES, QuestConfig
from quest_vllm.metadata import classify_rows, measure_traffic

CONFIG = QuestConfig()
row = st.tuples(st.integers(1, 4), st.integers(1, 5000), st.booleans(), st.sampled_from([0, 1, 48, 100, 512, 8192]))


def classify(rows: list[tuple[int, int, bool, int]], policies: list[str] | None = None):
    query, length, prefilling, budget = (np.array(column) for column in zip(*rows, strict=True))
    seq_lens = np.maximum(length, query).astype(np.int32)
    codes = None if policies is None else np.array([POLICIES.index(name) for name in policies], np.int32)
    arrays = (query.astype(np.int32), seq_lens, prefilling, budget.astype(np.int32))
    return classify_rows(*arrays, CONFIG, policies=codes), seq_lens


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


def test_two_stages_read_keys_of_the_pages_that_scores_leave_open() -> None:
    # of 251 pages ranks 16 to 47, then 94 to the last; of 57 the forced three are known, and nothing else is taken
    cases = ((4001, 512, 32), (4001, 3000, 157), (1024, 512, 32), (900, 64, 3), (900, 48, 0), (800, 0, 0), (40, 64, 0))
    for length, budget, pages in cases:
        keys = pages * 16
        (one, lengths), (scored, _) = (classify([(1, length, False, budget)], [name]) for name in ("two_stage", "mass"))
        found, plain = measure_traffic(one, lengths, 16), measure_traffic(scored, lengths, 16)
        assert found.keys_listed == keys and plain.keys_listed == 0
        # a key is half of a token's K+V
        assert found.vectors_read == plain.vectors_read + keys / 2
        assert (found.pages_selected, found.tokens_attended) == (plain.pages_selected, plain.tokens_attended)


def test_a_sparse_rows_reason_is_its_policy_where_that_reads_otherwise() -> None:
    policies = ["mass", "two_stage", "max", "window", "two_stage", "window", "two_stage"]
    budgets = [64, 64, 64, 64, 64, 0, 8192]
    classes, _ = classify([(1, 900, False, budget) for budget in budgets], policies)
    assert list(classes.counts()) == [
        ("sparse", "budget", 2),
        ("sparse", "window", 1),
        ("sparse", "two_stage", 2),
        ("dense", "no_budget", 1),
        ("dense", "budget_covers_context", 1),
    ]


def test_rows_without_policies_have_the_servers_own() -> None:
    arrays = (np.ones(1, np.int32), np.array([900], np.int32), np.zeros(1, bool), np.array([64], np.int32))
    for own, reason in (("auto", "budget"), ("mean", "budget"), ("window", "window"), ("two_stage", "two_stage")):
        config = QuestConfig(policy=own).resolved()
        assert list(classify_rows(*arrays, config).counts()) == [("sparse", reason, 1)]


def test_reasons() -> None:
    classes, _ = classify([(1, 900, True, 64), (3, 900, True, 64), (1, 900, False, 0), (1, 40, False, 64)])
    assert list(classes.counts()) == [
        ("dense", "prefill", 2),
        ("dense", "no_budget", 1),
        ("dense", "budget_covers_context", 1),
    ]


def test_dense_attention_reads_a_context_once_for_all_tokens_of_a_request() -> None:
    # three drafts behind a token: request 0 sparse, request 1 without a budget, request 2 covered but for its last two
    lengths = [997, 998, 999, 1000, 497, 498, 499, 500, 63, 64, 65, 66]
    classes, seq_lens = classify([(1, n, False, 0 if 490 < n < 510 else 64) for n in lengths])
    assert classes.sparse.tolist() == [True] * 4 + [False] * 6 + [True] * 2
    traffic = measure_traffic(classes, seq_lens, 16, np.repeat([0, 1, 2], 4))
    assert (traffic.pages_selected, traffic.pages_available) == (6 * 4, 4 * 63 + 2 * 5)
    assert traffic.vectors_dense == 1000 + 500 + 66
    # newest pages of 5, 6, 7 and 8 tokens, then of 1 and 2; every sparse token reads its summaries
    attended = 4 * 48 + 5 + 6 + 7 + 8 + 2 * 48 + 1 + 2
    assert traffic.tokens_attended == attended
    assert traffic.vectors_read == attended + traffic.pages_available + 500 + 64


def test_budget_below_the_forced_pages_is_raised_in_the_worker() -> None:
    classes, _ = classify([(1, 900, False, 1)])
    assert classes.page_budgets.tolist() == [3]
