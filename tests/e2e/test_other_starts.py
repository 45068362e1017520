"""Other ways to start a server, and starts that must fail with a reason."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import MODEL_NAME, run_server, serve_flags, server_environment, vllm_command
from tests.e2e.test_server import prompt_ids, xargs

pytestmark = pytest.mark.server


def test_plain_vllm_with_two_api_servers(model_path: Path, tmp_path: Path) -> None:
    flags = ["--attention-backend", "CUSTOM", "--api-server-count", "2"]
    with run_server(vllm_command("serve", *serve_flags(model_path), *flags), tmp_path / "log") as server:
        for seed in range(4):
            server.client().completions.create(
                model=MODEL_NAME,
                prompt=prompt_ids(800, seed),
                max_tokens=5,
                extra_body=xargs(128) | {"ignore_eos": True},
            )
        # both API servers see the same totals
        for _ in range(4):
            assert server.metrics()['quest_decode_rows_total{path="sparse",reason="budget"}'] == 16


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


def test_check_prints_the_configuration() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "quest_vllm.cli", "check"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "token_budget: 2048" in done.stdout
