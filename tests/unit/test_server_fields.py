"""The request object: what is taken, what is refused, and what is left alone."""

from __future__ import annotations

import json
import os
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quest_vllm.budget import ABSENT, XARG, BudgetLimits
from quest_vllm.cli import main
from quest_vllm.config import QuestConfig, load_config
from quest_vllm.errors import QuestConfigError, QuestValueError
from quest_vllm.server.asgi import Refusal
from quest_vllm.server.fields import read_request
from quest_vllm.server.flags import split_flags

LIMITS = BudgetLimits(QuestConfig(aliases=(("fast", 512), ("exact", 0))), 8192)
FIELD = "sparse_attention.token_budget"
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


def read(request: Any, limits: BudgetLimits = LIMITS) -> tuple[dict[str, Any], Any]:
    body, asked = read_request(json.dumps(request).encode(), limits, {"smol", "adapter", "odd:fast"})
    return json.loads(body), asked


def refusal(request: Any, limits: BudgetLimits = LIMITS) -> Refusal:
    with pytest.raises(Refusal) as caught:
        read(request, limits)
    assert caught.value.status == 400
    error = json.loads(caught.value.body())["error"]
    assert error == {
        "message": str(caught.value),
        "type": "BadRequestError",
        "param": caught.value.param,
        "code": 400,
    }
    return caught.value


@pytest.mark.parametrize("budget", [0, 48, 1024, 8192])
def test_object_becomes_an_xarg(budget: int) -> None:
    request, asked = read({"prompt": "x", "sparse_attention": {"token_budget": budget}, "vllm_xargs": {"other": 1}})
    assert request == {"prompt": "x", "vllm_xargs": {"other": 1, XARG: budget}}
    assert asked.budget == budget and asked.model is None


@pytest.mark.parametrize("xargs", [{}, {"vllm_xargs": None}])
def test_empty_object_is_the_default(xargs: dict[str, Any]) -> None:
    request, asked = read({"prompt": "x", "sparse_attention": {}, **xargs})
    assert request == {"prompt": "x", **xargs} and asked.budget is ABSENT


@pytest.mark.parametrize("value", [True, False, None, "512", 512.0, 1.5, [512], {"a": 1}, -1, 1, 47, 8193, 10**30])
def test_bad_budget_names_field_range_and_value(value: Any) -> None:
    refused = refusal({"sparse_attention": {"token_budget": value}})
    assert refused.param == FIELD
    message = str(refused)
    assert message.startswith(FIELD) and "48 to 8192" in message and repr(value) in message


@pytest.mark.parametrize("value", [None, 512, "fast", [], [1024], True])
def test_object_must_be_an_object(value: Any) -> None:
    refused = refusal({"sparse_attention": value})
    assert refused.param == "sparse_attention" and repr(value) in str(refused)


def test_unknown_key_names_the_nearest() -> None:
    refused = refusal({"sparse_attention": {"token_budgets": 512}})
    assert refused.param == "sparse_attention.token_budgets" and "did you mean 'token_budget'" in str(refused)
    assert "did you mean '" in str(refusal({"sparse_attention": {"x" * 10**6: 1}}))


@pytest.mark.parametrize("key", ["sparse_atention", "sparseattention", "sparse_attentions", "sparse-attention"])
def test_misspelt_object_is_not_dropped_in_silence(key: str) -> None:
    refused = refusal({"prompt": "x", key: {"token_budget": 512}})
    assert key in str(refused) and "did you mean 'sparse_attention'" in str(refused)


def test_object_and_xarg_may_agree_but_not_differ() -> None:
    both = {"sparse_attention": {"token_budget": 512}, "vllm_xargs": {XARG: 512}}
    assert read(both)[0] == {"vllm_xargs": {XARG: 512}}
    refused = refusal(both | {"vllm_xargs": {XARG: 1024}})
    assert "512" in str(refused) and "1024" in str(refused) and XARG in str(refused) and FIELD in str(refused)
    for other in (0, "512", 512.0, None, False):
        refusal(both | {"vllm_xargs": {XARG: other}})


@pytest.mark.parametrize(("name", "budget"), [("fast", 512), ("exact", 0)])
def test_alias_sets_budget_and_model(name: str, budget: int) -> None:
    request, asked = read({"model": f"adapter:{name}", "prompt": "x"})
    assert request == {"model": "adapter", "prompt": "x", "vllm_xargs": {XARG: budget}}
    assert asked.budget == budget and asked.model == f"adapter:{name}"


@pytest.mark.parametrize("model", ["smol", "smol:slow", "other:fast", "odd:fast", "smol:", ":fast", "fast", None, 3])
def test_other_models_pass(model: Any) -> None:
    body = json.dumps({"model": model, "prompt": "x"}).encode()
    handed_on, asked = read_request(body, LIMITS, {"smol", "adapter", "odd:fast"})
    assert handed_on is body and asked.model is None and asked.budget is ABSENT


def test_alias_with_another_budget_is_refused() -> None:
    explicit: dict[str, Any]
    for explicit in ({"sparse_attention": {"token_budget": 1024}}, {"vllm_xargs": {XARG: 1024}}):
        message = str(refusal({"model": "smol:fast", **explicit}))
        assert "smol:fast" in message and "512" in message and "1024" in message
    assert read({"model": "smol:fast", "sparse_attention": {"token_budget": 512}})[1].budget == 512


@pytest.mark.parametrize("value", [True, False, None, {}, -1, "abc", 1.5, 512.0, [1], 10**12])
def test_bad_xarg_names_field_range_and_value(value: Any) -> None:
    refused = refusal({"vllm_xargs": {XARG: value}})
    assert refused.param == f"vllm_xargs.{XARG}"
    assert XARG in str(refused) and "48 to 8192" in str(refused) and repr(value) in str(refused)


@pytest.mark.parametrize("value", ["512", "0", "8192"])
def test_good_xarg_passes_byte_for_byte(value: str) -> None:
    body = b'{"prompt":  "x", "vllm_xargs": {"%s": %s}}' % (XARG.encode(), value.encode())
    handed_on, asked = read_request(body, LIMITS)
    assert handed_on is body and asked.budget == json.loads(value)


@pytest.mark.parametrize("value", ["x", 3, [], [{}], True, 1e308])
def test_what_vllm_would_answer_with_500_is_refused(value: Any) -> None:
    refused = refusal({"prompt": "x", "structured_outputs": value})
    assert refused.param == "structured_outputs" and repr(value) in str(refused)
    refused = refusal({"prompt": ["x", {"stop": f"{value}\ud800"}]})
    assert "\\ud800" in str(refused)


@pytest.mark.parametrize("good", ["\U0001f600", "\\ud800", "\\\\ud800"])
def test_whole_characters_pass(good: str) -> None:
    body = json.dumps({"prompt": good, "structured_outputs": {"json": {}}}).encode()
    assert read_request(body, LIMITS)[0] is body


@settings(deadline=None)
@given(st.binary() | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_body_without_the_object_passes_byte_for_byte(body: bytes) -> None:
    handed_on, asked = read_request(body, LIMITS)
    assert handed_on is body and asked.budget is ABSENT


@settings(deadline=None)
@given(json_values, st.dictionaries(st.text(), json_values, max_size=3), json_values)
def test_any_object_is_taken_or_refused(value: Any, rest: dict[str, Any], xargs: Any) -> None:
    try:
        body, asked = read_request(
            json.dumps({**rest, "sparse_attention": value, "vllm_xargs": xargs}).encode(), LIMITS
        )
    except Refusal as refused:
        assert refused.status == 400 and json.loads(refused.body())
    else:
        handed_on = json.loads(body)
        assert "sparse_attention" not in handed_on and value in ({}, {"token_budget": asked.budget})


@pytest.mark.parametrize("depth", [500, 5000, 200_000])
@pytest.mark.parametrize("before", [b'{"a": ', b'{"sparse_attention": ', b'{"sparse_attention": {"token_budget": '])
def test_deep_nesting_is_passed_or_refused(before: bytes, depth: int) -> None:
    closing = b"}" * before.count(b"{")
    body = before + b"[" * depth + b"]" * depth + closing
    try:
        assert read_request(body, LIMITS)[0] is body
    except Refusal as refused:
        assert refused.status == 400 and len(str(refused)) < 500
    rewritten = b'{"sparse_attention": {"token_budget": 512}, "a": ' + b"[" * depth + b"]" * depth + b"}"
    try:
        handed_on, _ = read_request(rewritten, LIMITS)
        assert handed_on is rewritten or b"sparse_attention" not in handed_on
    except Refusal as refused:
        assert "nested too deeply" in str(refused)


def test_a_million_foreign_keys_do_not_hold_the_server_up() -> None:
    body = json.dumps({f"sparse_attentio{number}": 0 for number in range(300_000)} | {"prompt": "x"}).encode()
    start = time.perf_counter()
    with pytest.raises(Refusal):
        read_request(body, LIMITS)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("text", ['"é中😀"', "1e400", "NaN", "12345678901234567890123", "-0.0", '"\\u0000"'])
def test_other_values_survive_the_rewriting(text: str) -> None:
    body = f'{{"sparse_attention": {{"token_budget": 512}}, "other": [{text}]}}'.encode()
    handed_on = json.loads(read_request(body, LIMITS)[0])
    assert repr(handed_on["other"]) == repr([json.loads(text)])


@pytest.mark.parametrize(
    ("request_", "one", "countable"),
    [
        ({"prompt": "x"}, True, True),
        ({"prompt": ["x"]}, True, True),
        ({"prompt": [1, 2, 3]}, True, True),
        ({"messages": []}, True, True),
        ({"input": "x", "tools": [{"type": "function", "name": "f"}]}, True, True),
        ({"prompt": "x", "n": 1}, True, True),
        ({"prompt": "x", "n": 2}, False, True),
        ({"prompt": ["x", "y"]}, False, True),
        ({"prompt": [[1, 2], [3]]}, False, True),
        ({"prompt": "x", "use_beam_search": True}, False, False),
        ({"prompt_embeds": "x"}, False, False),
        ({"messages": [[], []]}, False, False),
        ({"input": "x", "tools": [{"type": "web_search"}]}, False, False),
        ({"input": "x", "tools": 3}, False, False),
    ],
)
def test_what_usage_can_be_counted_from(request_: dict[str, Any], one: bool, countable: bool) -> None:
    asked = read(request_)[1]
    assert (asked.one_sequence, asked.countable) == (one, countable)


OPERATOR = QuestConfig(min_budget=256, max_budget=2048, aliases=(("fast", 512),))


@pytest.mark.parametrize(("value", "limit"), [(128, "min_budget is 256"), (4096, "max_budget is 2048"), (0, "dense")])
def test_operator_limits_are_named(value: int, limit: str) -> None:
    limits = BudgetLimits(OPERATOR, 8192)
    message = str(refusal({"sparse_attention": {"token_budget": value}}, limits))
    assert limit in message and "from 256 to 2048" in message and str(value) in message
    with pytest.raises(QuestValueError, match=limit):
        limits.parse(value)
    assert limits.parse(256) == 256 and limits.parse(2048) == 2048 and limits.parse(ABSENT) == 2048


def test_smallest_budget_alone_leaves_dense_allowed() -> None:
    limits = BudgetLimits(QuestConfig(min_budget=256), 8192)
    assert limits.parse(0) == 0
    with pytest.raises(QuestValueError, match="0 .dense. or an integer from 256 to 8192"):
        limits.parse(255)


def test_without_override_only_the_default_and_aliases_pass() -> None:
    limits = BudgetLimits(QuestConfig(allow_override=False, aliases=(("fast", 512), ("exact", 0))), 8192)
    message = str(refusal({"sparse_attention": {"token_budget": 1024}}, limits))
    assert "allow_override" in message and "2048 or 512 or 0" in message and "1024" in message
    assert [limits.parse(value) for value in (ABSENT, 2048, 512, 0)] == [2048, 2048, 512, 0]
    assert read({"model": "smol:fast"}, limits)[1].budget == 512
    for value in (False, 512.0, "512"):
        with pytest.raises(QuestValueError, match="allow_override"):
            limits.parse(value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_budget": 1024}, "token_budget: got 2048, but max_budget is 1024"),
        ({"max_budget": 4096, "token_budget": 0}, "token_budget: got 0, but max_budget is 4096, and dense"),
        ({"max_budget": 32}, "max_budget: expected null or at least 48, got 32"),
        ({"min_budget": 4096}, "token_budget: got 2048, but min_budget is 4096"),
        ({"max_budget": 4096, "aliases": {"exact": 0}}, "aliases: exact: got 0, but max_budget is 4096"),
        ({"aliases": {"fast": 20}}, "aliases: fast: expected 0 (dense) or at least 48, got 20"),
        ({"aliases": {"fast": True}}, "aliases: fast: expected an integer"),
        ({"aliases": {"a:b": 512}}, "aliases: expected names of"),
        ({"aliases": ["fast"]}, "aliases: expected a mapping"),
        ({"allow_override": 1}, "allow_override: expected true or false, got 1"),
        ({"max_body_bytes": 10}, "max_body_bytes: expected an integer from 1024"),
    ],
)
def test_bad_limits_stop_the_start(values: dict[str, Any], message: str) -> None:
    with pytest.raises(QuestConfigError) as caught:
        load_config({"quest": values}, {})
    assert message in str(caught.value)


def test_limits_from_flags_reach_the_configuration() -> None:
    words = "m --port 1 --quest-alias fast=512 --quest_alias=mid=1024 --no-quest-allow-override --quest-min-budget=64"
    theirs, environment = split_flags([*words.split(), "--quest-max-budget", "4096", "-ac", '{"a": 1}'])
    assert theirs == ["m", "--port", "1", "-ac", '{"a": 1}']
    config = load_config(None, environment)
    assert config.aliases == (("fast", 512), ("mid", 1024)) and not config.allow_override
    assert (config.min_budget, config.max_budget) == (64, 4096)
    assert split_flags(["m", "--quest-allow-override"])[1] == {"QUEST_ALLOW_OVERRIDE": "True"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--quest-alais fast=512", "did you mean --quest-alias?"),
        ("--quest-min-budget many", "invalid int value: 'many'"),
        ("--quest-max-budget", "expected one argument"),
    ],
)
def test_bad_flag_is_a_usage_error(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        split_flags(["m", *words.split()])
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text"), [("ALIASES", "fast"), ("ALIASES", "a=1,a=2"), ("ALIASES", "a=x"), ("ALLOW_OVERRIDE", "maybe")]
)
def test_bad_text_in_the_environment_is_refused(name: str, text: str) -> None:
    with pytest.raises(QuestConfigError, match=f"QUEST_{name}: expected"):
        load_config(None, {f"QUEST_{name}": text})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--quest-max-budget 1024", "token_budget: got 2048, but max_budget is 1024"),
        ("--quest-alias fast=20", "aliases: fast: expected 0 (dense) or at least 48, got 20"),
        ("--quest-alias fast", "QUEST_ALIASES: expected NAME=TOKENS"),
        ('--additional_config={"quest":{"max_budgt":1}}', "did you mean 'max_budget'"),
        ('--quest-max-budget 1024 --additional-config {"quest":{"token_budget":1025}}', "token_budget: got 1025"),
    ],
)
def test_bad_configuration_ends_the_command_at_once(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "m", *words.split()])
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        '--quest-max-budget 1024 --additional-config {"quest":{"token_budget":512}}',
        "--quest-max-budget 1024 --config file.yaml",
        "--quest-max-budget 1024 --additional-config.quest.token_budget 512",
        "--additional-config {",
    ],
)
def test_configuration_that_may_be_good_is_left_to_the_server(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    handed_on: list[Any] = []
    monkeypatch.setattr(os, "execve", lambda *arguments: handed_on.append(arguments))
    assert main(["serve", "m", *words.split()]) == 0
    _, command, environment = handed_on[0]
    assert command[3:5] == ["serve", "m"] and not any("quest-" in word for word in command)
    assert ("QUEST_MAX_BUDGET" in environment) == ("--quest-max-budget" in words)
