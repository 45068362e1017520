"""Compiles csrc/cpu into a shared library, once per torch version and source.

``python -m quest_vllm.ops.cpu_build`` does it at set-up; :func:`build` returns at once where the library is there. The
compiler is called directly: each kernel file has its own instruction set, which ``torch.utils.cpp_extension`` cannot
express, and neither ninja nor setuptools is needed. Knows nothing of the operations themselves.

Environment: ``QUEST_VLLM_CACHE`` (default ``~/.cache/quest_vllm``) is where libraries are kept, ``CXX`` the compiler.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from quest_vllm.ops import build_tools
from quest_vllm.ops.build_tools import KernelsUnavailable, Progress

LIBRARY_NAME = "quest_vllm_cpu.so"
_COMMON_FLAGS = ("-O3", "-fPIC", "-std=c++20", "-fvisibility=hidden", "-Wno-psabi", "-DNDEBUG")
_AVX2_FLAGS = ("-mavx2", "-mfma", "-mf16c")
_AVX512_FLAGS = (
    *_AVX2_FLAGS,
    "-mavx512f",
    "-mavx512bw",
    "-mavx512vl",
    "-mavx512dq",
    "-mprefer-vector-width=512",
)


@dataclass(frozen=True)
class Unit:
    """One source file and the flags of its own."""

    source: str
    flags: tuple[str, ...]


def _units() -> list[Unit]:
    torch_root = Path(torch.__file__).parent
    abi = int(torch.compiled_with_cxx11_abi())
    x86 = ("-DQUEST_X86",) if platform.machine().lower() in ("x86_64", "amd64") else ()
    # -fopenmp for at::parallel_for; linked without it, so that the symbols come from the runtime that torch uses
    bindings = (f"-I{torch_root / 'include'}", f"-D_GLIBCXX_USE_CXX11_ABI={abi}", "-fopenmp", *x86)
    units = [Unit("bindings.cpp", bindings), Unit("kernels_generic.cpp", (*x86, "-O2"))]
    if x86:
        units += [Unit("kernels_avx2.cpp", (*x86, *_AVX2_FLAGS)), Unit("kernels_avx512.cpp", (*x86, *_AVX512_FLAGS))]
    return units


def library_path() -> Path:
    """Return where the library for this torch, these sources and these flags lies, built or not."""
    digest = hashlib.sha256(repr([(unit.source, unit.flags) for unit in _units()]).encode())
    digest.update(repr((_COMMON_FLAGS, torch.__version__, os.environ.get("CXX"))).encode())
    for source in sorted(build_tools.source_dir("cpu").iterdir()):
        if source.suffix in (".cpp", ".h"):
            digest.update(source.name.encode() + source.read_bytes())
    return build_tools.cache_dir() / f"cpu-torch{torch.__version__}-{digest.hexdigest()[:16]}" / LIBRARY_NAME


def _compiler() -> list[str]:
    wanted = os.environ.get("CXX")
    for command in [wanted] if wanted else ["g++", "c++", "clang++"]:
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return words
    looked_for = f"CXX={wanted}" if wanted else "g++, c++ or clang++"
    raise KernelsUnavailable(
        f"no C++ compiler: expected {looked_for} on PATH (on Debian or Ubuntu: apt-get install g++)"
    )


def _compile(compiler: list[str], unit: Unit, folder: Path, progress: Progress) -> str:
    begin = time.monotonic()
    target = folder / f"{Path(unit.source).stem}.o"
    build_tools.run_compiler(
        [
            *compiler,
            *_COMMON_FLAGS,
            *unit.flags,
            "-c",
            str(build_tools.source_dir("cpu") / unit.source),
            "-o",
            str(target),
        ]
    )
    progress(f"compiled {unit.source} in {time.monotonic() - begin:.0f} s")
    return str(target)


def _compile_and_link(target: Path, progress: Progress) -> None:
    compiler = _compiler()
    libraries = Path(torch.__file__).parent / "lib"
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        folder = Path(name)
        with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
            objects = list(pool.map(lambda unit: _compile(compiler, unit, folder, progress), _units()))
        linked = folder / LIBRARY_NAME
        link = ["-shared", *objects, f"-L{libraries}", "-Wl,--no-as-needed", "-ltorch_cpu", "-lc10", "-o", str(linked)]
        build_tools.run_compiler([*compiler, *link])
        linked.replace(target)  # atomic: nobody sees half a library


def build(progress: Progress | None = None) -> Path:
    """Return the library's path, after building it if it is not there yet.

    ``progress`` receives a line per step (default: the log). Safe in concurrent processes: one builds, the others wait.
    Raises :class:`KernelsUnavailable` without a compiler, without sources, or where compilation fails.
    """
    report = progress or build_tools.log_progress
    target = library_path()

    def make() -> None:
        report(f"building the C++ kernels into {target.parent} (once, under a minute)")
        _compile_and_link(target, report)

    return build_tools.build_once(target, make)


def main() -> int:
    """Build at set-up, with progress on standard output. Returns 0, or 1 with the reason."""
    try:
        path = build(lambda line: print(f"cpu_build: {line}", flush=True))
    except KernelsUnavailable as error:
        print(f"cpu_build: {error}", flush=True)
        return 1
    print(f"cpu_build: ready: {path}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
