"""What several unit tests need."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from quest_vllm import metrics, tally
from quest_vllm.metrics_files import ENV_PROMETHEUS_DIR, ENV_RUN_DIR


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A metrics directory of the test's own."""
    monkeypatch.delenv(ENV_PROMETHEUS_DIR, raising=False)
    monkeypatch.setenv(ENV_RUN_DIR, str(tmp_path / "run"))
    for cached in (metrics._worker_metrics, tally._tally_writer):
        cached.cache_clear()
    yield tmp_path / "run"
    for cached in (metrics._worker_metrics, tally._tally_writer):
        cached.cache_clear()
