"""The libraries of the CUDA kernels: built when need be, loaded once, launched through ctypes."""

from __future__ import annotations

import ctypes
import functools

import torch

from quest_vllm.ops import cuda_build
from quest_vllm.ops.build_tools import KernelsUnavailable
from quest_vllm.ops.cuda_params import DecodeParams, WriteParams


@functools.cache
def load(head_dim: int, warps: int = 8) -> ctypes.CDLL:
    """Build the library for ``head_dim`` and CTAs of ``warps`` if need be, and load it; its launches, by C name.

    Raises :class:`KernelsUnavailable`.
    """
    path = cuda_build.build(head_dim, warps)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelsUnavailable(f"cannot load {path}: {error}") from error
    library.quest_error_string.restype = ctypes.c_char_p
    for name in ("quest_decode", "quest_write_kv") if warps == 8 else ("quest_decode",):
        getattr(library, name).argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
    sizes = [library.quest_params_size(which) for which in (0, 1)]
    if sizes != [ctypes.sizeof(DecodeParams), ctypes.sizeof(WriteParams)]:
        raise KernelsUnavailable(f"{path} disagrees with cuda_params.py about the parameters' sizes {sizes}")
    return library


def prepare(head_dim: int) -> None:
    """Load the kernels that serving needs, before any CUDA graph is captured. Raises :class:`KernelsUnavailable`."""
    for warps, sources in cuda_build.variants(head_dim).items():
        library = load(head_dim, warps)
        for name in ("quest_prepare", "quest_prepare_write")[: len(sources)]:
            error = getattr(library, name)()
            if error:
                raise KernelsUnavailable(f"{name}: {library.quest_error_string(error).decode()}")


def launch(name: str, head_dim: int, params: DecodeParams | WriteParams, dtype: torch.dtype, warps: int = 8) -> None:
    """Queue the launch ``name`` on the current stream. Raises ``RuntimeError`` with CUDA's own words."""
    library = load(head_dim, warps)
    stream = torch.cuda.current_stream().cuda_stream
    error = getattr(library, name)(ctypes.byref(params), int(dtype == torch.bfloat16), stream)
    if error:
        raise RuntimeError(f"{name}: {library.quest_error_string(error).decode()}")
