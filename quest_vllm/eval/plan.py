"""What a run consists of, and the JSONL file that lets it go on where it stopped. No model, no network."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from quest_vllm.errors import QuestValueError

DENSE = 0
"""The budget that means dense attention."""
PREFILL, DECODE = "prefill", "decode"
"""How the model reads the question: in the (dense) prefill, or token by token in (sparse) decode."""


class Unit(NamedTuple):
    """One measurement: an item of a task at a context length, read in a mode, at a budget (0: dense)."""

    task: str
    context: int
    item: int
    mode: str
    budget: int


@dataclass(frozen=True)
class Plan:
    """Every measurement of a run. ``budgets`` always holds :data:`DENSE`."""

    tasks: tuple[str, ...]
    contexts: tuple[int, ...]
    items: int
    modes: tuple[str, ...]
    budgets: tuple[int, ...]
    seed: int

    def units(self, only_decode: tuple[str, ...] = (), only_prefill: tuple[str, ...] = ()) -> Iterator[Unit]:
        """All units, those of one item next to one another. Tasks in ``only_*`` have one mode."""
        for context, task, item in itertools.product(self.contexts, self.tasks, range(self.items)):
            modes = (DECODE,) if task in only_decode else (PREFILL,) if task in only_prefill else self.modes
            for mode, budget in itertools.product(modes, self.budgets):
                yield Unit(task, context, item, mode, budget)


class ResultStore:
    """Records of finished units in a JSONL file: a line with the run's identity, then a line a record, flushed each.

    A record is a mapping with the unit's fields and either results or ``error``; failed units count as not done.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Open or create ``path``. Raises :class:`QuestValueError` where it belongs to a run of another identity."""
        self.path = path
        self._records: dict[Unit, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = self._read()
        if lines:
            self._check_identity(lines[0], identity)
            for record in lines[1:]:
                self._records[_unit(record)] = record
        self._write_all(identity)
        self._file = path.open("a", encoding="utf-8")

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines()
        parsed = []
        for number, line in enumerate(lines, 1):
            try:
                parsed.append(json.loads(line))
            except ValueError:
                if number < len(lines):
                    raise QuestValueError(f"{self.path}: line {number} is not JSON") from None
                # the run was killed while it wrote its last line
        return parsed

    def _check_identity(self, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        stored = found.get("run")
        if not isinstance(stored, Mapping):
            raise QuestValueError(f"{self.path}: line 1 is not the identity of a run")
        for key in sorted({*stored, *wanted}):
            if stored.get(key) != wanted.get(key):
                raise QuestValueError(
                    f"--output: {self.path} holds a run with {key} {stored.get(key)!r}, this one has "
                    f"{wanted.get(key)!r}: name another directory"
                )

    def _write_all(self, identity: Mapping[str, Any]) -> None:
        """Rewrite the file without a torn last line."""
        lines = [{"run": dict(identity)}, *self._records.values()]
        fresh = self.path.with_suffix(".tmp")
        fresh.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        fresh.replace(self.path)

    def is_done(self, unit: Unit) -> bool:
        """Whether ``unit`` has a record without an error."""
        return unit in self._records and "error" not in self._records[unit]

    def add(self, unit: Unit, result: Mapping[str, Any]) -> None:
        """Keep ``result`` of ``unit``, on disk too."""
        record = {**unit._asdict(), **result}
        self._records[unit] = record
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def records(self, units: Iterable[Unit]) -> list[dict[str, Any]]:
        """The records of ``units``, in their order; units without one are left out."""
        return [self._records[unit] for unit in units if unit in self._records]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _unit(record: Mapping[str, Any]) -> Unit:
    return Unit(*(record[field] for field in Unit._fields))
