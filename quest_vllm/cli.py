"""``quest-vllm``: the console script. Exit codes: :mod:`quest_vllm.exit_codes`."""

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
DESCRIPTION = "Serve a model with sparse decode, measure what a token budget costs and saves, check this machine."
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

exit codes: 0 done, 1 something failed, 2 bad usage, 3 a server or engine cannot be used, 130 interrupted; the --help of
each command says what that means there.
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
    """Replace this process by vLLM's server, so that signals are vLLM's own; exit codes: server/process.py."""
    theirs, flags = split_flags(arguments)
    environment = {**os.environ, **flags}
    command = [sys.executable, "-m", "quest_vllm.server.process", *serve_command(theirs)]
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


COMMANDS = {
    "serve": "vllm serve with sparse decode on",
    "eval": "what a token budget costs in quality, on your model",
    "bench": "what a token budget saves in time, on your machine",
    "calibrate": "which layers of your model must stay dense",
    "check": "what this machine can do, what is refused, what to expect",
    "completion": "completion of these commands for bash, zsh or fish",
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of what stands before a command, and of ``check``; other commands read their own words."""
    parser = argparse.ArgumentParser(
        prog="quest-vllm", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=quest_vllm.__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, summary in COMMANDS.items():
        if name == "check":
            check.add_arguments(commands.add_parser(name, help=summary))
        else:
            commands.add_parser(name, help=summary, add_help=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command, words = arguments[:1], arguments[1:]
    # handed over before argparse sees it: vLLM owns every flag behind `serve`
    if command == ["serve"] and words:
        return serve(words)
    if command == ["eval"]:
        from quest_vllm.eval.cli import main as evaluate

        return evaluate(words)
    if command == ["bench"]:
        from quest_vllm.bench.cli import main as bench

        return bench(words)
    if command == ["calibrate"]:
        from quest_vllm.eval.calibrate_cli import main as calibrate

        return calibrate(words)
    if command == ["completion"]:
        from quest_vllm import completion

        return completion.main(words, COMMANDS)
    parser = build_parser()
    parsed = parser.parse_args(arguments)
    if parsed.command == "check":
        return check.run(parsed)
    parser.error("serve: expected a MODEL")


if __name__ == "__main__":
    raise SystemExit(main())
