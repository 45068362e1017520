"""``quest-vllm check``: what would be used here, what is refused and why, and the speed-up that the byte model allows.

What it says of features comes from the code that refuses them at start-up (:mod:`quest_vllm.support`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

import quest_vllm
from quest_vllm.byte_model import GPU_BANDWIDTHS, Estimate, ModelShape, estimate
from quest_vllm.config import AUTO, IMPLEMENTATIONS, MAX_TOKEN_BUDGET, QuestConfig, load_config
from quest_vllm.errors import QuestConfigError, QuestError
from quest_vllm.exit_codes import DONE, SOME_FAILED, USAGE, help_text
from quest_vllm.layer_shares import misplaced_shares
from quest_vllm.model_settings import find_settings

DESCRIPTION = """\
Print what this machine can do: kernels, page size, model runner, what is refused and why. With --context, also the
speed-up that the byte model allows: an upper limit by memory traffic, not a forecast.
"""
EPILOG = f"""\
examples:
  quest-vllm check
  quest-vllm check --model MODEL --context 131072 --batch 4 --budget 4096 --bandwidth H200
  quest-vllm check --context 32768 --json

{help_text("check")}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``check``."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", help="folder or Hub name: is it supported, and what does a whole step cost")
    parser.add_argument("--context", type=int, help="tokens of context, for the byte model")
    parser.add_argument("--batch", type=int, default=1, help="requests in a step (default 1)")
    parser.add_argument("--budget", type=int, help="token budget (default: the server's); 0 is dense")
    parser.add_argument(
        "--bandwidth",
        help=f"memory bandwidth in GB/s, or one of {', '.join(GPU_BANDWIDTHS)} (default: this GPU's, where known)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")


def run(arguments: argparse.Namespace) -> int:
    """Run ``check``; returns its exit code."""
    try:
        report = build_report(arguments)
    except QuestConfigError as error:
        print(f"quest-vllm check: {error}", file=sys.stderr)
        return USAGE
    print(json.dumps(report, indent=1) if arguments.json else render(report))
    return SOME_FAILED if report["problems"] else DONE


def build_report(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that ``check`` says, as JSON values. Raises :class:`QuestConfigError` for a flag out of range."""
    from quest_vllm import compat
    from quest_vllm.model_shape import read_config

    _check_flags(arguments)
    try:
        import torch
    except ImportError as error:
        versions = {"quest_vllm": quest_vllm.__version__, "vllm": compat.vllm_version(), "torch": None}
        wanted = " or ".join(compat.SUPPORTED_VLLM)
        words = f"PyTorch cannot be imported ({error}): install vLLM {wanted}, which brings it"
        return {"versions": versions, "device": "unknown", "problems": [words]}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    report: dict[str, Any] = {
        "versions": {
            "quest_vllm": quest_vllm.__version__,
            "vllm": compat.vllm_version(),
            "torch": torch.__version__,
        },
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "problems": [],
    }
    try:
        compat.check_vllm_version()
        config = load_config(None, model=arguments.model)
        if arguments.model and (path := find_settings(arguments.model)[0]):
            report["calibrated"] = path
    except (QuestError, ValueError) as error:
        return _stopped(report, error)
    model = read_config(arguments.model) if arguments.model else None
    try:
        config, summary = _without_auto(config, model, device)
        report["chosen"] = _chosen(config, device) | summary
    except (QuestError, ValueError) as error:
        return _stopped(report, error)
    report["implementations"] = _implementations(device)
    report["configuration"] = dataclasses.asdict(config)
    report["features"] = [dataclasses.asdict(finding) for finding in _findings(device)]
    shape = _add_model(report, arguments.model, model, device, config) if model is not None else None
    if arguments.context is not None:
        report["estimate"] = _estimate(arguments, config, shape, report["device"])
    return report


def _check_flags(arguments: argparse.Namespace) -> None:
    for name in ("context", "batch"):
        value = getattr(arguments, name)
        if value is not None and not 1 <= value <= MAX_TOKEN_BUDGET:
            raise QuestConfigError(f"--{name}: expected an integer from 1 to {MAX_TOKEN_BUDGET}, got {value}")
    if arguments.context is None and (arguments.budget is not None or arguments.bandwidth is not None):
        raise QuestConfigError("--context: expected with --budget and --bandwidth, got none")


def _stopped(report: dict[str, Any], error: Exception) -> dict[str, Any]:
    report["problems"].append(str(error))
    return report


def _without_auto(config: QuestConfig, model: Any | None, device: str) -> tuple[QuestConfig, dict[str, str]]:
    """``config`` as a server of ``model`` (a transformers configuration) resolves it, and its words for people."""
    from quest_vllm.model_shape import head_dim, served_dtype
    from quest_vllm.runtime import Heads, why_boxes

    heads = None
    if model is not None:
        kv_heads = getattr(model, "num_key_value_heads", None) or model.num_attention_heads
        heads = Heads(head_dim(model), model.num_attention_heads // kv_heads, str(served_dtype(model)))
    why = why_boxes(config, heads, device)
    chosen = config.resolved(why)
    said = {"page_summary": chosen.page_summary, "group_reduction": chosen.group_reduction, "policy": chosen.policy}
    if config.page_summary == AUTO:
        unsure = "" if model is not None or why else "; --model tells whether a model has anything against it"
        said["page_summary_auto"] = f"{chosen.page_summary}: {why or 'nothing is against key codes'}{unsure}"
    return chosen, said


def _chosen(config: QuestConfig, device: str) -> dict[str, Any]:
    """What a server started here and now would use."""
    import torch

    from quest_vllm import compat
    from quest_vllm.ops.api import load_ops
    from quest_vllm.support import backend_class

    backend = backend_class(device)
    ops = load_ops(config.implementation, device, page_summary=config.page_summary)
    chosen: dict[str, Any] = {
        "backend": f"{backend.__module__}.{backend.__name__}",
        "implementation": ops.name,
        "kernels": ops.name,
        "page_size": config.page_size,
        "block_sizes": [str(size) for size in backend.get_supported_kernel_block_sizes()],
        "model_runner": compat.default_model_runner(device == "cpu"),
        "summary_share_of_kv_cache": 1 / config.page_size,
        "token_budgets": {"default": config.token_budget, "minimum": config.min_token_budget, "dense": 0},
    }
    if ops.name == "cpu":
        from quest_vllm.ops import cpu

        chosen["kernels"] = f"C++, {cpu.isa()}; keys and values packed as {compat.cpu_kv_format(torch.bfloat16, 64)}"
    if device == "cuda":
        chosen["cuda_graphs"] = backend.get_builder_cls()._cudagraph_support.name
    return chosen


def _implementations(device: str) -> dict[str, str]:
    """Of every implementation of the operations: "available", or why not."""
    from quest_vllm.ops.api import load_ops

    found = {}
    for name in IMPLEMENTATIONS[1:]:  # the first is auto
        try:
            load_ops(name, device)
            found[name] = "available"
        except Exception as error:  # whatever stops an import is what the user wants to read
            found[name] = f"not here: {str(error).splitlines()[0]}"
    return found


def _findings(device: str) -> list[Any]:
    from quest_vllm.support import probe

    return list(probe(device))


def _add_model(report: dict[str, Any], model: str, config: Any, device: str, chosen: QuestConfig) -> ModelShape:
    """Say what ``model``, of the transformers configuration ``config``, asks for, and what speaks against it."""
    from quest_vllm.model_shape import attention_features, read_shape
    from quest_vllm.support import model_refusals

    features = attention_features(config)
    reasons = model_refusals(device, features)
    report["model"] = {"name": model, "type": config.model_type, "asks_for": features, "refused_for": reasons}
    if reasons:
        report["problems"].append(f"{model} cannot be served sparsely: {'; '.join(reasons)}")
    shape = read_shape(model, config)
    report["model"]["shape"] = dataclasses.asdict(shape)
    windowed = {layer for layer, window in enumerate(shape.layer_windows) if window}
    sparse = set(range(len(shape.layer_windows))) - windowed - set(chosen.dense_layers)
    if wrong := misplaced_shares(chosen, sparse, windowed, len(shape.layer_windows)):
        report["problems"].append(wrong)
    return shape


def _estimate(
    arguments: argparse.Namespace, config: QuestConfig, shape: ModelShape | None, device_name: str
) -> dict[str, Any]:
    budget = config.token_budget if arguments.budget is None else arguments.budget
    if budget != 0 and not config.min_token_budget <= budget <= MAX_TOKEN_BUDGET:
        raise QuestConfigError(
            f"--budget: expected 0 (dense) or an integer from {config.min_token_budget} to {MAX_TOKEN_BUDGET}, "
            f"got {budget}"
        )
    found = estimate(arguments.context, arguments.batch, budget, config, shape)
    result = {**dataclasses.asdict(found), "speedup": _speedups(found)}
    bandwidth = _bandwidth(arguments.bandwidth, device_name)
    if bandwidth is not None:
        result["bandwidth_gb_per_s"] = bandwidth
        result["microseconds"] = {
            name: {path: count / bandwidth / 1e3 for path, count in dataclasses.asdict(traffic).items()}
            for name, traffic in (("layer", found.layer), ("step", found.step))
            if traffic is not None
        }
    return result


def _speedups(found: Estimate) -> dict[str, float]:
    """Speed-up of attention in a sparse layer and, with a model, of the whole step."""
    step = {"step": found.step.speedup} if found.step else {}
    return {"attention": found.vectors.speedup, **step}


def _bandwidth(given: str | None, device_name: str) -> float | None:
    """GB/s: what was ``given``, or that of the GPU at hand; None where unknown."""
    if given is None:
        return _known_bandwidth(device_name)
    if given in GPU_BANDWIDTHS:
        return GPU_BANDWIDTHS[given]
    try:
        value = float(given)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise QuestConfigError(
            f"--bandwidth: expected GB/s above 0, or one of {', '.join(GPU_BANDWIDTHS)}, got {given!r}"
        )
    return value


def _known_bandwidth(device_name: str) -> float | None:
    """The table's entry all of whose parts ("H100", "PCIe") are in ``device_name``; the most specific one wins."""
    words = device_name.lower().replace("-", " ").split()
    matches = [name for name in GPU_BANDWIDTHS if all(part in words for part in name.lower().split("-"))]
    return GPU_BANDWIDTHS[max(matches, key=len)] if matches else None


def render(report: dict[str, Any]) -> str:
    """The report as text."""
    versions = report["versions"]
    lines = [
        f"quest-vllm {versions['quest_vllm']}, vllm {versions['vllm']}, torch {versions['torch']}, {report['device']}"
    ]
    if "chosen" in report:
        lines += _render_machine(report)
    if "model" in report:
        lines += _render_model(report["model"])
    if "estimate" in report:
        lines += _render_estimate(report["estimate"], report["configuration"]["page_size"])
    return "\n".join([*lines, *(f"problem: {problem}" for problem in report["problems"])])


def _render_machine(report: dict[str, Any]) -> list[str]:
    def section(title: str, entries: dict[str, Any]) -> list[str]:
        return [f"{title}:", *(f"  {key}: {value}" for key, value in entries.items())]

    chosen = dict(report["chosen"])
    budgets = chosen.pop("token_budgets")
    refused = {entry["feature"]: entry["reason"] for entry in report["features"] if not entry["supported"]}
    return [
        *section("chosen", chosen),
        *section("implementations", report["implementations"]),
        *section("configuration in force", report["configuration"]),
        *([f"calibrated for this model: {report['calibrated']}"] if "calibrated" in report else []),
        f"legal token budgets: 0 (dense), or {budgets['minimum']} to the model's max_model_len",
        *section("refused at start-up", refused),
    ]


def _render_model(model: dict[str, Any]) -> list[str]:
    shape = model["shape"]
    windows = shape["layer_windows"]
    verdict = "; ".join(model["refused_for"]) or "supported"
    return [
        f"model {model['name']} ({model['type']}): {verdict}",
        f"  {len(windows)} attention layers, {sum(map(bool, windows))} with a sliding window; "
        f"{shape['num_q_heads']} query / {shape['num_kv_heads']} KV heads, head size {shape['head_dim']}; "
        f"weights {(shape['dense_weight_bytes'] + shape['expert_weight_bytes']) / 1e9:.2f} GB a full step",
    ]


def _render_estimate(found: dict[str, Any], page_size: int) -> list[str]:
    lines = [
        f"byte model: {found['batch']} x {found['context']} tokens, budget {found['token_budget']}, page size "
        f"{page_size} (an upper limit, kernels and launches come on top)",
        f"  attention of a sparse layer: {found['speedup']['attention']:.2f}x",
    ]
    if found["step"]:
        step = {path: count / 1e9 for path, count in found["step"].items()}
        lines.append(
            f"  whole step: {found['speedup']['step']:.2f}x ({step['dense']:.3f} GB dense, {step['sparse']:.3f} GB "
            f"sparse, {found['weight_bytes'] / 1e9:.3f} GB of each weights)"
        )
    for name, times in found.get("microseconds", {}).items():
        lines.append(
            f"  {name} at {found['bandwidth_gb_per_s']:.0f} GB/s: {times['dense']:.1f} us dense, "
            f"{times['sparse']:.1f} us sparse"
        )
    return lines
