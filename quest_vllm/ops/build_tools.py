"""What the builders of the C++ and CUDA kernels share: where sources and libraries lie, locking, running a compiler.

Environment: ``QUEST_VLLM_CACHE`` (default ``~/.cache/quest_vllm``) is where built libraries are kept.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from quest_vllm.errors import QuestError

logger = logging.getLogger("vllm.quest_vllm")

Progress = Callable[[str], None]


class KernelsUnavailable(QuestError, RuntimeError):
    """Compiled kernels cannot be built or loaded here; the message says why and what would help."""


def source_dir(name: str) -> Path:
    """Return ``csrc/<name>``: inside the package in an installed wheel, beside it in a checkout.

    The wheel's own goes first: another package may leave a folder called ``csrc`` in site-packages.
    """
    package = Path(__file__).resolve().parent.parent
    candidates = (package / "_csrc" / name, package.parent / "csrc" / name)
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    raise KernelsUnavailable(f"the sources are missing: looked in {' and '.join(map(str, candidates))}")


def cache_dir() -> Path:
    """Return the folder that holds built libraries. Raises :class:`KernelsUnavailable` for a user without a home."""
    named = os.environ.get("QUEST_VLLM_CACHE")
    if named:
        return Path(named)
    try:
        return Path.home() / ".cache" / "quest_vllm"
    except RuntimeError as error:  # no HOME, and a user id that has no passwd entry
        raise KernelsUnavailable(f"QUEST_VLLM_CACHE: expected a folder for libraries, got none; {error}") from None


def log_progress(line: str) -> None:
    """Default receiver of progress lines: the log."""
    logger.info("quest_vllm: %s", line)


def run_compiler(command: list[str]) -> None:
    """Run ``command``; raises :class:`KernelsUnavailable` with the first lines of its errors."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        errors = "\n".join(result.stderr.strip().splitlines()[:20])
        raise KernelsUnavailable(f"status {result.returncode} from: {shlex.join(command)}\n{errors}")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed, also by a crash
        yield


def build_once(target: Path, make: Callable[[], None]) -> Path:
    """Return ``target``, after ``make`` has created it if it is not there yet.

    Safe in concurrent processes: one builds, the others wait. Raises :class:`KernelsUnavailable` where the folder
    cannot be written.
    """
    if target.is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent / "lock"):
            if not target.is_file():
                make()
    except OSError as error:
        raise KernelsUnavailable(
            f"cannot write the library to {target.parent}: {error}; set QUEST_VLLM_CACHE to a folder that can be "
            "written, or build into it beforehand with `python -m quest_vllm.ops.cpu_build` (GPU: cuda_build)"
        ) from error
    return target
