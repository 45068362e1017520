"""``quest-vllm bench`` against endpoints whose pace is known, and its arithmetic."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from quest_vllm.bench import run as bench_run
from quest_vllm.bench.measure import Streamed, describe
from quest_vllm.bench.plan import Cell
from quest_vllm.bench.plot import draw_sweep
from quest_vllm.bench.prompts import MARK_TOKENS, Prompts
from quest_vllm.bench.server import serve_flags, started, stock_environment
from quest_vllm.bench.summary import percentiles
from quest_vllm.cli import main
from quest_vllm.errors import EvalUnavailable
from quest_vllm.eval.prompts import Codec, load_codec
from quest_vllm.eval.text import load_text
from tests.eval.endpoint import FakeEndpoint, budget_of, fake_endpoint

QUICK = "--context 64 --batch 2 --budgets dense,512 --tokens 8".split()
DENSE_PACE, SPARSE_PACE = 0.12, 0.03  # seconds a token: far above the delays of a machine that does other work
load_once = functools.cache(load_codec)


@pytest.fixture(scope="session")
def codec(model_path: Path) -> Codec:
    return load_once(str(model_path))


@pytest.fixture(autouse=True)
def one_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_run, "load_codec", load_once)


def bench(target: str, output: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    code = main(["bench", target, "--output", str(output), *(arguments or QUICK)])
    report = output / "results.json"
    return code, json.loads(report.read_text()) if report.exists() else {}


def slower_when_dense(budget: int) -> float:
    return DENSE_PACE if budget in (0, -1) else SPARSE_PACE


def measured(endpoint: FakeEndpoint) -> list[dict[str, Any]]:
    """Requests of rounds: neither probes nor warm-up."""
    return [body for body in endpoint.bodies if body["max_tokens"] == 8]


def test_a_pace_is_measured_and_compared(model_path: Path, tmp_path: Path, capsys: Any) -> None:
    with fake_endpoint(lambda prompt, budget: "", str(model_path), pace=slower_when_dense) as endpoint:
        code, document = bench(endpoint.url, tmp_path, *QUICK, "--repeats", "2")
    assert code == 0 and document["complete"]
    dense, sparse = document["cells"]
    assert (dense["series"], sparse["series"]) == ("dense", "512")
    least = 1e3 * 0.975 * DENSE_PACE
    assert dense["itl_ms"]["p50"] >= least and sparse["itl_ms"]["p50"] >= 1e3 * 0.9 * SPARSE_PACE
    assert dense["ttft_ms"]["p50"] >= least and dense["tpot_ms"]["p50"] >= least
    assert 1.5 < sparse["speedup"]["low"] <= sparse["speedup"]["itl"] <= sparse["speedup"]["high"] < 5
    assert sparse["speedup"]["pairs"] == 2 and "speedup" not in dense
    assert dense["output_tokens_per_second"] < 2 / DENSE_PACE < sparse["output_tokens_per_second"]
    requests = measured(endpoint)
    assert [budget_of(body) for body in requests] == [0, 0, 512, 512] * 2
    assert all(len(body["prompt"]) == 64 and body["ignore_eos"] and body["stream"] for body in requests)
    assert len({tuple(body["prompt"][: MARK_TOKENS + 1]) for body in endpoint.bodies if body.get("stream")}) == 10
    shown = capsys.readouterr().out
    assert "vs dense" in shown and f"{sparse['speedup']['itl']:.2f}x" in shown


def test_document_says_where_it_comes_from(model_path: Path, tmp_path: Path) -> None:
    with fake_endpoint(lambda prompt, budget: "", str(model_path)) as endpoint:
        _, document = bench(endpoint.url, tmp_path)
    assert document["command"].startswith(f"quest-vllm bench {endpoint.url} --output")
    assert set(document["environment"]) >= {"commit", "versions", "cores", "cpu", "gpus"}
    assert document["settings"] | {"tokens": 8, "seed": 0, "repeats": 1} == document["settings"]
    assert document["servers"]["quest"]["model"] == "fake-model"
    assert len(document["rounds"]) == 2 and all(len(record["ttft"]) == 2 for record in document["rounds"])


def test_pictures(model_path: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with fake_endpoint(lambda prompt, budget: "", str(model_path)) as endpoint:
        assert bench(endpoint.url, tmp_path, "--context", "32,64", "--batch", "1,2", "--tokens", "8")[0] == 0
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (tmp_path / "results.svg").read_text()


def test_every_point_of_the_picture_is_in_sight() -> None:
    """The last column's values, too, which exceed the first one's."""
    pytest.importorskip("matplotlib")
    cells = [
        {"context": context, "batch": batch, "series": "dense", "itl_ms": told, "ttft_ms": told}
        for context, batch in ((1024, 1), (3000, 1), (1024, 2), (3000, 2))
        for told in [{"p50": context * batch, "p90": 2 * context * batch}]
    ]
    figure = draw_sweep({"cells": cells, "settings": {"model": "m"}})
    for axis in figure.axes:
        low, high = axis.get_ylim()
        assert low == 0 and high >= 2 * 3000 * 2
    assert len(figure.axes) == 4


def test_without_matplotlib_it_says_so(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with fake_endpoint(lambda prompt, budget: "", str(model_path)) as endpoint:
        assert bench(endpoint.url, tmp_path)[0] == 0
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert not (tmp_path / "results.png").exists()


def test_against_a_stock_server_at_a_url(model_path: Path, tmp_path: Path) -> None:
    with (
        fake_endpoint(lambda prompt, budget: "", str(model_path), pace=slower_when_dense) as stock,
        fake_endpoint(lambda prompt, budget: "", str(model_path), pace=slower_when_dense) as ours,
    ):
        code, document = bench(ours.url, tmp_path, *QUICK, "--against", stock.url, "--repeats", "2")
    assert code == 0
    assert [cell["series"] for cell in document["cells"]] == ["stock", "dense", "512"]
    assert document["settings"]["against"] == "stock"
    by_series = {cell["series"]: cell for cell in document["cells"]}
    assert 0.6 < by_series["dense"]["speedup"]["itl"] < 1.6 < by_series["512"]["speedup"]["itl"]
    assert len(measured(stock)) == 4 and not any("vllm_xargs" in body for body in stock.bodies)
    assert len(measured(ours)) == 8


def test_failed_rounds_are_left_out_and_end_with_one(model_path: Path, tmp_path: Path, capsys: Any) -> None:
    def refuses(prompt: list[int], budget: int) -> str | tuple[int, str]:
        return (500, "no memory") if len(prompt) == 128 else ""

    with fake_endpoint(refuses, str(model_path)) as endpoint:
        code, document = bench(endpoint.url, tmp_path, "--context", "64,128", "--batch", "1", "--tokens", "8")
    assert code == 3  # three rounds in a row
    assert "HTTP 500: no memory" in capsys.readouterr().err
    with fake_endpoint(refuses, str(model_path)) as endpoint:
        code, document = bench(endpoint.url, tmp_path, *"--context 64,128 --batch 1 --tokens 8 --budgets 512".split())
    assert code == 1 and document["complete"]
    assert "2 rounds failed, the first with HTTP 500: no memory" in capsys.readouterr().err
    assert {cell["context"] for cell in document["cells"]} == {64}
    assert [("error" in record) for record in document["rounds"]] == [False, False, True, True]


def test_an_interrupted_sweep_leaves_what_it_has(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = bench_run.run_round, []

    async def interrupted(*arguments: Any) -> dict[str, Any]:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return await real(*arguments)

    monkeypatch.setattr(bench_run, "run_round", interrupted)
    with fake_endpoint(lambda prompt, budget: "", str(model_path)) as endpoint:
        code, document = bench(endpoint.url, tmp_path)
    assert code == 130
    assert not document["complete"] and len(document["rounds"]) == 1


def test_a_server_that_ignores_budgets_is_refused(model_path: Path, tmp_path: Path, capsys: Any) -> None:
    with fake_endpoint(lambda prompt, budget: "", str(model_path), honours_budgets=False) as endpoint:
        assert bench(endpoint.url, tmp_path)[0] == 3
        assert "this server ignores budgets" in capsys.readouterr().err
        assert bench(endpoint.url, tmp_path, *QUICK, "--budgets", "dense")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--context", "4"], 2, "whole numbers of at least 8, got '4'"),
        (["--batch", "0"], 2, "whole numbers of at least 1, got '0'"),
        (["--budgets", "dense,x"], 2, "got 'x'"),
        (["--tokens", "1"], 2, "at least 2, got '1'"),
        (["--against", "vllm"], 2, "dense, stock or the URL of a stock server, got 'vllm'"),
        (["--context", "8190", "--tokens", "8"], 2, "--context: expected at most 8184"),
        (["--text", "/does/not/exist"], 2, "--text: expected a readable UTF-8 file"),
        (["--model-name", "other"], 3, "--model-name: expected one of fake-model"),
        (["--", "--dtype", "float16"], 2, "only where a server is started, got --dtype float16"),
    ],
)
def test_bad_usage_names_the_flag_and_the_value(
    arguments: list[str], code: int, message: str, model_path: Path, tmp_path: Path, capsys: Any
) -> None:
    with fake_endpoint(lambda prompt, budget: "", str(model_path)) as endpoint:
        try:
            ended = bench(endpoint.url, tmp_path, *arguments)[0]
        except SystemExit as usage:
            ended = int(str(usage.code))
    assert ended == code
    assert message in capsys.readouterr().err


def test_no_server_is_three(tmp_path: Path, capsys: Any) -> None:
    assert main(["bench", "http://127.0.0.1:9", "--output", str(tmp_path)]) == 3
    assert "/v1/models: expected a list of models" in capsys.readouterr().err


def test_help_teaches(capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    for part in ("examples:", "exit codes:", "what is measured:", "--against", "results.svg"):
        assert part in shown


def test_itl_holds_no_prefill() -> None:
    """The second answer begins when the first has three chunks; what came before is not inter-token latency."""
    first = Streamed(sent=0.0, stamps=[1.0, 3.0, 5.0, 5.1, 5.2], prompt_tokens=10, tokens=5)
    second = Streamed(sent=0.0, stamps=[5.0, 5.1, 5.2, 5.3], prompt_tokens=10, tokens=4)
    numbers = describe([first, second])
    assert numbers["ttft"] == [1.0, 5.0]
    assert numbers["itl"] == pytest.approx([0.1] * 4)
    assert numbers["tpot"] == pytest.approx([4.2 / 4, 0.3 / 3])
    assert numbers["output_tokens_per_second"] == pytest.approx(9 / 5.3)


def test_no_common_decode_is_no_latency() -> None:
    first = Streamed(sent=0.0, stamps=[1.0, 1.1], tokens=2)
    second = Streamed(sent=0.0, stamps=[2.0, 2.1], tokens=2)
    assert describe([first, second])["itl"] == []
    assert percentiles([]) is None


def test_percentiles_are_milliseconds() -> None:
    assert percentiles([0.001 * n for n in range(1, 101)]) == {
        "mean": 50.5,
        "p50": 50.5,
        "p90": 90.1,
        "p99": 99.01,
        "n": 100,
    }


def test_prompts_are_exact_and_share_no_prefix(codec: Codec) -> None:
    prompts = Prompts(codec, load_text(None), seed=0)
    made = [prompt for repeat in (0, 1) for prompt in prompts.of(Cell(200, 3, 512), repeat)]
    assert [len(prompt) for prompt in made] == [200] * 6
    assert len({tuple(prompt[:MARK_TOKENS]) for prompt in made}) == 6
    assert made[:3] == Prompts(codec, load_text(None), seed=0).of(Cell(200, 3, 512), 0)


def test_stock_runs_without_our_plugins() -> None:
    alone = stock_environment({"A": "1"})
    assert alone["A"] == "1" and "quest_vllm" not in alone["VLLM_PLUGINS"]
    assert stock_environment({"VLLM_PLUGINS": "lora_resolver,quest_vllm"})["VLLM_PLUGINS"] == "lora_resolver"


def test_servers_have_room_for_the_sweep() -> None:
    flags = " ".join(serve_flags((64, 4096), (1, 8), 32))
    assert "--max-num-seqs 8" in flags and "--max-model-len 4128" in flags and "--no-enable-prefix-caching" in flags


def test_a_server_that_does_not_come_up_shows_its_log(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('no such model'); raise SystemExit(7)"]
    with (
        pytest.raises(EvalUnavailable, match="ended at start-up with code 7.*\n.*no such model"),
        started(command, {}, tmp_path / "log", 30),
    ):
        pass


def test_a_server_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with pytest.raises(EvalUnavailable, match="--start-timeout"), started(command, {}, tmp_path / "log", 1):
        pass
