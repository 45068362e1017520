"""One round: ``batch`` requests at once, streamed, and when each piece of output came."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from quest_vllm.bench.plan import STOCK
from quest_vllm.budget import XARG
from quest_vllm.eval.http_runner import Endpoint, RequestFailed

DATA, END = "data: ", "[DONE]"


@dataclass
class Streamed:
    """One answer. Times are seconds of one clock; ``stamps`` are those of the chunks that carry output."""

    sent: float
    stamps: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    tokens: int = 0
    sparse: dict[str, Any] | None = None
    """``usage.sparse_attention``, where the server tells it."""


class StreamingEndpoint(Endpoint):
    """An :class:`~quest_vllm.eval.http_runner.Endpoint` whose answers are timed as they come."""

    async def stream(self, prompt: list[int], max_tokens: int, budget: int) -> Streamed:
        """Generate exactly ``max_tokens`` greedily. Raises :class:`RequestFailed`; nothing is tried again."""
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if budget != STOCK:
            body["vllm_xargs"] = {**self.xargs, XARG: budget}
        answer = Streamed(time.perf_counter())
        try:
            async with self._client.stream("POST", f"{self.url}/completions", json=body) as response:
                if response.status_code != 200:
                    text = (await response.aread()).decode(errors="replace")
                    raise RequestFailed(f"HTTP {response.status_code}: {text[:300]}")
                await _read(response.aiter_lines(), answer)
        except self.transport_error as error:
            raise RequestFailed(repr(error)) from error
        if answer.tokens != max_tokens:
            raise RequestFailed(f"expected {max_tokens} tokens (ignore_eos), got {answer.tokens}")
        return answer

    async def get(self, path: str) -> Any:
        """A JSON document below the server's root; None where there is none."""
        try:
            answer = await self._client.get(f"{self.url.removesuffix('/v1')}{path}")
            return answer.json() if answer.status_code == 200 else None
        except (self.transport_error, ValueError):
            return None


async def _read(lines: AsyncIterator[str], answer: Streamed) -> None:
    """Fill ``answer`` from server-sent events."""
    async for line in lines:
        now = time.perf_counter()
        if not line.startswith(DATA) or line == DATA + END:
            continue
        chunk = json.loads(line.removeprefix(DATA))
        if "error" in chunk:
            raise RequestFailed(f"the stream broke off: {str(chunk['error'])[:300]}")
        if chunk.get("choices"):
            answer.stamps.append(now)
        if usage := chunk.get("usage"):
            answer.prompt_tokens, answer.tokens = usage["prompt_tokens"], usage["completion_tokens"]
            answer.sparse = usage.get("sparse_attention")


async def run_round(
    endpoint: StreamingEndpoint, prompts: Sequence[list[int]], tokens: int, budget: int
) -> dict[str, Any]:
    """Send ``prompts`` at once; returns the round's raw numbers (:func:`describe`).

    Raises the first :class:`RequestFailed` once every request has ended: none runs on into the next round.
    """
    streams = (endpoint.stream(prompt, tokens, budget) for prompt in prompts)
    answers = await asyncio.gather(*streams, return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return describe([answer for answer in answers if isinstance(answer, Streamed)])


def describe(answers: Sequence[Streamed]) -> dict[str, Any]:
    """Raw numbers of a round, in seconds.

    ``itl``: gaps between chunks while *every* request of the batch decodes, so that no prefill is in them.
    ``tpot``: of each request, (last chunk - first chunk) / (tokens - 1), other requests' prefill included.
    """
    first = max(answer.stamps[0] for answer in answers)
    last = min(answer.stamps[-1] for answer in answers)
    common = [[stamp for stamp in answer.stamps if first <= stamp <= last] for answer in answers]
    end = max(answer.stamps[-1] for answer in answers)
    total = sum(answer.tokens for answer in answers)
    return {
        "ttft": [answer.stamps[0] - answer.sent for answer in answers],
        "itl": [later - earlier for stamps in common for earlier, later in itertools.pairwise(stamps)],
        "tpot": [(a.stamps[-1] - a.stamps[0]) / (a.tokens - 1) for a in answers if a.tokens > 1],
        "output_tokens_per_second": total / (end - min(answer.sent for answer in answers)),
        "prompt_tokens": [answer.prompt_tokens for answer in answers],
        "chunks": sum(len(answer.stamps) for answer in answers),
        "tokens": total,
        "sparse_attention": answers[0].sparse,
    }
