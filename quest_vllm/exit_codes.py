"""The exit codes of every command, in one table: help texts, the reference page and the commands themselves read it."""

from __future__ import annotations

import sys
import textwrap

from quest_vllm.errors import EvalUnavailable, QuestError

DONE, SOME_FAILED, USAGE, UNAVAILABLE, INTERRUPTED = 0, 1, 2, 3, 130
_BAD_USAGE = {USAGE: "bad usage: the message names the flag, what it takes and what it got"}
_STOPPED = "interrupted (Ctrl-C)"

STOPS = (QuestError, KeyboardInterrupt)
"""What ends eval, bench and calibrate before their work is done; see :func:`stop`."""

MEANINGS: dict[str, dict[int, str]] = {
    "serve": {
        DONE: "stopped by SIGTERM or Ctrl-C",
        SOME_FAILED: "vLLM could not start, or its engine died: its log says why (other codes are vLLM's too)",
        USAGE: "bad usage or configuration, found before vLLM starts",
    },
    "check": {
        DONE: "a server would start here",
        SOME_FAILED: "something here would stop a server, or the model given is refused",
        **_BAD_USAGE,
    },
    "eval": {
        DONE: "every measurement is there",
        SOME_FAILED: "some failed: the table leaves them out, the same command retries them",
        **_BAD_USAGE,
        UNAVAILABLE: "the server or the engine cannot be used",
        INTERRUPTED: f"{_STOPPED}: the same command goes on from there",
    },
    "bench": {
        DONE: "every round is there",
        SOME_FAILED: "some rounds failed: the table leaves them out",
        **_BAD_USAGE,
        UNAVAILABLE: "a server cannot be started or used",
        INTERRUPTED: f"{_STOPPED}: the files hold what was measured until then",
    },
    "calibrate": {
        DONE: "the settings are written",
        **_BAD_USAGE,
        UNAVAILABLE: "the engine cannot be used",
        INTERRUPTED: _STOPPED,
    },
    "completion": {
        DONE: "the script is on standard output",
        **_BAD_USAGE,
        UNAVAILABLE: "the package shtab is not installed",
    },
}


def help_text(command: str) -> str:
    """The codes of ``command`` for the end of its ``--help``."""
    codes = "; ".join(f"{code} {meaning}" for code, meaning in MEANINGS[command].items())
    return textwrap.fill(f"exit codes: {codes}.", width=118, break_on_hyphens=False)


def stop(command: str, why: BaseException, interrupted: str | None = None) -> int:
    """Say on standard error what of :data:`STOPS` ended ``command``; returns its code. None: Ctrl-C without a word."""
    if isinstance(why, KeyboardInterrupt):
        if interrupted is not None:
            print(f"\nquest-vllm {command}: {interrupted}", file=sys.stderr)
        return INTERRUPTED
    print(f"quest-vllm {command}: {why}", file=sys.stderr)
    return UNAVAILABLE if isinstance(why, EvalUnavailable) else USAGE
