"""Prompts of an exact number of tokens that no prefix cache has seen: running text behind a mark of their own."""

from __future__ import annotations

import random

from quest_vllm.bench.plan import Cell
from quest_vllm.eval.prompts import Codec
from quest_vllm.eval.text import TextSource

MARK_TOKENS = 16
"""Tokens at a prompt's beginning that no other prompt has: a prefix cache then holds nothing of it."""


class Prompts:
    """Makes the prompts of a sweep; the same seed makes the same ones."""

    def __init__(self, codec: Codec, source: TextSource, seed: int) -> None:
        self._head = list(codec.head)
        self._ids = codec.encode(source.content)
        self._seed = seed

    def of(self, cell: Cell, repeat: int) -> list[list[int]]:
        """``batch`` prompts of ``context`` ids each, for one round of ``cell``."""
        return [self._prompt(f"{self._seed}/{repeat}/{cell}/{number}", cell.context) for number in range(cell.batch)]

    def _prompt(self, name: str, length: int) -> list[int]:
        rng = random.Random(name)
        mark = rng.choices(self._ids, k=min(MARK_TOKENS, length))
        start = rng.randrange(len(self._ids))
        body = self._ids[start:]
        while len(body) < length:  # a short text is read over and over
            body = body + self._ids
        return (self._head + mark + body)[:length]
