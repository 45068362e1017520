"""What the steps of one request attended to under top_p: from the worker that chose its pages to the reply's usage.

vLLM has no channel from a worker to one reply, and under top_p nobody can work the numbers out from lengths. So the API
server gives such a request a number (:data:`TALLY_XARG`), the worker adds up what that number's rows took in a mapped
file of the metrics directory, of :data:`CAPACITY` records with the oldest overwritten first, and the API server reads
it when the reply is done. A step's forward pass comes before its token, so the record is complete by then.
"""

from __future__ import annotations

import functools
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quest_vllm.budget import BudgetTable
from quest_vllm.metrics_files import metrics_dir, set_aside
from quest_vllm.runtime import active_config

TALLY_XARG = "quest_tally"
MAX_TALLY = 2**31 - 1
CAPACITY = 4096

RECORD = np.dtype([("number", "<i8"), ("steps", "<f8"), ("pages", "<f8"), ("tokens", "<f8")])

_tallies = BudgetTable()


def get_tally_table() -> BudgetTable:
    """The tally number of each batch slot of this process; 0 is none."""
    return _tallies


def new_tally() -> int:
    """A number for one request, 1 .. :data:`MAX_TALLY`."""
    return 1 + secrets.randbelow(MAX_TALLY)


def tally_number(extra_args: dict[str, Any] | None) -> int:
    """The number that a request carries; 0 for none and for nonsense."""
    value = (extra_args or {}).get(TALLY_XARG)
    return value if type(value) is int and 1 <= value <= MAX_TALLY else 0


@dataclass(frozen=True)
class Tally:
    """Adaptive decode steps of one request, and the pages and tokens of one head of one layer, summed over them."""

    steps: float
    pages: float
    tokens: float


class TallyWriter:
    """This process's file."""

    def __init__(self, directory: Path) -> None:
        name = f"tally_quest-{os.getpid()}-{secrets.token_hex(4)}"
        unfinished = directory / f"{name}.tmp"
        set_aside(unfinished, CAPACITY * RECORD.itemsize)
        self._ring = np.memmap(unfinished, RECORD, "r+", shape=(CAPACITY,))
        self._slots: dict[int, int] = {}
        self._next = 0
        unfinished.rename(directory / f"{name}.ring")

    def add(self, number: int, steps: float, pages: float, tokens: float) -> None:
        """Add to ``number``'s record; a layer adds its share of a step."""
        record = self._ring[self._slot(number)]
        record["steps"] += steps
        record["pages"] += pages
        record["tokens"] += tokens

    def _slot(self, number: int) -> int:
        if number not in self._slots:
            slot = self._next % CAPACITY
            self._slots.pop(int(self._ring[slot]["number"]), None)
            self._ring[slot] = (number, 0, 0, 0)
            self._slots[number] = slot
            self._next += 1
        return self._slots[number]


def read_tally(directory: Path, number: int) -> Tally | None:
    """``number``'s record, from whichever worker keeps it; None where none does."""
    for path in sorted(directory.glob("tally_quest-*.ring")):
        ring = np.memmap(path, RECORD, "r", shape=(CAPACITY,))
        for slot in np.flatnonzero(ring["number"] == number):
            _, steps, pages, tokens = ring[slot].item()
            return Tally(steps, pages, tokens)
    return None


def find_tally(number: int) -> Tally | None:
    """:func:`read_tally` in this server's metrics directory; 0 has none."""
    return read_tally(metrics_dir(active_config().metrics_dir), number) if number else None


def get_tally_writer() -> TallyWriter:
    """This process's writer; a fork gets one of its own."""
    return _tally_writer(os.getpid())


@functools.lru_cache(maxsize=1)
def _tally_writer(_pid: int) -> TallyWriter:
    return TallyWriter(metrics_dir(active_config().metrics_dir))
