"""``quest-vllm eval URL`` from end to end against servers whose answers are known."""

from __future__ import annotations

import functools
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from quest_vllm.cli import main
from quest_vllm.eval import http_runner
from quest_vllm.eval.prompts import Codec
from tests.eval.endpoint import Answer, FakeEndpoint, fake_endpoint
from tests.eval.solvers import solve

QUICK = ["--context", "1024", "--items", "2", "--budgets", "dense,256"]


load_once = functools.cache(http_runner.load_codec)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pauses between tries, one tokenizer for all tests."""
    monkeypatch.setattr(http_runner, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(http_runner, "load_codec", load_once)


def always_right(codec: Codec) -> Answer:
    return lambda prompt, budget: solve(codec.decode(prompt))


def evaluate(endpoint: FakeEndpoint, output: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    code = main(["eval", endpoint.url, "--output", str(output), *(arguments or QUICK)])
    report = output / "results.json"
    return code, json.loads(report.read_text()) if report.exists() else {}


def means(document: dict[str, Any], metric: str) -> dict[tuple[str, int], float]:
    return {(c["task"], c["budget"]): c[metric]["mean"] for c in document["summary"]["cells"] if metric in c}


def test_always_right_scores_one_in_every_task(codec: Codec, model_path: Path, tmp_path: Path) -> None:
    with fake_endpoint(always_right(codec), str(model_path)) as endpoint:
        code, document = evaluate(endpoint, tmp_path)
    assert code == 0
    scores = means(document, "score")
    assert len(scores) == 20 and set(scores.values()) == {1.0}
    assert set(means(document, "agreement").values()) == {1.0}
    assert sorted(endpoint.budgets()) == [0] * 22 + [256] * 22
    assert all(body["temperature"] == 0 and len(body["prompt"]) == 1024 for body in endpoint.bodies[1:])
    assert document["settings"]["model"] == "fake-model"
    assert document["settings"]["seed"] == 0


def test_always_wrong_scores_zero_in_every_task(model_path: Path, tmp_path: Path) -> None:
    with fake_endpoint(lambda prompt, budget: " None of 1, 2, x -> y, Entry 1: 0 + 0 = 0", str(model_path)) as endpoint:
        code, document = evaluate(endpoint, tmp_path)
    assert code == 0
    scores = means(document, "score")
    assert len(scores) == 20 and set(scores.values()) == {0.0}


def test_a_loss_at_one_budget_is_seen_there_alone(codec: Codec, model_path: Path, tmp_path: Path, capsys: Any) -> None:
    def forgetful(prompt: list[int], budget: int) -> str:
        return solve(codec.decode(prompt)) if budget in (0, 512) else " lost"

    with fake_endpoint(forgetful, str(model_path)) as endpoint:
        arguments = "--context 1024 --items 8 --budgets 256,512 --tasks needle_single,few_shot".split()
        code, document = evaluate(endpoint, tmp_path, *arguments)
    assert code == 0
    changes = {row["budget"]: row.get("score_change") for row in document["summary"]["overall"]}
    assert changes[0] is None  # dense is measured though nobody named it
    assert (changes[512]["mean"], changes[256]["mean"]) == (0.0, -1.0)
    assert changes[512]["low"] < 0 < changes[512]["high"]
    assert changes[256]["high"] < 0
    assert "0.00!" in capsys.readouterr().out


def test_an_interrupted_run_goes_on_where_it_stopped(codec: Codec, model_path: Path, tmp_path: Path) -> None:
    calls = itertools.count()

    def dies_on_the_way(prompt: list[int], budget: int) -> str | tuple[int, str]:
        return solve(codec.decode(prompt)) if next(calls) < 9 else (500, "out of memory")

    with fake_endpoint(dies_on_the_way, str(model_path)) as endpoint:
        code, document = evaluate(endpoint, tmp_path, *QUICK, "--concurrency", "2")
    assert (code, document) == (3, {})
    raw = tmp_path / "items.jsonl"
    raw.write_text(raw.read_text() + '{"task": "needle_si')  # as a kill in the middle of a write leaves it
    with fake_endpoint(always_right(codec), str(model_path)) as endpoint:
        code, document = evaluate(endpoint, tmp_path)
        assert len(endpoint.budgets()) == 44 - 9
        assert code == 0 and set(means(document, "score").values()) == {1.0}
        assert all("error" not in record for record in document["items"])
        evaluate(endpoint, tmp_path, *QUICK[:-1], "dense,256,128")
        assert endpoint.budgets()[44 - 9 :] == [128] * 22  # a new budget alone is measured


def test_another_run_in_the_same_directory_is_refused(
    codec: Codec, model_path: Path, tmp_path: Path, capsys: Any
) -> None:
    with fake_endpoint(always_right(codec), str(model_path)) as endpoint:
        assert evaluate(endpoint, tmp_path, *QUICK, "--tasks", "few_shot")[0] == 0
        assert evaluate(endpoint, tmp_path, *QUICK, "--tasks", "few_shot", "--seed", "1")[0] == 2
    assert "holds a run with seed 0, this one has 1" in capsys.readouterr().err


def test_single_failures_are_reported_and_retried(codec: Codec, model_path: Path, tmp_path: Path, capsys: Any) -> None:
    def refuses_small_budgets(prompt: list[int], budget: int) -> str | tuple[int, str]:
        return (400, "budget too small") if budget == 64 else solve(codec.decode(prompt))

    arguments = "--context 1024 --items 2 --budgets dense,64 --tasks needle_single --concurrency 4".split()
    with fake_endpoint(refuses_small_budgets, str(model_path)) as endpoint:
        code, document = evaluate(endpoint, tmp_path, *arguments)
    assert code == 1
    assert "2 measurements failed" in capsys.readouterr().err
    assert endpoint.budgets().count(64) == 2  # HTTP 400 is not tried again
    assert [record["error"] for record in document["items"] if record["budget"]] == ["HTTP 400: budget too small"] * 2
    with fake_endpoint(always_right(codec), str(model_path)) as endpoint:
        assert evaluate(endpoint, tmp_path, *arguments)[0] == 0
        assert endpoint.budgets() == [64, 64]


def test_a_busy_server_is_asked_again(codec: Codec, model_path: Path, tmp_path: Path) -> None:
    calls = itertools.count()

    def busy(prompt: list[int], budget: int) -> str | tuple[int, str]:
        return (429, "busy") if next(calls) % 2 else solve(codec.decode(prompt))

    with fake_endpoint(busy, str(model_path)) as endpoint:
        arguments = [*QUICK, "--tasks", "few_shot", "--concurrency", "1"]
        code, document = evaluate(endpoint, tmp_path, *arguments)
    assert code == 0 and set(means(document, "score").values()) == {1.0}
    assert len(endpoint.budgets()) > 4


def test_concurrency_is_bounded_and_used(codec: Codec, model_path: Path, tmp_path: Path) -> None:
    def slow(prompt: list[int], budget: int) -> str:
        time.sleep(0.05)
        return " ?"

    with fake_endpoint(slow, str(model_path)) as endpoint:
        evaluate(endpoint, tmp_path, *QUICK, "--tasks", "needle_single,few_shot,arithmetic_chain", "--concurrency", "3")
    assert endpoint.most_at_once == 3


def test_a_server_that_ignores_budgets_is_refused(codec: Codec, model_path: Path, tmp_path: Path, capsys: Any) -> None:
    with fake_endpoint(always_right(codec), str(model_path), honours_budgets=False) as endpoint:
        assert evaluate(endpoint, tmp_path)[0] == 3
        assert "this server ignores budgets" in capsys.readouterr().err
        assert evaluate(endpoint, tmp_path, "--context", "1024", "--items", "2", "--budgets", "dense")[0] == 0


def test_no_server_is_exit_code_three(tmp_path: Path, capsys: Any) -> None:
    assert main(["eval", "http://127.0.0.1:9", "--output", str(tmp_path)]) == 3
    assert "/v1/models: expected a list of models" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budgets", "dense,abc"], "'abc'"),
        (["--items", "1"], "at least 2"),
        (["--tasks", "needle_single,nothing"], "got 'nothing'"),
        (["--context", "8192"], "--context: expected at most"),
        (["--context", "1024", "--budgets", "9000"], "--budgets: expected at most the server's max_model_len of 8192"),
        (["--context", "300"], "--context: expected at least"),
        (["--tasks", "text"], "needs a model in process"),
        (["--question", "decode"], "decode needs a model in process"),
        (["--engine-args", "[1]"], "expected a JSON object"),
        (["--text", "/does/not/exist"], "--text: expected a readable UTF-8 file"),
        (["--model-name", "other"], "--model-name: expected one of fake-model"),
        (["--tokenizer", "/does/not/exist"], "--tokenizer: expected a model folder"),
    ],
)
def test_bad_usage_names_the_flag_and_the_value(
    arguments: list[str], message: str, model_path: Path, tmp_path: Path, capsys: Any
) -> None:
    with fake_endpoint(lambda prompt, budget: "", str(model_path)) as endpoint:
        try:
            code = evaluate(endpoint, tmp_path, *arguments)[0]
        except SystemExit as ended:
            code = int(str(ended.code))
    assert code == (3 if "--model-name" in arguments else 2)
    assert message in capsys.readouterr().err
    assert not endpoint.budgets()


def test_without_matplotlib_the_run_says_so(
    codec: Codec, model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with fake_endpoint(always_right(codec), str(model_path)) as endpoint:
        assert evaluate(endpoint, tmp_path, *QUICK, "--tasks", "few_shot")[0] == 0
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert not (tmp_path / "results.png").exists()


def test_with_matplotlib_there_is_a_picture(codec: Codec, model_path: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with fake_endpoint(always_right(codec), str(model_path)) as endpoint:
        assert evaluate(endpoint, tmp_path, *QUICK, "--tasks", "few_shot")[0] == 0
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_help_teaches(capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["eval", "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    for part in ("exit codes:", "examples:", "arithmetic_chain", "items.jsonl", "question in decode"[:8]):
        assert part in shown


def test_more_arguments_go_with_every_request(codec: Codec, model_path: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = [*QUICK, "--tasks", "few_shot"]
    with fake_endpoint(always_right(codec), str(model_path)) as endpoint:
        assert evaluate(endpoint, tmp_path, *arguments, "--xargs", '{"some_policy": "mass"}')[0] == 0
        measured = [body["vllm_xargs"] for body in endpoint.bodies if body["vllm_xargs"]["quest_token_budget"] >= 0]
        assert [xargs["some_policy"] for xargs in measured] == ["mass"] * 4
        assert evaluate(endpoint, tmp_path, *arguments)[0] == 2  # other arguments, another run
    assert "holds a run with xargs {'some_policy': 'mass'}" in capsys.readouterr().err
