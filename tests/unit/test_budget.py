"""Budgets: the parse law, the slot table against a dict, and the tap under both model runners."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quest_vllm import budget
from quest_vllm.budget import (
    ABSENT,
    XARG,
    BudgetTable,
    clamp_token_budget,
    get_budget_limits,
    get_budget_table,
    parse_token_budget,
    set_budget_limits,
)
from quest_vllm.config import MAX_TOKEN_BUDGET, POLICIES, QuestConfig
from quest_vllm.errors import QuestError, QuestValueError

LIMITS = {"minimum": 48, "maximum": 8192, "default": 2048}
ANYTHING = st.one_of(
    st.integers(),
    st.floats(),
    st.text(),
    st.booleans(),
    st.none(),
    st.lists(st.integers()),
    st.dictionaries(st.text(), st.none()),
)


@pytest.fixture(autouse=True)
def fresh_process_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(budget, "_limits", None)
    monkeypatch.setattr(budget, "_table", BudgetTable())
    monkeypatch.setattr(budget, "_policies", BudgetTable())
    yield


@pytest.mark.parametrize("value", [-1, "abc", "512", 1.5, 512.0, [1], 10**12, None, True, False, 47, 8193, {}, b"512"])
def test_bad_value_names_field_range_and_value(value: Any) -> None:
    with pytest.raises(QuestValueError) as caught:
        parse_token_budget(value, **LIMITS)
    message = str(caught.value)
    assert XARG in message and "48" in message and "8192" in message and repr(value) in message
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, QuestError)


@pytest.mark.parametrize(("value", "expected"), [(ABSENT, 2048), (0, 0), (48, 48), (512, 512), (8192, 8192)])
def test_good_value(value: Any, expected: int) -> None:
    assert parse_token_budget(value, **LIMITS) == expected


@given(ANYTHING, st.integers(1, 200), st.integers(0, 10_000))
def test_parse_law(value: Any, minimum: int, maximum: int) -> None:
    legal = type(value) is int and (value == 0 or minimum <= value <= maximum)
    if legal:
        assert parse_token_budget(value, minimum=minimum, maximum=maximum, default=7) == value
    else:
        with pytest.raises(QuestValueError):
            parse_token_budget(value, minimum=minimum, maximum=maximum, default=7)


@given(ANYTHING)
def test_clamp_never_raises_and_agrees_with_parse_on_legal_values(value: Any) -> None:
    clamped = clamp_token_budget(value, minimum=48, default=2048)
    assert clamped == 0 or 48 <= clamped <= MAX_TOKEN_BUDGET
    if type(value) is int and 48 <= value <= 8192:
        assert clamped == value


def test_long_value_is_cut_in_the_message() -> None:
    with pytest.raises(QuestValueError) as caught:
        parse_token_budget("x" * 10_000, **LIMITS)
    assert len(str(caught.value)) < 250


def test_limits_before_and_after_the_model_is_known() -> None:
    assert get_budget_limits().parse(10**9) == 10**9
    with pytest.raises(QuestValueError):
        get_budget_limits().parse(10**12)
    set_budget_limits(QuestConfig(token_budget=4096, page_size=32), 1000)
    assert get_budget_limits().parse(ABSENT) == 4096
    with pytest.raises(QuestValueError, match="from 96 to 1000"):
        get_budget_limits().parse(1001)


SLOTS = st.integers(0, 40)
OPERATIONS = st.one_of(
    st.tuples(st.just("set"), SLOTS, st.integers(0, 4096)),
    st.tuples(st.just("clear"), SLOTS, st.just(0)),
    st.tuples(st.just("move"), SLOTS, SLOTS),
    st.tuples(st.just("swap"), SLOTS, SLOTS),
)


def _apply_to_model(model: dict[int, int], name: str, first: int, second: int) -> None:
    if name == "set":
        model[first] = second
    elif name == "clear":
        model.pop(first, None)
    elif name == "move":
        model[second] = model.pop(first, 0)
    else:
        model[first], model[second] = model.get(second, 0), model.get(first, 0)


@given(st.lists(OPERATIONS, max_size=60), st.integers(0, 60))
def test_table_behaves_as_a_dict_of_slots(operations: list[tuple[str, int, int]], num_reqs: int) -> None:
    table, model = BudgetTable(capacity=1), dict[int, int]()
    for name, first, second in operations:
        getattr(table, name)(*((first,) if name == "clear" else (first, second)))
        _apply_to_model(model, name, first, second)
    rows = table.rows(num_reqs)
    assert rows.dtype == np.int32 and rows.tolist() == [model.get(slot, 0) for slot in range(num_reqs)]
    slots = np.arange(num_reqs, dtype=np.int32)[::-1] - 2
    assert table.rows(num_reqs, slots).tolist() == [model.get(int(slot), 0) if slot >= 0 else 0 for slot in slots]


def test_rows_is_a_copy_and_takes_the_first_of_a_padded_index() -> None:
    table = BudgetTable()
    table.set(2, 100)
    rows = table.rows(3)
    rows[:] = 1
    assert table.rows(3).tolist() == [0, 0, 100]
    assert table.rows(1, np.array([2, 9, 9])).tolist() == [100]


def test_a_row_without_a_request_is_dense_though_the_table_is_full() -> None:
    table = BudgetTable(capacity=1)
    table.set(0, 512)
    assert table.rows(2, np.array([-1, 0])).tolist() == [0, 512]


def _params(value: object = ABSENT, **more: object) -> SimpleNamespace:
    extra = more if value is ABSENT else {XARG: value, **more}
    return SimpleNamespace(extra_args=extra or None)


def _vllm_config(max_model_len: int = 8192, **quest: Any) -> SimpleNamespace:
    return SimpleNamespace(
        additional_config={"quest": quest}, model_config=SimpleNamespace(max_model_len=max_model_len)
    )


@pytest.fixture
def tap_module() -> Any:
    pytest.importorskip("vllm")
    from quest_vllm import budget_tap

    return budget_tap


def test_tap_satisfies_both_runners_and_leaves_logits_alone(tap_module: Any) -> None:
    from quest_vllm.compat_logits import V1LogitsProcessor, V2LogitsProcessor

    assert issubclass(tap_module.QuestBudgetTap, V1LogitsProcessor)
    assert issubclass(tap_module.QuestBudgetTap, V2LogitsProcessor)
    logits: Any = object()
    v1 = tap_module.QuestBudgetTap(_vllm_config(), "cpu", False)
    v2 = tap_module.QuestBudgetTap(_vllm_config(), object())
    assert v1.is_argmax_invariant() and v1.apply(logits) is logits and v2.apply(logits, object()) is logits
    v2.apply_staged_writes()


def test_tap_v2_overwrites_a_reused_slot(tap_module: Any) -> None:
    tap = tap_module.QuestBudgetTap(_vllm_config(token_budget=1024), object())
    assert tap.add_request(3, _params(512)) is False
    assert get_budget_table().rows(4).tolist() == [0, 0, 0, 512]
    tap.add_request(3, _params())
    assert get_budget_table().rows(1, np.array([3])).tolist() == [1024]
    tap.add_request(3, _params(0))
    assert get_budget_table().rows(1, np.array([3])).tolist() == [0]


@pytest.mark.parametrize(
    ("value", "expected"), [(-5, 0), (1, 48), ("abc", 2048), (None, 2048), ([1], 2048), (10**12, MAX_TOKEN_BUDGET)]
)
def test_tap_clamps_what_skipped_validation(tap_module: Any, value: Any, expected: int) -> None:
    tap_module.QuestBudgetTap(_vllm_config(), object()).add_request(0, _params(value))
    assert get_budget_table().rows(1).tolist() == [expected]


def test_tap_validates_with_the_limits_of_the_process(tap_module: Any) -> None:
    set_budget_limits(QuestConfig(), 4096)
    tap_module.QuestBudgetTap.validate_params(_params(4096))
    tap_module.QuestBudgetTap.validate_params(_params())
    for bad in (4097, 47, True, None, "512"):
        with pytest.raises(QuestValueError, match="from 48 to 4096"):
            tap_module.QuestBudgetTap.validate_params(_params(bad))


def _policy(value: int | None) -> str:
    """A policy for the request of that budget."""
    policies = QuestConfig().resolved().policies
    return policies[(value or 0) % len(policies)]


@st.composite
def _batch_histories(draw: st.DrawFn) -> list[tuple[list[int], list[int], list[tuple[int, int]]]]:
    """Steps of (batch rows removed, budgets added, rows swapped after); indices are taken modulo the batch."""
    indices = st.lists(st.integers(0, 63), max_size=3)
    step = st.tuples(
        indices,
        st.lists(st.integers(48, 4096), max_size=4),
        st.lists(st.tuples(st.integers(0, 63), st.integers(0, 63)), max_size=3),
    )
    return draw(st.lists(step, max_size=12))


@given(_batch_histories())
def test_tap_v1_follows_vllms_batch_through_any_history(
    history: list[tuple[list[int], list[int], list[tuple[int, int]]]],
) -> None:
    """Removals, additions into the holes, condensing and reordering, as vLLM's persistent batch reports them.

    A request's policy goes with its budget.
    """
    pytest.importorskip("vllm")
    from quest_vllm.budget_tap import QuestBudgetTap
    from quest_vllm.compat_logits import BatchUpdate, MoveDirectionality

    tap = QuestBudgetTap(_vllm_config(), "cpu", False)
    tap._table = table = BudgetTable(capacity=1)
    budget._policies = policies = BudgetTable(capacity=1)
    batch: list[int | None] = []
    for removals, additions, swaps in history:
        holes = sorted({index % len(batch) for index in removals}) if batch else []
        added: list[Any] = []
        moved: list[Any] = []
        for hole in holes:
            batch[hole] = None
        for value in additions:
            row = holes.pop(0) if holes else len(batch)
            batch[row : row + 1] = [value]
            added.append((row, _params(value, quest_policy=_policy(value)), [], []))
        for hole in list(holes):
            while batch and batch[-1] is None:
                batch.pop()
            if hole < len(batch):
                moved.append((len(batch) - 1, hole, MoveDirectionality.UNIDIRECTIONAL))
                batch[hole] = batch.pop()
        for first, second in swaps if batch else []:
            first, second = first % len(batch), second % len(batch)
            moved.append((first, second, MoveDirectionality.SWAP))
            batch[first], batch[second] = batch[second], batch[first]
        tap.update_state(BatchUpdate(batch_size=len(batch), removed=holes, added=added, moved=moved))
        tap.update_state(None)
        # rows that left hold nothing
        assert table.rows(len(batch) + 8).tolist() == [*batch, *[0] * 8]
        assert [POLICIES[code] for code in policies.rows(len(batch))] == [_policy(value) for value in batch]
