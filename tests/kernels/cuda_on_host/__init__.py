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


def build(source: str, head_dim: int, folder: Path, warps: int = 8) -> ctypes.CDLL:
    """Compile ``source`` of this folder into ``folder``, for CTAs of ``warps``; skips the test where CUDA lacks."""
    try:
        headers = Path(shutil.which(cuda_build.find_nvcc()[0]) or "").resolve().parent.parent / "include"
    except KernelsUnavailable as error:
        pytest.skip(str(error))
    if not (headers / "cuda_bf16.h").is_file():
        headers = Path("/usr/local/cuda/include")
    target = folder / f"{Path(source).stem}_{head_dim}_{warps}.so"
    folders = [f"-I{path}" for path in (headers, build_tools.source_dir("cuda"), HERE)]
    # threads change stacks by longjmp, which a fortified one takes for an error; libraries share no variables
    flags = ["-std=c++20", "-O1", "-U_FORTIFY_SOURCE", "-fno-gnu-unique", "-shared", "-fPIC"]
    flags += [f"-DQUEST_HEAD_DIM={head_dim}", f"-DQUEST_WARPS={warps}"]
    command = ["g++", *flags, *folders, str(HERE / source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return ctypes.CDLL(str(target))
