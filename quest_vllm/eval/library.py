"""The items of one run, built when first asked for."""

from __future__ import annotations

import functools

from quest_vllm.eval.plan import Plan, Unit
from quest_vllm.eval.prompts import Codec, Item, build_item
from quest_vllm.eval.scoring import RULES
from quest_vllm.eval.text import CONTINUATION, TEXT, TextSource, window_start


class Library:
    """Builds each item once, whatever budgets and modes ask for it."""

    def __init__(self, codec: Codec, plan: Plan, source: TextSource | None, text_tokens: int) -> None:
        """``source`` may be None where no task needs running text; ``text_tokens`` are forced or generated on it."""
        self.codec, self.plan, self.text_tokens = codec, plan, text_tokens
        self._source = source
        self.item = functools.lru_cache(maxsize=64)(self._build)

    @functools.cached_property
    def _text(self) -> list[int]:
        return self.codec.encode(self._source.content) if self._source is not None else []

    def of(self, unit: Unit) -> Item:
        """The item of ``unit``."""
        return self.item(unit.task, unit.context, unit.item)

    def _build(self, task: str, context: int, index: int) -> Item:
        if task not in (TEXT, CONTINUATION):
            return build_item(self.codec, task, context, index, self.plan.seed)
        head = self.codec.head
        length = context - len(head) + self.text_tokens
        start = window_start(len(self._text), length, index, self.plan.seed)
        window = self._text[start : start + length]
        cut = context - len(head)
        return Item(
            task=task,
            context=context,
            index=index,
            context_ids=head + window[:cut],
            question_ids=window[cut:] if task == TEXT else [],
            references=(),
            scoring="",
            max_tokens=self.text_tokens,
        )

    def check(self) -> None:
        """Build the first item of every task and length: a bad combination is known before anything runs."""
        for task in self.plan.tasks:
            for context in self.plan.contexts:
                self.item(task, context, 0)

    def longest_answer(self) -> int:
        """Tokens that the longest answer, forced question included, adds to a context."""
        firsts = [self.item(task, context, 0) for task in self.plan.tasks for context in self.plan.contexts]
        return max(item.max_tokens + len(item.question_ids) for item in firsts)


def score(item: Item, answer: str) -> float | None:
    """The score of ``answer``, 0 to 1; None where the item has no right answer."""
    return RULES[item.scoring](answer, item.references) if item.scoring else None
