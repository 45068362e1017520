"""Numbers that rows ask for, at fixed addresses on the device; no step waits for their transfer."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch


def staged(array: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """``array`` where a transfer to ``device`` needs no wait. A fresh copy: the last one may still be being read."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if device.type == "cuda" else tensor


class RowBuffer:
    """One number a row at a fixed address, for CUDA graphs; what the device holds already does not travel again.

    With ``layers`` one number a layer and row: ``tensor`` is ``[rows]``, or ``[layers, rows]``.
    """

    def __init__(
        self, rows: int, value: float, dtype: torch.dtype, device: torch.device, layers: int | None = None
    ) -> None:
        """Room for ``rows``, which hold ``value`` at first."""
        shape = (rows,) if layers is None else (layers, rows)
        self.tensor = torch.full(shape, value, dtype=dtype, device=device)
        self._held = torch.full(shape, value, dtype=dtype).numpy()
        self._value = value

    def put_at(self, count: int, places: npt.NDArray[np.intp], values: npt.NDArray[np.generic]) -> None:
        """:meth:`put` for ``count`` rows: ``values`` ``[..., len(places)]`` at ``places``, else what was at first."""
        rows = np.full((*self._held.shape[:-1], count), self._value, dtype=self._held.dtype)
        rows[..., places] = values
        self.put(rows)

    def put(self, values: npt.NDArray[np.generic]) -> None:
        """Make ``values`` ``[..., <= rows]`` the first rows' numbers, before the kernels that follow on this stream."""
        held = self._held[..., : values.shape[-1]]
        if not np.array_equal(values, held):  # most steps change nothing
            held[...] = values
            self.tensor[..., : held.shape[-1]].copy_(staged(held.copy(), self.tensor.device), non_blocking=True)
