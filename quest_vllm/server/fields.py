"""What a request says about sparse attention, merged into the one place that vLLM carries to the worker.

Three ways to name a budget: ``"sparse_attention": {"token_budget": 1024}``, ``"vllm_xargs": {"quest_token_budget":
1024}``, and a model name that ends in an alias. They may agree, they may not differ; ``top_p`` has the first two. The
body is rewritten only where the object or an alias is in it, or a top_p below 1 in force: the worker then counts under
a number that goes along. ``vllm_xargs`` is checked here too, although our logits processor does it again: vLLM
types its values as str, int, float or list, so it would turn ``false`` into 0 (dense!), ``true`` into 1, and answer
``null`` without naming the range; and some of its routes log a traceback for every value refused so late.
"""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from quest_vllm.budget import ABSENT, TOP_P_XARG, XARG, BudgetLimits, shown
from quest_vllm.errors import QuestValueError
from quest_vllm.server.asgi import Refusal
from quest_vllm.server.guards import refuse_crashing
from quest_vllm.tally import TALLY_XARG, new_tally

OBJECT = "sparse_attention"
XARGS = "vllm_xargs"


class SparseAttention(BaseModel):
    """How one request attends while it decodes. Strict: unknown keys and other types are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    # the factory keeps the field optional without promising a default, which is the server's
    token_budget: int = Field(
        default_factory=int,
        ge=0,
        description=(
            "Tokens that each decode step may read per KV head and layer; sink, recent and current pages count. "
            "0: dense attention. Without it, the server's default. GET /v1/sparse_attention tells the legal range."
        ),
        examples=[1024],
    )
    top_p: float = Field(
        default_factory=float,
        gt=0,
        le=1,
        description=(
            "Share of the estimated attention mass of the budget's pages after which a KV head stops taking more, in "
            "each layer and step. 1: the whole budget. Without it, the server's default."
        ),
        examples=[0.95],
    )


@dataclass(frozen=True)
class Asked:
    """What was found in a request's body.

    ``budget``: a legal budget in tokens, :data:`~quest_vllm.budget.ABSENT` if none is named. ``model``: the aliased
    name to answer with, or None.
    ``one_sequence``: one prompt, one answer, one generation. ``countable``: whether several sequences can be told apart
    by the token ids of their choices. ``request_id``: the body's own name for the request, or None. ``top_p`` is the
    one in force; ``tally``: the number under which the worker counts where that is below 1; 0: none.
    """

    budget: object = ABSENT
    model: str | None = None
    one_sequence: bool = False
    countable: bool = False
    request_id: str | None = None
    top_p: float = 1.0
    tally: int = 0


def read_request(body: bytes, limits: BudgetLimits, served: Collection[str] | None = None) -> tuple[bytes, Asked]:
    """The body to hand on, and what it asks for.

    ``served`` holds the model names without aliases, None if they are not known. A body that is no JSON object passes
    as it is, for vLLM to refuse. Raises :class:`Refusal` (400) for a bad object and for budgets that differ.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):  # vLLM says what is wrong with it
        return body, Asked()
    if not isinstance(request, dict):
        return body, Asked()
    refuse_crashing(body, request)
    asked, changed = _merge(request, limits, served)
    try:
        return (json.dumps(request).encode() if changed else body), asked
    except RecursionError:
        raise Refusal(400, None, f"the body is nested too deeply to be read with {OBJECT} in it") from None


def _merge(request: dict[str, Any], limits: BudgetLimits, served: Collection[str] | None) -> tuple[Asked, bool]:
    """Merge in place; also returns whether anything changed."""
    _refuse_near_miss(request)
    named: dict[str, object] = {}
    shares: dict[str, object] = {}
    model, alias = request.get("model"), _alias(request.get("model"), limits, served)
    changed = OBJECT in request or alias is not None
    if alias is not None:
        request["model"], named[f"model {shown(model)}"] = alias
    if OBJECT in request:
        given = parse_object(request.pop(OBJECT), limits)
        for key, into in (("token_budget", named), ("top_p", shares)):
            if key in given:
                into[f"{OBJECT}.{key}"] = given[key]
    xargs = request.get(XARGS)
    if isinstance(xargs, dict) and XARG in xargs:
        named[f"{XARGS}.{XARG}"] = _checked(limits.parse, xargs[XARG], f"{XARGS}.{XARG}")
    if isinstance(xargs, dict) and TOP_P_XARG in xargs:
        shares[f"{XARGS}.{TOP_P_XARG}"] = _checked(limits.parse_top_p, xargs[TOP_P_XARG], f"{XARGS}.{TOP_P_XARG}")
    budget, share = _agreed(named, "budget"), _agreed(shares, "top_p")
    top_p = limits.parse_top_p(share)
    tally = new_tally() if top_p < 1 else 0
    added = {XARG: budget, TOP_P_XARG: share, TALLY_XARG: tally or ABSENT}
    added = {key: value for key, value in added.items() if value is not ABSENT}
    # any other vllm_xargs is for vLLM to refuse
    if added and (xargs is None or isinstance(xargs, dict)):
        request[XARGS] = {**(xargs or {}), **added}
    one, several = _is_one_sequence(request), not _is_opaque(request)
    name = request.get("request_id")
    own_name = name if isinstance(name, str) else None
    served_model = model if alias is not None else None
    return Asked(budget, served_model, one, several, own_name, top_p, tally), changed or tally > 0


def parse_object(value: object, limits: BudgetLimits) -> dict[str, Any]:
    """The keys that a ``sparse_attention`` object sets, checked. Raises :class:`Refusal` naming field and range."""
    if not isinstance(value, dict):
        raise Refusal(400, OBJECT, f'{OBJECT}: expected an object like {{"token_budget": 1024}}, got {shown(value)}')
    known = list(SparseAttention.model_fields)
    for key in value:
        if key not in known:
            near = difflib.get_close_matches(key[:64], known, n=1, cutoff=0.0)[0]
            message = f"{OBJECT}: unknown key {shown(key)}; did you mean {near!r}? Known keys: {', '.join(known)}"
            raise Refusal(400, f"{OBJECT}.{key[:64]}", message)
    if "token_budget" in value:
        _checked(limits.parse, value["token_budget"], f"{OBJECT}.token_budget")
    if "top_p" in value:
        _checked(limits.parse_top_p, value["top_p"], f"{OBJECT}.top_p")
    try:
        return SparseAttention.model_validate(value).model_dump(exclude_unset=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join([OBJECT, *map(str, first["loc"])])
        raise Refusal(400, field, f"{field}: {first['msg']}, got {shown(first['input'])}") from None


def _checked(parse: Callable[[object, str], float], value: object, field: str) -> float:
    try:
        return parse(value, field)
    except QuestValueError as error:
        raise Refusal(400, field, str(error)) from None


def _refuse_near_miss(request: dict[str, Any]) -> None:
    """vLLM ignores unknown top-level fields: a misspelt object would be dropped in silence."""
    # a request has a few dozen fields; comparing a million hostile ones would hold up the event loop
    fields = [key for key in itertools.islice(request, 200) if key != OBJECT]
    for key in difflib.get_close_matches(OBJECT, fields, n=1, cutoff=0.85):
        raise Refusal(400, key, f"unknown field {shown(key)}; did you mean {OBJECT!r}?")


def _alias(model: object, limits: BudgetLimits, served: Collection[str] | None) -> tuple[str, int] | None:
    """``(served name, budget)`` of an aliased model name. A model served under that very name comes first."""
    if not isinstance(model, str) or (served is not None and model in served):
        return None
    name, colon, alias = model.rpartition(":")
    budget = dict(limits.config.aliases).get(alias)
    if not colon or budget is None or (served is not None and name not in served):
        return None
    return name, budget


def _agreed(named: Mapping[str, object], what: str) -> object:
    """The ``what`` that all sources name; ABSENT without any. Raises :class:`Refusal` where two differ."""
    first: object = ABSENT
    source = ""
    for field, value in named.items():
        if first is ABSENT:
            first, source = value, field
        elif type(value) is not type(first) or value != first:
            message = f"{field}: expected the same {what} as {source}, {shown(first)}, or none; got {shown(value)}"
            raise Refusal(400, field, message)
    return first


def _is_one_sequence(request: Mapping[str, Any]) -> bool:
    """Whether usage describes one generation: one prompt and one answer."""
    return not _is_opaque(request) and request.get("n") in (None, 1) and _num_prompts(request.get("prompt")) == 1


def _is_opaque(request: Mapping[str, Any]) -> bool:
    """Whether usage sums over generations that the reply does not tell apart.

    Beam search, prompts given as embeddings, batched chats, and tools that the server itself calls between turns.
    """
    messages, tools = request.get("messages"), request.get("tools")
    batched = isinstance(messages, list) and bool(messages) and isinstance(messages[0], list)
    clients_own = isinstance(tools, list) and all(isinstance(t, dict) and t.get("type") == "function" for t in tools)
    embeddings = request.get("prompt_embeds") is not None
    return bool(request.get("use_beam_search")) or embeddings or batched or not (tools is None or clients_own)


def _num_prompts(prompt: object) -> int:
    """How many prompts a completion has; a chat has one. A list of integers is one prompt of token ids."""
    if not isinstance(prompt, list) or not prompt or isinstance(prompt[0], int):
        return 1
    return len(prompt)
