"""How many pages adaptive rows took, counted on the device: no step waits for the numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from quest_vllm.accounting import AdaptiveRows
from quest_vllm.step_log import StepLog


def read_back(tensor: torch.Tensor) -> tuple[torch.Tensor, Callable[[], None]]:
    """A copy of ``tensor`` on the host, behind what its stream has to do, and what waits until it is there."""
    if tensor.device.type != "cuda":
        return tensor.clone(), lambda: None
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record()  # type: ignore[no-untyped-call]
    return copy, arrived.synchronize


class ReachedCounts:
    """From the kernels that choose adaptive rows' pages to :func:`~quest_vllm.accounting.record_reached`.

    Every layer's kernel writes its counts to a place of its own. They are read back before the next step's kernels
    write theirs, on the same stream, and counted by the log's thread. So the last step before a pause is counted with
    the first one after it, and a reply's usage lacks its last steps.
    """

    def __init__(self, layers: Sequence[str], rows: int, heads: int, device: torch.device, log: StepLog) -> None:
        """For the sparse ``layers`` of a group, steps of up to ``rows`` rows, and ``heads`` that choose pages."""
        self._taken = torch.zeros(len(layers), rows, heads, dtype=torch.int32, device=device)
        self._slots = {name: slot for slot, name in enumerate(layers)}
        self._log = log
        self._expected: tuple[AdaptiveRows, npt.NDArray[np.intp]] | None = None

    def of(self, layer: str, rows: int) -> torch.Tensor:
        """Where ``layer`` writes its counts: ``[rows, heads]`` int32."""
        return self._taken[self._slots[layer], :rows]

    def expect(self, adaptive: AdaptiveRows | None, places: npt.NDArray[np.intp]) -> None:
        """Say which rows of the coming step adapt; ``places`` ``[num_adaptive]`` among the rows of its kernels."""
        self._expected = None if adaptive is None else (adaptive, places)

    def collect(self) -> None:
        """Read the step before back. To be called before every step."""
        if self._expected is None:
            return
        (adaptive, places), self._expected = self._expected, None
        counts, wait = read_back(self._taken[:, : int(places.max()) + 1])
        self._log.add_reached(adaptive, places, counts, wait)
