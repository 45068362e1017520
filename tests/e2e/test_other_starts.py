"""Starts that must fail with a reason, and `quest-vllm check`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from quest_vllm.cli import main
from tests.e2e.conftest import serve_flags, server_environment

pytestmark = pytest.mark.server


def test_unknown_key_stops_the_start_and_names_the_nearest(model_path: Path) -> None:
    flags = ["--additional-config", '{"quest": {"token_budgt": 512}}']
    command = [sys.executable, "-m", "quest_vllm.cli", "serve", *serve_flags(model_path), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=server_environment())
    assert done.returncode != 0
    output = done.stdout + done.stderr
    assert "token_budgt" in output and "did you mean 'token_budget'" in output


def test_another_backend_is_a_usage_error() -> None:
    command = [sys.executable, "-m", "quest_vllm.cli", "serve", "m", "--attention-backend", "FLASH_ATTN"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "FLASH_ATTN" in done.stderr


def test_check_prints_the_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check"]) == 0
    assert "token_budget: 2048" in capsys.readouterr().out
