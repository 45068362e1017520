"""Our route, our part of the served OpenAPI schema, and aliases in ``/v1/models``.

The route goes into vLLM's own FastAPI app, so its API key, CORS and root path hold for it as for any other.
"""

from __future__ import annotations

from typing import Any

from quest_vllm import compat
from quest_vllm.budget import get_budget_limits
from quest_vllm.server.facts import describe
from quest_vllm.server.fields import OBJECT, SparseAttention
from quest_vllm.server.usage import SparseUsage

PATH = "/v1/sparse_attention"
REQUEST_SCHEMAS = (
    "ChatCompletionRequest",
    "BatchChatCompletionRequest",
    "CompletionRequest",
    "ResponsesRequest",
    "AnthropicMessagesRequest",
)
USAGE_SCHEMAS = ("UsageInfo", "ResponseUsage")


def install(app: Any) -> None:
    """Add the route and the schema to vLLM's FastAPI ``app``; a second time does nothing."""
    if not hasattr(app, "add_api_route") or getattr(app.state, "quest_vllm_installed", False):
        return
    app.state.quest_vllm_installed = True

    async def sparse_attention() -> dict[str, Any]:
        """Defaults, legal range and policy of sparse attention on this server, and what its model supports."""
        return describe(get_budget_limits(), sorted(compat.served_models(app) or ()))

    app.add_api_route(PATH, sparse_attention, methods=["GET"], tags=["quest_vllm"])
    stock = app.openapi

    def openapi() -> dict[str, Any]:
        schema: dict[str, Any] = stock()
        extend_schema(schema)
        return schema

    app.openapi = openapi


def extend_schema(schema: dict[str, Any]) -> None:
    """Add the request object and the usage object to an OpenAPI schema, in place."""
    components = schema.setdefault("components", {}).setdefault("schemas", {})
    for model in (SparseAttention, SparseUsage):
        components[model.__name__] = model.model_json_schema(ref_template="#/components/schemas/{model}")
    for names, model in ((REQUEST_SCHEMAS, SparseAttention), (USAGE_SCHEMAS, SparseUsage)):
        for name in names:
            if name in components:
                field = {"$ref": f"#/components/schemas/{model.__name__}"}
                components[name].setdefault("properties", {})[OBJECT] = field


def list_aliases(models: dict[str, Any]) -> None:
    """Add ``NAME:alias`` behind every model of a ``/v1/models`` answer, in place."""
    aliases = dict(get_budget_limits().config.aliases)
    cards = models.get("data")
    if isinstance(cards, list):
        models["data"] = [
            listed
            for card in cards
            for listed in (card, *({**card, "id": f"{card['id']}:{name}", "parent": card["id"]} for name in aliases))
        ]
