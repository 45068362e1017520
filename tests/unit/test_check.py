"""``quest-vllm check``: what it prints, and that its refusals are start-up's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quest_vllm import check, cli, support
from quest_vllm.capabilities import QuestCapabilities


def run_json(capsys: pytest.CaptureFixture[str], *flags: str, code: int = 0) -> dict[str, Any]:
    assert cli.main(["check", "--json", *flags]) == code
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def write_config(folder: Path, **config: Any) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_it_says_what_was_chosen(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUEST_PAGE_SIZE", "32")
    monkeypatch.setenv("QUEST_IMPLEMENTATION", "torch")
    chosen = run_json(capsys)["chosen"]
    assert chosen["page_size"] == 32
    assert chosen["implementation"] == "torch"
    assert chosen["model_runner"] == "V1"
    assert chosen["backend"] == "quest_vllm.backend_cpu.QuestCpuBackend"
    assert chosen["token_budgets"]["minimum"] == 96


@pytest.mark.parametrize(
    ("settings", "head_size", "summary", "reduction", "because"),
    [
        ({}, None, "key_codes", "mass", "key_codes: nothing is against key codes; --model tells"),
        ({}, 64, "key_codes", "mass", "key_codes: nothing is against key codes"),
        ({}, 80, "min_max", "max", "min_max: key codes need a head_dim that is a multiple of 64, got 80"),
        ({"page_size": 32}, 64, "min_max", "max", "min_max: key codes need page_size 16, got 32"),
        ({"page_summary": "min_max"}, 64, "min_max", "max", None),
    ],
)
def test_auto_is_told_as_what_it_means(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    settings: dict[str, Any],
    head_size: int | None,
    summary: str,
    reduction: str,
    because: str | None,
) -> None:
    monkeypatch.setenv("QUEST_IMPLEMENTATION", "torch")
    for key, value in settings.items():
        monkeypatch.setenv(f"QUEST_{key.upper()}", str(value))
    flags = []
    if head_size is not None:
        shape = {"hidden_size": 128, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
        shape |= {"num_hidden_layers": 1, "vocab_size": 32, "head_dim": head_size}
        flags = ["--model", write_config(tmp_path, model_type="llama", architectures=["LlamaForCausalLM"], **shape)]
    report = run_json(capsys, *flags)
    chosen, configuration = report["chosen"], report["configuration"]
    assert (chosen["page_summary"], chosen["group_reduction"]) == (summary, reduction)
    assert (configuration["page_summary"], configuration["group_reduction"]) == (summary, reduction)
    assert chosen["policy"] == configuration["policy"] == reduction
    assert chosen.get("page_summary_auto", "").startswith(because or "")
    assert ("page_summary_auto" in chosen) == (because is not None)


def test_a_default_policy_that_cannot_be_is_a_problem(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUEST_POLICY", "two_stage")
    monkeypatch.setenv("QUEST_IMPLEMENTATION", "torch")
    assert run_json(capsys)["chosen"]["policy"] == "two_stage"
    monkeypatch.setenv("QUEST_PAGE_SUMMARY", "min_max")
    (problem,) = run_json(capsys, code=1)["problems"]
    assert problem.startswith("policy: expected one of auto, max, window") and "got 'two_stage'" in problem


def test_a_policys_bytes_are_in_the_estimate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUEST_IMPLEMENTATION", "torch")
    read = {}
    for policy in ("mass", "window", "two_stage"):
        monkeypatch.setenv("QUEST_POLICY", policy)
        report = run_json(capsys, "--context", "8192", "--budget", "512")
        read[policy] = report["estimate"]["vectors"]["sparse"]
    assert read == {"mass": 512 + 512, "window": 512, "two_stage": 512 + 512 + 256}


def test_refusals_come_from_the_capabilities(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def supported(report: dict[str, Any]) -> dict[str, bool]:
        return {entry["feature"]: entry["supported"] for entry in report["features"]}

    before = supported(run_json(capsys))
    assert not before["attention sinks"] and before["sliding-window layers"]
    monkeypatch.setattr(QuestCapabilities, "supports_sink", classmethod(lambda cls: True))
    monkeypatch.setattr(QuestCapabilities, "supports_sliding_window", classmethod(lambda cls: False))
    after = supported(run_json(capsys))
    assert {name for name in before if before[name] != after[name]} == {"attention sinks", "sliding-window layers"}


def test_both_devices_can_be_asked_anywhere() -> None:
    cpu = {finding.feature: finding for finding in support.probe("cpu")}
    cuda = {finding.feature: finding for finding in support.probe("cuda")}
    assert cpu["float32"].supported and not cuda["float32"].supported
    assert "V2" in cuda["pipeline parallelism, model runner V2"].reason
    assert cpu["pipeline parallelism, model runner V1"].supported
    assert cpu["MLA layers"].supported and "MLA" in cuda["MLA layers"].reason
    assert all(finding.reason for finding in (*cpu.values(), *cuda.values()) if not finding.supported)


def test_estimate_for_a_real_model(capsys: pytest.CaptureFixture[str], model_path: Path) -> None:
    flags = f"--model {model_path} --context 8000 --batch 4 --budget 512 --bandwidth 100".split()
    report = run_json(capsys, *flags)
    shape, found = report["model"]["shape"], report["estimate"]
    assert len(shape["layer_windows"]) == 30 and shape["num_kv_heads"] == 3
    stored = (model_path / "model.safetensors").stat().st_size
    assert shape["dense_weight_bytes"] == pytest.approx(stored, rel=0.001)  # tied: the embedding is the output head
    assert found["layer"]["dense"] == 4 * 3 * 8000 * 2 * 64 * 2
    assert found["speedup"]["attention"] == pytest.approx(8000 / (500 + 512))
    assert found["microseconds"]["step"]["dense"] == pytest.approx(found["step"]["dense"] / 100e9 * 1e6)


def test_moe_and_windows_are_sized_without_weights(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = write_config(
        tmp_path,
        model_type="mixtral",
        architectures=["MixtralForCausalLM"],
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=3,
        num_local_experts=8,
        num_experts_per_tok=2,
        vocab_size=1000,
        sliding_window=128,
        dtype="bfloat16",
    )
    shape = run_json(capsys, "--model", model)["model"]["shape"]
    assert shape["expert_weight_bytes"] == 3 * 8 * 3 * 64 * 128 * 2
    assert (shape["num_experts"], shape["experts_per_token"]) == (8, 2)
    assert shape["layer_windows"] == [128, 128, 128]
    # the untied input embedding is not read whole: only attention, router, norms and output head remain
    attention = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 8 * 64 + 2 * 64)
    assert shape["dense_weight_bytes"] == (attention + 64 + 1000 * 64) * 2


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "gpt_oss"}, "attention sinks"),
        ({"model_type": "bloom", "hidden_size": 64, "n_head": 4, "n_layer": 2}, "ALiBi"),
        ({"model_type": "t5"}, "encoder_decoder"),
    ],
)
def test_a_model_that_start_up_would_refuse(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    from quest_vllm.model_shape import attention_features, read_config

    features = attention_features(read_config(write_config(tmp_path, **config)))
    assert reason in "; ".join(support.model_refusals("cpu", features))


def test_what_was_calibrated_for_a_model_is_in_force_and_checked(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_path: Path
) -> None:
    settings = tmp_path / f"{model_path.name}.yaml"
    shares = {layer: 1 + layer % 2 for layer in range(30)}
    settings.write_text(json.dumps({"settings": {"layer_shares": shares}}))
    monkeypatch.setenv("QUEST_MODELS_DIR", str(tmp_path))
    report = run_json(capsys, "--model", str(model_path), "--context", "8000", "--budget", "512")
    assert report["calibrated"] == str(settings) and report["problems"] == []
    assert report["configuration"]["layer_shares"] == [[layer, share] for layer, share in shares.items()]
    assert report["estimate"]["speedup"]["attention"] == pytest.approx(8000 / (500 + 512), rel=0.001)
    settings.write_text(json.dumps({"settings": {"layer_shares": {**shares, 30: 1}}}))
    report = run_json(capsys, "--model", str(model_path), code=1)
    assert "shares for layers beyond the model's 30 [30]" in report["problems"][0]


def test_refused_model_is_exit_code_1(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = write_config(
        tmp_path, model_type="bloom", hidden_size=64, n_head=4, n_layer=2, vocab_size=100, architectures=["B"]
    )
    assert "ALiBi" in run_json(capsys, "--model", model, code=1)["problems"][0]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--context 0", "--context: expected an integer from 1 to 2147483647, got 0"),
        ("--context 9000 --batch -2", "--batch: expected an integer from 1 to 2147483647, got -2"),
        ("--context 9000 --budget 47", "--budget: expected 0 (dense) or an integer from 48 to 2147483647, got 47"),
        ("--context 9000 --bandwidth H1000", "--bandwidth: expected GB/s above 0, or one of A100-40GB"),
        ("--context 9000 --bandwidth nan", "got 'nan'"),
        ("--budget 512", "--context: expected with --budget"),
        ("--model /nowhere/at/all", "--model: expected a folder or Hub name with a config.json"),
    ],
)
def test_bad_flags_are_exit_code_2(capsys: pytest.CaptureFixture[str], flags: str, said: str) -> None:
    assert cli.main(["check", *flags.split()]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "bandwidth"),
    [
        ("NVIDIA H100 80GB HBM3", 3350.0),
        ("NVIDIA H100 PCIe", 2000.0),
        ("NVIDIA H200", 4800.0),
        ("NVIDIA A100-SXM4-80GB", 2039.0),
        ("NVIDIA A100-PCIE-40GB", 1555.0),
        ("NVIDIA L40S", 864.0),
        ("cpu", None),
        ("NVIDIA L40", None),
    ],
)
def test_known_gpus(device: str, bandwidth: float | None) -> None:
    assert check._known_bandwidth(device) == bandwidth


def test_text_output_names_the_speedups(capsys: pytest.CaptureFixture[str], model_path: Path) -> None:
    assert cli.main(["check", "--model", str(model_path), "--context", "8000", "--budget", "512"]) == 0
    said = capsys.readouterr().out
    assert "attention of a sparse layer: 7.91x" in said
    assert "whole step: 1.55x" in said
    assert "attention sinks: attention sinks not supported" in said
    assert f"model {model_path} (llama): supported" in said
