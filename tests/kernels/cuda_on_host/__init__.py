"""Builds CUDA sources as host functions, with as much of CUDA as they need."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from quest_vllm.ops import build_tools, cuda_build
from quest_vllm.ops.build_tools import KernelsUnavailable

HERE = Path(__file__).parent


def build(
    source: str, head_dim: int, folder: Path, warps: int = 8, races: bool = False, kernels: Path | None = None
) -> ctypes.CDLL:
    """Compile ``source`` of this folder into ``folder``, for CTAs of ``warps``; skips the test where CUDA lacks.

    With ``races`` accesses to shared memory that no barrier orders are noted (races.h), for :func:`take_races`.
    ``kernels`` is the folder of the CUDA sources, ours when None.
    """
    try:
        headers = Path(shutil.which(cuda_build.find_nvcc()[0]) or "").resolve().parent.parent / "include"
    except KernelsUnavailable as error:
        pytest.skip(str(error))
    if not (headers / "cuda_bf16.h").is_file():
        headers = Path("/usr/local/cuda/include")
    target = folder / f"{Path(source).stem}_{head_dim}_{warps}{'_races' * races}.so"
    folders = [f"-I{path}" for path in (headers, kernels or build_tools.source_dir("cuda"), HERE)]
    # threads change stacks by longjmp, which a fortified one takes for an error; libraries share no variables
    flags = ["-std=c++20", "-O1", "-U_FORTIFY_SOURCE", "-fno-gnu-unique", "-shared", "-fPIC"]
    flags += [f"-DQUEST_HEAD_DIM={head_dim}", f"-DQUEST_WARPS={warps}"]
    parts = [str(HERE / source)]
    if races:  # linked without the sanitizer's library: races.cpp stands for it
        flags += ["-DQUEST_RACES", "-g", "-fno-threadsafe-statics"]
        parts = [str(target.with_suffix(".o")), str(HERE / "races.cpp")]
        compiled = [flag for flag in flags if flag != "-shared"]
        run("g++", *compiled, "-fsanitize=thread", *folders, "-c", str(HERE / source), "-o", parts[0])
    run("g++", *flags, *folders, *parts, "-o", str(target))
    return ctypes.CDLL(str(target))


def run(*command: str) -> str:
    """Run ``command``; its output."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


class Race(ctypes.Structure):
    """See races.h."""

    _fields_ = [
        ("offset", ctypes.c_uint64),
        ("first", ctypes.c_uint32),
        ("second", ctypes.c_uint32),
        ("first_code", ctypes.c_void_p),
        ("second_code", ctypes.c_void_p),
    ]


def take_races(library: ctypes.CDLL) -> list[str]:
    """The races that ``library`` has found since the last call, in words, each pair of places in the code once."""
    into = (Race * 64)()
    found = into[: library.quest_take_races(into, len(into))]
    start = _first_address(library._name)

    def where(code: int) -> str:
        return Path(run("addr2line", "-e", library._name, hex(code - 1 - start)).split()[0]).name

    pairs = {(race.first_code, race.second_code): race for race in reversed(found)}
    return [
        f"byte {race.offset}: thread {race.first} at {where(first)}, thread {race.second} at {where(second)}"
        for (first, second), race in pairs.items()
    ]


def _first_address(path: str) -> int:
    """Where a library lies in this process."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(path):
            return int(line.split("-")[0], 16)
    raise LookupError(path)
