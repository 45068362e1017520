"""A server of this machine, started for a sweep: ours, or stock vLLM."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

from quest_vllm.errors import EvalUnavailable

PLUGIN_GROUPS = tuple(f"vllm.{kind}_plugins" for kind in ("general", "platform", "stat_logger", "io_processor"))
LOCAL = "127.0.0.1"
GRACE_SECONDS = 60


@dataclass(frozen=True)
class Running:
    """A server that is healthy."""

    url: str
    process: subprocess.Popen[bytes]


def quest_command(model: str) -> list[str]:
    """``quest-vllm serve MODEL`` of this environment."""
    return [sys.executable, "-m", "quest_vllm.cli", "serve", model]


def stock_command(model: str) -> list[str]:
    """``vllm serve MODEL`` of this environment; see :func:`stock_environment`."""
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model]


def stock_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """``environment`` without this package's plugins: platform, backend, stat logger.

    vLLM loads the logits processors of every installed package whatever ``VLLM_PLUGINS`` says. Ours changes no logits;
    it notes each request's budget when the batch changes, in stock's runs too.
    """
    named = environment.get("VLLM_PLUGINS")
    names = named.split(",") if named is not None else [e.name for g in PLUGIN_GROUPS for e in entry_points(group=g)]
    return {**environment, "VLLM_PLUGINS": ",".join(name for name in names if not name.startswith("quest_vllm"))}


def serve_flags(contexts: Sequence[int], batches: Sequence[int], tokens: int) -> list[str]:
    """What a sweep asks of ``vllm serve``: room for its longest request and its largest batch, no prefix cache."""
    flags = f"--host {LOCAL} --no-enable-prefix-caching --max-num-seqs {max(batches)}"
    return [*flags.split(), "--max-model-len", str(max(contexts) + tokens)]


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind((LOCAL, 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def started(
    command: Sequence[str], environment: Mapping[str, str], log: Path, timeout: float, port: int = 0
) -> Iterator[Running]:
    """Run ``command`` on ``port`` (0: a free one) until the block ends; yields once it is healthy.

    Raises :class:`EvalUnavailable` with the end of its log where it does not come up in ``timeout`` seconds.
    """
    port = port or free_port()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [*command, "--port", str(port)], stdout=sink, stderr=subprocess.STDOUT, env=dict(environment)
        )
    try:
        url = f"http://{LOCAL}:{port}"
        _wait(process, url, log, timeout)
        yield Running(url, process)
    finally:
        _stop(process)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        code = process.poll()
        if code is not None:
            raise EvalUnavailable(f"the server ended at start-up with code {code}; the end of {log}:\n{_tail(log)}")
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=2):
            return
        time.sleep(0.5)
    raise EvalUnavailable(
        f"--start-timeout: the server was not healthy after {timeout:.0f} seconds; the end of {log}:\n{_tail(log)}"
    )


def _tail(log: Path, lines: int = 12) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def machine_environment() -> dict[str, str]:
    """The environment of a server started here."""
    return {"VLLM_NO_USAGE_STATS": "1", **os.environ}
