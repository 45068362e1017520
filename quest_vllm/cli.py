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
from quest_vllm import check
from quest_vllm.errors import QuestConfigError
from quest_vllm.server.flags import check_configuration, parser, split_flags

BACKEND_FLAG = "--attention-backend"
MIDDLEWARE = ["--middleware", "quest_vllm.server.middleware.QuestMiddleware"]
EPILOG = """\
examples:
  quest-vllm serve MODEL --port 8000            any flag of `vllm serve` may follow
  QUEST_TOKEN_BUDGET=1024 quest-vllm serve MODEL
  quest-vllm eval MODEL_OR_URL                  scores, KL and text against dense attention, by token budget
  quest-vllm bench MODEL_OR_URL                 latency and throughput by context, batch and token budget
  quest-vllm serve MODEL --quest-audit 1000     check page summaries while serving, every 1000 steps
  quest-vllm serve MODEL --quest-page           a page at /quest: one prompt, several budgets side by side
  quest-vllm check                              versions, kernels and configuration of this machine

  quest-vllm serve MODEL --quest-alias fast=512 --quest-max-budget 4096     see `serve MODEL --help` for all of ours

A request sets its own budget with "sparse_attention": {"token_budget": 512}; 0 is dense.
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
    theirs, flags = split_flags(arguments)
    environment = {**os.environ, **flags}
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", *serve_command(theirs)]
    if any(word in ("-h", "--help") for word in theirs):
        print(parser().format_help())
    try:
        check_configuration(theirs, environment)
    except QuestConfigError as error:
        print(f"quest-vllm: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    sys.stdout.flush()
    os.execve(sys.executable, command, environment)
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
    if arguments[:1] == ["bench"]:
        from quest_vllm.bench.cli import main as bench

        return bench(arguments[1:])
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
    commands.add_parser("bench", help="what a token budget saves in time, on your machine", add_help=False)
    commands.add_parser("calibrate", help="which layers of your model must stay dense", add_help=False)
    check.add_arguments(commands.add_parser("check", help="what this machine can do, what is refused, what to expect"))
    parsed = parser.parse_args(arguments)
    if parsed.command == "check":
        return check.run(parsed)
    parser.error("serve: expected a MODEL")


if __name__ == "__main__":
    raise SystemExit(main())
