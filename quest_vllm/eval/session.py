"""What both runners need of a run: its options, its identity, its file of records."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quest_vllm.eval.plan import Plan, ResultStore, Unit
from quest_vllm.eval.tasks import GENERATOR_VERSION
from quest_vllm.eval.text import CONTINUATION, TEXT, TextSource

RAW = "items.jsonl"


@dataclass(frozen=True)
class Options:
    """Everything that the command line says. ``timeout`` is in seconds; what is None has a default of the runner's."""

    target: str
    plan: Plan
    output: Path
    concurrency: int = 8
    tokenizer: str | None = None
    model_name: str | None = None
    api_key: str = "-"
    timeout: float = 600.0
    chat_template: bool = False
    text: Path | None = None
    text_tokens: int = 64
    engine_args: dict[str, Any] | None = None
    xargs: dict[str, Any] | None = None

    @property
    def is_url(self) -> bool:
        """Whether the target is a server."""
        return self.target.startswith(("http://", "https://"))


def planned(plan: Plan) -> list[Unit]:
    """Every unit of ``plan``; running text is read in decode, a continuation has no question."""
    return list(plan.units(only_decode=(TEXT,), only_prefill=(CONTINUATION,)))


@dataclass
class Session:
    """A run in progress. ``identity`` is what two records must share to be compared."""

    store: ResultStore
    identity: dict[str, Any]
    planned: Sequence[Unit]

    @property
    def left(self) -> list[Unit]:
        """Units without a result, in order."""
        return [unit for unit in self.planned if not self.store.is_done(unit)]


def open_session(options: Options, model: str, source: TextSource | None, policy: object) -> Session:
    """Open the run's directory, and say so where it has results already.

    Raises :class:`~quest_vllm.errors.QuestValueError` where they are of another run.
    """
    identity = {
        "model": model,
        "seed": options.plan.seed,
        "generator": GENERATOR_VERSION,
        "chat_template": options.chat_template,
        "text": f"{source.name} {source.sha256}" if source else None,
        "text_tokens": options.text_tokens,
        "policy": policy,
        "xargs": options.xargs or {},
    }
    session = Session(ResultStore(options.output / RAW, identity), identity, planned(options.plan))
    done = len(session.planned) - len(session.left)
    if done:
        print(f"resuming: {done} of {len(session.planned)} measurements are in {session.store.path}", file=sys.stderr)
    return session
