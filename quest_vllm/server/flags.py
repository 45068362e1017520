"""The ``--quest-*`` flags of ``quest-vllm serve``. Each is a key of the configuration, handed on in the environment."""

from __future__ import annotations

import argparse
import difflib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from quest_vllm.config import ENV_PREFIX, load_config
from quest_vllm.exit_codes import help_text

PAGE_MIDDLEWARE = ["--middleware", "quest_vllm.page.routes.QuestPage"]
PREFIXES = ("--quest-", "--no-quest-")


def parser() -> argparse.ArgumentParser:
    """The flags, and what each means."""
    flags = argparse.ArgumentParser(
        prog="quest-vllm serve MODEL",
        usage=argparse.SUPPRESS,
        add_help=False,
        epilog=help_text("serve"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group = flags.add_argument_group("flags of quest-vllm serve; any flag of vllm serve may follow")
    for flag, key, what in (
        ("--quest-token-budget", "token_budget", "budget of requests that name none; 0: dense (2048)"),
        ("--quest-min-budget", "min_budget", "smallest budget that a request may name"),
        ("--quest-max-budget", "max_budget", "largest budget that a request may name; rules out dense (0) too"),
        ("--quest-max-body-bytes", "max_body_bytes", "largest body of a generation request (33554432)"),
    ):
        group.add_argument(flag, dest=key, type=int, metavar="N", help=what)
    group.add_argument(
        "--quest-top-p",
        dest="top_p",
        type=float,
        metavar="P",
        help="share of its budget's estimated attention mass at which a head stops taking pages; 1: never (1)",
    )
    group.add_argument(
        "--quest-allow-override",
        dest="allow_override",
        action=argparse.BooleanOptionalAction,
        help="whether requests may name budgets other than the default and the aliases' (yes)",
    )
    group.add_argument(
        "--quest-alias",
        dest="aliases",
        action="append",
        metavar="NAME=N",
        help="also serve the model as MODEL:NAME with this budget; may be repeated",
    )
    group.add_argument(
        "--quest-audit",
        dest="audit_steps",
        type=int,
        metavar="STEPS",
        help="check page summaries of one request while serving, every so many steps (never)",
    )
    group.add_argument(
        "--quest-page",
        dest="page",
        action="store_const",
        const="true",
        help="a page at /quest: one prompt, several budgets side by side",
    )
    return flags


def split_flags(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """vLLM's own arguments, and ours as environment variables (``QUEST_MIN_BUDGET``).

    Raises SystemExit(2) for a flag of ours that is unknown or has a bad value; ranges are checked where the
    configuration is read.
    """
    flags = parser()
    theirs, ours = _split(arguments, flags)
    values = flags.parse_args(ours)
    environment = {}
    for key, value in vars(values).items():
        if value is not None:
            environment[ENV_PREFIX + key.upper()] = ",".join(value) if isinstance(value, list) else str(value)
    return theirs + (PAGE_MIDDLEWARE if values.page else []), environment


def check_configuration(theirs: Sequence[str], environment: Mapping[str, str]) -> None:
    """Read the configuration as the server will: in a second here, after a minute and under a traceback there.

    Raises :class:`~quest_vllm.errors.QuestConfigError`. Passes over what vLLM reads from a file or from dotted flags.
    """
    additional = None
    words = [
        word.replace("_", "-") if word.startswith("--") else word for word in (w.partition("=")[0] for w in theirs)
    ]
    if any(word == "--config" or word.startswith("--additional-config.") for word in words):
        return
    if "--additional-config" in words:
        place = words.index("--additional-config")
        _, equals, value = theirs[place].partition("=")
        try:
            additional = json.loads(value if equals else "".join(theirs[place + 1 : place + 2]))
        except ValueError:  # vLLM says what is wrong with it
            return
    model = theirs[0] if theirs and not theirs[0].startswith("-") else None
    config = load_config(additional if isinstance(additional, dict) else None, environment, model)
    if model is not None:
        config.resolved()  # a policy that is legal anywhere is so where nothing is against key codes
    if config.metrics_dir:
        from quest_vllm.metrics_files import make_directory  # wants prometheus_client, which comes with vLLM

        make_directory(Path(config.metrics_dir))


def _split(arguments: Sequence[str], flags: argparse.ArgumentParser) -> tuple[list[str], list[str]]:
    known = {name: action for action in flags._actions for name in action.option_strings}
    theirs: list[str] = []
    ours: list[str] = []
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        if not name.startswith(PREFIXES):
            theirs.append(word)
            continue
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            flags.error(f"unknown flag {name}; did you mean {near}? Known flags: {', '.join(known)}")
        if equals:
            ours.append(f"{name}={value}")
        elif known[name].nargs == 0:
            ours.append(name)
        else:
            ours += [name, *itertools.islice(words, 1)]
    return theirs, ours
