"""Request latencies by budget class, as the HTTP client sees them.

The API server's middleware (:mod:`quest_vllm.server.middleware`) is the only place where a request's time and its
budget are both known: vLLM's per-request statistics carry no sampling parameters, and the worker sees neither the queue
nor the network.

- time to first token: request in, to the first chunk with output of a streamed (chat) completion out;
- inter-token latency: between two such chunks (one may carry several tokens when the client is slow or speculation is
  on; with ``n > 1`` the answers' chunks interleave);
- end to end: request in, to the last byte out, streamed or not. Refused or broken-off requests aren't counted.
"""

from __future__ import annotations

import time
from typing import Protocol

from quest_vllm.metrics import LatencyMetrics
from quest_vllm.server.asgi import Message, Send, header


class TimedRequest(Protocol):
    """What the timer needs of a request: known once the answer starts."""

    @property
    def budget_class(self) -> str:
        """Label of the budget asked for."""

    @property
    def broken_off(self) -> bool:
        """Whether the client has left."""


class RequestTimer:
    """Watches an answer go out. Time starts with the request's headers."""

    def __init__(self, request: TimedRequest, send: Send, metrics: LatencyMetrics) -> None:
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
            self._streamed = (header(message.get("headers"), b"content-type") or b"").startswith(b"text/event-stream")
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


def carries_tokens(chunk: bytes) -> bool:
    """Whether a chunk of a streamed answer holds output: not a chat's opening role, the usage or the end marker."""
    opens_chat = b'"delta":{"role":' in chunk and b'"content":""' in chunk
    return b'"choices":[{' in chunk and not opens_chat
