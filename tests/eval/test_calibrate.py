"""Calibration: equal bytes, the choice, the file, and the way of that file into serving."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from quest_vllm.cli import main
from quest_vllm.config import QuestConfig, load_config
from quest_vllm.errors import QuestConfigError
from quest_vllm.eval import calibrate_cli
from quest_vllm.eval.calibrate import Candidate, Shares, Task, calibrate, choose, equal_bytes_budget, shares_of
from quest_vllm.eval.engine_probe import Probe, set_sparse_layers
from quest_vllm.eval.library import Library
from quest_vllm.eval.plan import Plan
from quest_vllm.eval.prompts import Codec
from quest_vllm.eval.text import TEXT, load_text
from quest_vllm.model_settings import file_name, find_settings
from quest_vllm.runtime import config_of

CONFIG = QuestConfig()


def test_dense_layers_are_paid_for_by_the_others() -> None:
    assert equal_bytes_budget(CONFIG, 512, 4096, layers=30, dense=0) == 512
    # 30 * (512 + 256) = 4096 + 29 * (b + 256): 397.3, in whole pages 384
    assert equal_bytes_budget(CONFIG, 512, 4096, layers=30, dense=1) == 384
    assert equal_bytes_budget(CONFIG, 512, 4096, layers=30, dense=6) < 0
    assert equal_bytes_budget(CONFIG, 512, 4096, layers=2, dense=2) <= 0


@given(
    st.integers(48, 4096), st.integers(1, 16384), st.integers(1, 80), st.integers(0, 80), st.sampled_from((16, 32, 64))
)
def test_equal_bytes_never_reads_more(budget: int, extra: int, layers: int, dense: int, page_size: int) -> None:
    context, dense = budget + extra, min(dense, layers)
    config = QuestConfig(page_size=page_size, token_budget=0)
    others = equal_bytes_budget(config, budget, context, layers, dense)
    summaries = -(-context // page_size)
    if others > 0:
        assert others % page_size == 0
        read = dense * context + (layers - dense) * (others + summaries)
        assert read <= layers * (budget + summaries)
        if dense < layers:  # and wastes less than a page in each layer
            assert read + (layers - dense) * (page_size + 1) > layers * (budget + summaries)


def candidate(layers: tuple[int, ...], mean: float, spread: float = 0.01) -> Candidate:
    return Candidate(layers, 512, tuple(mean + spread * np.sin(np.arange(8))))


def test_a_dense_layer_must_earn_its_place() -> None:
    none, one = candidate((), 0.10), candidate((4,), 0.05)
    hardly = Candidate((4, 9), 512, tuple(kl - 0.001 + 0.02 * (-1) ** n for n, kl in enumerate(one.kl)))
    assert choose([none, one, hardly]).dense_layers == (4,)
    assert choose([one, none]) is one
    assert choose([none, candidate((4,), 0.2), candidate((4, 9), 0.02)]).dense_layers == (4, 9)


class LayersThatMatter:
    """KL of windows whose sparse layers add up: ``worth`` by layer, over the budget."""

    def __init__(self, worth: dict[int, float], windows: Sequence[float]) -> None:
        self.layers, self.worth, self.windows = sorted(worth), worth, windows

    def kl(self, dense_layers: Sequence[int], budget: int, shares: Shares | None = None) -> list[float]:
        sparse = [layer for layer in self.layers if layer not in dense_layers]
        own = shares or dict.fromkeys(sparse, 1.0)
        lost = sum(self.worth[layer] / (budget * own[layer]) for layer in sparse)
        return [lost * window for window in self.windows]

    def kl_alone(self, layer: int, budget: int) -> list[float]:
        return self.kl([other for other in self.layers if other != layer], budget)


def test_the_layer_that_loses_most_stays_dense_where_that_pays_and_text_held_back_judges() -> None:
    worth = dict.fromkeys(range(24), 1.0) | {7: 200.0}
    opened: list[Sequence[float]] = []

    @contextlib.contextmanager
    def probe(windows: Sequence[float]) -> Iterator[LayersThatMatter]:
        opened.append(windows)
        yield LayersThatMatter(worth, windows)

    task = Task(QuestConfig(), 512, 4096, 2, [1.0, 1.1, 0.9, 1.0, 2.0, 2.1, 1.9, 2.0])
    found = calibrate(probe, task, lambda _: None)
    assert opened == [task.windows[:4], task.windows[4:]]
    assert found["settings"] == {"dense_layers": [7], "layer_shares": {}}  # the others are alike: nothing to spread
    held_back = found["evidence"]["held_back"]
    budget = equal_bytes_budget(task.config, 512, 4096, 24, 1)
    assert held_back["chosen"] == {
        "dense_layers": [7],
        "budget": budget,
        "kl": pytest.approx({"mean": 23 / budget * 2, "low": 23 / budget * 2, "high": 23 / budget * 2}, rel=0.06),
    }
    assert held_back["no_dense_layer"]["kl_of_chosen_less_this"]["high"] < 0


def test_pages_are_spread_by_loss_where_that_pays() -> None:
    worth = {layer: float(1 + layer % 7) for layer in range(24)}

    @contextlib.contextmanager
    def probe(windows: Sequence[float]) -> Iterator[LayersThatMatter]:
        yield LayersThatMatter(worth, windows)

    found = calibrate(probe, Task(QuestConfig(), 512, 4096, 2, [1.0, 1.1, 0.9, 1.0] * 2), lambda _: None)
    losses = {layer: value / 512 for layer, value in worth.items()}
    assert found["settings"] == {"dense_layers": [], "layer_shares": shares_of(losses)}
    assert QuestConfig(**found["settings"]).layer_shares == tuple(shares_of(losses).items())
    last = found["evidence"]["candidates_at_equal_bytes"][-1]
    assert (last["budget"], last["layer_shares"]) == (512, shares_of(losses))
    held_back = found["evidence"]["held_back"]
    assert held_back["chosen"]["layer_shares"] == shares_of(losses)
    assert "layer_shares" not in held_back["no_dense_layer"]
    assert held_back["no_dense_layer"]["kl_of_chosen_less_this"]["high"] < 0


@given(st.dictionaries(st.integers(0, 200), st.floats(-0.01, 10), min_size=1, max_size=60))
def test_shares_grow_with_losses_and_have_the_mean_1(losses: dict[int, float]) -> None:
    shares = shares_of(losses)
    assert shares.keys() == losses.keys()
    assert sum(shares.values()) / len(shares) == pytest.approx(1, abs=0.001)
    ordered = [shares[layer] for layer in sorted(losses, key=losses.__getitem__)]
    assert ordered == sorted(ordered)
    QuestConfig(layer_shares=tuple(shares.items()))


def written(folder: Path, model: str, document: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(model)
    path.write_text(yaml.safe_dump(document))
    return path


def test_a_models_file_is_found_by_its_last_name(tmp_path: Path) -> None:
    path = written(tmp_path / "own", "org/Small-1B", {"settings": {"dense_layers": [3]}})
    environ = {"QUEST_MODELS_DIR": str(tmp_path / "own"), "HOME": str(tmp_path / "home")}
    for model in ("org/Small-1B", "/data/models/Small-1B/", "Small-1B"):
        assert find_settings(model, environ) == (str(path), {"dense_layers": [3]})
    assert find_settings("org/Small-2B", environ) == ("", {})
    home = {"HOME": str(tmp_path / "home")}
    assert find_settings("Small-1B", home) == ("", {})
    written(tmp_path / "home/.config/quest_vllm/models", "Small-1B", {"settings": {"dense_layers": [5]}})
    assert find_settings("Small-1B", home)[1] == {"dense_layers": [5]}
    assert find_settings("Small-1B", environ | home)[1] == {"dense_layers": [3]}


def test_calibrated_settings_lie_between_the_defaults_and_what_a_user_says(tmp_path: Path) -> None:
    environ = {"QUEST_MODELS_DIR": str(tmp_path), "HOME": str(tmp_path)}
    written(tmp_path, "small", {"settings": {"dense_layers": [7]}, "evidence": {}})
    assert load_config(None, environ, model="small").dense_layers == (7,)
    assert load_config(None, environ).dense_layers == load_config(None, environ, model="other").dense_layers == ()
    assert load_config({"quest": {"dense_layers": [2]}}, environ, model="small").dense_layers == (2,)
    assert load_config(None, environ | {"QUEST_DENSE_LAYERS": "4"}, model="small").dense_layers == (4,)
    own = tmp_path / "mine.yaml"
    own.write_text("dense_layers: [9]\n")
    assert load_config(None, environ | {"QUEST_CONFIG": str(own)}, model="small").dense_layers == (9,)
    own.write_text("token_budget: 256\n")
    named = load_config(None, environ | {"QUEST_CONFIG": str(own)}, model="small")
    assert (named.dense_layers, named.token_budget) == ((7,), 256)


@pytest.mark.parametrize(
    ("document", "message"),
    [({"dense_layers": [1]}, "the key settings"), ([1], "the key settings"), ({"settings": {"dense": [1]}}, "dense")],
)
def test_a_bad_file_is_refused_by_name(document: object, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, "small", document)
    with pytest.raises(QuestConfigError, match=message) as refused:
        load_config(None, {"QUEST_MODELS_DIR": str(tmp_path)}, model="small")
    assert str(path) in str(refused.value)


def test_serving_reads_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUEST_MODELS_DIR", str(tmp_path))
    written(tmp_path, "tiny-7", {"settings": {"dense_layers": [11]}})
    vllm_config = SimpleNamespace(additional_config={}, model_config=SimpleNamespace(model="/models/tiny-7"))
    assert config_of(vllm_config).dense_layers == (11,)
    vllm_config.additional_config = {"quest": {"dense_layers": []}}
    assert config_of(vllm_config).dense_layers == ()
    assert config_of(None).dense_layers == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "32"], "--budget: expected 48 to 4095"),
        (["--budget", "512", "--context", "512"], "--budget: expected 48 to 511 (less than the context), got 512"),
    ],
)
def test_bad_usage(arguments: list[str], message: str, model_path: Path, capsys: Any) -> None:
    assert main(["calibrate", str(model_path), *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("variable", "value"), [("QUEST_DENSE_LAYERS", "0,1"), ("QUEST_LAYER_SHARES", "0=1")])
def test_an_answer_given_beforehand_is_refused(
    variable: str, value: str, model_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv(variable, value)
    assert main(["calibrate", str(model_path)]) == 2
    assert f"{variable}: expected unset, as calibration looks for it, got {value}" in capsys.readouterr().err


@pytest.fixture
def engine(llm: Any) -> Iterator[Any]:
    """The shared engine, with the layers that it began with afterwards."""
    yield llm
    llm.collective_rpc(set_sparse_layers, args=(list(range(30)),))


@pytest.mark.engine
def test_only_the_layers_that_are_named_select(engine: Any, codec: Codec, tmp_path: Path) -> None:
    plan = Plan((TEXT,), (384,), 2, ("decode",), (0, 64), seed=0)
    library = Library(codec, plan, load_text(None), text_tokens=6)
    probe = Probe(engine, [library.item(TEXT, 384, index) for index in range(2)], tmp_path)
    assert probe.layers == list(range(30))
    rounding = np.mean(probe.kl(probe.layers, 64))
    alone = {layer: np.mean(probe.kl_alone(layer, 64)) for layer in (0, 12)}
    everything = np.mean(probe.kl([], 64))
    assert rounding < 0.002
    assert all(rounding <= value + 0.002 for value in alone.values())
    assert max(alone.values()) < everything
    assert np.mean(probe.kl([], 1024)) < 0.005  # covers the context
    # all pages beyond the forced in two layers are nearly all pages of those: the others lose as with the forced alone
    least, only = CONFIG.min_token_budget, {layer: float(layer in (3, 4)) for layer in range(30)}
    assert np.mean(probe.kl([], 64, only)) == pytest.approx(np.mean(probe.kl([3, 4], least)), rel=0.2)
    assert np.mean(probe.kl([], 64, dict.fromkeys(range(30), 2.0))) == pytest.approx(everything, rel=1e-6)


@pytest.mark.engine
def test_the_command_line_writes_a_file_that_serving_takes(
    engine: Any, model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(calibrate_cli, "start_engine", lambda arguments: engine)
    monkeypatch.setattr(calibrate_cli, "stop_engine", lambda engine: None)
    monkeypatch.setenv("QUEST_MODELS_DIR", str(tmp_path))
    arguments = "--context 320 --budget 96 --windows 4 --text-tokens 3 --max-dense 2".split()
    output = tmp_path / file_name(str(model_path))
    assert main(["calibrate", str(model_path), *arguments, "--output", str(output)]) == 0
    document = yaml.safe_load(output.read_text())
    evidence = document["evidence"]
    assert sorted(evidence["kl_of_each_layer_sparse_alone"]) == list(range(30))
    assert all(value >= 0 for value in evidence["kl_of_each_layer_sparse_alone"].values())
    worst = max(evidence["kl_of_each_layer_sparse_alone"], key=evidence["kl_of_each_layer_sparse_alone"].get)
    assert evidence["policy"]["page_summary"] == "key_codes"  # what "auto" became
    candidates = evidence["candidates_at_equal_bytes"]
    assert [len(row["dense_layers"]) for row in candidates[:-1]] == [0, 1, 2]
    assert sum(candidates[-1]["layer_shares"].values()) == pytest.approx(
        30 - len(candidates[-1]["dense_layers"]), abs=0.1
    )
    assert candidates[1]["dense_layers"] == [worst]
    assert [row["budget"] for row in candidates[:-1]] == [96, 80, 80]
    assert evidence["held_back"]["original"]["dense_layers"] == [0, 1]
    assert evidence["held_back"]["chosen"]["dense_layers"] == document["settings"]["dense_layers"]
    served = load_config(model=str(model_path))
    assert served.dense_layers == tuple(document["settings"]["dense_layers"])
    assert dict(served.layer_shares) == document["settings"]["layer_shares"]
    assert "held-back text, equal bytes" in capsys.readouterr().out
