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
    """Return ``csrc/<name>``: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).resolve().parent.parent
    candidates = (package.parent / "csrc" / name, package / "_csrc" / name)
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    raise KernelsUnavailable(f"the sources are missing: looked in {' and '.join(map(str, candidates))}")


def cache_dir() -> Path:
    """Return the folder that holds built libraries."""
    return Path(os.environ.get("QUEST_VLLM_CACHE") or Path.home() / ".cache" / "quest_vllm")


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
        raise KernelsUnavailable(f"cannot write the library to {target.parent}: {error}") from error
    return target
