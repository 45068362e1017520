"""Generators that can take a draw back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from quest_vllm.compat_seeds import RewindingGenerator, keep_seeds


def draw(generator: torch.Generator) -> list[float]:
    return torch.empty(4).exponential_(generator=generator).tolist()


def runner_with(generator: torch.Generator, discards: bool) -> Any:
    batch = SimpleNamespace(generators={1: generator}, req_ids=["other", "seeded"])
    requests = {"other": SimpleNamespace(generator=None), "seeded": SimpleNamespace(generator=generator)}
    mask = SimpleNamespace(np=[False, discards])
    return SimpleNamespace(input_batch=batch, requests=requests, discard_request_mask=mask)


def test_a_dropped_draw_is_taken_back() -> None:
    plain = torch.Generator().manual_seed(9)
    runner = runner_with(torch.Generator().manual_seed(9), discards=True)
    keep_seeds(runner)
    generator = runner.input_batch.generators[1]
    assert isinstance(generator, RewindingGenerator)
    assert runner.requests["seeded"].generator is generator and runner.requests["other"].generator is None
    dropped = draw(generator)
    generator.set_offset(generator.get_offset() - 4)  # as the runner does
    assert draw(generator) == dropped == draw(plain)
    assert draw(generator) == draw(plain)


def test_a_draw_that_counts_stays() -> None:
    plain = torch.Generator().manual_seed(9)
    runner = runner_with(torch.Generator().manual_seed(9), discards=False)
    for _ in range(3):
        keep_seeds(runner)
        assert draw(runner.input_batch.generators[1]) == draw(plain)
