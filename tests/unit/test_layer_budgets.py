"""Budgets by layer: what is spent in all, what each layer gets, and what is refused."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quest_vllm.accounting import LayerGroup, record_step
from quest_vllm.byte_model import read_vectors
from quest_vllm.compat import UnsupportedVllm
from quest_vllm.config import QuestConfig, load_config
from quest_vllm.errors import QuestConfigError
from quest_vllm.layer_budgets import LayerBudgets, layer_budgets
from quest_vllm.layer_shares import spread
from quest_vllm.layers import refuse_layer_shares, sparse_layers
from quest_vllm.metadata import classify_rows
from quest_vllm.server.usage import count_usage
from quest_vllm.token_rows import step_rows

SHARES = {0: 0.5, 1: 3.0, 2: 1.0, 4: 0.0}
CONFIG = QuestConfig(layer_shares=SHARES)  # type: ignore[arg-type]


@given(st.lists(st.floats(0, 1000), min_size=1, max_size=40), st.integers(0, 300), st.integers(1, 8))
def test_a_spread_spends_exactly_the_total_and_more_where_shares_are_larger(
    shares: list[float], extra: int, least: int
) -> None:
    pages = spread(shares, least + extra, least)
    assert sum(pages) == len(shares) * (least + extra) and min(pages) >= least
    ordered = [count for _, count in sorted(zip(shares, pages, strict=True))]
    assert all(b >= a - 1 for a, b in itertools.pairwise(ordered))  # but for the rest, a page at most
    with pytest.raises(ValueError, match=f"pages: expected at least {least}, got {least - 1}"):
        spread(shares, least - 1, least)


@given(st.integers(1, 12), st.integers(0, 300), st.floats(0.001, 1000))
def test_equal_shares_are_the_plain_budget(layers: int, extra: int, share: float) -> None:
    budgets = LayerBudgets(dict.fromkeys(range(layers), share), 3)
    assert budgets.pages(3 + extra).tolist() == [3 + extra] * layers


@given(st.lists(st.tuples(st.integers(1, 400), st.integers(1, 400)), max_size=8))
def test_rows_get_what_one_row_gets_up_to_their_pages(rows: list[tuple[int, int]]) -> None:
    budgets = LayerBudgets(SHARES, 3)
    wanted, num_pages = (np.array([row[i] for row in rows], dtype=np.int32) for i in (0, 1))
    found = budgets.rows(wanted, num_pages)
    assert found.shape == (4, len(rows)) and found.dtype == np.int32
    for row, (budget, pages) in enumerate(rows):
        expected = [pages] * 4 if budget >= pages else np.minimum(budgets.pages(budget), pages).tolist()
        assert found[:, row].tolist() == expected


def test_a_group_gets_its_layers_part_of_the_whole_models() -> None:
    whole, part = LayerBudgets(SHARES, 3), LayerBudgets(SHARES, 3, (4, 1))
    assert whole.layers == (0, 1, 2, 4) and part.slots == {4: 0, 1: 1}
    assert whole.pages(32).tolist() == [3 + 13, 3 + 77, 3 + 26, 3]  # 4 x 29 pages, as 1 : 6 : 2 : 0
    assert part.pages(32).tolist() == [3, 80]
    assert whole.pages(3).tolist() == whole.pages(1).tolist() == [3] * 4
    assert whole.pages(2**27).max() == 2**31 - 1 or whole.pages(2**27).sum() == 4 * 2**27
    with pytest.raises(KeyError):
        LayerBudgets(SHARES, 3, (3,))


def test_layers_told_to_stay_dense_have_no_part() -> None:
    config = QuestConfig(layer_shares=SHARES, dense_layers=[1])  # type: ignore[arg-type]
    budgets = layer_budgets(config)
    assert budgets is not None and budgets.layers == (0, 2, 4)
    assert budgets.pages(32).sum() == 3 * 32
    assert layer_budgets(QuestConfig()) is None


@pytest.mark.parametrize(
    ("source", "value"),
    [("YAML", {1: 0.5, 0: 2}), ("JSON", {"0": 2.0, "1": 0.5}), ("environment", "1=0.5, 0=2")],
)
def test_every_source_can_say_shares(source: str, value: Any) -> None:
    if source == "environment":
        config = load_config(None, {"QUEST_LAYER_SHARES": value})
    else:
        config = load_config({"quest": {"layer_shares": value}}, {})
    assert config.layer_shares == ((0, 2.0), (1, 0.5))
    assert load_config({"quest": {"layer_shares": value}}, {"QUEST_LAYER_SHARES": "{}"}).layer_shares == ()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2], r"layer_shares: expected a mapping of layer indices to shares.*got \[1, 2\]"),
        ({-1: 1}, "layer_shares: expected layer indices, each 0 or more and named once, got -1"),
        ({"first": 1}, "layer indices.*got 'first'"),
        ({True: 1}, "layer indices.*got True"),
        ({1: 1, "1": 2}, "layer indices.*got '1'"),
        ({3: -0.5}, "layer_shares: 3: expected a number from 0 to 1000, got -0.5"),
        ({3: float("nan")}, "layer_shares: 3: expected a number from 0 to 1000, got nan"),
        ({3: "1"}, "layer_shares: 3: expected a number"),
    ],
)
def test_bad_shares_are_refused_by_name(value: Any, message: str) -> None:
    with pytest.raises(QuestConfigError, match=message):
        QuestConfig(layer_shares=value)


@pytest.mark.parametrize("text", ["0=1,0=2", "0:1", "a=1", "0=much"])
def test_bad_shares_in_the_environment(text: str) -> None:
    with pytest.raises(QuestConfigError, match="QUEST_LAYER_SHARES: expected"):
        load_config(None, {"QUEST_LAYER_SHARES": text})


def shape(layers: int, method: str | None = None) -> Any:
    return SimpleNamespace(
        model_config=SimpleNamespace(get_total_num_hidden_layers=lambda: layers),
        speculative_config=None if method is None else SimpleNamespace(method=method),
    )


@pytest.mark.parametrize(
    ("sparse", "windowed", "layers", "message"),
    [
        ({0, 1, 2, 3}, set(), 5, r"no share for the sparse layers \[3\]"),
        ({0, 1, 2}, {4}, 5, r"shares for layers with a sliding window \[4\]"),
        ({0, 1, 2}, set(), 4, r"shares for layers beyond the model's 4 \[4\]"),
    ],
)
def test_shares_of_another_model_stop_the_start_up(
    sparse: set[int], windowed: set[int], layers: int, message: str
) -> None:
    with pytest.raises(UnsupportedVllm, match=message):
        refuse_layer_shares(shape(layers), CONFIG, sparse, windowed)


def test_a_draft_models_layers_have_no_shares() -> None:
    with pytest.raises(
        UnsupportedVllm, match="no draft model beside them.*got speculation by eagle3.*set layer_shares"
    ):
        refuse_layer_shares(shape(5, "eagle3"), CONFIG, {0, 1, 2, 4}, {3})
    refuse_layer_shares(shape(5, "eagle3"), QuestConfig(), {0, 1, 2, 4}, {3})
    refuse_layer_shares(shape(5, "ngram"), CONFIG, {0, 1, 2, 4}, {3})


def test_shares_of_this_model_are_accepted_by_any_rank() -> None:
    refuse_layer_shares(shape(5), CONFIG, {0, 1, 2, 4}, {3})
    refuse_layer_shares(shape(5), CONFIG, {2, 4}, set())  # a pipeline stage
    refuse_layer_shares(shape(1), QuestConfig(), {0}, set())
    impl = SimpleNamespace(sliding_window=-1)
    names = {f"model.layers.{index}.self_attn.attn": SimpleNamespace(impl=impl) for index in (4, 0, 1, 2)}
    assert list(sparse_layers(shape(5), names, CONFIG).values()) == [4, 0, 1, 2]


def test_steps_and_replies_count_what_the_layers_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contexts of 1000 (63 pages) and 200 (13), budget 512: 16, 80, 29 and 3 pages, or as many as there are."""
    lengths, budgets = np.array([1000, 200], np.int32), np.array([512, 176], np.int32)
    ones, none = np.ones(2, np.int32), np.zeros(2, bool)
    rows = classify_rows(ones, lengths, none, budgets, CONFIG)
    own = layer_budgets(CONFIG, (0, 1, 2, 4))
    assert own is not None
    pages = own.rows(rows.page_budgets, rows.num_pages)
    assert pages[:, 0].tolist() == [16, 63, 29, 3]
    assert pages[:, 1].tolist() == [7, 13, 10, 3]  # 4 x 8 beyond the forced: 4, 21, 7, 0
    counted: dict[str, tuple[float, ...]] = {}
    metrics = SimpleNamespace(rows=lambda *_: None, budget=lambda *_: None)
    for name in ("pages", "tokens", "kv_bytes"):
        setattr(metrics, name, lambda *values, name=name: counted.__setitem__(name, values))
    monkeypatch.setattr("quest_vllm.accounting.get_worker_metrics", lambda: metrics)
    group = LayerGroup(4, 2, 2, 64, 2, 16, True, own)
    step = (step_rows(np.arange(3, dtype=np.int32), lengths, none), budgets)
    record_step(group, rows, *step)
    missing = 4 * (63 * 16 - 1000 + 13 * 16 - 200)
    attended, available = int(pages.sum()) * 16 - missing, 4 * (63 + 13)
    assert counted["pages"] == (2 * pages.sum(), 2 * available)
    assert counted["tokens"] == (attended / 4, 1200)
    assert counted["kv_bytes"] == ((attended + available) * 2 * group.vector_bytes, 4 * 1200 * 2 * group.vector_bytes)
    staged = replace(CONFIG, policy="two_stage")
    record_step(group, classify_rows(ones, lengths, none, budgets, staged), *step)
    listed = [16 + 30, 8 + 8]  # pages; where a layer takes forced ones alone, or all, none
    assert counted["kv_bytes"][0] == (attended + available + sum(listed) * 16 / 2) * 2 * group.vector_bytes
    assert counted["pages"] == (2 * pages.sum(), 2 * available)
    read = 63 + pages[:, 0].mean() * 16 - 8 + listed[0] / 4 * 16 / 2
    assert read_vectors(1000, 512, staged).sparse == round(read)
    usage = count_usage([(999, 2)], 512, CONFIG)
    assert usage.pages_selected == round(pages[:, 0].mean()) and usage.pages_available == 63
    assert usage.mean_tokens_attended == pages[:, 0].mean() * 16 - 8
    assert read_vectors(1000, 512, CONFIG).sparse == round(63 + pages[:, 0].mean() * 16 - 8)
    assert count_usage([(999, 1)], 512, CONFIG).pages_selected == 0  # no decode step
