"""Running text for KL, NLL and continuations: a user's file, or the language reference that comes with Python."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path

from quest_vllm.errors import QuestValueError

TEXT = "text"
"""The measurement of KL, NLL and top-1 agreement, teacher-forced; in process only."""
CONTINUATION = "continuation"
"""Greedy continuation of running text: no right answer, only agreement with dense."""


@dataclass(frozen=True)
class TextSource:
    """A long text and where it comes from."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        """What makes two runs comparable."""
        return hashlib.sha256(self.content.encode()).hexdigest()


def load_text(path: Path | None) -> TextSource:
    """The text of ``path``, or about 460 000 characters of Python's own documentation.

    Raises :class:`QuestValueError` for a file that cannot be read, and where Python lacks its documentation.
    """
    if path is not None:
        try:
            return TextSource(path.name, path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise QuestValueError(f"--text: expected a readable UTF-8 file, got {path}: {error}") from error
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise QuestValueError("--text: this Python comes without pydoc_data.topics; name a text file") from None
    return TextSource("pydoc_data.topics", "\n".join(topics[name] for name in sorted(topics)))


def window_start(available: int, length: int, index: int, seed: int) -> int:
    """Where window ``index`` of ``length`` tokens begins in ``available`` tokens.

    Any number of first windows is spread evenly (steps of the golden ratio); they overlap where the text is short.
    Raises :class:`QuestValueError` where one does not fit.
    """
    if available < length:
        raise QuestValueError(f"--text: expected at least {length} tokens for this context, got {available}")
    phase = random.Random(seed).random() + index * (5**0.5 - 1) / 2
    return int(phase % 1 * (available - length + 1))
