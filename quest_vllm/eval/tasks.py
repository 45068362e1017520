"""The tasks: what is asked, of which text, and which answers are right. Text only; no tokenizer, no model.

A task turns a ``random.Random`` and a context length into a :class:`Draft`. :mod:`.prompts` fills a draft up to an
exact number of tokens; the length is given here only to scale how often things repeat. The families are those of the
RULER benchmark (needles, variable tracking, common and frequent words, questions on a text), written anew, and two
more: few-shot recall, and a chain of additions whose every step needs a fact from another place of the text.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from quest_vllm.eval import words

NEEDLE_KEYS = 8
NEEDLE_VALUES = 4
CHAIN_VARIABLES = 5
COMMON_WORDS = 5
FREQUENT_WORDS = 3
LEDGER_ENTRIES = 8
PEOPLE = 12
GENERATOR_VERSION = 1
"""Raise it with any change that makes other items of the same seed: results of two versions do not mix."""


@dataclass(frozen=True)
class Draft:
    """One item before it has a length: a text to be filled, and a question on it.

    ``facts`` go into the text in this order, at random places among units of the endless ``filler``.
    ``question`` follows the text; ``answer_prefix`` begins the answer and is written for the model. ``scoring`` names
    a rule of :mod:`.scoring`; ``expected`` is a full right answer, as it would follow ``answer_prefix``.
    """

    intro: str
    facts: tuple[str, ...]
    filler: Iterator[str]
    question: str
    answer_prefix: str
    references: tuple[str, ...]
    scoring: str
    expected: str


def _numbers(rng: random.Random, count: int) -> list[str]:
    """Distinct numbers of seven digits."""
    return [str(number) for number in rng.sample(range(1_000_000, 10_000_000), count)]


def _keys(rng: random.Random, count: int) -> list[str]:
    return list(itertools.islice(words.phrases(rng, "-"), count))


def _needle_draft(rng: random.Random, needles: list[tuple[str, str]], asked: list[str]) -> Draft:
    """Hide ``needles`` (key, value) in prose and ask for every value of the keys in ``asked``."""
    wanted = tuple(value for key in asked for name, value in needles if name == key)
    facts = [f"One of the special magic numbers for {key} is: {value}.\n" for key, value in needles]
    rng.shuffle(facts)
    names = asked[0] if len(asked) == 1 else ", ".join(asked[:-1]) + f" and {asked[-1]}"
    number, verb = ("number", "is") if len(wanted) == 1 else ("numbers", "are")
    return Draft(
        intro="Special magic numbers are hidden in the following text. Remember them; they are asked for later.\n\n",
        facts=tuple(facts),
        filler=words.prose(rng),
        question=f"\nQuestion: What {verb} the special magic {number} for {names} in the text above?\n",
        answer_prefix=f"Answer: The special magic {number} for {names} in the text {verb}:",
        references=wanted,
        scoring="all",
        expected=" " + ", ".join(wanted) + ".",
    )


def needle_single(rng: random.Random, context: int) -> Draft:
    """One number in prose."""
    key, value = _keys(rng, 1)[0], _numbers(rng, 1)[0]
    return _needle_draft(rng, [(key, value)], [key])


def needle_multikey(rng: random.Random, context: int) -> Draft:
    """Eight keys with a number each; one is asked for."""
    keys = _keys(rng, NEEDLE_KEYS)
    return _needle_draft(rng, list(zip(keys, _numbers(rng, NEEDLE_KEYS), strict=True)), keys[:1])


def needle_multivalue(rng: random.Random, context: int) -> Draft:
    """Four keys with four numbers each; all four of one key are asked for."""
    keys = [key for key in _keys(rng, NEEDLE_KEYS // 2) for _ in range(NEEDLE_VALUES)]
    return _needle_draft(rng, list(zip(keys, _numbers(rng, len(keys)), strict=True)), keys[:1])


def needle_multiquery(rng: random.Random, context: int) -> Draft:
    """Eight keys with a number each; four are asked for in one question."""
    keys = _keys(rng, NEEDLE_KEYS)
    return _needle_draft(rng, list(zip(keys, _numbers(rng, NEEDLE_KEYS), strict=True)), keys[: NEEDLE_KEYS // 2])


def _interleave(rng: random.Random, chains: list[list[str]]) -> tuple[str, ...]:
    """One order of all lines that keeps each chain's own order."""
    turns = [number for number, chain in enumerate(chains) for _ in chain]
    rng.shuffle(turns)
    lines = [iter(chain) for chain in chains]
    return tuple(next(lines[number]) for number in turns)


def variable_tracking(rng: random.Random, context: int) -> Draft:
    """Five variables that hand on one value, among two other such chains."""
    codes = [
        "".join(letters)
        for letters in zip(*(rng.sample("ABCDEFGHJKLMNPQRSTUVWXYZ", 15) for _ in range(4)), strict=True)
    ]
    values = [str(value) for value in rng.sample(range(10_000, 100_000), 3)]
    chains = []
    for number, value in enumerate(values):
        names = codes[number * CHAIN_VARIABLES : (number + 1) * CHAIN_VARIABLES]
        copies = [f"VAR {name} = VAR {before}\n" for before, name in itertools.pairwise(names)]
        chains.append([f"VAR {names[0]} = {value}\n", *copies])
    wanted = tuple(codes[:CHAIN_VARIABLES])
    return Draft(
        intro="Remember the chains of variable assignments that are hidden in the following text.\n\n",
        facts=_interleave(rng, chains),
        filler=words.prose(rng),
        question=f"\nQuestion: Which variables have the value {values[0]}, directly or by a chain of assignments?\n",
        answer_prefix=f"Answer: {CHAIN_VARIABLES} variables have the value {values[0]}. They are: VAR",
        references=wanted,
        scoring="all",
        expected=" " + ", VAR ".join(wanted) + ".",
    )


def common_words(rng: random.Random, context: int) -> Draft:
    """A list in which five phrases come often and all others rarely (once in 10 000 lines)."""
    stream = words.phrases(rng)
    common = tuple(itertools.islice(stream, COMMON_WORDS))
    facts = [f"{phrase}\n" for phrase in common for _ in range(max(10, context // 200))]
    rng.shuffle(facts)
    return Draft(
        intro="Below is a list of things. Some come often, most of them rarely. Remember those that come often.\n\n",
        facts=tuple(facts),
        filler=(f"{phrase}\n" for phrase in stream if phrase not in common),
        question=f"\nQuestion: What are the {COMMON_WORDS} most common things in the list above?\n",
        answer_prefix=f"Answer: The {COMMON_WORDS} most common things in the list are:",
        references=common,
        scoring="all",
        expected=" " + ", ".join(common) + ".",
    )


def _rounds(rng: random.Random, vocabulary: list[str]) -> Iterator[str]:
    """Every word once a round, so that no count runs away."""
    while True:
        rng.shuffle(vocabulary)
        yield from (f" {word}" for word in vocabulary)


def frequent_words(rng: random.Random, context: int) -> Draft:
    """A text in code of 63 words, three of which come far more often than the rest."""
    vocabulary = list(itertools.islice(words.made_up_words(rng), FREQUENT_WORDS + 60))
    frequent = tuple(vocabulary[:FREQUENT_WORDS])
    least = max(12, context // 80)
    counts = (2 * least, 3 * least // 2, least)
    facts = [f" {word}" for word, count in zip(frequent, counts, strict=True) for _ in range(count)]
    rng.shuffle(facts)
    return Draft(
        intro="Read the following text in code and count how often each word comes.\n\n",
        facts=tuple(facts),
        filler=_rounds(rng, vocabulary[FREQUENT_WORDS:]),
        question="\n\nQuestion: What are the three most frequent words in the text above?\n",
        answer_prefix="Answer: The three most frequent words are:",
        references=frequent,
        scoring="all",
        expected=" " + ", ".join(frequent) + ".",
    )


def question_answering(rng: random.Random, context: int) -> Draft:
    """Twelve lives told in one sentence each among prose; one of them is asked about."""
    names = [f"{first} {noun.capitalize()}" for first in words.FIRST_NAMES for noun in words.NOUNS]
    cities = rng.sample(words.CITIES, 2 * PEOPLE)
    people = list(zip(rng.sample(names, PEOPLE), cities[:PEOPLE], cities[PEOPLE:], strict=True))
    trades = rng.sample(words.TRADES, PEOPLE)
    facts = [
        f"{name} was born in {birthplace} and worked as a {trade} in {home}.\n"
        for (name, birthplace, home), trade in zip(people, trades, strict=True)
    ]
    name, birthplace, _ = people[0]
    question, beginning, answer = rng.choice(
        (
            (f"Where was {name} born?", f"{name} was born in", birthplace),
            (f"What did {name} work as?", f"{name} worked as a", trades[0]),
        )
    )
    rng.shuffle(facts)
    return Draft(
        intro="Read the following text, then answer the question on it.\n\n",
        facts=tuple(facts),
        filler=words.prose(rng),
        question=f"\nQuestion: {question}\n",
        answer_prefix=f"Answer: {beginning}",
        references=(answer,),
        scoring="first_line",
        expected=f" {answer}.",
    )


def few_shot(rng: random.Random, context: int) -> Draft:
    """Made-up words with one of twelve labels; a word seen twice is asked for."""
    stream = words.made_up_words(rng)
    word, label = next(stream), rng.choice(words.LABELS)
    return Draft(
        intro="Each word has a label. Learn the labels from the examples.\n\n",
        facts=(f"{word} -> {label}\n",) * 2,
        filler=(f"{other} -> {rng.choice(words.LABELS)}\n" for other in stream),
        question="\nNow give the label of one of the words above.\n",
        answer_prefix=f"{word} ->",
        references=(label,),
        scoring="first_line",
        expected=f" {label}",
    )


def arithmetic_chain(rng: random.Random, context: int) -> Draft:
    """Eight additions whose numbers are spread over the text among two other ledgers."""
    towns = [word.capitalize() for word in itertools.islice(words.made_up_words(rng), 3)]
    ledgers = [[rng.randint(2, 9) for _ in range(LEDGER_ENTRIES)] for _ in towns]
    chains = [
        [f"Entry {step} in the ledger of {town}: add {number}.\n" for step, number in enumerate(numbers, 1)]
        for town, numbers in zip(towns, ledgers, strict=True)
    ]
    totals = list(itertools.accumulate(ledgers[0]))
    steps = [
        f"Entry {step}: {total - number} + {number} = {total}"
        for step, (number, total) in enumerate(zip(ledgers[0], totals, strict=True), 1)
    ]
    start = "Entry 1: 0 +"
    return Draft(
        intro="The following text hides the entries of some ledgers. Remember them.\n\n",
        facts=_interleave(rng, chains),
        filler=words.prose(rng),
        question=(
            f"\nThe ledger of {towns[0]} starts at 0. Apply its {LEDGER_ENTRIES} entries in order and write the total "
            "after each. A ledger with the entries add 4 and add 9 would give:\n"
            "Entry 1: 0 + 4 = 4\nEntry 2: 4 + 9 = 13\n\n"
        ),
        answer_prefix=f"The ledger of {towns[0]}:\n{start}",
        references=tuple(str(total) for total in totals),
        scoring="steps",
        expected="\n".join(steps).removeprefix(start),
    )


TASKS: dict[str, Callable[[random.Random, int], Draft]] = {
    task.__name__: task
    for task in (
        needle_single,
        needle_multikey,
        needle_multivalue,
        needle_multiquery,
        variable_tracking,
        common_words,
        frequent_words,
        question_answering,
        few_shot,
        arithmetic_chain,
    )
}
"""Every generated task by name."""


def make_draft(task: str, context: int, index: int, seed: int) -> tuple[Draft, random.Random]:
    """Item ``index`` of ``task`` and the generator that goes on to place its facts: same arguments, same item."""
    rng = random.Random(f"{seed}/{task}/{context}/{index}")
    return TASKS[task](rng, context), rng
