"""Answers every task from the text of its prompt alone, by other means than the code that wrote the prompt.

That a solver scores 1.0 shows that the facts are in the text, that only one answer is right, and that a right answer
is scored as right.
"""

from __future__ import annotations

import re
from collections import Counter


def body(text: str) -> str:
    """What stands between the introduction and the question."""
    return text.split("\n\n", 1)[1].rsplit("\nQuestion:", 1)[0]


def strictly_most_common(units: list[str], count: int) -> list[str]:
    ranked = Counter(units).most_common(count + 1)
    # less than half as frequent: no model should need luck to tell them apart
    assert ranked[count][1] <= 0.75 * ranked[count - 1][1], ranked
    return [unit for unit, _ in ranked[:count]]


def needles(text: str) -> str:
    (asked,) = re.findall(r"magic numbers? for ([\w\-, ]+) in the text above\?", text)
    found = re.findall(r"magic numbers for ([\w-]+) is: (\d+)\.", text)
    values = [value for _, value in found]
    assert len(set(values)) == len(values)
    assert all(text.count(value) == 1 for value in values)
    keys = re.split(r", | and ", asked)
    return " " + ", ".join(value for key, value in found if key in keys)


def variables(text: str) -> str:
    (wanted,) = re.findall(r"Which variables have the value (\d+)", text)
    values: dict[str, str] = {}
    for name, source in re.findall(r"^VAR (\w+) = (?:VAR )?(\w+)$", text, re.M):
        values[name] = values.get(source, source)  # KeyError-free: a copy never stands before its source
    assert all(value.isdigit() for value in values.values())
    return " " + ", ".join(name for name, value in values.items() if value == wanted)


def common(text: str) -> str:
    return " " + ", ".join(strictly_most_common([line for line in body(text).splitlines() if line], 5))


def frequent(text: str) -> str:
    return " " + ", ".join(strictly_most_common(body(text).split(), 3))


def question(text: str) -> str:
    (question,) = re.findall(r"^Question: (.*)$", text, re.M)
    pattern = {
        "Where was (.+) born": r"^%s was born in (\w+) and",
        "What did (.+) work as": r"^%s was born in \w+ and worked as a (\w+) in",
    }
    for asked, told in pattern.items():
        if name := re.match(asked, question):
            (answer,) = re.findall(told % name[1], text, re.M)
            return f" {answer}."
    raise AssertionError(question)


def shots(text: str) -> str:
    word = text.rsplit("\n", 1)[1].removesuffix(" ->")
    labels = re.findall(rf"^{word} -> (\w+)$", text, re.M)
    assert len(labels) == 2 and len(set(labels)) == 1
    return f" {labels[0]}\nanother -> red"


def ledger(text: str) -> str:
    (town,) = re.findall(r"^The ledger of (\w+) starts at 0", text, re.M)
    added = re.findall(rf"^Entry (\d+) in the ledger of {town}: add (\d+)\.$", text, re.M)
    assert [int(step) for step, _ in added] == list(range(1, 9))
    lines, total = [], 0
    for step, number in added:
        lines.append(f"Entry {step}: {total} + {number} = {total + int(number)}")
        total += int(number)
    return "\n".join(lines).removeprefix("Entry 1: 0 +")


SOLVERS = {
    "needle_single": needles,
    "needle_multikey": needles,
    "needle_multivalue": needles,
    "needle_multiquery": needles,
    "variable_tracking": variables,
    "common_words": common,
    "frequent_words": frequent,
    "question_answering": question,
    "few_shot": shots,
    "arithmetic_chain": ledger,
}
SIGNS = {
    "magic number": needles,
    "Which variables": variables,
    "most common things": common,
    "most frequent words": frequent,
    "answer the question on it": question,
    "Each word has a label": shots,
    "The ledger of": ledger,
}


def solve(text: str) -> str:
    """The right answer to a prompt of any task."""
    for sign, solver in SIGNS.items():
        if sign in text:
            return solver(text)
    return " And so the text went on as it had begun."
