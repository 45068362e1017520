"""Shared fixtures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("shared cores", deadline=None)  # tests run beside engines: time says nothing
settings.load_profile("shared cores")

ROOT = Path(__file__).parents[1]
# of engines and servers on the CPU: without AVX-512, bfloat16 prefills three to six times slower than float32
DTYPE = "float32" if torch.backends.cpu.get_cpu_capability() == "AVX2" else "auto"


@pytest.fixture(scope="session")
def model_path() -> Path:
    """The small real model that set-up builds."""
    path = Path(os.environ.get("QUEST_TEST_MODEL", ROOT / ".cache/models/SmolLM2-135M-Instruct"))
    if not (path / "config.json").exists():
        pytest.fail(f"no model at {path}: run `make model` first")
    return path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What leaves something behind comes later: engines leave torch with one thread, faults kill a shared server.

    Speculation goes last. N-gram look-up imports numba, and vLLM 0.32 then starts no other engine in the process: its
    scan of all modules for Triton kernels ends in "'_lib_fn_wrapper' object has no attribute 'get'" (llvmlite's).
    """
    last = {"test_faults.py": 2, "test_speculation.py": 3}
    items.sort(key=lambda item: last.get(item.path.name, int(item.get_closest_marker("engine") is not None)))
