"""What a request's decode steps did, as attributes of vLLM's own request spans (``--otlp-traces-endpoint``).

vLLM makes one span a generation when it has ended, knows its lengths and its request id, and knows no budget. The
middleware notes the budget under an id that vLLM will use; the span's own numbers then say the rest, by the rule that
replies use (:mod:`quest_vllm.server.usage`). Off, and not imported by vLLM's path, unless tracing is on.
"""

from __future__ import annotations

import re
import uuid
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quest_vllm.budget import get_budget_limits
from quest_vllm.config import QuestConfig
from quest_vllm.server.asgi import Scope, header, route_path
from quest_vllm.server.facts import steps_follow
from quest_vllm.server.usage import count_usage
from quest_vllm.tally import find_tally

SPAN = "llm_request"
REQUEST_ID = "gen_ai.request.id"
LENGTHS = ("gen_ai.usage.prompt_tokens", "gen_ai.usage.completion_tokens")
NOTED_AT_MOST = 10_000
"""Requests whose budgets are kept; the oldest go first, and their spans stay as vLLM made them."""
_ROUTE_PREFIX = {
    "/v1/completions": "",
    "/v1/chat/completions": "",
    "/v1/responses": "resp_",
}
"""Routes whose body may name a ``request_id``, and how vLLM's own ones begin there."""
_ID_PREFIXES = ("chatcmpl-", "cmpl-")
_SEQUENCE = re.compile(r"[-_]\d+$")


@dataclass(frozen=True)
class Noted:
    """What was in force for a request: budget in tokens (0: dense), top_p, policy, and its tally's number (0: none)."""

    token_budget: int
    top_p: float = 1.0
    policy: str = ""
    tally: int = 0


_noted: OrderedDict[str, Noted] | None = None


def is_on() -> bool:
    """Whether spans get our attributes in this process."""
    return _noted is not None


def install(vllm_config: Any) -> None:
    """Add to the spans of this API server, if vLLM traces requests. A second time does nothing.

    Called once vLLM has set its tracer provider.
    """
    global _noted
    endpoint = getattr(getattr(vllm_config, "observability_config", None), "otlp_traces_endpoint", None)
    if endpoint is None or is_on():
        return
    from opentelemetry import trace

    add = getattr(trace.get_tracer_provider(), "add_span_processor", None)
    if add is not None:
        _noted = OrderedDict()
        add(_processor())


def name_request(scope: Scope, body: bytes, request_id: str | None) -> tuple[bytes, str | None]:
    """The body to hand on and the id that vLLM will call the request by; None where that cannot be told.

    In vLLM's order: the header X-Request-Id, the body's ``request_id``, or a new one, which is put into the body.
    """
    given = header(scope.get("headers"), b"x-request-id")
    if given is not None:
        return body, given.decode("latin-1")
    prefix = _ROUTE_PREFIX.get(route_path(scope))
    if prefix is None or request_id is not None:
        return body, request_id
    start = body.lstrip(b" \t\r\n")
    if not start.startswith(b'{"'):  # another encoding, or an empty object
        return body, None
    name = f"{prefix}{uuid.uuid4().hex}"
    return b'{"request_id":"' + name.encode() + b'",' + start[1:], name


def note(name: str, in_force: Noted) -> None:
    """Keep what is in force for the request that vLLM will call ``name``."""
    if _noted is not None:
        _noted[name] = in_force
        _noted.move_to_end(name)
        while len(_noted) > NOTED_AT_MOST:
            _noted.popitem(last=False)


def noted(external_id: str) -> Noted | None:
    """What was noted for a span's request id, which adds a prefix by route and a number by prompt or turn."""
    if _noted is None:
        return None
    name = next((external_id.removeprefix(p) for p in _ID_PREFIXES if external_id.startswith(p)), external_id)
    return _noted.get(name, _noted.get(_SEQUENCE.sub("", name)))


def settings_text(config: QuestConfig) -> str:
    """What the server chooses pages by, as one attribute."""
    keys = ("page_summary", "group_reduction", "bound_radius", "sink_pages", "recent_pages", "page_size")
    return ", ".join(f"{key}={getattr(config, key)}" for key in keys)


def attributes_of(span: Mapping[str, Any]) -> dict[str, Any]:
    """Our attributes for a span with the attributes ``span``; none where its budget is not known."""
    of = noted(str(span.get(REQUEST_ID)))
    if of is None:
        return {}
    config = get_budget_limits().config
    found: dict[str, Any] = {"quest.token_budget": of.token_budget, "quest.top_p": of.top_p, "quest.policy": of.policy}
    found["quest.settings"] = settings_text(config)
    prompt, completion = (span.get(name) for name in LENGTHS)
    if steps_follow() and isinstance(prompt, int) and isinstance(completion, int):
        usage = count_usage(
            [(prompt, completion)], of.token_budget, config, of.top_p, find_tally(of.tally), of.policy
        ).model_dump()
        found |= {f"quest.{key}": value for key, value in usage.items() if value is not None}
    return found


def _processor() -> Any:
    """A span processor; the SDK is imported here, where tracing is on and so installed."""
    from opentelemetry.sdk.trace import SpanProcessor

    class QuestSpans(SpanProcessor):  # type: ignore[misc]
        """Adds to vLLM's request spans.

        vLLM sets a span's attributes right after it starts it and ends it at once. A processor may not add any when a
        span ends (the SDK freezes them first; its OnEnding is experimental), so ours go in together with vLLM's. Can
        go once processors may add to an ending span.
        """

        def on_start(self, span: Any, parent_context: Any = None) -> None:
            """A span begins."""
            if span.name != SPAN:
                return
            stock = span.set_attributes

            def set_attributes(attributes: Mapping[str, Any]) -> None:
                stock({**attributes, **attributes_of(attributes)})

            span.set_attributes = set_attributes

    return QuestSpans()
