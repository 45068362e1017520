"""``policy`` from the request to the worker, and back to the reply."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
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
STAGED = QuestConfig(policy="two_stage").resolved()
LIMITS = BudgetLimits(CONFIG, 8192)
ADAPTS = BudgetLimits(QuestConfig(top_p=0.8).resolved(), 8192)
FIXED = BudgetLimits(QuestConfig(allow_override=False).resolved(), 8192)
OBJECT, IN_XARGS = "sparse_attention.policy", f"vllm_xargs.{POLICY_XARG}"
LEGAL = "expected one of 'mass', 'max', 'mean', 'two_stage', 'window', got"
BAD = [None, True, 0, 1.5, [], ["window"], {}, "", "Window", "windw", "auto", "two-stage", "per_query_head"]
OTHERS = ("max", "mean", "two_stage", "window")


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
    assert config.policies == ((own, *OTHERS) if own == "mass" else (own, "window"))
    assert parse_policy(ABSENT, config=config) == own
    for policy in config.policies:
        assert parse_policy(policy, config=config) == POLICIES[clamp_policy(policy, config=config)] == policy


@pytest.mark.parametrize("own", ["mass", *OTHERS])
def test_the_default_of_requests_may_be_another(own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "_vllm_config", None)
    config = QuestConfig(policy=own).resolved()
    assert (config.group_reduction, config.policies[0]) == ("mass", own)
    assert sorted(config.policies) == sorted(CONFIG.policies)
    assert parse_policy(ABSENT, config=config) == POLICIES[clamp_policy("nonsense", config=config)] == own
    limits = BudgetLimits(config, 8192)
    assert read({"prompt": "x"}, limits) == ({"prompt": "x"}, replace(read({"prompt": "x"})[1], policy=own))
    assert read({"sparse_attention": {"policy": "mass"}}, limits)[1].policy == "mass"
    assert facts.describe(limits, [])["policies"] == list(config.policies)
    assert count_usage([(999, 2)], 512, config).policy == own
    alone = BudgetLimits(replace(config, allow_override=False), 8192)
    assert alone.parse_policy(own) == own and facts.describe(alone, [])["policies"] == [own]
    with pytest.raises(QuestValueError, match=f"expected nothing or '{own}', got"):
        alone.parse_policy(next(name for name in config.policies if name != own))


VALUES = st.none() | st.integers() | st.text() | st.sampled_from([*POLICIES, *BAD])


@given(st.sampled_from([CONFIG, BOXES, STAGED]), VALUES)
def test_anything_else_is_refused_and_a_worker_takes_the_servers_own(config: QuestConfig, value: Any) -> None:
    clamped = clamp_policy(value, config=config)
    if value in config.policies:
        assert POLICIES[clamped] == value
        return
    assert POLICIES[clamped] == config.own_policy
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


@pytest.mark.parametrize("value", ["mass", "mean", "two_stage"])
def test_what_this_server_cannot_do_says_why(value: str) -> None:
    assert refusal({"sparse_attention": {"policy": value}}, BudgetLimits(BOXES, 8192)) == (
        OBJECT,
        f"{OBJECT}: expected one of 'max', 'window', got '{value}' "
        "(this server has group_reduction max; others need mass)",
    )


def test_two_stages_need_key_codes() -> None:
    config = QuestConfig(page_summary="min_max", group_reduction="mass").resolved()
    assert config.policies == ("mass", "max", "mean", "window")
    assert refusal({"sparse_attention": {"policy": "two_stage"}}, BudgetLimits(config, 8192)) == (
        OBJECT,
        f"{OBJECT}: expected one of 'mass', 'max', 'mean', 'window', got 'two_stage' "
        "(this server has page_summary min_max; that policy needs key_codes)",
    )


@pytest.mark.parametrize("value", OTHERS)
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
    for policy in ("mass", "max", "mean", "two_stage"):
        request, asked = read({"sparse_attention": {"policy": policy}}, ADAPTS)
        assert asked.top_p == 0.8 and request["vllm_xargs"] == {POLICY_XARG: policy, TALLY_XARG: asked.tally}


def test_where_a_window_is_the_default_the_servers_top_p_is_for_requests_that_name_another() -> None:
    limits = BudgetLimits(QuestConfig(policy="window", top_p=0.8).resolved(), 8192)
    body = b'{"prompt":  "x"}'
    handed_on, asked = read_request(body, limits)
    assert handed_on is body and (asked.policy, asked.top_p, asked.tally) == ("window", 1.0, 0)
    assert read({"sparse_attention": {"policy": "mass"}}, limits)[1].top_p == 0.8
    assert read({"sparse_attention": {"policy": "two_stage", "top_p": 0.5}}, limits)[1].top_p == 0.5
    for field, body_ in (
        ("sparse_attention.top_p", {"sparse_attention": {"top_p": 0.9}}),
        (f"vllm_xargs.{TOP_P_XARG}", {"vllm_xargs": {TOP_P_XARG: 0.9}}),
    ):
        message = f"{field}: expected 1 or none with policy 'window', got 0.9: it scores no page"
        assert refusal(body_, limits) == (field, message)


def test_usage_and_route_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "_vllm_config", None)
    assert count_usage([(999, 2)], 512, CONFIG).policy == "mass"
    window = count_usage([(999, 2)], 512, CONFIG, policy="window")
    assert window.policy == "window" and window.pages_selected == 32
    staged = count_usage([(999, 2)], 512, CONFIG, policy="two_stage")
    assert staged == window.model_copy(update={"policy": "two_stage"})  # whatever choosing them reads
    for own in ("window", "two_stage"):
        servers = count_usage([(999, 2), (400, 300)], 512, replace(CONFIG, policy=own))
        assert servers == count_usage([(999, 2), (400, 300)], 512, CONFIG, policy=own)
    assert facts.describe(LIMITS, [])["policies"] == ["mass", *OTHERS]
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
        *({POLICY_XARG: name} for name in ("window", "mean", "max", "mass", "two_stage")),
        None,
        {POLICY_XARG: "window", TOP_P_XARG: 0.5},  # skipped validation
    )
    assert policies == ["window", "mean", "max", "mass", "two_stage", "mass", "window"]
    assert top_ps == [1.0, 0.8, 0.8, 0.8, 0.8, 0.8, 1.0]
    staged = [None, {POLICY_XARG: "nonsense"}, {POLICY_XARG: "max"}, {TOP_P_XARG: 0.5}]
    policies, top_ps = add(made(tap_class, policy="two_stage", top_p=0.8), *staged)
    assert (policies, top_ps) == (["two_stage", "two_stage", "max", "two_stage"], [0.8, 0.8, 0.8, 0.5])
    newest = [None, {TOP_P_XARG: 0.5}, {POLICY_XARG: "mass"}]
    policies, top_ps = add(made(tap_class, policy="window", top_p=0.8), *newest)
    assert (policies, top_ps) == (["window", "window", "mass"], [1.0, 1.0, 0.8])


@pytest.mark.parametrize("own", GROUP_REDUCTIONS)
def test_tap_clamps_what_skipped_validation(tap_class: Any, own: str) -> None:
    garbage = [value for value in (*BAD, b"window", 2**70, object(), *POLICIES) if value != own and value != "window"]
    garbage = [value for value in garbage if own != "mass" or value not in OTHERS]
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
    validate(quest_policy="two_stage", quest_top_p=0.5)
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
    set_budget_limits(QuestConfig(policy="window").resolved(), 8192)
    with pytest.raises(QuestValueError, match="expected 1 or none with policy 'window', got 0.5"):
        validate(quest_top_p=0.5)
    validate(quest_policy="mass", quest_top_p=0.5)
