"""Shared fixtures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def model_path() -> Path:
    """The small real model that set-up builds."""
    path = Path(os.environ.get("QUEST_TEST_MODEL", ROOT / ".cache/models/SmolLM2-135M-Instruct"))
    if not (path / "config.json").exists():
        pytest.fail(f"no model at {path}: run `make model` first")
    return path
