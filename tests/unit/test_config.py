"""Server defaults: sources, precedence, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from quest_vllm import runtime
from quest_vllm.config import POLICIES, QuestConfig, default_config_path, load_config
from quest_vllm.errors import QuestConfigError, QuestError
from quest_vllm.server.flags import check_configuration


def test_default_yaml_is_found_names_every_key_and_agrees_with_the_dataclass() -> None:
    path = default_config_path()
    assert path is not None
    text = path.read_text()
    loaded = yaml.safe_load(text)
    assert list(loaded) == list(QuestConfig.__dataclass_fields__)
    assert load_config(None, {}) == QuestConfig()
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if line and not line.startswith("#"):
            assert lines[number - 1].startswith("#"), f"{line!r} has no comment above it"


def test_each_source_overrides_the_one_before(tmp_path: Path) -> None:
    file = tmp_path / "quest.yaml"
    file.write_text("token_budget: 512\npage_size: 32\nsink_pages: 2\n")
    additional = {"quest": {"token_budget": 1024, "page_size": 64}, "other": {"unknown": 1}}
    environ = {"QUEST_CONFIG": str(file), "QUEST_TOKEN_BUDGET": "4096", "QUEST_DENSE_LAYERS": "0,3"}
    config = load_config(additional, environ)
    assert (config.token_budget, config.page_size, config.sink_pages) == (4096, 64, 2)
    assert config.dense_layers == (0, 3)
    assert config.recent_pages == QuestConfig().recent_pages


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("QUEST_TOKEN_BUDGET", "0", ("token_budget", 0)),
        ("QUEST_PAGE_SIZE", "64", ("page_size", 64)),
        ("QUEST_SINK_PAGES", "0", ("sink_pages", 0)),
        ("QUEST_RECENT_PAGES", "1", ("recent_pages", 1)),
        ("QUEST_DENSE_LAYERS", "[]", ("dense_layers", ())),
        ("QUEST_GROUP_REDUCTION", "mean", ("group_reduction", "mean")),
        ("QUEST_GROUP_REDUCTION", "mass", ("group_reduction", "mass")),
        ("QUEST_POLICY", "two_stage", ("policy", "two_stage")),
        ("QUEST_BOUND_RADIUS", "0.25", ("bound_radius", 0.25)),
        ("QUEST_BOUND_RADIUS", "1", ("bound_radius", 1.0)),
        ("QUEST_IMPLEMENTATION", "reference", ("implementation", "reference")),
        ("QUEST_METRICS_DIR", "/var/quest", ("metrics_dir", "/var/quest")),
    ],
)
def test_every_key_has_an_environment_variable(name: str, text: str, expected: tuple[str, Any]) -> None:
    assert getattr(load_config(None, {name: text}), expected[0]) == expected[1]


@pytest.mark.parametrize(("key", "near"), [("token_budgets", "token_budget"), ("pagesize", "page_size"), (7, "")])
def test_unknown_key_names_the_source_and_the_nearest_key(key: Any, near: str) -> None:
    with pytest.raises(QuestConfigError, match=f"additional-config.*{key}.*did you mean '{near}"):
        load_config({"quest": {key: 1}}, {})


def test_mistyped_environment_variable_is_refused_and_a_stranger_is_not() -> None:
    with pytest.raises(QuestConfigError, match=r"QUEST_TOKEN_BUDGTE.*QUEST_TOKEN_BUDGET"):
        load_config(None, {"QUEST_TOKEN_BUDGTE": "512"})
    assert load_config(None, {"QUEST_PORT": "1"}) == QuestConfig()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("token_budget", True),
        ("token_budget", "512"),
        ("token_budget", 512.0),
        ("token_budget", -1),
        ("token_budget", 47),
        ("token_budget", 10**12),
        ("token_budget", None),
        ("page_size", 8),
        ("page_size", 16.0),
        ("page_size", False),
        ("sink_pages", -1),
        ("recent_pages", 0),
        ("dense_layers", 2),
        ("dense_layers", [-1]),
        ("dense_layers", [True]),
        ("dense_layers", "0,1"),
        ("group_reduction", "sum"),
        ("group_reduction", None),
        ("policy", "two-stage"),
        ("policy", None),
        ("page_summary", "means"),
        ("page_summary", None),
        ("bound_radius", -0.01),
        ("bound_radius", 1.01),
        ("bound_radius", "0.5"),
        ("bound_radius", True),
        ("bound_radius", None),
        ("bound_radius", float("nan")),
        ("implementation", "CUDA"),
        ("metrics_dir", 3),
    ],
)
def test_bad_value_names_key_expectation_and_value(key: str, value: Any) -> None:
    with pytest.raises(QuestConfigError) as caught:
        load_config({"quest": {key: value}}, {})
    message = str(caught.value)
    assert key in message and "expected" in message and repr(value) in message
    assert isinstance(caught.value, QuestError) and isinstance(caught.value, ValueError)


@pytest.mark.parametrize("value", [[], "fast", 3])
def test_quest_section_must_be_a_mapping(value: Any) -> None:
    with pytest.raises(QuestConfigError, match="expected a mapping"):
        load_config({"quest": value}, {})


@pytest.mark.parametrize("text", ["- 1\n", "a: [", "\x00"])
def test_bad_yaml_names_the_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(QuestConfigError, match=r"broken\.yaml"):
        load_config(None, {"QUEST_CONFIG": str(file)})


def test_missing_named_yaml_is_an_error_and_an_empty_one_is_not(tmp_path: Path) -> None:
    with pytest.raises(QuestConfigError, match=r"absent\.yaml"):
        load_config(None, {"QUEST_CONFIG": str(tmp_path / "absent.yaml")})
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_config(None, {"QUEST_CONFIG": str(tmp_path / "empty.yaml")}) == QuestConfig()


def test_bad_environment_number_names_the_variable() -> None:
    with pytest.raises(QuestConfigError, match="QUEST_BOUND_RADIUS: expected a number, got 'wide'"):
        load_config(None, {"QUEST_BOUND_RADIUS": "wide"})
    with pytest.raises(QuestConfigError, match="bound_radius: expected a number from 0 to 1, got nan"):
        load_config(None, {"QUEST_BOUND_RADIUS": "nan"})


def test_bad_environment_integer_names_the_variable() -> None:
    with pytest.raises(QuestConfigError, match="QUEST_PAGE_SIZE: expected an integer, got 'big'"):
        load_config(None, {"QUEST_PAGE_SIZE": "big"})


def test_key_codes_are_for_pages_of_sixteen_tokens() -> None:
    assert load_config(None, {"QUEST_PAGE_SUMMARY": "key_codes"}).page_summary == "key_codes"
    with pytest.raises(QuestConfigError, match="page_size: expected 16 with page_summary key_codes, got 32"):
        load_config({"quest": {"page_summary": "key_codes", "page_size": 32}}, {})


def test_smallest_budget_is_the_forced_pages() -> None:
    config = QuestConfig(token_budget=96, page_size=32)
    assert config.min_token_budget == 96
    with pytest.raises(QuestConfigError, match="at least 192"):
        QuestConfig(token_budget=96, page_size=64)


@pytest.mark.parametrize(
    ("settings", "head_dim", "summary", "reduction"),
    [
        ({}, 128, "key_codes", "mass"),
        ({}, 64, "key_codes", "mass"),
        ({}, None, "key_codes", "mass"),
        ({}, 80, "min_max", "max"),
        ({"page_size": 32}, 128, "min_max", "max"),
        ({"bound_radius": 1.0}, 128, "min_max", "max"),
        ({"page_summary": "min_max"}, 128, "min_max", "max"),
        ({"page_summary": "min_max", "group_reduction": "mass"}, 128, "min_max", "mass"),
        ({"group_reduction": "per_query_head"}, 128, "key_codes", "per_query_head"),
        ({"page_summary": "key_codes", "bound_radius": 1.0}, 80, "key_codes", "mass"),  # named: refused at start-up
    ],
)
def test_auto_is_key_codes_where_they_can_be_had(
    settings: dict[str, Any], head_dim: int | None, summary: str, reduction: str
) -> None:
    config = QuestConfig(**settings)
    why = config.why_boxes(head_dim)
    found = config.resolved(why)
    assert (found.page_summary, found.group_reduction) == (summary, reduction)
    assert found.policy == found.policies[0] == reduction
    assert found.resolved() == found
    if "page_summary" not in settings:
        assert bool(why) == (summary == "min_max")


@pytest.mark.parametrize(
    ("settings", "legal"),
    [
        ({}, "mass, max, mean, two_stage, window"),
        ({"page_summary": "min_max"}, "max, window"),
        ({"page_size": 32}, "max, window"),
        ({"group_reduction": "mean"}, "mean, window"),
        ({"page_summary": "min_max", "group_reduction": "mass"}, "mass, max, mean, window"),
        ({"group_reduction": "per_query_head"}, "per_query_head, window"),
    ],
)
def test_a_default_policy_must_be_one_that_a_request_may_name(settings: dict[str, Any], legal: str) -> None:
    names = legal.split(", ")
    for policy in POLICIES:
        if policy in names:
            found = load_config({"quest": {**settings, "policy": policy}}, {}).resolved()
            assert (found.policy, found.policies[0]) == (policy, policy) and sorted(found.policies) == sorted(names)
            assert found.resolved() == found
            continue
        with pytest.raises(QuestConfigError) as caught:  # as soon as group_reduction is known
            load_config({"quest": {**settings, "policy": policy}}, {}).resolved()
        reduction = names[0]
        lacking = "page_summary to key_codes" if reduction == "mass" else "group_reduction to mass"
        hint = "" if policy == "per_query_head" else f"; set {lacking} for others"
        expected = f"policy: expected one of auto, {legal} with group_reduction {reduction}, got '{policy}'{hint}"
        assert str(caught.value) == expected


def test_a_default_policy_is_checked_once_the_model_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.compat, "is_cpu_platform", lambda: True)
    assert runtime.config_of(vllm_config(64, torch.float16, 14, 1, policy="two_stage")).policy == "two_stage"
    with pytest.raises(QuestConfigError, match="policy: expected one of auto, max, window with .*, got 'two_stage'"):
        runtime.config_of(vllm_config(80, torch.float16, 14, 1, policy="two_stage"))


@pytest.mark.parametrize(
    ("words", "environment", "refused"),
    [
        (["model"], {"QUEST_POLICY": "two_stage"}, False),
        (["model"], {"QUEST_POLICY": "two_stage", "QUEST_PAGE_SUMMARY": "min_max"}, True),
        (["model", "--additional-config", '{"quest": {"page_size": 32}}'], {"QUEST_POLICY": "two_stage"}, True),
        (["model"], {"QUEST_POLICY": "two_stage", "QUEST_GROUP_REDUCTION": "max"}, True),
        (["--port", "80", "model"], {"QUEST_POLICY": "two_stage", "QUEST_GROUP_REDUCTION": "max"}, True),
        # what is calibrated for a model that is not known here may say otherwise: the server decides
        (["--port", "80", "model"], {"QUEST_POLICY": "two_stage", "QUEST_PAGE_SUMMARY": "min_max"}, False),
    ],
)
def test_serve_refuses_a_default_policy_before_vllm_starts(
    words: list[str], environment: dict[str, str], refused: bool
) -> None:
    if not refused:
        check_configuration(words, environment)
        return
    with pytest.raises(QuestConfigError, match="^policy: expected one of auto, max, window .* got 'two_stage'; set"):
        check_configuration(words, environment)


GPU_MODEL = {"head_dim": 128, "dtype": torch.bfloat16, "heads": 32, "kv_heads": 8}


def vllm_config(head_dim: int, dtype: torch.dtype, heads: int, kv_heads: int, **quest: Any) -> SimpleNamespace:
    model = SimpleNamespace(
        dtype=dtype,
        get_head_size=lambda: head_dim,
        get_num_attention_heads=lambda _: heads,
        get_num_kv_heads=lambda _: kv_heads,
    )
    return SimpleNamespace(additional_config={"quest": quest}, model_config=model, parallel_config=None)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, None),
        ({"heads": 64}, None),
        ({"heads": 72}, "no CUDA kernels for key codes with 9 query heads a KV head"),
        ({"dtype": torch.float16}, "no CUDA kernels for key codes with torch.float16"),
        ({"implementation": "triton"}, "no CUDA kernels for key codes with implementation triton"),
        ({"head_dim": 80}, "key codes need a head_dim that is a multiple of 64, got 80"),
        ({"generation": 8}, "no CUDA kernels for key codes with compute capability 8.x"),
    ],
)
def test_the_server_says_what_auto_chose_and_why(
    change: dict[str, Any], why: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runtime._report_summary.cache_clear()
    settings = {**GPU_MODEL, **change}
    generation = settings.pop("generation", 9)
    monkeypatch.setattr(runtime.compat, "is_cpu_platform", lambda: False)
    monkeypatch.setattr(runtime.compat, "gpu_generation", lambda: generation)
    with caplog.at_level("INFO", logger="vllm.quest_vllm"):
        found = [runtime.config_of(vllm_config(**settings)) for _ in range(2)]
    assert {config.page_summary for config in found} == {"min_max" if why else "key_codes"}
    said = [record.getMessage() for record in caplog.records if "page_summary auto" in record.getMessage()]
    assert said == [f"quest_vllm: page_summary auto: {f'min_max ({why})' if why else 'key_codes'}"]


def test_on_a_cpu_auto_asks_for_no_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.compat, "is_cpu_platform", lambda: True)
    assert runtime.config_of(vllm_config(64, torch.float16, 14, 1)).page_summary == "key_codes"
    assert runtime.config_of(vllm_config(80, torch.float16, 14, 1)).page_summary == "min_max"
