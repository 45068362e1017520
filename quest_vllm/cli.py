"""``quest-vllm``: serve a model with sparse decode, measure what a budget costs, or check what this machine can do.

Exit codes: 0 done; 1 a check failed; 2 bad usage; anything else is vLLM's own.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

import quest_vllm

BACKEND_FLAG = "--attention-backend"
MIDDLEWARE = ["--middleware", "quest_vllm.metrics_http.QuestMiddleware"]
EPILOG = """\
examples:
  quest-vllm serve MODEL --port 8000            any flag of `vllm serve` may follow
  QUEST_TOKEN_BUDGET=1024 quest-vllm serve MODEL
  quest-vllm eval MODEL_OR_URL                  scores, KL and text against dense attention, by token budget
  quest-vllm check                              versions, kernels and configuration of this machine

A request sets its own budget with "vllm_xargs": {"quest_token_budget": 512}; 0 is dense.
"""


def chosen_backend(arguments: Sequence[str]) -> str | None:
    """Return the attention backend that ``vllm serve`` flags ask for, or None.

    vLLM takes it in three ways, with hyphens or underscores, and with ``=`` or as the next word:
    ``--attention-backend X``, ``--attention-config.backend X`` and ``--attention-config '{"backend": "X"}'`` (``-ac``).
    """
    chosen = None
    for position, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        flag = flag.replace("_", "-")
        value = value if equals else "".join(arguments[position + 1 : position + 2])
        if flag in (BACKEND_FLAG, "--attention-config.backend", "-ac.backend"):
            chosen = value
        elif flag in ("--attention-config", "-ac"):
            chosen = _backend_in_json(value) or chosen
    return chosen


def _backend_in_json(text: str) -> str | None:
    try:
        backend = json.loads(text).get("backend")
    except (ValueError, AttributeError):  # vLLM says what is wrong with it
        return None
    return str(backend) if backend else None


def serve_command(arguments: Sequence[str]) -> list[str]:
    """Turn ``quest-vllm serve`` arguments into those of ``vllm serve``: ours are added, the rest untouched.

    Raises SystemExit(2) where another attention backend is asked for.
    """
    chosen = chosen_backend(arguments)
    if chosen is None:
        return ["serve", *arguments, *MIDDLEWARE, BACKEND_FLAG, "CUSTOM"]
    if chosen.upper() != "CUSTOM":
        print(
            f"quest-vllm: {BACKEND_FLAG}: expected CUSTOM (or nothing), got {chosen!r}; "
            "use `vllm serve` to serve with another backend",
            file=sys.stderr,
        )
        raise SystemExit(2)
    return ["serve", *arguments, *MIDDLEWARE]


def serve(arguments: Sequence[str]) -> int:
    """Replace this process by vLLM's server, so that signals and exit codes are vLLM's own."""
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", *serve_command(arguments)]
    sys.stdout.flush()
    os.execv(sys.executable, command)
    return 0


def _implementations(device: str) -> list[str]:
    """Say of every implementation of the operations whether it runs on ``device``, and if not, why."""
    from quest_vllm.config import IMPLEMENTATIONS
    from quest_vllm.ops.api import load_ops

    lines = []
    for name in IMPLEMENTATIONS[1:]:  # the first is auto
        try:
            load_ops(name, device)
            lines.append(f"  {name}: available")
        except Exception as error:  # whatever stops an import is what the user wants to read
            lines.append(f"  {name}: not here ({str(error).splitlines()[0]})")
    return lines


def check() -> int:
    """Print versions, device, kernels and the configuration in force; 1 where something would stop a server."""
    import torch

    from quest_vllm import compat
    from quest_vllm.config import load_config
    from quest_vllm.errors import QuestError
    from quest_vllm.ops.api import load_ops

    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "no GPU"
    print(f"quest-vllm {quest_vllm.__version__}, vllm {compat.vllm_version()}, torch {torch.__version__}, {name}")
    try:
        compat.check_vllm_version()
        config = load_config(None)
        ops = load_ops(config.implementation, device)
    except (QuestError, ValueError) as error:
        print(f"problem: {error}")
        return 1
    print(f"kernels: {ops.name} on {device}")
    print("implementations:", *_implementations(device), sep="\n")
    print("configuration in force:")
    for key, value in vars(config).items():
        print(f"  {key}: {value}")
    print(f"legal token budgets: 0 (dense), or {config.min_token_budget} to the model's max_model_len")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # handed over before argparse sees it: vLLM owns every flag behind `serve`
    if arguments[:1] == ["serve"] and len(arguments) > 1:
        return serve(arguments[1:])
    if arguments[:1] == ["eval"]:
        from quest_vllm.eval.cli import main as evaluate

        return evaluate(arguments[1:])
    if arguments[:1] == ["calibrate"]:
        from quest_vllm.eval.calibrate_cli import main as calibrate

        return calibrate(arguments[1:])
    parser = argparse.ArgumentParser(
        prog="quest-vllm", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=quest_vllm.__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("serve", help="vllm serve with sparse decode on", add_help=False)
    commands.add_parser("eval", help="what a token budget costs in quality, on your model", add_help=False)
    commands.add_parser("calibrate", help="which layers of your model must stay dense", add_help=False)
    commands.add_parser("check", help="what this machine can do, and the configuration in force")
    if parser.parse_args(arguments).command == "check":
        return check()
    parser.error("serve: expected a MODEL")


if __name__ == "__main__":
    raise SystemExit(main())
