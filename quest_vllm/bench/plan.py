"""What a sweep consists of. No model, no network."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from quest_vllm.eval.plan import DENSE

STOCK = -1
"""Stands where a budget does: stock vLLM, without this package's backend."""
AGAINST = ("dense", "stock")
FEWEST_TOKENS = 8
"""Prompt tokens; the first :data:`~quest_vllm.bench.prompts.MARK_TOKENS` of a longer one are its mark."""


class Cell(NamedTuple):
    """One point of the sweep: ``batch`` requests of ``context`` prompt tokens at ``budget`` (0: dense, or STOCK)."""

    context: int
    batch: int
    budget: int


def series_name(budget: int) -> str:
    """ "stock", "dense", or the budget."""
    return {STOCK: "stock", DENSE: "dense"}.get(budget) or str(budget)


@dataclass(frozen=True)
class Options:
    """Everything that the command line says. ``timeout`` is in seconds, of one request."""

    target: str
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    budgets: tuple[int, ...]
    against: str
    tokens: int
    repeats: int
    seed: int
    output: Path
    tokenizer: str | None = None
    text: Path | None = None
    model_name: str | None = None
    api_key: str = "-"
    timeout: float = 600.0
    start_timeout: float = 900.0
    serve_args: tuple[str, ...] = field(default=())

    @property
    def is_url(self) -> bool:
        """Whether the target is a running server."""
        return self.target.startswith(("http://", "https://"))

    @property
    def with_stock(self) -> bool:
        """Whether a stock server takes part, started here or at a URL."""
        return self.against != "dense"

    @property
    def reference(self) -> int:
        """The budget that ratios are taken against."""
        return STOCK if self.with_stock else DENSE

    @property
    def rounds(self) -> int:
        """How many rounds the sweep takes."""
        return len(list(self.cells(self.budgets))) * self.repeats + (
            len(list(self.cells((STOCK,)))) * self.repeats if self.with_stock else 0
        )

    def cells(self, budgets: tuple[int, ...]) -> Iterator[Cell]:
        """Cells of one server, budgets of the same context and batch next to one another."""
        return itertools.starmap(Cell, itertools.product(self.contexts, self.batches, budgets))
