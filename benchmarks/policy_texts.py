"""Texts and needles for measuring page policies: long prose that ships with Python or an installed package.

Nothing is downloaded. Each text is named by its source and offset, so that a result says what it was measured on.
"""

from __future__ import annotations

import hashlib
import importlib.util
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

Encode = Callable[[str], list[int]]

OPTICKS = ("tvm_ffi", "3rdparty/libbacktrace/Isaac.Newton-Opticks.txt")
"""Newton's Opticks, 560 KB of running prose; the package comes with vLLM."""
CHARACTERS = 6  # of a token, at most, on average over a text
NAMES = "Alice Bruno Clara David Elena Felix Greta Henry Irene Jacob Karla Louis Maria Nolan Olive Peter".split()


@dataclass(frozen=True)
class Text:
    """``tokens`` of a prefix and, after it, those that are decoded under teacher forcing."""

    name: str
    sha256: str
    prefix: list[int]
    rows: list[int]


def package_file(package: str, path: str) -> str:
    """A text file inside an installed package. Raises ``FileNotFoundError`` naming both."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / path).is_file():
            return (Path(folder) / path).read_text(encoding="utf-8", errors="replace")
    raise FileNotFoundError(f"expected {path} in the installed package {package}")


def python_manual() -> str:
    """The chapters of the language reference that pydoc carries, in order of their names."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def sources() -> list[tuple[str, str, int]]:
    """``(name, text, first character)`` of every text; those of even index choose, those of odd index confirm."""
    opticks, manual = package_file(*OPTICKS), python_manual()
    news = package_file("idlelib", "NEWS.txt")
    places = [("opticks", opticks, start) for start in range(40_000, 560_000, 65_000)]
    places += [("python-manual", manual, start) for start in (60_000, 160_000, 260_000)]
    return [*places, ("idle-news", news, 0)]


def places(count: int, tokens: int) -> list[tuple[str, str, int]]:
    """``count`` texts of ``tokens`` tokens, evenly spread over Opticks and the manual; as :func:`sources`.

    They overlap where there are many, but no two begin within the same 1,000 characters: raises ``ValueError``.
    """
    found = []
    wanted = {
        "opticks": (package_file(*OPTICKS), 40_000, -(-count // 2)),
        "python-manual": (python_manual(), 0, count // 2),
    }
    for name, (whole, first, share) in wanted.items():
        apart = (len(whole) - CHARACTERS * tokens - first) // max(share, 1)
        if apart < 1000:
            raise ValueError(f"{name}: {share} texts of {tokens} tokens would begin {apart} characters apart")
        found += [(name, whole, first + apart * number) for number in range(share)]
    return found


def texts(
    encode: Encode,
    length: int,
    rows: int,
    start: Sequence[int] = (),
    where: Sequence[tuple[str, str, int]] | None = None,
) -> list[Text]:
    """Every source, or ``where``, as ``length`` prefix tokens, the first of them ``start``, and ``rows`` more."""
    found = []
    for name, whole, place in sources() if where is None else where:
        part = whole[place : place + 8 * (length + rows)]
        tokens = [*start, *encode(part)]
        if len(tokens) < length + rows:
            raise ValueError(f"{name} at {place}: expected {length + rows} tokens, got {len(tokens)}")
        digest = hashlib.sha256(part.encode()).hexdigest()[:16]
        found.append(Text(f"{name}@{place}", digest, tokens[:length], tokens[length : length + rows]))
    return found


@dataclass(frozen=True)
class Question:
    """A continuation that asks for one needle: ``tokens`` decoded one by one, the last ``answer`` of them its value."""

    tokens: list[int]
    answer: int


def needles(
    encode: Encode, length: int, count: int, seed: int, digits: int = 5, start: Sequence[int] = ()
) -> tuple[list[int], list[Question], Sequence[str]]:
    """A prefix of ``length`` tokens of prose that hides ``count`` numbers under as many names, and a question each.

    Depths are spread evenly and jittered; ``start`` comes first. Returns the prefix, the questions, and the values.
    """
    rng = random.Random(seed)
    names = rng.sample(NAMES, count)
    values = ["".join(rng.choice("123456789") for _ in range(digits)) for _ in names]
    hidden = [encode(f" The secret number of {n} is {v}. ") for n, v in zip(names, values, strict=True)]
    opticks = package_file(*OPTICKS)
    last = min(480_000, len(opticks) - CHARACTERS * length)
    prose = encode(opticks[rng.randrange(40_000, last) :][: 8 * length])
    head = [*start, *encode("Remember the secret numbers in the following text.\n\n")]
    room = length - len(head) - sum(map(len, hidden))
    places = sorted(rng.sample(range(64, room - 256), count))
    prefix, taken = list(head), 0
    for place, needle in zip(places, hidden, strict=True):
        prefix += prose[taken:place] + needle
        taken = place
    prefix += prose[taken:room]
    questions = []
    for name, value in zip(names, values, strict=True):
        ask, answer = encode(f"\n\nThe secret number of {name} is "), encode(value)
        questions.append(Question(ask + answer, len(answer)))
    return prefix, questions, values
