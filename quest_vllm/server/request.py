"""The way in: reads a generation request's body, within a size limit, and hands on what vLLM should see."""

from __future__ import annotations

from quest_vllm import compat
from quest_vllm.budget import get_budget_limits
from quest_vllm.metrics import budget_class
from quest_vllm.server import spans
from quest_vllm.server.asgi import Message, Receive, Refusal, Scope, header
from quest_vllm.server.fields import Asked, read_request


class GenerationRequest:
    """Hands the body on in one piece, when the app asks for it: so after vLLM's own authentication.

    A request that is refused raises FastAPI's HTTPException into the body's reader, which is how a middleware stops a
    route there; :attr:`refusal` then holds the answer to give.
    """

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self._scope, self._receive = scope, receive
        self._body_done = False
        self.asked = Asked()
        self.refusal: Refusal | None = None
        self.broken_off = False

    async def receive(self) -> Message:
        """ASGI receive."""
        if self._body_done:
            return self._note(await self._receive())
        try:
            body = await self._read()
            if body is None:
                return {"type": "http.disconnect"}
            self._body_done = True
            body, self.asked = read_request(body, get_budget_limits(), compat.served_models(self._scope.get("app")))
            if spans.is_on():
                body = self._trace(body)
        except Refusal as refusal:
            from fastapi import HTTPException

            self._body_done, self.refusal = True, refusal
            raise HTTPException(refusal.status, str(refusal)) from None
        return {"type": "http.request", "body": body, "more_body": False}

    def _trace(self, body: bytes) -> bytes:
        """Note what is in force for the request's span; the body may gain the id that finds it again."""
        body, name = spans.name_request(self._scope, body, self.asked.request_id)
        if name is not None:
            asked = self.asked
            spans.note(name, spans.Noted(self.token_budget, asked.top_p, asked.policy, asked.tally))
        return body

    async def _read(self) -> bytes | None:
        """The whole body; None where the client left. Raises :class:`Refusal` (413) for one that is too large.

        Up to twice the limit is still read, and dropped: many clients only look for an answer once they have sent all.
        """
        limit = get_budget_limits().config.max_body_bytes
        declared = header(self._scope.get("headers"), b"content-length")
        if declared is not None and declared.isdigit() and int(declared[:20]) > 2 * limit:
            raise self._too_large(limit)
        chunks: list[bytes] = []
        size, more = 0, True
        while more and size <= 2 * limit:
            message = self._note(await self._receive())
            if message["type"] != "http.request":
                return None
            chunk, more = message.get("body", b""), message.get("more_body", False)
            size += len(chunk)
            if size <= limit:
                chunks.append(chunk)
            else:
                chunks.clear()
        if size > limit:
            raise self._too_large(limit)
        return b"".join(chunks)

    @staticmethod
    def _too_large(limit: int) -> Refusal:
        return Refusal(413, None, f"request body: expected at most {limit} bytes (max_body_bytes), got more")

    def _note(self, message: Message) -> Message:
        self.broken_off |= message["type"] == "http.disconnect"
        return message

    @property
    def token_budget(self) -> int:
        """The budget in force, in tokens; 0: dense."""
        return get_budget_limits().parse(self.asked.budget)

    @property
    def budget_class(self) -> str:
        """Label of the budget in latency metrics."""
        return budget_class(self.token_budget)
