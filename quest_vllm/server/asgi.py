"""The few words of ASGI that the middleware speaks, and vLLM's shape of an error."""

from __future__ import annotations

import http
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Refusal(Exception):
    """A request that is answered with an HTTP error: ``status``, the ``param`` at fault and a message for the user."""

    def __init__(self, status: int, param: str | None, message: str) -> None:
        super().__init__(message)
        self.status, self.param = status, param

    def body(self) -> bytes:
        """The answer's body, in the shape of OpenAI's errors as vLLM fills it."""
        kind = "BadRequestError" if self.status == 400 else http.HTTPStatus(self.status).phrase
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.status}
        return json.dumps({"error": error}).encode()


def route_path(scope: Scope) -> str:
    """The path below ``--root-path``, which servers put in front of ``scope["path"]``."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "").rstrip("/"))


def header(headers: Any, name: bytes) -> bytes | None:
    """Value of a header, by lower-case name; None without it."""
    return next((bytes(value) for key, value in headers or () if key.lower() == name), None)


def with_body(start: Message, body: bytes) -> Message:
    """``http.response.start`` again, as JSON of ``body``'s length; other headers (CORS, request ids) stay."""
    replaced = (b"content-length", b"content-type")
    kept = [(key, value) for key, value in start.get("headers", ()) if key.lower() not in replaced]
    length = str(len(body)).encode()
    return {**start, "headers": [*kept, (b"content-type", b"application/json"), (b"content-length", length)]}
