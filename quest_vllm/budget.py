"""Per-request settings: what a request may ask for, and which token budget, top_p and policy each batch slot has.

Knows nothing of vLLM: :mod:`quest_vllm.budget_tap` feeds it, the metadata builders read it.
"""

from __future__ import annotations

import logging
import reprlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from quest_vllm.config import MASS_POLICIES, MAX_TOKEN_BUDGET, POLICIES, TWO_STAGE, WINDOW, QuestConfig, load_config
from quest_vllm.errors import QuestConfigError, QuestValueError

logger = logging.getLogger("vllm.quest_vllm")

XARG = "quest_token_budget"
"""Key of a request's budget in ``vllm_xargs`` (HTTP) and ``SamplingParams.extra_args`` (Python)."""
TOP_P_XARG = "quest_top_p"
"""Key of a request's share of its budget's mass, beside :data:`XARG`."""
POLICY_XARG = "quest_policy"
"""Key of the policy that chooses a request's pages, beside :data:`XARG`."""


class _Absent:
    """Stands for "the request named no budget"; None is a value, and a bad one."""

    def __repr__(self) -> str:
        return "ABSENT"


ABSENT = _Absent()


def parse_token_budget(
    value: object, *, minimum: int, maximum: int, default: int, field: str = XARG, dense: bool = True
) -> int:
    """The budget that a request asked for, in tokens; 0 is dense.

    ``value`` is :data:`ABSENT` (gives ``default``), 0 (where ``dense`` is allowed), or an int in [``minimum``,
    ``maximum``]. Anything else, bools, numeric strings and whole floats included, raises :class:`QuestValueError`
    naming ``field``, range and value.
    """
    if value is ABSENT:
        return default
    if (
        isinstance(value, int)
        and not isinstance(value, bool)
        and (minimum <= value <= maximum or (value == 0 and dense))
    ):
        return value
    legal = f"an integer from {minimum} to {maximum} (tokens)" if minimum <= maximum else f"only 0 at {maximum} tokens"
    raise QuestValueError(f"{field}: expected {'0 (dense) or ' if dense else ''}{legal}, got {shown(value)}")


def parse_top_p(value: object, *, default: float, field: str = TOP_P_XARG) -> float:
    """The share of its budget's mass that a request asked for: :data:`ABSENT` gives ``default``.

    Anything but a number above 0, up to 1, raises :class:`QuestValueError` naming ``field``, range and value.
    """
    if value is ABSENT:
        return default
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1:  # NaN is in no range
        return float(value)
    raise QuestValueError(f"{field}: expected a number above 0, up to 1, got {shown(value)}")


def parse_policy(value: object, *, config: QuestConfig, field: str = POLICY_XARG) -> str:
    """The policy that a request asked for: :data:`ABSENT` gives the server's own.

    Anything but one of ``config.policies`` raises :class:`QuestValueError` naming ``field``, those and the value.
    """
    legal = config.policies
    if value is ABSENT:
        return config.own_policy
    if isinstance(value, str) and value in legal:
        return value
    why = ""
    if value == TWO_STAGE and config.group_reduction == "mass":
        why = f" (this server has page_summary {config.page_summary}; that policy needs key_codes)"
    elif value in MASS_POLICIES:
        why = f" (this server has group_reduction {config.group_reduction}; others need mass)"
    raise QuestValueError(f"{field}: expected one of {', '.join(map(repr, legal))}, got {shown(value)}{why}")


def check_together(policy: str, top_p: float, field: str = TOP_P_XARG) -> None:
    """Raise :class:`QuestValueError` for a ``top_p`` that a request asked for, below 1, beside the policy "window"."""
    if policy == WINDOW and top_p < 1:
        raise QuestValueError(f"{field}: expected 1 or none with policy {WINDOW!r}, got {top_p:g}: it scores no page")


def shown(value: object) -> str:
    """``value`` for an error message: its repr, cut to 80 characters, whatever its size or depth."""
    text = _REPR.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = 80


def clamp_token_budget(value: object, *, minimum: int, default: int) -> int:
    """As :func:`parse_token_budget`, for a worker: never raises. ``value`` may have skipped validation.

    An int below 0 is dense, one below ``minimum`` is raised to it, one beyond int32 is lowered; what is no int gets
    ``default``.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        return default
    return 0 if value <= 0 else min(max(value, minimum), MAX_TOKEN_BUDGET)


def clamp_top_p(value: object, *, default: float) -> float:
    """As :func:`parse_top_p`, for a worker: what is no legal number gets ``default``."""
    try:
        return parse_top_p(value, default=default)
    except QuestValueError:
        return default


def clamp_policy(value: object, *, config: QuestConfig) -> int:
    """As :func:`parse_policy`, for a worker with a resolved ``config``: a place in ``POLICIES``.

    Never raises. What is not legal here is logged, and the server's own taken: HTTP refuses it, but an offline ``LLM``
    does not know what the worker resolves "auto" to.
    """
    try:
        return POLICIES.index(parse_policy(value, config=config))
    except QuestValueError as error:
        logger.warning("quest_vllm: %s; the request is served with %r", error, config.own_policy)
        return POLICIES.index(config.own_policy)


@dataclass(frozen=True)
class BudgetLimits:
    """The range that this process validates against: ``config``'s minimum to ``max_model_len`` tokens."""

    config: QuestConfig
    max_model_len: int

    def parse(self, value: object, field: str = XARG) -> int:
        """:func:`parse_token_budget` with these limits, then the operator's own (min_budget, max_budget, override)."""
        config = self.config
        if value is ABSENT:
            return config.token_budget
        if type(value) is int and value in self.presets:
            return value
        if not config.allow_override:
            presets = " or ".join(map(str, self.presets))
            raise QuestValueError(
                f"{field}: this server lets no request override its budget (allow_override is false): "
                f"expected nothing or {presets}, got {shown(value)}"
            )
        try:
            return parse_token_budget(
                value,
                minimum=self.smallest,
                maximum=self.largest,
                default=config.token_budget,
                field=field,
                dense=config.broken_limit(0) is None,
            )
        except QuestValueError as error:
            limit = config.broken_limit(value) if type(value) is int else None
            raise (QuestValueError(f"{error}; {limit}") if limit else error) from None

    def parse_top_p(self, value: object, field: str = TOP_P_XARG) -> float:
        """:func:`parse_top_p`, then what the server allows."""
        default = self.config.top_p
        top_p = parse_top_p(value, default=default, field=field)
        if top_p != default and not self.config.allow_override:
            raise QuestValueError(
                f"{field}: this server lets no request override its budget (allow_override is false): "
                f"expected nothing or {default:g}, got {shown(value)}"
            )
        return top_p

    def parse_policy(self, value: object, field: str = POLICY_XARG) -> str:
        """:func:`parse_policy`, then what the server allows."""
        own = self.config.own_policy
        policy = parse_policy(value, config=self.config, field=field)
        if policy != own and not self.config.allow_override:
            raise QuestValueError(
                f"{field}: this server lets no request override its policy (allow_override is false): "
                f"expected nothing or {own!r}, got {shown(value)}"
            )
        return policy

    @property
    def presets(self) -> tuple[int, ...]:
        """Budgets that every request may name: the default and the aliases'."""
        return tuple(dict.fromkeys((self.config.token_budget, *dict(self.config.aliases).values())))

    @property
    def smallest(self) -> int:
        """The smallest budget but 0 that a request may name, in tokens."""
        return max(self.config.min_token_budget, self.config.min_budget)

    @property
    def largest(self) -> int:
        """The largest budget that a request may name, in tokens."""
        limit = self.config.max_budget
        return self.max_model_len if limit is None else min(limit, self.max_model_len)


_limits: BudgetLimits | None = None


def set_budget_limits(config: QuestConfig, max_model_len: int) -> None:
    """Say what this process validates against. Called where a VllmConfig is first at hand (stat logger, worker).

    Raises :class:`~quest_vllm.errors.QuestConfigError` for an alias beyond ``max_model_len``.
    """
    global _limits
    for name, budget in config.aliases:
        if budget > max_model_len:
            raise QuestConfigError(f"aliases: {name}: expected at most max_model_len {max_model_len}, got {budget}")
    _limits = BudgetLimits(config, max_model_len)


def get_budget_limits() -> BudgetLimits:
    """The limits of this process.

    Before :func:`set_budget_limits` (offline ``LLM``: nothing hands a plugin the VllmConfig in that process), those of
    files and environment, with int32's end for max_model_len; the worker clamps.
    """
    if _limits is None:
        return BudgetLimits(load_config(None).resolved(), MAX_TOKEN_BUDGET)
    return _limits


class BudgetTable:
    """Token budget, or another number, of each batch slot. Grows on demand, one per process.

    A slot is vLLM's persistent batch row (model runner V1) or request state index (V2). An empty slot reads ``empty``:
    the budget 0, which is dense. Values are int32, or ``dtype``.
    """

    def __init__(self, capacity: int = 256, empty: float = 0, dtype: type[np.generic] = np.int32) -> None:
        self._empty = np.array(empty, dtype=dtype)
        self._budgets: npt.NDArray[Any] = np.full(max(1, capacity), empty, dtype=dtype)

    def set(self, slot: int, budget: float) -> None:
        """Give ``slot`` a budget in tokens (0: dense), whatever it held before."""
        self._reserve(slot)
        self._budgets[slot] = budget

    def clear(self, slot: int) -> None:
        """Empty ``slot``."""
        if slot < len(self._budgets):
            self._budgets[slot] = self._empty

    def move(self, source: int, target: int) -> None:
        """Move ``source``'s budget to ``target`` and empty ``source``."""
        if source != target:
            self._reserve(max(source, target))
            self._budgets[target] = self._budgets[source]
            self._budgets[source] = self._empty

    def swap(self, first: int, second: int) -> None:
        """Exchange two slots' budgets."""
        self._reserve(max(first, second))
        budgets = self._budgets
        budgets[[first, second]] = budgets[[second, first]]

    def rows(self, num_reqs: int, req_idx: npt.NDArray[np.integer] | None = None) -> npt.NDArray[Any]:
        """Budgets of a batch's rows, ``[num_reqs]``, a copy; 0 is dense.

        ``req_idx`` ``[>= num_reqs]``: the slot of each row (negative: no request, empty); None: row r is slot r.
        """
        if req_idx is None:
            self._reserve(num_reqs - 1)
            return self._budgets[:num_reqs].copy()
        slots = np.asarray(req_idx[:num_reqs])
        if not len(slots):
            return self._budgets[:0].copy()
        self._reserve(int(slots.max()))
        return np.where(slots >= 0, self._budgets[np.maximum(slots, 0)], self._empty)

    def _reserve(self, slot: int) -> None:
        if slot >= len(self._budgets):
            grown = np.full(max(slot + 1, 2 * len(self._budgets)), self._empty)
            grown[: len(self._budgets)] = self._budgets
            self._budgets = grown


_table = BudgetTable()
_top_ps = BudgetTable(empty=1.0, dtype=np.float32)
_policies = BudgetTable()


def get_budget_table() -> BudgetTable:
    """This process's table."""
    return _table


def get_top_p_table() -> BudgetTable:
    """This process's table of top_p, float32; an empty slot reads 1: the whole budget."""
    return _top_ps


def get_policy_table() -> BudgetTable:
    """This process's table of policies: places in :data:`~quest_vllm.config.POLICIES`; no matter in an empty slot."""
    return _policies
