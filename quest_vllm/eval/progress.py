"""A progress bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

BAR_WIDTH = 30
SECONDS_BETWEEN_LINES = 20.0


class Progress:
    """Counts to ``total`` on standard error; ``done`` were finished before this run began."""

    def __init__(self, total: int, done: int = 0) -> None:
        self._total, self._done, self._before = total, done, done
        self._began = time.monotonic()
        self._shown = 0.0
        self._bar = sys.stderr.isatty()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            print(file=sys.stderr)

    def advance(self, count: int = 1) -> None:
        """``count`` more are done."""
        self._done += count
        now = time.monotonic()
        pause = 0.1 if self._bar else SECONDS_BETWEEN_LINES
        if now - self._shown >= pause or self._done == self._total:
            self._shown = now
            print(self._line(now), end="" if self._bar else "\n", file=sys.stderr, flush=True)

    def _line(self, now: float) -> str:
        filled = BAR_WIDTH * self._done // max(1, self._total)
        rate = (self._done - self._before) / max(1e-9, now - self._began)
        left = (self._total - self._done) / rate if rate else float("inf")
        text = f"{self._done}/{self._total} measurements, {rate:.1f}/s, {left / 60:.1f} min left"
        return f"\r[{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {text}  " if self._bar else text
