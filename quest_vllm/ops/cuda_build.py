"""Compiles csrc/cuda with nvcc into a shared library per head dimension and number of warps, once per source.

The library has a C interface and links the CUDA runtime statically: it depends on neither Python's, torch's nor CUDA's
version, only on a driver that runs what nvcc emits. ``python -m quest_vllm.ops.cuda_build 64 128 256`` builds ahead of
time, for an image without a compiler.

Environment: ``QUEST_VLLM_CACHE`` is where libraries are kept, ``NVCC`` the compiler (else ``$CUDA_HOME/bin/nvcc``, else
the one on PATH).
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

from quest_vllm.ops import build_tools
from quest_vllm.ops.build_tools import KernelsUnavailable, Progress

HEAD_DIMS = (64, 128, 256)
_SOURCES = {8: ("quest_decode.cu", "write_kv.cu"), 16: ("quest_decode.cu",)}  # by warps a CTA
FLAGS = ("-std=c++17", "-O3", "-lineinfo", "-gencode=arch=compute_90a,code=sm_90a")
_LINK_FLAGS = ("-shared", "-cudart=static", "-Xcompiler", "-fPIC,-fvisibility=hidden")


def variants(head_dim: int) -> dict[int, tuple[str, ...]]:
    """Numbers of warps of a CTA for which ``head_dim`` is built, and from which files."""
    return {warps: names for warps, names in _SOURCES.items() if warps == 8 or head_dim <= 128}


def library_path(head_dim: int, warps: int = 8) -> Path:
    """Return where the library for ``head_dim`` and CTAs of ``warps`` lies, built or not."""
    digest = hashlib.sha256(repr((FLAGS, _LINK_FLAGS)).encode())
    for source in sorted(build_tools.source_dir("cuda").iterdir()):
        if source.suffix in (".cu", ".cuh", ".h"):
            digest.update(source.name.encode() + source.read_bytes())
    return build_tools.cache_dir() / f"cuda-{digest.hexdigest()[:16]}" / f"quest_vllm_cuda_d{head_dim}_w{warps}.so"


def find_nvcc() -> list[str]:
    """Return the command that compiles CUDA; raises :class:`KernelsUnavailable` where there is none."""
    wanted = os.environ.get("NVCC")
    home = os.environ.get("CUDA_HOME")
    for command in [wanted] if wanted else [f"{home}/bin/nvcc" if home else "", "nvcc", "/usr/local/cuda/bin/nvcc"]:
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return words
    looked_for = f"NVCC={wanted}" if wanted else "nvcc under CUDA_HOME, on PATH or in /usr/local/cuda/bin"
    raise KernelsUnavailable(f"no CUDA compiler: expected {looked_for}; a CUDA 12.3 or newer toolkit has it")


def build(head_dim: int, warps: int = 8, progress: Progress | None = None) -> Path:
    """Return the library's path for ``head_dim`` and CTAs of ``warps``, after building it if it is not there yet.

    Building takes about 20 seconds. Safe in concurrent processes. Raises :class:`KernelsUnavailable` for another head
    dimension, without a compiler, or where compilation fails.
    """
    if head_dim not in HEAD_DIMS:
        raise KernelsUnavailable(f"head_dim: expected one of {HEAD_DIMS}, got {head_dim}")
    report = progress or build_tools.log_progress
    target = library_path(head_dim, warps)

    def make() -> None:
        report(f"building the CUDA kernels (head_dim {head_dim}, {warps} warps) into {target.parent}: once, 20 seconds")
        folder = build_tools.source_dir("cuda")
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            linked = Path(scratch) / target.name
            sources = [str(folder / name) for name in _SOURCES[warps]]
            options = [*FLAGS, *_LINK_FLAGS, f"-DQUEST_HEAD_DIM={head_dim}", f"-DQUEST_WARPS={warps}"]
            build_tools.run_compiler([*find_nvcc(), *options, *sources, "-o", str(linked)])
            linked.replace(target)  # atomic: nobody sees half a library

    return build_tools.build_once(target, make)


def main() -> int:
    """Build for the head dimensions on the command line (default: all). Returns 0, or 1 with the reason."""
    try:
        for head_dim in map(int, sys.argv[1:] or HEAD_DIMS):
            for warps in variants(head_dim):
                print(f"cuda_build: ready: {build(head_dim, warps, print)}", flush=True)
    except (KernelsUnavailable, ValueError) as error:
        print(f"cuda_build: {error}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
