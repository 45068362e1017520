"""A small OpenAI-compatible server whose answers a test chooses."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[list[int], int], str | tuple[int, str]]
"""Prompt ids and token budget to the text of the completion, or to an HTTP status and a body."""
Pace = Callable[[int], float]
"""Token budget (-1: the request named none) to the seconds between two tokens of a stream."""


@dataclass
class FakeEndpoint:
    """What the server was asked."""

    url: str
    bodies: list[dict[str, Any]] = field(default_factory=list)
    most_at_once: int = 0

    def budgets(self) -> list[int]:
        """Of every request that was no probe."""
        return [b for body in self.bodies if (b := budget_of(body)) >= 0]


def budget_of(body: dict[str, Any]) -> int:
    """The budget that a request names; -1 without one."""
    return int(body.get("vllm_xargs", {}).get("quest_token_budget", -1))


@contextlib.contextmanager
def fake_endpoint(
    answer: Answer,
    root: str,
    honours_budgets: bool = True,
    max_model_len: int = 8192,
    pace: Pace = lambda budget: 0.0,
) -> Iterator[FakeEndpoint]:
    """Serve ``answer`` until the block ends; ``root`` is the model folder that /v1/models names.

    A stream sends ``max_tokens`` chunks at ``pace``, and the usage.
    """
    lock, running = threading.Lock(), [0]

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

        def _reply(self, status: int, document: object) -> None:
            data = (document if isinstance(document, str) else json.dumps(document)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            model = {"id": "fake-model", "root": root, "max_model_len": max_model_len}
            self._reply(200 if self.path == "/v1/models" else 404, {"data": [model]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                endpoint.bodies.append(body)
                running[0] += 1
                endpoint.most_at_once = max(endpoint.most_at_once, running[0])
            try:
                self._complete(body)
            finally:
                with lock:
                    running[0] -= 1

        def _complete(self, body: dict[str, Any]) -> None:
            budget = budget_of(body)
            if budget < 0 and "vllm_xargs" in body and honours_budgets:
                return self._reply(400, f"quest_token_budget: expected 0 (dense) or more, got {budget}")
            given = answer(body["prompt"], budget)
            if isinstance(given, tuple):
                return self._reply(*given)
            if body.get("stream"):
                return self._stream(len(body["prompt"]), body["max_tokens"], pace(budget))
            self._reply(200, {"choices": [{"text": given}]})

        def _stream(self, prompt_tokens: int, tokens: int, seconds: float) -> None:
            self.send_response(200)
            self.end_headers()
            for _ in range(tokens):
                time.sleep(seconds)
                self._event({"choices": [{"index": 0, "text": " a"}], "usage": None})
            usage = {"prompt_tokens": prompt_tokens, "completion_tokens": tokens}
            self._event({"choices": [], "usage": usage})
            self.wfile.write(b"data: [DONE]\n\n")

        def _event(self, chunk: dict[str, Any]) -> None:
            self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    endpoint = FakeEndpoint(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
