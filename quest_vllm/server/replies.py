"""The way out: adds ``usage.sparse_attention`` and the aliased model name to answers as they pass.

Nothing is held back but the headers of a JSON answer until its body comes; vLLM sends that in one message, and streams
one event a message. Anything in other portions passes as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from quest_vllm.budget import get_budget_limits
from quest_vllm.server.asgi import Message, Send, header, with_body
from quest_vllm.server.facts import steps_follow
from quest_vllm.server.request import GenerationRequest
from quest_vllm.server.usage import Sequences, count_usage, lengths_in
from quest_vllm.tally import find_tally

Json = dict[str, Any]
# in a chunk, "model" comes before everything that a model or client wrote
_MODEL = re.compile(rb'"model":"(?:[^"\\]|\\.)*"')
_NAMES_MODEL = (b'data: {"id"', b"event: message_start")
_RESPONSE_EVENTS = (b"event: response.created", b"event: response.in_progress")
_LAST_EVENTS = (b"event: response.completed", b"event: response.incomplete", b"event: response.failed")


class JsonReply:
    """Passes an answer on; a JSON body with status 200 goes through ``edit``, which changes it in place."""

    def __init__(self, send: Send, edit: Callable[[Json], None]) -> None:
        self._send, self._edit = send, edit
        self._start: Message | None = None

    async def send(self, message: Message) -> None:
        """ASGI send."""
        if message["type"] == "http.response.start" and self._is_editable(message):
            self._start = message
            return
        if self._start is not None:
            start, self._start = self._start, None
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                body = self._edited(message.get("body", b""))
                start, message = with_body(start, body), {**message, "body": body}
            await self._send(start)
        await self._send(message)

    @staticmethod
    def _is_editable(start: Message) -> bool:
        kind = header(start.get("headers"), b"content-type") or b""
        return start["status"] == 200 and kind.startswith(b"application/json")

    def _edited(self, body: bytes) -> bytes:
        try:
            reply = json.loads(body)
        except (ValueError, RecursionError):
            return body
        if isinstance(reply, dict):
            self._edit(reply)
        return _dump(reply)


class GenerationReply:
    """The answer to one :class:`~quest_vllm.server.request.GenerationRequest`."""

    def __init__(self, request: GenerationRequest, send: Send) -> None:
        self._request, self._send = request, send
        self._whole = JsonReply(send, self._edit_reply)
        self._sequences = Sequences()
        self._streamed = self._refused = False

    async def send(self, message: Message) -> None:
        """ASGI send."""
        if message["type"] == "http.response.start":
            kind = header(message.get("headers"), b"content-type") or b""
            self._streamed = kind.startswith(b"text/event-stream") and message["status"] == 200
        if self._request.refusal is not None:
            await self._refuse(message, self._request.refusal.body())
        elif self._streamed:
            if message["type"] == "http.response.body":
                message = {**message, "body": self._edit_event(message.get("body", b""))}
            await self._send(message)
        else:
            await self._whole.send(message)

    async def _refuse(self, message: Message, body: bytes) -> None:
        """Send our own answer under the app's other headers; the app's body is dropped."""
        assert self._request.refusal is not None
        if message["type"] == "http.response.start":
            await self._send({**with_body(message, body), "status": self._request.refusal.status})
        elif not self._refused:
            self._refused = True
            await self._send({"type": "http.response.body", "body": body, "more_body": False})

    def _edit_reply(self, reply: Json) -> None:
        """A whole answer, in place."""
        self._rename(reply)
        self._sequences.add(reply)
        self._add_usage(reply)

    def _edit_event(self, event: bytes) -> bytes:
        """One server-sent event; what is not exactly one passes as it is."""
        named = event.startswith((*_RESPONSE_EVENTS, *_LAST_EVENTS))
        last = b'"usage":{' in event and (b'"choices":[]' in event or event.startswith(_LAST_EVENTS))
        tally = self._request.asked.countable and not self._request.asked.one_sequence and b'"token_ids":[' in event
        if last or tally or (named and self._request.asked.model is not None):
            return self._edit_parsed(event)
        return self._rename_bytes(event) if event.startswith(_NAMES_MODEL) else event

    def _edit_parsed(self, event: bytes) -> bytes:
        head, data, payload = event.partition(b"data: ")
        try:
            chunk = json.loads(payload)
        except (ValueError, RecursionError):
            return event
        if not isinstance(chunk, dict):
            return event
        reply = chunk["response"] if isinstance(chunk.get("response"), dict) else chunk
        self._rename(reply)
        self._sequences.add(reply)
        if not reply.get("choices"):
            self._add_usage(reply)
        return head + data + _dump(chunk) + b"\n\n"

    def _rename(self, reply: Json) -> None:
        if self._request.asked.model is not None and isinstance(reply.get("model"), str):
            reply["model"] = self._request.asked.model

    def _rename_bytes(self, event: bytes) -> bytes:
        model = self._request.asked.model
        if model is None:
            return event
        return _MODEL.sub(lambda _: b'"model":' + _dump(model), event, count=1)

    def _add_usage(self, reply: Json) -> None:
        """Add the object to a usage that it can be counted from; see docs/api.md for those that lack it."""
        usage, budget, asked = reply.get("usage"), self._request.token_budget, self._request.asked
        # Anthropic's messages have no "object", and their usage counts cached tokens apart
        totals = lengths_in(usage) if isinstance(usage, dict) and "object" in reply else None
        if totals is None or not steps_follow():
            return
        sequences = [totals] if asked.one_sequence else None
        if sequences is None and asked.countable:
            sequences = self._sequences.lengths(*totals)
        if sequences is not None:
            config = get_budget_limits().config
            counted = count_usage(sequences, budget, config, asked.top_p, find_tally(asked.tally), asked.policy)
            reply["usage"]["sparse_attention"] = counted.model_dump()


def _dump(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
