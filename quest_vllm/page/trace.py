"""Which pages a traced request attended to: a ring of records in the metrics directory, from worker to API server.

A request asks to be traced with a number of its own choosing in ``vllm_xargs`` (:data:`TRACE_XARG`); without the page
the number is ignored. vLLM has no channel from a worker to the API server, so the worker writes fixed-size records into
a mapped file of :data:`CAPACITY` records, the oldest overwritten first, and the API server reads them while the request
streams. A record is one layer of one decode step, with the context cut into at most :data:`MAX_CELLS` cells of whole
pages. CPU backend only: on a GPU the selection never leaves the device.
"""

from __future__ import annotations

import base64
import functools
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quest_vllm.budget import BudgetTable
from quest_vllm.metrics_files import metrics_dir, set_aside
from quest_vllm.runtime import active_config

TRACE_XARG = "quest_trace"
MAX_TRACE = 2**31 - 1
MAX_CELLS = 512
CAPACITY = 8192
MAX_RECORDS_PER_REPLY = 4096
MAX_TRACED_ROWS = 8
"""Rows of one step that are recorded; further ones are not."""

RECORD = np.dtype(
    [
        ("written", "<i8"),  # monotonic nanoseconds; 0 while it is being written
        ("trace", "<i4"),
        ("length", "<i4"),  # tokens of context, the step's own included
        ("layer", "<i4"),
        ("pages_per_cell", "<i4"),
        ("cells", "<i4"),
        ("share", "u1", (MAX_CELLS,)),  # 255 * (page, head) pairs attended / all of the cell
    ]
)

_traces = BudgetTable()


def get_trace_table() -> BudgetTable:
    """The trace number of each batch slot of this process; 0 is none."""
    return _traces


def trace_number(extra_args: dict[str, Any] | None) -> int:
    """The trace number asked for, 1 .. :data:`MAX_TRACE`; 0 for none, for nonsense, and where the page is off."""
    value = (extra_args or {}).get(TRACE_XARG)
    if not active_config().page or not isinstance(value, int) or isinstance(value, bool):
        return 0
    return value if 1 <= value <= MAX_TRACE else 0


@dataclass(frozen=True)
class TracedRows:
    """The traced rows of a step: their places among the sparse rows, and their trace numbers."""

    rows: npt.NDArray[np.intp]
    traces: npt.NDArray[np.int32]


def traced_rows(traces: npt.NDArray[np.int32]) -> TracedRows | None:
    """``[num_sparse]`` trace numbers of the sparse rows to the rows that have one; None if there is none."""
    rows = np.flatnonzero(traces)[:MAX_TRACED_ROWS]
    return TracedRows(rows, traces[rows]) if rows.size else None


class TraceWriter:
    """This process's ring."""

    def __init__(self, directory: Path) -> None:
        name = f"trace_quest-{os.getpid()}-{secrets.token_hex(4)}"
        unfinished = directory / f"{name}.tmp"
        set_aside(unfinished, CAPACITY * RECORD.itemsize)
        self._ring = np.memmap(unfinished, RECORD, "r+", shape=(CAPACITY,))
        self._next = 0
        unfinished.rename(directory / f"{name}.ring")

    def record(
        self,
        layer: int,
        traced: TracedRows,
        seq_lens: npt.NDArray[np.int32],
        selected: npt.NDArray[Any],
        page_size: int,
    ) -> None:
        """Record one layer of one step.

        ``seq_lens`` is ``[num_sparse]``; ``selected`` is ``[num_sparse, num_heads, max_page_budget]``, -1 padded.
        """
        for row, trace in zip(traced.rows, traced.traces, strict=True):
            length = int(seq_lens[row])
            pages_per_cell, share = cell_shares(selected[row], -(-length // page_size))
            slot = self._ring[self._next % CAPACITY]
            slot["written"] = 0
            slot["trace"], slot["length"], slot["layer"] = trace, length, layer
            slot["pages_per_cell"], slot["cells"] = pages_per_cell, share.size
            slot["share"][: share.size] = share
            slot["written"] = time.monotonic_ns()
            self._next += 1


def cell_shares(selected: npt.NDArray[Any], num_pages: int) -> tuple[int, npt.NDArray[np.uint8]]:
    """Pages per cell, and each cell's attended share times 255, rounded up so that nothing attended shows as nothing.

    ``selected`` is ``[num_heads, max_page_budget]`` page indices, -1 padded.
    """
    pages_per_cell = -(-num_pages // MAX_CELLS)
    counts = np.bincount(selected[selected >= 0].ravel() // pages_per_cell, minlength=-(-num_pages // pages_per_cell))
    sizes = np.full(counts.size, pages_per_cell)
    sizes[-1] = num_pages - pages_per_cell * (counts.size - 1)
    return pages_per_cell, np.ceil(255 * counts / (sizes * selected.shape[0])).astype(np.uint8)


@dataclass(frozen=True)
class TraceReader:
    """Reads every worker's ring in a directory."""

    directory: Path

    def read(self, trace: int, after: int) -> dict[str, Any]:
        """Records of ``trace`` written after the cursor ``after``, oldest first, as JSON; ``next`` is the new cursor.

        ``records`` holds ``[length, layer, pages per cell, base64 of the cells' shares]``. At most
        :data:`MAX_RECORDS_PER_REPLY` of them; a record that is being overwritten is left out.
        """
        found = [self._matching(path, trace, after) for path in sorted(self.directory.glob("trace_quest-*.ring"))]
        records = np.concatenate(found) if found else np.zeros(0, RECORD)
        records = records[np.argsort(records["written"], kind="stable")][:MAX_RECORDS_PER_REPLY]
        return {
            "next": int(records["written"][-1]) if records.size else after,
            "records": [
                [
                    int(record["length"]),
                    int(record["layer"]),
                    int(record["pages_per_cell"]),
                    base64.b64encode(record["share"][: record["cells"]].tobytes()).decode(),
                ]
                for record in records
            ],
        }

    @staticmethod
    def _matching(path: Path, trace: int, after: int) -> npt.NDArray[Any]:
        ring = np.memmap(path, RECORD, "r", shape=(CAPACITY,))
        slots = np.flatnonzero((ring["trace"] == trace) & (ring["written"] > after))
        copies = np.array(ring[slots])
        # a record that changed meanwhile belongs to somebody else now
        whole = (copies["written"] > after) & (copies["written"] == ring["written"][slots]) & (copies["trace"] == trace)
        return copies[whole & (copies["cells"] <= MAX_CELLS)]


def get_trace_writer() -> TraceWriter:
    """This process's writer; a fork gets one of its own."""
    return _trace_writer(os.getpid())


@functools.lru_cache(maxsize=1)
def _trace_writer(_pid: int) -> TraceWriter:
    return TraceWriter(metrics_dir(active_config().metrics_dir))
