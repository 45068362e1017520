"""The ``quest-vllm calibrate`` command line."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quest_vllm.config import QuestConfig, load_config
from quest_vllm.errors import QuestValueError
from quest_vllm.eval.calibrate import Task, calibrate
from quest_vllm.eval.cli import json_object, number
from quest_vllm.eval.engine_probe import engine_probes
from quest_vllm.eval.engine_runner import engine_args, policy, start_engine, stop_engine
from quest_vllm.eval.library import Library
from quest_vllm.eval.plan import DECODE, DENSE, Plan
from quest_vllm.eval.prompts import load_codec
from quest_vllm.eval.run import environment
from quest_vllm.eval.text import TEXT, TextSource, load_text
from quest_vllm.exit_codes import DONE, STOPS, help_text, stop
from quest_vllm.model_settings import file_name, packaged_models_dir, search_dirs
from quest_vllm.runtime import config_of

DESCRIPTION = "Find what each layer of a model should read, by measured KL, and keep the answer for serving."
EPILOG = f"""\
Each layer is made sparse alone; then the worst 0, 1, 2, ... layers are kept dense while the others get a smaller
budget, so that every candidate reads as many bytes as --budget in all layers. The pages of the others are then spread
by what each layer loses: as many in all. What helps is kept, and measured again on held-back text, beside every layer
alike without dense layers and with layers 0 and 1 dense. All of it is written into the YAML file as evidence.

`quest-vllm serve MODEL` picks the file up by the model's name: $QUEST_MODELS_DIR, then ~/.config/quest_vllm/models,
then the packaged configs/models. QUEST_CONFIG, --additional-config and QUEST_* variables win over it.

{help_text("calibrate")}
"""
COMMENT = """\
# Written by `quest-vllm calibrate`. Serving reads `settings` for models of this name; the rest is why.
# KL is to dense attention, nats a token, on text read token by token in decode; intervals are 95%.
"""


SOUGHT = ("dense_layers", "layer_shares")
"""What calibration looks for, and must find unset."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``quest-vllm calibrate``."""
    parser = argparse.ArgumentParser(
        prog="quest-vllm calibrate",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a model to load here")
    add(
        "--budget",
        type=number(1),
        default=512,
        metavar="B",
        help="tokens a layer to calibrate for; default %(default)s",
    )
    add("--context", type=number(64), default=4096, metavar="N", help="tokens of context; default %(default)s")
    add(
        "--windows", type=number(4), default=16, metavar="N", help="pieces of text, half held back; default %(default)s"
    )
    add("--max-dense", type=number(0), default=4, metavar="N", help="most dense layers tried; default %(default)s")
    add("--text", type=Path, metavar="FILE", help="calibrate on this text; default: Python's own documentation")
    add("--text-tokens", type=number(2), default=48, metavar="N", help="tokens read of each piece; default %(default)s")
    add("--seed", type=number(0), default=0, metavar="S", help="which pieces; default %(default)s")
    add("--output", type=Path, metavar="FILE", help="default: the model's file where serving looks for it")
    add("--engine-args", type=json_object, metavar="JSON", help="arguments of vllm.LLM")
    return parser


def default_output(model: str) -> Path:
    """In a checkout its own ``configs/models``, else the user's folder."""
    checkout = packaged_models_dir().parent / "default.yaml"
    in_checkout = checkout.is_file() and (checkout.parents[1] / "pyproject.toml").is_file()
    return (packaged_models_dir() if in_checkout else search_dirs()[0]) / file_name(model)


def main(arguments: Sequence[str]) -> int:
    """Run ``quest-vllm calibrate``; returns its exit code."""
    parsed = build_parser().parse_args(arguments)
    output = parsed.output or default_output(parsed.model)
    try:
        document = _run(parsed, shlex.join(["quest-vllm", "calibrate", *arguments]))
    except STOPS as why:
        return stop("calibrate", why)
    _write(output, document)
    print(_verdict(document))
    print(f"written: {output}")
    return DONE


def _run(parsed: argparse.Namespace, command: str) -> dict[str, Any]:
    own = _without_answers(parsed.engine_args or {})
    config = load_config(own["additional_config"], model=parsed.model)
    for variable in (f"QUEST_{key.upper()}" for key in SOUGHT):
        if os.environ.get(variable):
            raise QuestValueError(
                f"{variable}: expected unset, as calibration looks for it, got {os.environ[variable]}"
            )
    if not config.min_token_budget <= parsed.budget < parsed.context:
        raise QuestValueError(
            f"--budget: expected {config.min_token_budget} to {parsed.context - 1} (less than the context), "
            f"got {parsed.budget}"
        )
    source = load_text(parsed.text)
    plan = Plan((TEXT,), (parsed.context,), parsed.windows, (DECODE,), (DENSE, parsed.budget), parsed.seed)
    library = Library(load_codec(parsed.model), plan, source, parsed.text_tokens)
    windows = [library.item(TEXT, parsed.context, index) for index in range(parsed.windows)]
    length = parsed.context + parsed.text_tokens + 1
    # layers change between steps: no captured graph may remember them
    wanted = engine_args(parsed.model, length, 8, {**own, "enforce_eager": True})
    engine = start_engine(wanted)
    try:
        config = config_of(engine.llm_engine.vllm_config)  # without "auto": what it chooses with
        task = Task(config, parsed.budget, parsed.context, parsed.max_dense, windows)
        found = calibrate(engine_probes(engine), task, lambda line: print(line, file=sys.stderr, flush=True))
    finally:
        stop_engine(engine)
    found["evidence"] |= _circumstances(parsed, config, source, command)
    return {"model": parsed.model.rstrip("/").rsplit("/", 1)[-1], **found}


def _without_answers(given: dict[str, Any]) -> dict[str, Any]:
    """The user's engine arguments, with every layer sparse and alike whatever was calibrated before."""
    additional = given.get("additional_config") or {}
    quest = {**additional.get("quest", {}), "dense_layers": [], "layer_shares": {}}
    return {**given, "additional_config": {**additional, "quest": quest}}


def _circumstances(parsed: argparse.Namespace, config: QuestConfig, source: TextSource, command: str) -> dict[str, Any]:
    return {
        "command": command,
        "budget": parsed.budget,
        "context": parsed.context,
        "windows": parsed.windows,
        "tokens_a_window": parsed.text_tokens - 1,
        "seed": parsed.seed,
        "text": f"{source.name} {source.sha256}",
        "policy": {key: value for key, value in policy(config).items() if key not in SOUGHT},
        "environment": environment(),
    }


def _write(path: Path, document: dict[str, Any]) -> None:
    import yaml

    path.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(document, sort_keys=False, width=110, default_flow_style=None)
    path.write_text(COMMENT + text, encoding="utf-8")


def _verdict(document: dict[str, Any]) -> str:
    held_back = document["evidence"]["held_back"]
    lines = ["held-back text, equal bytes:"]
    for name, row in held_back.items():
        change = row.get("kl_of_chosen_less_this")
        against = (
            f", chosen less this {change['mean']:+.4f} [{change['low']:+.4f}, {change['high']:+.4f}]" if change else ""
        )
        layers = row["dense_layers"] or "none"
        spread = ", spread by loss" if "layer_shares" in row else ""
        lines.append(
            f"  {name}: dense layers {layers}{spread}, budget {row['budget']}, KL {row['kl']['mean']:.4f}{against}"
        )
    return "\n".join(lines)
