"""Runs units against an OpenAI-compatible server: ``/v1/completions`` with token ids, greedy."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from quest_vllm.budget import XARG
from quest_vllm.errors import EvalUnavailable, QuestValueError
from quest_vllm.eval.library import Library, score
from quest_vllm.eval.plan import DECODE, PREFILL, ResultStore, Unit
from quest_vllm.eval.progress import Progress
from quest_vllm.eval.prompts import load_codec
from quest_vllm.eval.session import Options, Session, open_session
from quest_vllm.eval.text import TEXT, TextSource

TRIES = 4
FIRST_PAUSE_SECONDS = 0.5
ASK_THE_SERVER = "the server's own"


class Endpoint:
    """One server and how to talk to it. Use as an async context manager."""

    def __init__(
        self,
        url: str,
        api_key: str,
        timeout: float,
        model: str | None = None,
        xargs: Mapping[str, Any] | None = None,
    ) -> None:
        """``url`` with or without ``/v1``; ``model`` None takes the first that the server lists."""
        self.xargs = dict(xargs or {})
        try:
            import httpx
        except ImportError:
            raise EvalUnavailable("talking to a server needs the package httpx: pip install httpx") from None
        base = url.rstrip("/")
        self.url = base if base.endswith("/v1") else f"{base}/v1"
        self.model = model or ""
        self.max_model_len: int | None = None
        self.root: str | None = None
        self.transport_error = httpx.TransportError
        headers = {"Authorization": f"Bearer {api_key}"}
        self._client = httpx.AsyncClient(timeout=timeout, headers=headers, limits=httpx.Limits(max_connections=None))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def describe(self) -> None:
        """Ask for the model's name, length and folder. Raises :class:`EvalUnavailable`."""
        try:
            answer = await self._client.get(f"{self.url}/models")
            answer.raise_for_status()
            models = answer.json()["data"]
        except Exception as error:  # refused, no JSON, another shape: all mean the same to the user
            raise EvalUnavailable(f"{self.url}/models: expected a list of models, got {error!r}") from error
        names = [model["id"] for model in models]
        if self.model and self.model not in names:
            raise EvalUnavailable(f"--model-name: expected one of {', '.join(names)}, got {self.model!r}")
        chosen = models[names.index(self.model)] if self.model else models[0]
        self.model, self.root = chosen["id"], chosen.get("root")
        length = chosen.get("max_model_len")
        self.max_model_len = length if isinstance(length, int) else None

    async def honours_budgets(self, prompt: list[int]) -> bool:
        """Whether the server refuses a budget that cannot be: one that ignores budgets answers."""
        answer = await self.post(prompt, 1, -1)
        return bool(answer.status_code == 400 and XARG in answer.text)

    async def post(self, prompt: list[int], max_tokens: int, budget: int) -> Any:
        """One completion; the raw HTTP response."""
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "vllm_xargs": {**self.xargs, XARG: budget},
        }
        return await self._client.post(f"{self.url}/completions", json=body)

    async def complete(self, prompt: list[int], max_tokens: int, budget: int) -> str:
        """The text of a completion. Tries again on lost connections, 429 and 5xx; raises :class:`RequestFailed`."""
        problem = ""
        for attempt in range(TRIES):
            if attempt:
                await asyncio.sleep(FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))
            try:
                answer = await self.post(prompt, max_tokens, budget)
            except self.transport_error as error:
                problem = repr(error)
                continue
            if answer.status_code == 200:
                return _text(answer)
            problem = f"HTTP {answer.status_code}: {answer.text[:300]}"
            if answer.status_code < 500 and answer.status_code != 429:
                break
        raise RequestFailed(problem)


class RequestFailed(Exception):
    """One request failed for good."""


def _text(answer: Any) -> str:
    try:
        return str(answer.json()["choices"][0]["text"])
    except (ValueError, LookupError, TypeError):
        raise RequestFailed(f"expected choices[0].text in the answer, got {answer.text[:300]}") from None


async def run_units(
    endpoint: Endpoint,
    units: Sequence[Unit],
    library: Library,
    store: ResultStore,
    concurrency: int,
    advance: Callable[[], object],
) -> int:
    """Measure ``units``, ``concurrency`` at a time; returns how many failed.

    Raises :class:`EvalUnavailable` after ``2 * concurrency`` failures without a success between them.
    """
    waiting = iter(units)
    failed = in_a_row = 0

    async def work() -> None:
        nonlocal failed, in_a_row
        for unit in waiting:
            item = library.of(unit)
            began = time.monotonic()
            try:
                answer = await endpoint.complete(item.prompt_ids, item.max_tokens, unit.budget)
            except RequestFailed as problem:
                failed, in_a_row = failed + 1, in_a_row + 1
                store.add(unit, {"error": str(problem)})
                if in_a_row >= 2 * concurrency:
                    raise EvalUnavailable(f"{in_a_row} requests in a row failed, the last with {problem}") from None
            else:
                in_a_row = 0
                seconds = round(time.monotonic() - began, 3)
                store.add(unit, {"score": score(item, answer), "answer": answer, "seconds": seconds})
            advance()

    workers = [asyncio.create_task(work()) for _ in range(concurrency)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
    return failed


def run_over_http(options: Options, source: TextSource | None) -> tuple[dict[str, Any], Session]:
    """Measure what is left against a server; returns facts for the report, and the session.

    Raises :class:`QuestValueError` for options that a server cannot serve, :class:`EvalUnavailable` where it does not
    answer or ignores budgets.
    """
    return asyncio.run(_run(options, source))


async def _run(options: Options, source: TextSource | None) -> tuple[dict[str, Any], Session]:
    plan = options.plan
    if TEXT in plan.tasks:
        raise QuestValueError(f"--tasks: {TEXT} forces tokens in decode and needs a model in process, got a URL")
    if DECODE in plan.modes:
        raise QuestValueError(
            f"--question: expected {PREFILL} for a URL (decode needs a model in process), got {DECODE}"
        )
    server = Endpoint(options.target, options.api_key, options.timeout, options.model_name, options.xargs)
    async with server as endpoint:
        await endpoint.describe()
        # the model's folder as the server names it, where that is on this machine; else the model's name
        codec = load_codec(options.tokenizer or endpoint.root or endpoint.model, options.chat_template)
        library = Library(codec, plan, source, options.text_tokens)
        library.check()
        _check_lengths(library, endpoint.max_model_len)
        if any(plan.budgets) and not await endpoint.honours_budgets(codec.encode("a")):
            raise EvalUnavailable(
                f"{endpoint.url}: expected HTTP 400 for the token budget -1, got another answer: this server ignores "
                "budgets, so every column would be the same. Serve the model with `quest-vllm serve`, or ask for "
                "--budgets dense"
            )
        session = open_session(options, endpoint.model, source, ASK_THE_SERVER)
        left = session.left
        with Progress(len(session.planned), len(session.planned) - len(left)) as progress:
            await run_units(endpoint, left, library, session.store, options.concurrency, progress.advance)
    return {"runner": "http", "url": endpoint.url, "max_model_len": endpoint.max_model_len}, session


def _check_lengths(library: Library, longest: int | None) -> None:
    plan = library.plan
    if longest is None:
        return
    room = longest - library.longest_answer()
    if max(plan.contexts) > room:
        raise QuestValueError(
            f"--context: expected at most {room} (the server's max_model_len of {longest} less the answer), "
            f"got {max(plan.contexts)}"
        )
    if max(plan.budgets) > longest:
        raise QuestValueError(
            f"--budgets: expected at most the server's max_model_len of {longest}, got {max(plan.budgets)}"
        )
