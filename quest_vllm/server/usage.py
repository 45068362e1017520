"""``usage.sparse_attention``: what a request's decode steps did, from numbers that the API server has.

While every decode step brings one token, the steps follow from the lengths of prompt and answer, and the worker's own
classification (:mod:`quest_vllm.metadata`) says what each of them reads; under top_p the worker tells the rest by
:mod:`quest_vllm.tally`. The first token of an answer comes out of prefill, which is dense.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydantic import BaseModel, Field

from quest_vllm.config import QuestConfig
from quest_vllm.layer_budgets import layer_budgets
from quest_vllm.metadata import classify_rows, measure_traffic
from quest_vllm.tally import Tally

LENGTHS = (("prompt_tokens", "completion_tokens"), ("input_tokens", "output_tokens"))


class SparseUsage(BaseModel):
    """What a reply's decode steps did. Counts are those of one selecting head, the mean over sparse layers."""

    token_budget: int = Field(description="Budget in force, in tokens; 0: dense.")
    top_p: float = Field(description="Share of the budget's estimated mass in force; 1: the whole budget is spent.")
    policy: str = Field(description="Policy in force, by which sparse steps chose their pages.")
    mean_tokens_attended: float | None = Field(
        description=(
            "Tokens that a decode step attended to, dense steps included; null without a decode step, and under top_p "
            "where the worker's count cannot be seen (another host)."
        )
    )
    pages_selected: int | None = Field(
        description="Pages attended to, summed over the sparse decode steps; null as above."
    )
    pages_available: int = Field(description="Pages that those steps could have attended to.")
    decode_steps: int = Field(description="Tokens of the answer, less one per sequence: prefill makes the first.")


def count_usage(
    sequences: Iterable[tuple[int, int]],
    token_budget: int,
    config: QuestConfig,
    top_p: float = 1.0,
    tally: Tally | None = None,
    policy: str | None = None,
) -> SparseUsage:
    """Usage of ``sequences``, each ``(prompt tokens, completion tokens)``, decoded with ``token_budget`` (0: dense).

    ``tally`` is what the worker counted of the steps that ``top_p`` made adaptive. ``policy`` None: the server's own;
    each takes as many pages.
    """
    # step k of a sequence, from 1, sees the prompt and the k tokens before its own
    spans = [np.arange(1, max(1, completion), dtype=np.int32) + prompt for prompt, completion in sequences]
    seq_lens = np.concatenate([np.zeros(0, np.int32), *spans]).astype(np.int32)
    steps = len(seq_lens)
    rows = classify_rows(
        np.ones(steps, np.int32),
        seq_lens,
        np.zeros(steps, np.bool_),
        np.full(steps, token_budget, np.int32),
        config,
        np.full(steps, top_p, np.float32),
    )
    budgets = layer_budgets(config)
    layer_pages = budgets.rows(rows.page_budgets, rows.num_pages) if budgets else rows.page_budgets[None]
    layers = len(layer_pages)
    traffic = measure_traffic(rows, seq_lens, config.page_size, layer_pages=layer_pages)
    # a summary is one vector a page, a key half of one
    attended = (traffic.vectors_read - traffic.summaries_read - traffic.keys_listed / 2) / layers
    pages = traffic.pages_selected / layers
    adaptive = int(rows.adaptive.sum())
    known = adaptive == 0 or (tally is not None and tally.steps > 0)
    if adaptive and known and tally is not None:
        # per step: a preempted request, or a step beyond a stop token, makes the worker's steps not quite ours
        attended += tally.tokens * adaptive / tally.steps
        pages += tally.pages * adaptive / tally.steps
    return SparseUsage(
        token_budget=token_budget,
        top_p=top_p,
        policy=policy or config.own_policy,
        mean_tokens_attended=round(attended / steps, 2) if steps and known else None,
        pages_selected=round(pages) if known else None,
        pages_available=traffic.pages_available // layers + int(rows.num_pages[rows.adaptive].sum()),
        decode_steps=steps,
    )


@dataclass
class Sequences:
    """Lengths of a reply's sequences, gathered from its choices where their token ids are shown.

    ``usage`` sums over the choices of ``n > 1`` and over several prompts; only ``return_token_ids`` tells them apart.
    """

    prompts: dict[int, int] = field(default_factory=dict)
    completions: dict[int, int] = field(default_factory=dict)

    def add(self, reply: Mapping[str, Any]) -> None:
        """Take in a whole reply or one chunk of a stream."""
        for choice in reply.get("choices") or ():
            index = choice.get("index", 0)
            if choice.get("prompt_token_ids"):
                self.prompts[index] = len(choice["prompt_token_ids"])
            self.completions[index] = self.completions.get(index, 0) + len(choice.get("token_ids") or ())

    def lengths(self, prompt_tokens: int, completion_tokens: int) -> list[tuple[int, int]] | None:
        """``(prompt tokens, completion tokens)`` of each sequence; None where they do not add up to ``usage``."""
        if sum(self.completions.values()) != completion_tokens:
            return None
        if self.prompts:
            known = [(self.prompts.get(i, -1), length) for i, length in self.completions.items()]
            return known if all(prompt >= 0 for prompt, _ in known) else None
        return [(prompt_tokens, length) for length in self.completions.values()]


def lengths_in(usage: Mapping[str, Any]) -> tuple[int, int] | None:
    """``(prompt tokens, completion tokens)`` of a chat's, completion's or response's usage."""
    for prompt, completion in LENGTHS:
        if isinstance(usage.get(prompt), int) and isinstance(usage.get(completion), int):
            return usage[prompt], usage[completion]
    return None
