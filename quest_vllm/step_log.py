"""Counts a GPU worker's steps beside its work: a step costs the host a list entry, a thread adds up many at once.

Turning one step into metrics takes the host about as long as turning fifty: numpy's calls, not its arithmetic. A decode
step of some milliseconds waits for everything that the host does before it, so there metrics lag by :data:`LAG`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from quest_vllm.accounting import AdaptiveRows, LayerGroup, record_reached, record_step
from quest_vllm.metadata import IntArray, RowClasses
from quest_vllm.token_rows import StepRows

LAG = 0.1
"""Seconds from a step to its metrics, about."""

Step = tuple[RowClasses, StepRows, IntArray]

logger = logging.getLogger("vllm.quest_vllm")


class StepLog:
    """The steps of one group of layers that are not counted yet. Fork before use, not after."""

    def __init__(self, group: LayerGroup) -> None:
        self._group = group
        self._steps: deque[Step] = deque()
        self._reached: deque[Callable[[], None]] = deque()
        self._some, self._urgent = threading.Event(), threading.Event()
        self._counting = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, rows: RowClasses, step: StepRows, token_budgets: IntArray) -> None:
        """Note one step; the arguments are :func:`~quest_vllm.accounting.record_step`'s, and stay as they are."""
        self._steps.append((rows, step, token_budgets))
        self._wake()

    def add_reached(
        self, adaptive: AdaptiveRows, places: npt.NDArray[np.intp], taken: torch.Tensor, wait: Callable[[], None]
    ) -> None:
        """Note what ``adaptive`` rows took, and count it at once: a reply tells of it.

        After ``wait()`` it is ``taken[:, places]``, ``[num_layers, num_adaptive, heads]`` int32 on the host.
        """

        def count() -> None:
            wait()
            record_reached(adaptive, taken.numpy()[:, places])

        self._reached.append(count)
        self._urgent.set()
        self._wake()

    def count(self) -> None:
        """Count what is noted, now."""
        with self._counting:
            steps = [self._steps.popleft() for _ in range(len(self._steps))]
            if steps:
                record_step(self._group, *joined(steps))
        self._count_reached()

    def _count_reached(self) -> None:
        with self._counting:
            for _ in range(len(self._reached)):
                self._reached.popleft()()

    def _wake(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="quest-step-log", daemon=True)
            self._thread.start()
        if not self._some.is_set():
            self._some.set()

    def _run(self) -> None:
        while True:
            self._some.wait()
            self._some.clear()
            end = time.monotonic() + LAG
            # a host that is ahead of its device never leaves the queue empty: steps must not wait for that
            while (left := end - time.monotonic()) > 0 and self._urgent.wait(left):
                self._urgent.clear()
                self._try(self._count_reached)
            self._try(self.count)

    @staticmethod
    def _try(count: Callable[[], None]) -> None:
        try:
            count()
        except Exception:
            logger.exception("quest_vllm: steps could not be counted: metrics lack them, answers are not affected")


def joined(steps: list[Step]) -> Step:
    """Several steps as one with all of their rows; no two of them share a request."""
    if len(steps) == 1:
        return steps[0]
    classes, rows, budgets = zip(*steps, strict=True)
    reasons = classes[0].dense_reasons
    merged = RowClasses(
        sparse=np.concatenate([c.sparse for c in classes]),
        page_budgets=np.concatenate([c.page_budgets for c in classes]),
        num_pages=np.concatenate([c.num_pages for c in classes]),
        dense_reasons={name: np.concatenate([c.dense_reasons[name] for c in classes]) for name in reasons},
        adaptive=np.concatenate([c.adaptive for c in classes]),
        windows=np.concatenate([c.windows for c in classes]),
        two_stage=np.concatenate([c.two_stage for c in classes]),
        forced=classes[0].forced,
    )
    offsets = np.cumsum([0, *(1 + r.requests.max(initial=-1) for r in rows[:-1])])
    whole = StepRows(
        requests=np.concatenate([r.requests + offset for r, offset in zip(rows, offsets, strict=True)]),
        starts=np.concatenate([r.starts for r in rows]),
        query_lens=np.concatenate([r.query_lens for r in rows]),
        seq_lens=np.concatenate([r.seq_lens for r in rows]),
        lags=np.concatenate([r.lags for r in rows]),
        stored=np.concatenate([r.stored for r in rows]),
    )
    return merged, whole, np.concatenate(budgets)
