"""Scores of answers, each from 0 (nothing right) to 1 (all right). Text in, number out."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence


def _holds(text: str, reference: str) -> bool:
    """Whether ``reference`` stands in ``text`` as a whole word: 123 is not in 51234."""
    return re.search(rf"(?<!\w){re.escape(reference)}(?!\w)", text, re.IGNORECASE) is not None


def score_all(answer: str, references: Sequence[str]) -> float:
    """The share of ``references`` that stand in ``answer``."""
    return sum(_holds(answer, reference) for reference in references) / len(references)


def score_first_line(answer: str, references: Sequence[str]) -> float:
    """1 where a reference stands in the first line of ``answer`` that is not blank: a model may ramble on after it."""
    line = next((line for line in answer.splitlines() if line.strip()), "")
    return float(any(_holds(line, reference) for reference in references))


def score_steps(answer: str, references: Sequence[str]) -> float:
    """The share of steps with the right total. Step n is the first "Entry n: ... = total"; step 1 may lack its head."""
    found: dict[int, str] = {}
    for step, total in re.findall(r"Entry\s+(\d+):[^=\n]*=\s*(-?\d+)", "Entry 1:" + answer):
        found.setdefault(int(step), total)
    return sum(found.get(step) == total for step, total in enumerate(references, 1)) / len(references)


RULES: dict[str, Callable[[str, Sequence[str]], float]] = {
    "all": score_all,
    "first_line": score_first_line,
    "steps": score_steps,
}


def agreement(answer: str, dense_answer: str) -> float:
    """The share of ``dense_answer``'s characters before the first one in which ``answer`` differs; 1: same text."""
    if answer == dense_answer:
        return 1.0
    same = 0
    for ours, theirs in zip(answer, dense_answer, strict=False):
        if ours != theirs:
            break
        same += 1
    return same / max(len(answer), len(dense_answer))
