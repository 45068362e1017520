"""``top_p`` from the request to the worker, and its counts back to the reply."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from quest_vllm.accounting import LayerGroup, adaptive_rows, record_reached, record_step
from quest_vllm.budget import (
    TOP_P_XARG,
    XARG,
    BudgetLimits,
    BudgetTable,
    clamp_top_p,
    get_top_p_table,
    parse_top_p,
)
from quest_vllm.config import POLICIES, QuestConfig, load_config
from quest_vllm.errors import QuestConfigError, QuestValueError
from quest_vllm.layer_budgets import LayerBudgets
from quest_vllm.metadata import classify_rows, measure_traffic
from quest_vllm.metrics_files import FilesCollector
from quest_vllm.server.asgi import Refusal
from quest_vllm.server.fields import read_request
from quest_vllm.server.usage import count_usage
from quest_vllm.tally import CAPACITY, TALLY_XARG, Tally, TallyWriter, read_tally, tally_number
from quest_vllm.token_rows import step_rows

LIMITS = BudgetLimits(QuestConfig(), 8192)
BAD = [0, -0.1, 1.0001, 2, float("nan"), float("inf"), True, False, None, "0.9", [0.9], {}]


def read(request: dict[str, Any], limits: BudgetLimits = LIMITS) -> tuple[dict[str, Any], Any]:
    body, asked = read_request(json.dumps(request).encode(), limits, {"smol"})
    return json.loads(body), asked


@pytest.mark.parametrize("value", BAD)
def test_bad_values_name_field_range_and_value(value: Any) -> None:
    with pytest.raises(QuestValueError) as caught:
        parse_top_p(value, default=1.0, field="here")
    assert str(caught.value).startswith("here: expected a number above 0, up to 1, got ")
    assert clamp_top_p(value, default=0.7) == 0.7
    with pytest.raises(QuestConfigError, match="top_p: expected a number above 0, up to 1, got"):
        QuestConfig(top_p=value)


@given(st.floats(0, 1, exclude_min=True))
def test_legal_values_pass(value: float) -> None:
    assert parse_top_p(value, default=1.0) == clamp_top_p(value, default=1.0) == QuestConfig(top_p=value).top_p == value


def test_server_default_from_the_environment() -> None:
    assert load_config(None, {"QUEST_TOP_P": "0.9"}).top_p == 0.9
    assert load_config(None, {}).top_p == 1.0
    with pytest.raises(QuestConfigError, match="QUEST_TOP_P: expected a number, got 'much'"):
        load_config(None, {"QUEST_TOP_P": "much"})


def test_operator_may_forbid_it() -> None:
    limits = BudgetLimits(QuestConfig(top_p=0.9, allow_override=False), 8192)
    assert limits.parse_top_p(0.9) == 0.9
    for value in (1, 0.5):
        with pytest.raises(QuestValueError, match="allow_override is false"):
            limits.parse_top_p(value)


@pytest.mark.parametrize(
    "request_body",
    [
        {"sparse_attention": {"token_budget": 512, "top_p": 0.9}},
        {"sparse_attention": {"token_budget": 512}, "vllm_xargs": {TOP_P_XARG: 0.9}},
        {"sparse_attention": {"token_budget": 512, "top_p": 0.9}, "vllm_xargs": {TOP_P_XARG: 0.9, XARG: 512}},
    ],
)
def test_both_ways_arrive_with_a_number_to_count_under(request_body: dict[str, Any]) -> None:
    request, asked = read({"prompt": "x", **request_body})
    assert asked.top_p == 0.9 and asked.budget == 512 and asked.tally >= 1
    assert request == {"prompt": "x", "vllm_xargs": {XARG: 512, TOP_P_XARG: 0.9, TALLY_XARG: asked.tally}}


def test_bodies_without_it_stay_as_they_are_and_a_server_default_counts() -> None:
    body = json.dumps({"prompt": "x", "vllm_xargs": {TOP_P_XARG: 1}}).encode()
    assert read_request(body, LIMITS)[0] is body
    request, asked = read({"prompt": "x"}, BudgetLimits(QuestConfig(top_p=0.8), 8192))
    assert asked.top_p == 0.8 and request["vllm_xargs"] == {TALLY_XARG: asked.tally}


@pytest.mark.parametrize("value", [value for value in BAD if value == value and value != float("inf")])
def test_bad_fields_are_refused(value: Any) -> None:
    for field, body in (
        ("sparse_attention.top_p", {"sparse_attention": {"top_p": value}}),
        (f"vllm_xargs.{TOP_P_XARG}", {"vllm_xargs": {TOP_P_XARG: value}}),
    ):
        with pytest.raises(Refusal) as caught:
            read({"prompt": "x", **body})
        assert caught.value.param == field and "expected a number above 0, up to 1, got" in str(caught.value)


def test_two_values_that_differ_are_refused() -> None:
    with pytest.raises(Refusal, match="expected the same top_p as sparse_attention.top_p, 0.9, or none; got 0.8"):
        read({"sparse_attention": {"top_p": 0.9}, "vllm_xargs": {TOP_P_XARG: 0.8}})


def test_tap_carries_it_to_the_rows_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm")
    from quest_vllm.budget_tap import QuestBudgetTap

    model = SimpleNamespace(max_model_len=8192)
    vllm_config = SimpleNamespace(additional_config={"quest": {"top_p": 0.8}}, model_config=model)
    tap = QuestBudgetTap(vllm_config, object())
    for slot, extra in enumerate(({TOP_P_XARG: 0.5}, None, {TOP_P_XARG: "bad"}, {TOP_P_XARG: 1})):
        tap.add_request(slot, SimpleNamespace(extra_args=extra))
    assert get_top_p_table().rows(4).tolist() == pytest.approx([0.5, 0.8, 0.8, 1.0])
    with pytest.raises(QuestValueError, match=TOP_P_XARG):
        tap.validate_params(SimpleNamespace(extra_args={TOP_P_XARG: 1.5}))


def test_tap_has_counts_fetched_behind_the_forward_pass_of_rows_that_adapt(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm")
    from quest_vllm import budget_tap

    collected: list[None] = []
    monkeypatch.setattr(budget_tap, "collect_reached", lambda: collected.append(None))
    config = SimpleNamespace(additional_config={}, model_config=SimpleNamespace(max_model_len=8192))
    tap = budget_tap.QuestBudgetTap(config, object())
    for on_device in (True, False):
        monkeypatch.setattr(budget_tap, "counts_on_device", lambda on_device=on_device: on_device)
        # V2 calls apply in steps with a request that said so
        assert tap.add_request(0, SimpleNamespace(extra_args={TOP_P_XARG: 0.5})) is on_device
        assert tap.add_request(0, SimpleNamespace(extra_args={TOP_P_XARG: 1})) is False
        assert tap.add_request(0, SimpleNamespace(extra_args=None)) is False
    logits = object()
    assert tap.apply(logits, object()) is logits and len(collected) == 1


def test_table_of_shares_reads_one_where_it_is_empty() -> None:
    table = BudgetTable(capacity=1, empty=1.0, dtype=np.float32)
    table.set(5, 0.25)
    table.swap(5, 0)
    table.move(0, 2)
    assert table.rows(4).tolist() == [1, 1, 0.25, 1] and table.rows(4).dtype == np.float32
    assert table.rows(3, np.array([2, -1, 9])).tolist() == [0.25, 1, 1]
    table.clear(2)
    assert table.rows(3).tolist() == [1, 1, 1]


def classify(lengths: list[int], budgets: list[int], top_ps: list[float], policies: Any = None) -> Any:
    ones = np.ones(len(lengths), np.int32)
    arrays = (np.array(lengths, np.int32), np.zeros(len(lengths), np.bool_), np.array(budgets, np.int32))
    return classify_rows(ones, *arrays, QuestConfig(), np.array(top_ps, np.float32), policies)


def test_rows_with_a_share_are_sparse_even_where_the_budget_covers() -> None:
    rows = classify([1000, 1000, 1000, 1000, 40], [512, 8192, 8192, 0, 512], [0.9, 0.9, 1, 0.9, 0.9])
    assert rows.sparse.tolist() == [True, True, False, False, False]
    assert rows.adaptive.tolist() == [True, True, False, False, False]
    assert rows.page_budgets[:2].tolist() == [32, 63]
    assert rows.dense_reasons["budget_covers_context"].tolist() == [False, False, True, False, True]
    assert sum(count for *_, count in rows.counts()) == 5
    # what they read is counted from their selection alone
    assert measure_traffic(rows, np.array([1000] * 4 + [40], np.int32), 16).pages_selected == 0


def test_counts_of_a_selection_reach_metrics_and_tally(run_dir: Path) -> None:
    group = LayerGroup(
        num_sparse_layers=2,
        num_kv_heads=2,
        num_select_heads=2,
        head_dim=4,
        element_size=2,
        page_size=16,
        counts_rows=True,
    )
    lengths, budgets = np.array([1000, 900, 1000], np.int32), np.array([512, 512, 512], np.int32)
    rows = classify(lengths.tolist(), budgets.tolist(), [0.9, 1, 0.5])
    record_step(group, rows, step_rows(np.arange(4, dtype=np.int32), lengths, np.zeros(3, bool)), budgets)
    adapting = adaptive_rows(group, rows, lengths, np.array([7, 8, 0], np.int32))
    assert adapting is not None and adapting.rows.tolist() == [0, 2]
    for pages in ([[10, 20], [3, 5]], [[12, 22], [3, 3]]):  # two layers
        record_reached(adapting, np.array([pages], np.int32))
    found = read_tally(run_dir, 7)
    assert found == Tally(1.0, 16.0, 16.0 * 16 - 8)
    assert read_tally(run_dir, 8) is None
    registry = CollectorRegistry()
    registry.register(FilesCollector(run_dir))
    value = registry.get_sample_value
    # the second row has a fixed budget: 32 pages of 57 in both heads of both layers
    assert value("quest_pages_selected_total") == 10 + 20 + 3 + 5 + 12 + 22 + 3 + 3 + 4 * 32
    assert value("quest_pages_available_total") == 4 * (63 + 57 + 63)
    assert value("quest_tokens_attended_total") == (16 * 16 - 8) + (3.5 * 16 - 8) + (32 * 16 - 12)
    assert value("quest_tokens_available_total") == 2900
    assert value("quest_tokens_reached_count") == 8
    assert value("quest_tokens_reached_bucket", {"le": "64.0"}) == 3
    vectors = 16 * 78 - 8 * 8 + 4 * 126 + 4 * (32 * 16 - 12 + 57)  # summaries included
    assert value("quest_kv_bytes_read_total") == vectors * group.vector_bytes


def test_adaptive_rows_in_two_stages_read_the_keys_that_their_budgets_list(run_dir: Path) -> None:
    own = LayerBudgets({2: 1.0, 3: 0.0}, forced=3)
    group = LayerGroup(2, 2, 2, head_dim=4, element_size=2, page_size=16, counts_rows=True, budgets=own)
    lengths, budgets = np.array([1000, 900, 1000], np.int32), np.array([256, 256, 256], np.int32)
    staged, mass = POLICIES.index("two_stage"), POLICIES.index("mass")
    rows = classify(lengths.tolist(), budgets.tolist(), [0.9, 0.9, 1.0], np.array([staged, mass, staged]))
    record_step(group, rows, step_rows(np.arange(4, dtype=np.int32), lengths, np.zeros(3, bool)), budgets)
    adapting = adaptive_rows(group, rows, lengths, np.zeros(3, np.int32))
    assert adapting is not None
    # 16 pages a layer: 29 in one, whose ranks 14 to 43 are listed whatever is taken, and the 3 forced ones in the other
    keys = 30 * 16
    assert adapting.keys.tolist() == [keys / 2, 0]
    for _ in range(2):  # layer by layer, as on a CPU
        record_reached(adapting, np.full((1, 2, 2), 3, np.int32))
    registry = CollectorRegistry()
    registry.register(FilesCollector(run_dir))
    taken = 2 * ((3 * 16 - 8 + 63) + (3 * 16 - 12 + 57)) + keys / 2  # of one head, summaries included
    fixed = 32 * 16 - 2 * 8 + 2 * 63 + keys / 2
    assert registry.get_sample_value("quest_kv_bytes_read_total") == 2 * (taken + fixed) * group.vector_bytes
    labels = {"path": "sparse", "reason": "two_stage"}
    assert registry.get_sample_value("quest_decode_rows_total", labels) == 2


def test_usage_joins_what_follows_from_lengths_and_what_the_worker_counted() -> None:
    # steps at lengths 47, 48 are dense (the forced pages cover them), at 49 to 52 adaptive
    usage = count_usage([(46, 7)], 512, QuestConfig(), 0.9, Tally(steps=4.0, pages=12.0, tokens=150.0))
    assert usage.mean_tokens_attended == round((47 + 48 + 150) / 6, 2)
    assert (usage.pages_selected, usage.pages_available, usage.top_p) == (12, 16, 0.9)
    unseen = count_usage([(46, 7)], 512, QuestConfig(), 0.9, None)
    assert unseen.mean_tokens_attended is None and unseen.pages_selected is None
    assert count_usage([(40, 7)], 0, QuestConfig(), 0.9, None).mean_tokens_attended == 43.5


def test_tally_keeps_the_newest_and_ignores_nonsense(run_dir: Path) -> None:
    run_dir.mkdir()
    writer = TallyWriter(run_dir)
    for number in range(1, CAPACITY + 3):
        writer.add(number, 1, 2, 3)
        writer.add(number, 1, 2, 3)
    assert read_tally(run_dir, 1) is read_tally(run_dir, 2) is None
    assert read_tally(run_dir, 3) == read_tally(run_dir, CAPACITY + 2) == Tally(2, 4, 6)
    for value in (None, True, 0, -1, 2**31, "7", 7.0):
        assert tally_number({TALLY_XARG: value}) == 0
    assert tally_number({TALLY_XARG: 7}) == 7 and tally_number(None) == 0
