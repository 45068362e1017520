"""csrc/cuda compiles for Hopper without a GPU, fits its registers, and agrees with Python about its parameters."""

from __future__ import annotations

import subprocess

import pytest

from quest_vllm.ops import build_tools, cuda_build, cuda_library
from quest_vllm.ops.build_tools import KernelsUnavailable


@pytest.fixture(scope="module")
def nvcc() -> list[str]:
    try:
        return cuda_build.find_nvcc()
    except KernelsUnavailable as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("source", "warps"), [("quest_decode.cu", 16), ("write_kv.cu", 8)])
def test_kernels_compile_and_spill_little(nvcc: list[str], source: str, warps: int, tmp_path) -> None:
    """As most models run them, with the fewest registers: what attention's loop spills, it reads again."""
    path = build_tools.source_dir("cuda") / source
    options = ["-Xptxas=-v", "-DQUEST_HEAD_DIM=128", f"-DQUEST_WARPS={warps}"]
    command = [*nvcc, *cuda_build.FLAGS, *options, "-cubin", str(path), "-o"]
    done = subprocess.run([*command, str(tmp_path / "out.cubin")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    spills = [
        int(line.split(" bytes spill stores")[0].split()[-1]) for line in done.stderr.splitlines() if "spill" in line
    ]
    assert spills and max(spills) <= 96, done.stderr


def test_library_loads_and_parameters_have_the_same_size(nvcc: list[str], tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("QUEST_VLLM_CACHE", str(tmp_path))
    cuda_library.load.cache_clear()
    library = cuda_library.load(64)  # raises where the sizes differ
    assert all(hasattr(library, name) for name in ("quest_prepare", "quest_prepare_write"))
    assert cuda_build.library_path(64).is_file()


def test_no_compiler_is_said_in_words(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("NVCC", "no-such-nvcc")
    monkeypatch.setenv("QUEST_VLLM_CACHE", str(tmp_path))
    with pytest.raises(KernelsUnavailable, match="no CUDA compiler: expected NVCC=no-such-nvcc"):
        cuda_build.build(64)


def test_another_head_dim_is_refused() -> None:
    with pytest.raises(KernelsUnavailable, match=r"head_dim: expected one of \(64, 128, 256\), got 80"):
        cuda_build.build(80)
