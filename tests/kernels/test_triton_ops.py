"""Runs the cases of ``triton_cases.py``, ``triton_code_cases.py`` and ``triton_two_stage_cases.py``.

Here on a GPU, else in Triton's interpreter, in a process of its own.

Triton reads TRITON_INTERPRET once, when it is first imported, and importing vLLM imports it. A process of its own
keeps the order of the test files from mattering, and the switch from reaching the servers that other tests start.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

CASES = ("triton_cases", "triton_code_cases", "triton_two_stage_cases")

if torch.cuda.is_available():
    pytest.register_assert_rewrite(*(f"tests.kernels.{name}" for name in CASES))
    from tests.kernels.triton_cases import *  # noqa: F403
    from tests.kernels.triton_code_cases import *  # noqa: F403
    from tests.kernels.triton_two_stage_cases import *  # noqa: F403
else:

    @pytest.mark.parametrize("name", CASES)
    def test_kernels_in_the_interpreter(name: str) -> None:
        cases = Path(__file__).with_name(f"{name}.py")
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(cases)],
            cwd=Path(__file__).parents[2],
            env=os.environ | {"TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
            timeout=580,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
