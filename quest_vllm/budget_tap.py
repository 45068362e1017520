"""The logits processor that carries each request's budget, top_p and policy into the worker, and changes no logits.

Entry point ``vllm.logits_processors``: vLLM validates a request's parameters with it in the API process, and tells it
in the worker which request has which batch slot. One class serves both model runners: V1 calls ``update_state`` in
every step in which the batch changed (also for an all-greedy batch: argmax-invariant processors are skipped in
sampling, not in bookkeeping) before the attention metadata is built; V2 calls ``add_request``. V2's call of ``apply``
comes right behind a forward pass: the moment to fetch what adaptive rows took (:mod:`quest_vllm.reached`).

Limits: V1 drops entry-point processors under speculative decoding (:mod:`quest_vllm.worker_cpu` puts this one back);
V2 with pipeline parallelism calls them on the last rank only. What remains is refused at start-up
(:func:`quest_vllm.layers.refuse_engine_features`). Rows without a recorded budget run dense.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from quest_vllm.budget import (
    ABSENT,
    POLICY_XARG,
    TOP_P_XARG,
    XARG,
    BudgetTable,
    check_together,
    clamp_policy,
    clamp_token_budget,
    clamp_top_p,
    get_budget_limits,
    get_budget_table,
    get_policy_table,
    get_top_p_table,
    set_budget_limits,
)
from quest_vllm.compat_logits import MoveDirectionality, V1LogitsProcessor, V2LogitsProcessor
from quest_vllm.config import POLICIES, WINDOW
from quest_vllm.page.trace import get_trace_table, trace_number
from quest_vllm.reached import collect_reached, counts_on_device
from quest_vllm.runtime import config_of
from quest_vllm.tally import get_tally_table, tally_number

if TYPE_CHECKING:
    import torch

    from quest_vllm.compat_logits import BatchUpdate

WINDOW_CODE = POLICIES.index(WINDOW)


def requested(sampling_params: Any, xarg: str) -> object:
    """What ``sampling_params`` asks for, unchecked; :data:`~quest_vllm.budget.ABSENT` without the key."""
    extra = getattr(sampling_params, "extra_args", None)
    return extra.get(xarg, ABSENT) if extra else ABSENT


def requested_budget(sampling_params: Any) -> object:
    """The token budget that ``sampling_params`` asks for, as :func:`requested`."""
    return requested(sampling_params, XARG)


class QuestBudgetTap(V1LogitsProcessor, V2LogitsProcessor):
    """Keeps this process's :class:`~quest_vllm.budget.BudgetTable` in step with the batch."""

    def __init__(self, vllm_config: Any, *_: Any) -> None:
        """Called as ``(vllm_config, device, is_pin_memory)`` by V1 and ``(vllm_config, req_states)`` by V2."""
        self._config = config_of(vllm_config)
        set_budget_limits(self._config, vllm_config.model_config.max_model_len)
        self._table = get_budget_table()
        self._traces = get_trace_table()

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raise :class:`~quest_vllm.errors.QuestValueError` for a bad budget, top_p or policy: HTTP 400."""
        budget, limits = requested_budget(sampling_params), get_budget_limits()
        if budget is not ABSENT:
            limits.parse(budget)
        top_p, policy = requested(sampling_params, TOP_P_XARG), requested(sampling_params, POLICY_XARG)
        in_force = limits.parse_policy(policy)
        if top_p is not ABSENT:
            check_together(in_force, limits.parse_top_p(top_p))

    def is_argmax_invariant(self) -> bool:
        """True: V1 then skips :meth:`apply` for greedy batches."""
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """V1: apply one step's removed, added and moved rows, in that order."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            for table in self._tables():
                table.clear(row)
        for row, params, *_ in batch_update.added:
            self._set(row, params)
        for first, second, direction in batch_update.moved:
            for table in self._tables():
                (table.swap if direction == MoveDirectionality.SWAP else table.move)(first, second)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """V2: a request takes slot ``req_idx``. Whether its steps call :meth:`apply`: where a GPU counts for them."""
        self._set(req_idx, sampling_params)
        return counts_on_device() and bool(get_top_p_table().rows(1, np.array([req_idx]))[0] < 1)

    def apply(self, logits: torch.Tensor, *_: Any) -> torch.Tensor:
        """``logits``, untouched."""
        collect_reached()
        return logits

    def _tables(self) -> tuple[BudgetTable, ...]:
        return self._table, get_top_p_table(), get_policy_table(), self._traces, get_tally_table()

    def _set(self, slot: int, sampling_params: Any) -> None:
        extra = getattr(sampling_params, "extra_args", None)
        self._table.set(slot, self._budget(sampling_params))
        policy = clamp_policy(requested(sampling_params, POLICY_XARG), config=self._config)
        get_policy_table().set(slot, policy)
        # a window scores no page: the server's top_p, and one that skipped validation, have nothing to go by
        share = 1.0 if policy == WINDOW_CODE else requested(sampling_params, TOP_P_XARG)
        get_top_p_table().set(slot, clamp_top_p(share, default=self._config.top_p))
        self._traces.set(slot, trace_number(extra))
        get_tally_table().set(slot, tally_number(extra))

    def _budget(self, sampling_params: Any) -> int:
        budget = requested_budget(sampling_params)
        config = self._config
        if budget is ABSENT:
            return config.token_budget
        return clamp_token_budget(budget, minimum=config.min_token_budget, default=config.token_budget)
