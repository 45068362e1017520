"""What ``quest-vllm serve`` hands to ``vllm serve``."""

from __future__ import annotations

import pytest

from quest_vllm.cli import BACKEND_FLAG, MIDDLEWARE, main, serve_command
from quest_vllm.server.flags import split_flags


@pytest.mark.parametrize(
    "flags",
    [
        ["m", "--port", "1", "--enforce-eager"],
        ["m", "--attention-config", '{"flash_attn_version": 3}'],
        ["m", "--attention-config", "not json"],
        ["--model", "m", "--additional-config", '{"quest": {"token_budget": 512}}'],
    ],
)
def test_flags_pass_untouched_and_the_backend_is_added(flags: list[str]) -> None:
    assert serve_command(flags) == ["serve", *flags, *MIDDLEWARE, BACKEND_FLAG, "CUSTOM"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--attention-backend", "CUSTOM"],
        ["--attention_backend=custom"],
        ["--attention-config.backend", "CUSTOM"],
        ["-ac", '{"backend": "CUSTOM"}'],
    ],
)
def test_a_backend_that_is_given_is_not_given_twice(flags: list[str]) -> None:
    assert serve_command(["m", *flags]) == ["serve", "m", *flags, *MIDDLEWARE]


@pytest.mark.parametrize(
    "flags",
    [
        ["--attention-backend", "FLASH_ATTN"],
        ["--attention_backend=FLASH_ATTN"],
        ["--attention-config.backend=FLASH_ATTN"],
        ["--attention-config", '{"backend": "FLASH_ATTN"}'],
        ["--attention-backend", "CUSTOM", "--attention-backend", "FLASH_ATTN"],
    ],
)
def test_another_backend_is_refused_by_name(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        serve_command(["m", *flags])
    assert ended.value.code == 2
    assert "'FLASH_ATTN'" in capsys.readouterr().err


def test_serve_without_a_model_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve"])
    assert ended.value.code == 2
    assert "expected a MODEL" in capsys.readouterr().err


def test_our_own_flags_become_environment_and_the_rest_keeps_its_order() -> None:
    flags = ["m", "--port", "1", "--quest-audit", "500", "-ac", '{"backend": "CUSTOM"}', "--lora-modules", "a=b"]
    rest, environment = split_flags(flags)
    assert rest == [flag for flag in flags if flag not in ("--quest-audit", "500")]
    assert environment == {"QUEST_AUDIT_STEPS": "500"}
    assert split_flags(["m", "--quest-audit=7"]) == (["m"], {"QUEST_AUDIT_STEPS": "7"})


def test_the_page_brings_its_middleware() -> None:
    rest, environment = split_flags(["m", "--quest-page", "--port", "1"])
    assert rest == ["m", "--port", "1", "--middleware", "quest_vllm.page.routes.QuestPage"]
    assert environment == {"QUEST_PAGE": "true"}


def test_own_flag_without_its_value_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        split_flags(["m", "--quest-audit"])
    assert ended.value.code == 2
    assert "--quest-audit" in capsys.readouterr().err
