"""``policy`` from the request to the worker, and back to the reply."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quest_vllm.budget import (
    ABSENT,
    POLICY_XARG,
    TOP_P_XARG,
    XARG,
    BudgetLimits,
    clamp_policy,
    get_policy_table,
    get_top_p_table,
    parse_policy,
    set_budget_limits,
)
from quest_vllm.config import GROUP_REDUCTIONS, POLICIES, QuestConfig
from quest_vllm.errors import QuestValueError
from quest_vllm.server import facts
from quest_vllm.server.asgi import Refusal
from quest_vllm.server.fields import read_request
from quest_vllm.server.usage import count_usage
from quest_vllm.tally import TALLY_XARG

CONFIG = QuestConfig().resolved()
BOXES = QuestConfig(page_summary="min_max").resolved()
LIMITS = BudgetLimits(CONFIG, 8192)
ADAPTS = BudgetLimits(QuestConfig(top_p=0.8).resolved(), 8192)
FIXED = BudgetLimits(QuestConfig(allow_override=False).resolved(), 8192)
OBJECT, IN_XARGS = "sparse_attention.policy", f"vllm_xargs.{POLICY_XARG}"
LEGAL = "expected one of 'mass', 'max', 'mean', 'window', got"
BAD = [None, True, 0, 1.5, [], ["window"], {}, "", "Window", "windw", "auto", "per_query_head"]


def read(request: dict[str, Any], limits: BudgetLimits = LIMITS) -> tuple[dict[str, Any], Any]:
    body, asked = read_request(json.dumps(request).encode(), limits, {"smol"})
    return json.loads(body), asked


def refusal(request: dict[str, Any], limits: BudgetLimits = LIMITS) -> tuple[str | None, str]:
    """The field at fault and the message."""
    with pytest.raises(Refusal) as caught:
        read(request, limits)
    assert caught.value.status == 400
    return caught.value.param, str(caught.value)


@pytest.mark.parametrize("own", GROUP_REDUCTIONS)
def test_a_server_has_its_own_and_window_and_others_only_beside_mass(own: str) -> None:
    config = QuestConfig(group_reduction=own).resolved()
    assert config.policies == ((own, "max", "mean", "window") if own == "mass" else (own, "window"))
    assert parse_policy(ABSENT, config=config) == own
    for policy in config.policies:
        assert parse_policy(policy, config=config) == POLICIES[clamp_policy(policy, config=config)] == policy


@given(st.sampled_from([CONFIG, BOXES]), st.none() | st.integers() | st.text() | st.sampled_from([*POLICIES, *BAD]))
def test_anything_else_is_refused_and_a_worker_takes_the_servers_own(config: QuestConfig, value: Any) -> None:
    clamped = clamp_policy(value, config=config)
    if value in config.policies:
        assert POLICIES[clamped] == value
        return
    assert POLICIES[clamped] == config.group_reduction
    with pytest.raises(QuestValueError, match="^here: expected one of "):
        parse_policy(value, config=config, field="here")


def test_a_worker_says_what_it_cannot_serve(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    assert POLICIES[clamp_policy("mean", config=BOXES)] == "max"
    (said,) = caplog.messages
    assert "quest_policy: expected one of 'max', 'window', got 'mean'" in said and "served with 'max'" in said


@pytest.mark.parametrize("value", BAD)
def test_a_bad_value_names_field_legal_ones_and_value(value: Any) -> None:
    for field, body in (
        (OBJECT, {"sparse_attention": {"policy": value}}),
        (IN_XARGS, {"vllm_xargs": {POLICY_XARG: value}}),
    ):
        assert refusal(body) == (field, f"{field}: {LEGAL} {value!r}")
    with pytest.raises(QuestValueError) as caught:
        LIMITS.parse_policy(value)
    assert str(caught.value) == f"{POLICY_XARG}: {LEGAL} {value!r}"


@pytest.mark.parametrize("value", ["mass", "mean"])
def test_what_this_server_cannot_do_says_why(value: str) -> None:
    assert refusal({"sparse_attention": {"policy": value}}, BudgetLimits(BOXES, 8192)) == (
        OBJECT,
        f"{OBJECT}: expected one of 'max', 'window', got '{value}' "
        "(this server has group_reduction max; others need mass)",
    )


@pytest.mark.parametrize("value", ["max", "mean", "window"])
def test_operator_may_forbid_it(value: str) -> None:
    for field, body in (
        (OBJECT, {"sparse_attention": {"policy": value}}),
        (IN_XARGS, {"vllm_xargs": {POLICY_XARG: value}}),
    ):
        assert refusal(body, FIXED) == (
            field,
            f"{field}: this server lets no request override its policy (allow_override is false): "
            f"expected nothing or 'mass', got '{value}'",
        )
    assert read({"sparse_attention": {"policy": "mass"}}, FIXED)[1].policy == "mass"


@pytest.mark.parametrize("policy", CONFIG.policies)
@pytest.mark.parametrize(
    ("in_object", "in_xargs"), [(True, False), (False, True), (True, True)], ids=["object", "xargs", "both"]
)
def test_both_ways_arrive(policy: str, in_object: bool, in_xargs: bool) -> None:
    body: dict[str, Any] = {"sparse_attention": {"token_budget": 512}, "vllm_xargs": {"other": 1}}
    body["sparse_attention"] |= {"policy": policy} if in_object else {}
    body["vllm_xargs"] |= {POLICY_XARG: policy} if in_xargs else {}
    request, asked = read({"prompt": "x", **body})
    assert request == {"prompt": "x", "vllm_xargs": {"other": 1, XARG: 512, POLICY_XARG: policy}}
    assert (asked.policy, asked.budget, asked.top_p, asked.tally) == (policy, 512, 1.0, 0)


def test_without_it_the_servers_own_is_in_force_and_nothing_is_added() -> None:
    assert read({"sparse_attention": {"token_budget": 512}})[0] == {"vllm_xargs": {XARG: 512}}
    assert read({"prompt": "x"})[1].policy == "mass"
    assert read({"prompt": "x"}, BudgetLimits(BOXES, 8192))[1].policy == "max"
    body = b'{"vllm_xargs":  {"quest_policy": "window"}}'
    handed_on, asked = read_request(body, LIMITS)
    assert handed_on is body and asked.policy == "window"


def test_two_values_that_differ_are_refused() -> None:
    assert refusal({"sparse_attention": {"policy": "window"}, "vllm_xargs": {POLICY_XARG: "max"}}) == (
        IN_XARGS,
        f"{IN_XARGS}: expected the same policy as {OBJECT}, 'window', or none; got 'max'",
    )


@pytest.mark.parametrize(
    ("field", "body"),
    [
        ("sparse_attention.top_p", {"sparse_attention": {"policy": "window", "top_p": 0.9}}),
        (
            "sparse_attention.top_p",
            {"sparse_attention": {"top_p": 0.9}, "vllm_xargs": {POLICY_XARG: "window", TOP_P_XARG: 0.9}},
        ),
        (f"vllm_xargs.{TOP_P_XARG}", {"sparse_attention": {"policy": "window"}, "vllm_xargs": {TOP_P_XARG: 0.9}}),
        (f"vllm_xargs.{TOP_P_XARG}", {"vllm_xargs": {POLICY_XARG: "window", TOP_P_XARG: 0.9}}),
        ("sparse_attention.top_p", {"sparse_attention": {"token_budget": 0, "policy": "window", "top_p": 0.9}}),
    ],
)
@pytest.mark.parametrize("limits", [LIMITS, ADAPTS])
def test_a_window_has_no_mass_to_take_a_share_of(field: str, body: dict[str, Any], limits: BudgetLimits) -> None:
    message = f"{field}: expected 1 or none with policy 'window', got 0.9: it scores no page"
    assert refusal(body, limits) == (field, message)


def test_a_window_has_top_p_one_whatever_the_servers() -> None:
    for asked_top_p in ({}, {"top_p": 1}):
        request, asked = read({"sparse_attention": {"policy": "window", **asked_top_p}}, ADAPTS)
        assert (asked.policy, asked.top_p, asked.tally) == ("window", 1.0, 0)
        assert TALLY_XARG not in request["vllm_xargs"]
    body = b'{"vllm_xargs":  {"quest_policy": "window"}}'
    assert read_request(body, ADAPTS)[0] is body
    for policy in ("mass", "max", "mean"):
        request, asked = read({"sparse_attention": {"policy": policy}}, ADAPTS)
        assert asked.top_p == 0.8 and request["vllm_xargs"] == {POLICY_XARG: policy, TALLY_XARG: asked.tally}


def test_usage_and_route_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "_vllm_config", None)
    assert count_usage([(999, 2)], 512, CONFIG).policy == "mass"
    window = count_usage([(999, 2)], 512, CONFIG, policy="window")
    assert window.policy == "window" and window.pages_selected == 32
    assert facts.describe(LIMITS, [])["policies"] == ["mass", "max", "mean", "window"]
    assert facts.describe(BudgetLimits(BOXES, 8192), [])["policies"] == ["max", "window"]
    assert facts.describe(FIXED, [])["policies"] == ["mass"]


@pytest.fixture
def tap_class(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("vllm")
    from quest_vllm.budget_tap import QuestBudgetTap

    monkeypatch.setattr("quest_vllm.budget._limits", None)
    return QuestBudgetTap


def made(tap_class: Any, **quest: Any) -> Any:
    model = SimpleNamespace(max_model_len=8192)
    return tap_class(SimpleNamespace(additional_config={"quest": quest}, model_config=model), object())


def add(tap: Any, *extras: dict[str, Any] | None) -> tuple[list[str], list[float]]:
    """Requests with these ``extra_args``, each in the next slot; the policy and the top_p of the slots."""
    for slot, extra in enumerate(extras):
        tap.add_request(slot, SimpleNamespace(extra_args=extra))
    policies = [POLICIES[code] for code in get_policy_table().rows(len(extras))]
    return policies, [round(float(share), 6) for share in get_top_p_table().rows(len(extras))]


def test_tap_carries_it_to_the_rows_of_the_batch(tap_class: Any) -> None:
    policies, top_ps = add(
        made(tap_class, top_p=0.8),
        *({POLICY_XARG: name} for name in ("window", "mean", "max", "mass")),
        None,
        {POLICY_XARG: "window", TOP_P_XARG: 0.5},  # skipped validation
    )
    assert policies == ["window", "mean", "max", "mass", "mass", "window"]
    assert top_ps == [1.0, 0.8, 0.8, 0.8, 0.8, 1.0]


@pytest.mark.parametrize("own", GROUP_REDUCTIONS)
def test_tap_clamps_what_skipped_validation(tap_class: Any, own: str) -> None:
    garbage = [value for value in (*BAD, b"window", 2**70, object(), *POLICIES) if value != own and value != "window"]
    garbage = [value for value in garbage if own != "mass" or value not in ("max", "mean")]
    tap = made(tap_class, group_reduction=own)
    assert add(tap, *({POLICY_XARG: value} for value in garbage))[0] == [own] * len(garbage)


def test_tap_validates_it(tap_class: Any) -> None:
    def validate(**extra: Any) -> None:
        tap_class.validate_params(SimpleNamespace(extra_args=extra))

    set_budget_limits(CONFIG, 8192)
    for policy in CONFIG.policies:
        validate(quest_policy=policy, quest_token_budget=512)
    validate(quest_policy="window", quest_top_p=1)
    validate(quest_policy="max", quest_top_p=0.5)
    for extra, message in (
        ({"quest_policy": "windw"}, f"{POLICY_XARG}: {LEGAL} 'windw'"),
        (
            {"quest_policy": "window", "quest_top_p": 0.5},
            f"{TOP_P_XARG}: expected 1 or none with policy 'window', got 0.5: it scores no page",
        ),
    ):
        with pytest.raises(QuestValueError) as caught:
            validate(**extra)
        assert str(caught.value) == message
