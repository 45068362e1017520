"""ASGI middleware of the API server: request latencies by budget class, and budgets that vLLM's field type blurs.

``--middleware quest_vllm.metrics_http.QuestMiddleware`` (``quest-vllm serve`` adds it). This is the only place where a
request's time and its budget are both known: vLLM's per-request statistics carry no sampling parameters, and the
worker sees neither the queue nor the network. So the latencies are those of the HTTP client:

- time to first token: request in, to the first chunk with output of a streamed (chat) completion out;
- inter-token latency: between two such chunks (one may carry several tokens when the client is slow or speculation is
  on; with ``n > 1`` the answers' chunks interleave);
- end to end: request in, to the last byte out, streamed or not. Refused or broken-off requests aren't counted.

vLLM types ``vllm_xargs`` values as str, int, float or list: its validation turns ``false`` into 0 (dense!) and ``true``
into 1, and answers ``null`` without naming the range. Such a value is handed on as its JSON text, which
:func:`quest_vllm.budget.parse_token_budget` then refuses like any other string.
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from quest_vllm.budget import ABSENT, XARG, get_budget_limits
from quest_vllm.errors import QuestValueError
from quest_vllm.metrics import LatencyMetrics, budget_class, get_latency_metrics

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

GENERATE_PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")


class QuestMiddleware:
    """Times generation requests and keeps their budgets' JSON types apart. Everything else passes untouched."""

    def __init__(self, app: App) -> None:
        self._app = app
        get_latency_metrics()  # a histogram that a scrape sees at zero: its first request then counts in rates

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """One ASGI connection."""
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].endswith(GENERATE_PATHS):
            await self._app(scope, receive, send)
            return
        request = _Request(receive)
        timer = _Timer(request, send, get_latency_metrics())
        await self._app(scope, request.receive, timer.send)


class _Request:
    """Hands the body on in one piece when the app asks for it (so after authentication), budget made distinct."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._body_done = False
        self.requested: object = ABSENT
        self.broken_off = False

    async def receive(self) -> Message:
        """ASGI receive."""
        if self._body_done:
            return self._note(await self._receive())
        chunks: list[bytes] = []
        while True:
            message = await self._receive()
            if message["type"] != "http.request":
                return self._note(message)
            chunks.append(message.get("body", b""))
            if not message.get("more_body", False):
                break
        self._body_done = True
        body, self.requested = distinct_budget(b"".join(chunks))
        return {"type": "http.request", "body": body, "more_body": False}

    def _note(self, message: Message) -> Message:
        self.broken_off |= message["type"] == "http.disconnect"
        return message

    @property
    def budget_class(self) -> str:
        """Class of the budget asked for; a bad budget's request is refused, so its class is never used."""
        try:
            return budget_class(get_budget_limits().parse(self.requested))
        except QuestValueError:
            return budget_class(0)


class _Timer:
    """Watches an answer go out. Time starts with the request's headers."""

    def __init__(self, request: _Request, send: Send, metrics: LatencyMetrics) -> None:
        self._request, self._send, self._metrics = request, send, metrics
        self._start = time.perf_counter()
        self._previous: float | None = None
        self._ok = self._streamed = False
        self._label = ""

    async def send(self, message: Message) -> None:
        """ASGI send."""
        await self._send(message)
        if message["type"] == "http.response.start":
            self._ok = message["status"] == 200
            self._streamed = _content_type(message).startswith(b"text/event-stream")
            self._label = self._request.budget_class if self._ok else ""
        elif message["type"] == "http.response.body" and self._ok and not self._request.broken_off:
            self._body(message)

    def _body(self, message: Message) -> None:
        now = time.perf_counter()
        if self._streamed and carries_tokens(message.get("body", b"")):
            if self._previous is None:
                self._metrics.first_token(self._label, now - self._start)
            else:
                self._metrics.next_token(self._label, now - self._previous)
            self._previous = now
        if not message.get("more_body", False):
            self._metrics.end_to_end(self._label, now - self._start)


def distinct_budget(body: bytes) -> tuple[bytes, object]:
    """The body to hand on, and the budget that it asks for (ABSENT without one).

    A bool, null or object becomes its JSON text as a string. A body that is no JSON object passes as it is.
    """
    if XARG.encode() not in body:
        return body, ABSENT
    try:
        request = json.loads(body)
        xargs = request["vllm_xargs"]
        value = xargs[XARG]
    except (ValueError, TypeError, KeyError, RecursionError):
        return body, ABSENT
    if isinstance(value, int | float | str | list) and not isinstance(value, bool):
        return body, value
    xargs[XARG] = json.dumps(value)
    return json.dumps(request).encode(), xargs[XARG]


def carries_tokens(chunk: bytes) -> bool:
    """Whether a chunk of a streamed answer holds output: not a chat's opening role, the usage or the end marker."""
    opens_chat = b'"delta":{"role":' in chunk and b'"content":""' in chunk
    return b'"choices":[{' in chunk and not opens_chat


def _content_type(message: Message) -> bytes:
    headers: list[tuple[bytes, bytes]] = list(message.get("headers", ()))
    return next((bytes(value) for name, value in headers if name.lower() == b"content-type"), b"")
