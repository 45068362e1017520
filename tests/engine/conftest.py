"""Fixtures of the in-process engine tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def monkeypatch_module() -> Iterator[pytest.MonkeyPatch]:
    """A monkeypatch that lasts as long as the module's engine."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch
