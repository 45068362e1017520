"""What a request says about sparse attention, merged into the one place that vLLM carries to the worker.

Three ways to name a budget: ``"sparse_attention": {"token_budget": 1024}``, ``"vllm_xargs": {"quest_token_budget":
1024}``, and a model name that ends in an alias. They may agree, they may not differ; ``top_p`` and ``policy`` have the
first two. The body is rewritten only where the object or an alias is in it, or a top_p below 1 in force: the worker
then counts under a number that goes along. ``vllm_xargs`` is checked here too, although our logits processor does it
again: vLLM types its values as str, int, float or list, so it would turn ``false`` into 0 (dense!), ``true`` into 1,
and answer ``null`` without naming the range; and some of its routes log a traceback for every value refused so late.
"""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from quest_vllm.budget import ABSENT, POLICY_XARG, TOP_P_XARG, XARG, BudgetLimits, check_together, shown
from quest_vllm.config import TWO_STAGE, WINDOW
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
    policy: str = Field(
        default_factory=str,
        description=(
            'How a decode step chooses its pages: "window", the first and the newest whatever the query; "two_stage", '
            "by their keys where their scores leave it open; or how the scores of the query heads that share a KV head "
            "are joined. Without it, the server's own. GET /v1/sparse_attention lists the legal names."
        ),
        examples=[TWO_STAGE, WINDOW],
    )


@dataclass(frozen=True)
class Setting:
    """What a request may set: ``key`` in the object, ``xarg`` in ``vllm_xargs``, both checked by ``parse``."""

    key: str
    xarg: str
    what: str  # its name in messages
    parse: Callable[[BudgetLimits, object, str], object]  # limits, value, field


BUDGET = Setting("token_budget", XARG, "budget", BudgetLimits.parse)
TOP_P = Setting("top_p", TOP_P_XARG, "top_p", BudgetLimits.parse_top_p)
POLICY = Setting("policy", POLICY_XARG, "policy", BudgetLimits.parse_policy)
SETTINGS = (BUDGET, TOP_P, POLICY)


@dataclass(frozen=True)
class Asked:
    """What was found in a request's body.

    ``budget``: a legal budget in tokens, :data:`~quest_vllm.budget.ABSENT` if none is named. ``model``: the aliased
    name to answer with, or None.
    ``one_sequence``: one prompt, one answer, one generation. ``countable``: whether several sequences can be told apart
    by the token ids of their choices. ``request_id``: the body's own name for the request, or None. ``top_p`` and
    ``policy`` are those in force; ``tally``: the number under which the worker counts where top_p is below 1; 0: none.
    """

    budget: object = ABSENT
    model: str | None = None
    one_sequence: bool = False
    countable: bool = False
    request_id: str | None = None
    top_p: float = 1.0
    policy: str = ""
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
    model, alias = request.get("model"), _alias(request.get("model"), limits, served)
    changed = OBJECT in request or alias is not None
    given = parse_object(request.pop(OBJECT), limits) if OBJECT in request else {}
    xargs = request.get(XARGS)
    named = {setting: _named(setting, given, xargs, limits) for setting in SETTINGS}
    if alias is not None:
        request["model"], budget = alias
        named[BUDGET] = {f"model {shown(model)}": budget, **named[BUDGET]}
    agreed = {setting: _agreed(values, setting.what) for setting, values in named.items()}
    policy = limits.parse_policy(agreed[POLICY])
    for field, share in named[TOP_P].items():
        _checked(partial(check_together, policy), share, field)
    top_p = 1.0 if policy == WINDOW else limits.parse_top_p(agreed[TOP_P])
    tally = new_tally() if top_p < 1 else 0
    added = {setting.xarg: value for setting, value in agreed.items()} | {TALLY_XARG: tally or ABSENT}
    added = {key: value for key, value in added.items() if value is not ABSENT}
    # any other vllm_xargs is for vLLM to refuse
    if added and (xargs is None or isinstance(xargs, dict)):
        request[XARGS] = {**(xargs or {}), **added}
    name = request.get("request_id")
    asked = Asked(
        budget=agreed[BUDGET],
        model=model if alias is not None else None,
        one_sequence=_is_one_sequence(request),
        countable=not _is_opaque(request),
        request_id=name if isinstance(name, str) else None,
        top_p=top_p,
        policy=policy,
        tally=tally,
    )
    return asked, changed or tally > 0


def _named(setting: Setting, given: Mapping[str, Any], xargs: object, limits: BudgetLimits) -> dict[str, object]:
    """What the object and ``vllm_xargs`` name, checked, by field. Raises :class:`Refusal` for a bad value."""
    values: dict[str, object] = {}
    if setting.key in given:
        values[f"{OBJECT}.{setting.key}"] = given[setting.key]
    if isinstance(xargs, dict) and setting.xarg in xargs:
        field = f"{XARGS}.{setting.xarg}"
        values[field] = _checked(partial(setting.parse, limits), xargs[setting.xarg], field)
    return values


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
    for setting in SETTINGS:
        if setting.key in value:
            _checked(partial(setting.parse, limits), value[setting.key], f"{OBJECT}.{setting.key}")
    try:
        return SparseAttention.model_validate(value).model_dump(exclude_unset=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join([OBJECT, *map(str, first["loc"])])
        raise Refusal(400, field, f"{field}: {first['msg']}, got {shown(first['input'])}") from None


def _checked(check: Callable[[Any, str], object], value: object, field: str) -> object:
    try:
        return check(value, field)
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
