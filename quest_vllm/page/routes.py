"""The page's routes, added to vLLM's own app by an ASGI middleware that does nothing else.

``--middleware quest_vllm.page.routes.QuestPage`` (``quest-vllm serve --quest-page`` adds it, and switches the tracing
in the worker on). The static files hold no secret and load without a key. What the page calls lies under ``/v1``, so
vLLM's own ``--api-key`` check, CORS and ``--root-path`` apply to it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from quest_vllm.config import TWO_STAGE, WINDOW, QuestConfig
from quest_vllm.metrics_files import metrics_dir
from quest_vllm.page.trace import MAX_TRACE, TraceReader
from quest_vllm.runtime import active_config

STATIC = Path(__file__).parent / "static"
FILES = {
    "page.css": "text/css",
    "page.js": "text/javascript",
    "map.js": "text/javascript",
    "bytes.js": "text/javascript",
}
# the page needs nothing from elsewhere, and nothing may be put into it
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
App = Callable[[MutableMapping[str, Any], Any, Any], Awaitable[None]]


class QuestPage:
    """Adds the routes when the server starts; every connection passes untouched."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._added = False

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        """One ASGI connection."""
        if not self._added and "app" in scope:
            add_routes(scope["app"])
            self._added = True
        await self._app(scope, receive, send)


def add_routes(app: Any) -> None:
    """Put the page's routes into a Starlette or FastAPI app."""
    from starlette.routing import Route

    app.router.routes.extend(
        [
            Route("/quest", _index),
            Route("/quest/{name}", _file),
            Route("/v1/quest/info", _info),
            Route("/v1/quest/trace/{trace:int}", _trace),
        ]
    )


async def _index(_: Any) -> Any:
    from starlette.responses import FileResponse

    return FileResponse(STATIC / "index.html", media_type="text/html", headers=HEADERS)


async def _file(request: Any) -> Any:
    from starlette.responses import FileResponse, PlainTextResponse

    name = request.path_params["name"]
    if name not in FILES:
        return PlainTextResponse("not found", status_code=404)
    return FileResponse(STATIC / name, media_type=FILES[name], headers=HEADERS)


async def _info(request: Any) -> Any:
    from starlette.responses import JSONResponse

    return JSONResponse(describe(request.app.state.vllm_config, active_config()))


async def _trace(request: Any) -> Any:
    from starlette.responses import JSONResponse

    trace = request.path_params["trace"]
    after = request.query_params.get("after", "0")
    if not 1 <= trace <= MAX_TRACE or not after.isascii() or not after.isdigit() or len(after) > 19:
        expected = f"trace: expected 1 to {MAX_TRACE}; after: a number from an earlier reply"
        return JSONResponse({"error": {"message": f"{expected}, got {trace} and {after[:40]!r}"}}, status_code=400)
    return JSONResponse(TraceReader(metrics_dir(active_config().metrics_dir)).read(trace, int(after)))


def describe(vllm_config: Any, config: QuestConfig) -> dict[str, Any]:
    """What the page needs to know of the server: budgets, and the sizes that the byte model takes.

    ``map`` says whether the worker can record the pages that were attended; ``scores_pages`` and ``reads_keys``: what
    requests without a policy choose theirs by.
    """
    from quest_vllm import compat

    model = vllm_config.model_config
    return {
        "default_budget": config.token_budget,
        "min_budget": config.min_token_budget,
        "max_model_len": model.max_model_len,
        "page_size": config.page_size,
        "layers": model.get_total_num_hidden_layers(),
        "dense_layers": list(config.dense_layers),
        "by_layer": bool(config.layer_shares),
        "kv_heads": model.get_total_num_kv_heads(),
        "select_heads": "query" if config.group_reduction == "per_query_head" else "KV",
        "scores_pages": config.own_policy != WINDOW,
        "reads_keys": config.own_policy == TWO_STAGE,
        "vector_bytes": 2 * model.get_head_size() * model.dtype.itemsize,
        "map": compat.is_cpu_platform(),
    }
