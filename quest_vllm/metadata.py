"""Which rows of a step are sparse, and what that saves. Host arithmetic on numpy arrays; no device, no vLLM.

A row is one decode token of a request, or one prefill chunk (:mod:`quest_vllm.token_rows`). Every dense row has a
reason, and every reason is counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quest_vllm.config import POLICIES, TWO_STAGE, WINDOW, QuestConfig

IntArray = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class RowClasses:
    """The rows of one step, each in exactly one class.

    ``page_budgets`` and ``num_pages`` are ``[num_rows]``; a sparse row's page budget is below its number of pages, an
    adaptive one's at most that. The masks are ``[num_rows]`` bool. ``adaptive`` are sparse rows with a top_p below 1:
    what they read is known once their pages are chosen. ``windows`` are sparse rows with the policy "window": they read
    no page summary. ``two_stage`` are those with that policy: they read the keys of a shortlist, too. ``forced`` is how
    many pages a row takes whatever they score.
    """

    sparse: BoolArray
    page_budgets: IntArray
    num_pages: IntArray
    dense_reasons: dict[str, BoolArray]
    adaptive: BoolArray
    windows: BoolArray
    two_stage: BoolArray
    forced: int

    def counts(self) -> Iterator[tuple[str, str, int]]:
        """Yield ``(path, reason, rows)`` for every class that has a row."""
        sparse = {
            "budget": self.sparse & ~self.windows & ~self.two_stage,
            WINDOW: self.windows,
            TWO_STAGE: self.two_stage,
        }
        for path, reasons in (("sparse", sparse), ("dense", self.dense_reasons)):
            for reason, rows in reasons.items():
                if rows.any():
                    yield path, reason, int(rows.sum())


def classify_rows(
    query_lens: IntArray,
    seq_lens: IntArray,
    is_prefilling: BoolArray,
    token_budgets: IntArray,
    config: QuestConfig,
    top_ps: FloatArray | None = None,
    policies: IntArray | None = None,
) -> RowClasses:
    """Sort the rows of a step. All arguments are ``[num_rows]``; a token budget of 0 means dense.

    A decode row has one query token: requests with several are cut into rows first. ``top_ps`` None: 1, no row adapts.
    Below it a row with a budget is sparse even where the budget covers the context, unless the forced pages do.
    ``policies``: places in :data:`~quest_vllm.config.POLICIES`; None: the server's own in every row.

    A budget below the forced pages is raised to them here: the API refuses it, but a worker never fails on it.
    """
    page_size = config.page_size
    num_pages = (seq_lens + (page_size - 1)) // page_size
    page_budgets = -(-np.maximum(token_budgets, config.min_token_budget) // page_size)  # up to int32's end
    chunk = query_lens > 0
    decode = chunk & ~is_prefilling
    budgeted = decode & (token_budgets > 0)
    if top_ps is None:
        adaptive = np.zeros_like(decode)
        covered = page_budgets >= num_pages
    else:
        adaptive = budgeted & (top_ps < 1) & (num_pages > config.sink_pages + config.recent_pages)
        page_budgets = np.where(adaptive, np.minimum(page_budgets, num_pages), page_budgets)
        covered = (page_budgets >= num_pages) & ~adaptive
    sparse = budgeted & ~covered

    def with_policy(policy: str) -> BoolArray:
        own = np.bool_(config.own_policy == policy)
        return sparse & (own if policies is None else policies == POLICIES.index(policy))

    return RowClasses(
        sparse=sparse,
        page_budgets=page_budgets.astype(np.int32, copy=False),
        num_pages=num_pages.astype(np.int32, copy=False),
        dense_reasons={
            "prefill": chunk & is_prefilling,
            "no_budget": decode & ~budgeted,
            "budget_covers_context": budgeted & covered,
        },
        adaptive=adaptive,
        windows=with_policy(WINDOW),
        two_stage=with_policy(TWO_STAGE),
        forced=config.sink_pages + config.recent_pages,
    )


@dataclass(frozen=True)
class StepTraffic:
    """Pages and KV bytes of the decode rows of one step but its adaptive ones, in one KV head, summed over layers.

    ``pages_*`` and ``tokens_*`` count the sparse rows only, ``summaries_read`` those that score their pages, and
    ``keys_listed`` the keys of shortlists; ``vectors_*`` are K+V pairs of ``head_dim`` elements (a page summary is as
    large as one such pair, a key half of one) over all decode rows. Dense attention reads a request's context once for
    all of its query tokens, a sparse row reads its own pages.
    """

    pages_selected: int
    pages_available: int
    summaries_read: int
    tokens_attended: int
    tokens_available: int
    keys_listed: int
    vectors_read: float
    vectors_dense: int


def measure_traffic(
    rows: RowClasses,
    seq_lens: IntArray,
    page_size: int,
    requests: npt.NDArray[np.intp] | None = None,
    layer_pages: IntArray | None = None,
) -> StepTraffic:
    """Count what the step's decode rows read: DESIGN's byte model, exact to the last partial page.

    ``requests`` ``[num_rows]``, ascending: each row's request; None: every row has its own. ``layer_pages``
    ``[num_layers, num_rows]``: page budgets of each layer, up to ``num_pages``; None: the rows' own, in one layer.
    """
    sparse = rows.sparse & ~rows.adaptive
    dense = rows.dense_reasons["budget_covers_context"] | rows.dense_reasons["no_budget"]
    layer_pages = rows.page_budgets[None] if layer_pages is None else layer_pages
    num_layers, selected = len(layer_pages), int(layer_pages[:, sparse].sum(dtype=np.int64))
    available = num_layers * int(rows.num_pages[sparse].sum(dtype=np.int64))
    scored = num_layers * int(rows.num_pages[sparse & ~rows.windows].sum(dtype=np.int64))
    lengths = num_layers * int(seq_lens[sparse].sum(dtype=np.int64))
    # the newest page is always selected, and it alone may be partial
    attended = selected * page_size - (available * page_size - lengths)
    listing = sparse & rows.two_stage
    listed = page_size * int(pages_listed(layer_pages[:, listing], rows.num_pages[listing], rows.forced).sum())
    dense_read = num_layers * int(seq_lens[_last(dense, requests)].sum(dtype=np.int64))
    return StepTraffic(
        pages_selected=selected,
        pages_available=available,
        summaries_read=scored,
        tokens_attended=attended,
        tokens_available=lengths,
        keys_listed=listed,
        vectors_read=attended + scored + listed / 2 + dense_read,
        vectors_dense=num_layers * int(seq_lens[_last(sparse | dense, requests)].sum(dtype=np.int64)),
    )


def pages_listed(page_budgets: IntArray, num_pages: IntArray, forced: int) -> npt.NDArray[np.int64]:
    """How many pages are on the shortlists of two-stage rows, in one KV head and ``page_budgets``' shape.

    ``page_budgets`` is ``[..., num_rows]``, ``num_pages`` ``[num_rows]``. None of them is the newest, so all are full;
    see :func:`quest_vllm.ops.reference.shortlist_pages`.
    """
    take = np.minimum(page_budgets, num_pages).astype(np.int64)
    listed = np.minimum(take + (take + 1) // 2, num_pages) - np.maximum(take // 2, forced)
    return np.where((take > forced) & (take < num_pages), listed, 0)


def _last(rows: BoolArray, requests: npt.NDArray[np.intp] | None) -> npt.NDArray[np.intp]:
    """Indices of the last of each request's ``rows``: the one with the longest context."""
    index = np.flatnonzero(rows)
    if requests is None or not index.size:
        return index
    owner = requests[index]
    return index[np.append(owner[1:] != owner[:-1], True)]
