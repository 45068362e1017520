"""Where built libraries go, and what is said where they cannot."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from quest_vllm.ops import build_tools
from quest_vllm.ops.build_tools import KernelsUnavailable

NOBODY = 65534


def as_nobody(target: Path, said: multiprocessing.Queue) -> None:  # type: ignore[type-arg]
    """Ask for ``target`` as a user who may not write where it lies; puts the path or the refusal."""
    if os.getuid() == 0:
        os.setuid(NOBODY)
    try:
        said.put(str(build_tools.build_once(target, lambda: target.touch())))
    except KernelsUnavailable as error:
        said.put(str(error))


@pytest.fixture
def read_only(tmp_path: Path) -> Path:
    """A folder that everybody may read and nobody may write."""
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(folder.stat().st_mode | 0o055)  # pytest keeps its folders from other users
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(0o555)
    return folder


def ask(target: Path) -> str:
    context = multiprocessing.get_context("fork")
    said = context.Queue()
    child = context.Process(target=as_nobody, args=(target, said))
    child.start()
    answer: str = said.get(timeout=30)
    child.join(30)
    return answer


def test_read_only_cache_is_refused_with_the_way_out(read_only: Path) -> None:
    answer = ask(read_only / "cpu-x" / "library.so")
    assert answer.startswith(f"cannot write the library to {read_only / 'cpu-x'}: [Errno 13] Permission denied")
    assert "set QUEST_VLLM_CACHE to a folder that can be written" in answer


def test_library_in_a_read_only_cache_is_used(read_only: Path) -> None:
    read_only.chmod(0o755)
    (read_only / "library.so").touch()
    read_only.chmod(0o555)
    assert ask(read_only / "library.so") == str(read_only / "library.so")


def test_user_without_a_home_must_name_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.delenv("QUEST_VLLM_CACHE", raising=False)
    with pytest.raises(KernelsUnavailable, match="QUEST_VLLM_CACHE: expected a folder for libraries, got none"):
        build_tools.cache_dir()
    monkeypatch.setenv("QUEST_VLLM_CACHE", "/elsewhere")
    assert build_tools.cache_dir() == Path("/elsewhere")


def test_sources_in_the_wheel_go_before_a_folder_that_happens_to_be_called_csrc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_tools, "__file__", str(tmp_path / "quest_vllm/ops/build_tools.py"))
    (tmp_path / "csrc/cpu").mkdir(parents=True)
    assert build_tools.source_dir("cpu") == tmp_path / "csrc/cpu"
    (tmp_path / "quest_vllm/_csrc/cpu").mkdir(parents=True)
    assert build_tools.source_dir("cpu") == tmp_path / "quest_vllm/_csrc/cpu"
    with pytest.raises(KernelsUnavailable, match="the sources are missing: looked in .*_csrc/cuda and .*csrc/cuda"):
        build_tools.source_dir("cuda")
