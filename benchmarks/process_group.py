"""Runs a command that starts workers of its own, in a process group that leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


def run_group(
    command: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    limit: float,
    watch: Callable[[], None] = lambda: None,
) -> int:
    """Run ``command``, its output in ``log``, for at most ``limit`` seconds; ``watch`` is called twice a second.

    Returns the exit status, 124 where time ran out. Whatever of the group still lives at the end is killed.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=dict(environment), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        end = time.monotonic() + limit
        try:
            while process.poll() is None and time.monotonic() < end:
                watch()
                time.sleep(0.5)
            status = process.poll()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    watch()
    return 124 if status is None else status


def last_lines(log: Path, count: int = 60) -> str:
    """The end of a log, without progress bars."""
    lines = log.read_text(errors="replace").replace("\r", "\n").splitlines()
    return "\n".join([line for line in lines if line.strip() and "%|" not in line][-count:])
