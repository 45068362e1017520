"""The ASGI middleware of the API server: ``--middleware quest_vllm.server.middleware.QuestMiddleware``.

vLLM puts it outermost, so it acts where vLLM has let a request through: a body is read when the route asks for it, and
answers are edited on their way out.
"""

from __future__ import annotations

from quest_vllm import compat
from quest_vllm.budget import get_budget_limits
from quest_vllm.metrics import get_latency_metrics
from quest_vllm.metrics_http import RequestTimer
from quest_vllm.server.asgi import App, Receive, Scope, Send, route_path
from quest_vllm.server.facts import note_engine_death
from quest_vllm.server.replies import GenerationReply, JsonReply
from quest_vllm.server.request import GenerationRequest
from quest_vllm.server.routes import install, list_aliases

GENERATE_PATHS = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    "/v1/responses",
    "/v1/messages",
    "/invocations",
)


class QuestMiddleware:
    """Reads and times generation requests, adds to their answers and to the model list. The rest passes untouched."""

    def __init__(self, app: App) -> None:
        self._app = app
        get_latency_metrics()  # a histogram that a scrape sees at zero: its first request then counts in rates

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI connection."""
        install(scope.get("app"))
        if scope["type"] == "http":
            path = route_path(scope)
            if scope["method"] == "POST" and path in GENERATE_PATHS:
                request = GenerationRequest(scope, receive)
                timer = RequestTimer(request, send, get_latency_metrics())
                receive, send = request.receive, GenerationReply(request, timer.send).send
            elif scope["method"] == "GET" and path == "/v1/models" and get_budget_limits().config.aliases:
                send = JsonReply(send, list_aliases).send
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The server's life, at whose end vLLM's app has no state any more."""
        watch = compat.EngineWatch(getattr(getattr(scope.get("app"), "state", None), "engine_client", None))
        try:
            await self._app(scope, receive, send)
        finally:
            note_engine_death(watch.end())
