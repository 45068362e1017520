"""``quest-vllm completion``: a shell's completion script, made from the parsers of all commands.

Flags of ``vllm serve`` itself are not in it: reading them takes vLLM's import, and they change with its version.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from quest_vllm.exit_codes import DONE, UNAVAILABLE, help_text

SHELLS = ("bash", "zsh", "fish")
MODELS = ("target", "model")
EPILOG = f"""\
examples:
  eval "$(quest-vllm completion bash)"                                     in this shell; in ~/.bashrc: in every one
  quest-vllm completion bash > ~/.local/share/bash-completion/completions/quest-vllm
  quest-vllm completion zsh > ~/.zfunc/_quest-vllm                         a folder in $fpath, before compinit
  quest-vllm completion fish > ~/.config/fish/completions/quest-vllm.fish

Make it anew after an upgrade. Flags of vLLM's own are not completed. Needs the package shtab.

{help_text("completion")}
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``quest-vllm completion``."""
    parser = argparse.ArgumentParser(
        prog="quest-vllm completion",
        description="Print the completion script of a shell.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell that will read it")
    return parser


def command_parsers() -> dict[str, Callable[[], argparse.ArgumentParser]]:
    """What builds the parser of each command."""
    from quest_vllm import check
    from quest_vllm.bench import cli as bench
    from quest_vllm.eval import calibrate_cli
    from quest_vllm.eval import cli as evaluate
    from quest_vllm.server import flags

    def check_parser() -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser(prog="quest-vllm check")
        check.add_arguments(parser)
        return parser

    return {
        "serve": flags.parser,
        "check": check_parser,
        "eval": evaluate.build_parser,
        "bench": bench.build_parser,
        "calibrate": calibrate_cli.build_parser,
        "completion": build_parser,
    }


def whole_parser(summaries: dict[str, str]) -> argparse.ArgumentParser:
    """One parser that knows every command's flags; ``summaries``: a line a command."""
    whole = argparse.ArgumentParser(prog="quest-vllm")
    whole.add_argument("--version", action="store_true", help="print the version")
    commands = whole.add_subparsers(dest="command")
    for name, build in command_parsers().items():
        parents = [build()]
        commands.add_parser(
            name, help=summaries[name], parents=parents, conflict_handler="resolve", prog=f"quest-vllm {name}"
        )
    return whole


def script(shell: str, summaries: dict[str, str]) -> str:
    """The script for ``shell``, one of :data:`SHELLS`. Raises ImportError without shtab."""
    import shtab

    whole = whole_parser(summaries)
    for parser in (whole, *_subparsers(whole)):
        for action in parser._actions:
            if action.dest == "output" and action.metavar == "DIR":
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
            elif action.type is Path or action.dest in MODELS:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    return shtab.complete(whole, shell)


def _subparsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [sub for group in groups for sub in group.choices.values()]


def main(arguments: Sequence[str], summaries: dict[str, str]) -> int:
    """Run ``quest-vllm completion``; returns its exit code."""
    shell = build_parser().parse_args(arguments).shell
    try:
        print(script(shell, summaries))
    except ImportError:
        print("quest-vllm completion: needs the package shtab: pip install shtab", file=sys.stderr)
        return UNAVAILABLE
    return DONE
