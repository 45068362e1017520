"""How many pages adaptive rows took, counted on the device: no step waits for the numbers.

The next forward pass writes over them, so their copy to the host is enqueued before it: by the logits processor
(:mod:`quest_vllm.budget_tap`), which model runner V2 calls right behind the forward pass, or else by the next build of
metadata. Under V2 the copy lies ahead of the token's own, so an answer's last step is counted before its reply, but for
a race that the counting thread all but wins. Where only the next build copies (V1), the last step comes too late.
"""

from __future__ import annotations

import weakref
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
    arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # who waits sleeps
    arrived.record()  # type: ignore[no-untyped-call]
    return copy, arrived.synchronize


class ReachedCounts:
    """From the kernels that choose adaptive rows' pages to :func:`~quest_vllm.accounting.record_reached`.

    Every layer's kernel writes its counts to a place of its own. They are read back before the next step's kernels
    write theirs, on the same stream, and counted by the log's thread.
    """

    def __init__(self, layers: Sequence[str], rows: int, heads: int, device: torch.device, log: StepLog) -> None:
        """For the sparse ``layers`` of a group, steps of up to ``rows`` rows, and ``heads`` that choose pages."""
        self._taken = torch.zeros(len(layers), rows, heads, dtype=torch.int32, device=device)
        self._slots = {name: slot for slot, name in enumerate(layers)}
        self._log = log
        self._expected: tuple[AdaptiveRows, npt.NDArray[np.intp]] | None = None
        _groups.add(self)

    def of(self, layer: str, rows: int) -> torch.Tensor:
        """Where ``layer`` writes its counts: ``[rows, heads]`` int32."""
        return self._taken[self._slots[layer], :rows]

    def expect(self, adaptive: AdaptiveRows | None, places: npt.NDArray[np.intp]) -> None:
        """Say which rows of the coming step adapt; ``places`` ``[num_adaptive]`` among the rows of its kernels."""
        self._expected = None if adaptive is None else (adaptive, places)

    def collect(self) -> None:
        """Read the step before back, once. To be called before every forward pass that may write counts."""
        if self._expected is None:
            return
        (adaptive, places), self._expected = self._expected, None
        counts, wait = read_back(self._taken[:, : int(places.max()) + 1])
        self._log.add_reached(adaptive, places, counts, wait)


_groups: weakref.WeakSet[ReachedCounts] = weakref.WeakSet()


def counts_on_device() -> bool:
    """Whether kernels of this process count what rows take, for :func:`collect_reached` to read back."""
    return bool(_groups)


def collect_reached() -> None:
    """:meth:`ReachedCounts.collect` for every group of layers; right behind a forward pass, on its stream."""
    for group in _groups:
        group.collect()
