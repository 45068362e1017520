"""One real server for this folder: audited, with the page, behind an API key and a root path."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import Server, run_server, serve_flags

KEY, ROOT_PATH = "a-test-key", "/lab"


@pytest.fixture(scope="session")
def deployed(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server; ``/metrics`` and the page's static files need no key."""
    flags = ["--quest-audit", "3", "--quest-page", "--api-key", KEY, "--root-path", ROOT_PATH]
    command = [sys.executable, "-m", "quest_vllm.cli", "serve", *serve_flags(model_path), *flags]
    with run_server(command, tmp_path_factory.mktemp("server") / "log", key=KEY) as running:
        yield running
