"""Drafts and texts made into prompts of an exact number of tokens.

Lengths are exact by construction: every unit of text is tokenized on its own, the ids are joined, and the first unit
of filler is cut to what is left. The ids themselves are sent to the model, so nobody tokenizes the text again.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from quest_vllm.errors import QuestValueError
from quest_vllm.eval.tasks import Draft, make_draft


@dataclass(frozen=True)
class Item:
    """One question to the model. ``context_ids + question_ids`` are the prompt, ``context`` tokens together.

    ``question_ids`` begin with the question and end with the beginning of the answer. ``max_tokens`` bounds the answer.
    """

    task: str
    context: int
    index: int
    context_ids: list[int]
    question_ids: list[int]
    references: tuple[str, ...]
    scoring: str
    max_tokens: int

    @property
    def prompt_ids(self) -> list[int]:
        """The whole prompt."""
        return self.context_ids + self.question_ids


class Codec:
    """A model's tokenizer, and what stands around a prompt: the begin-of-sequence token, or a chat template."""

    def __init__(self, tokenizer: Any, chat_template: bool = False) -> None:
        """``tokenizer`` is a Hugging Face one. Raises :class:`QuestValueError` where it has no chat template."""
        self.tokenizer = tokenizer
        if chat_template:
            head, tail = _around_a_message(tokenizer)
            self.head, self.tail = self.encode(head), self.encode(tail)
        else:
            marked, plain = list(tokenizer.encode("a")), self.encode("a")
            # what the tokenizer puts before any text; what it puts behind (EOS) would end the prompt
            self.head = marked[: marked.index(plain[0])] if plain[0] in marked else []
            self.tail = []

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` alone, nothing added."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: list[int]) -> str:
        """Text of ``ids``, special tokens left out."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def load_codec(name: str, chat_template: bool = False) -> Codec:
    """The tokenizer of a model folder or name. Raises :class:`QuestValueError` where there is none."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise QuestValueError("reading a tokenizer needs the package transformers: pip install transformers") from None
    try:
        return Codec(AutoTokenizer.from_pretrained(name), chat_template)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise QuestValueError(
            f"--tokenizer: expected a model folder or name with a tokenizer, got {name!r}: {first}"
        ) from error


def _around_a_message(tokenizer: Any) -> tuple[str, str]:
    if not getattr(tokenizer, "chat_template", None):
        raise QuestValueError("--chat-template: expected a tokenizer with a chat template, got one without")
    mark = "@@the message@@"
    messages = [{"role": "user", "content": mark}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    head, tail = text.split(mark)
    return head, tail


def build_item(codec: Codec, task: str, context: int, index: int, seed: int) -> Item:
    """Item ``index`` of ``task`` with a prompt of exactly ``context`` tokens.

    Raises :class:`QuestValueError` where the facts and the question alone are longer.
    """
    draft, rng = make_draft(task, context, index, seed)
    intro = codec.head + codec.encode(draft.intro)
    question = codec.encode(draft.question) + codec.tail + codec.encode(draft.answer_prefix)
    facts = [codec.encode(fact) for fact in draft.facts]
    needed = len(intro) + len(question) + sum(map(len, facts))
    if needed > context:
        raise QuestValueError(f"--context: expected at least {needed} tokens for {task}, got {context}")
    filler = _filler(codec, draft, context - needed)
    text = _placed(rng, facts, filler)
    return Item(
        task=task,
        context=context,
        index=index,
        context_ids=intro + text,
        question_ids=question,
        references=draft.references,
        scoring=draft.scoring,
        max_tokens=len(codec.encode(draft.expected)) + 8,
    )


def _filler(codec: Codec, draft: Draft, tokens: int) -> list[list[int]]:
    """Units of filler, ``tokens`` ids together. The first one lacks its beginning, as an excerpt would."""
    units: list[list[int]] = []
    while tokens > 0:
        unit = codec.encode(next(draft.filler))[-tokens:]
        units.append(unit)
        tokens -= len(unit)
    return units[::-1]


def _placed(rng: random.Random, facts: list[list[int]], filler: list[list[int]]) -> list[int]:
    """Facts in their order at random places between units of filler, never before the cut one."""
    places = sorted(rng.randint(min(1, len(filler)), len(filler)) for _ in facts)
    ids: list[int] = []
    fact = 0
    for place in range(len(filler) + 1):
        while fact < len(facts) and places[fact] == place:
            ids += facts[fact]
            fact += 1
        if place < len(filler):
            ids += filler[place]
    return ids
