"""How a budget is spread over the sparse layers: the same pages in all, more of them where a layer needs more.

``layer_shares`` (configuration) holds a share for each sparse layer. Every layer gets the forced pages; what a budget
has beyond them, times the number of layers, goes to the layers in proportion. Knows nothing of vLLM.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np

from quest_vllm.config import QuestConfig
from quest_vllm.metadata import IntArray


def spread(shares: Sequence[float], pages: int, least: int) -> list[int]:
    """Page budgets of ``len(shares)`` layers: ``pages`` each on average, exactly, and ``least`` or more in every one.

    Beyond ``least`` in proportion to ``shares``, each 0 or more; all 0: alike. Where that is no whole number, it is
    rounded by largest remainder, in favour of lower layers. Raises ``ValueError`` where ``pages`` is below ``least``.
    """
    if pages < least:
        raise ValueError(f"pages: expected at least {least}, got {pages}")
    free, total = len(shares) * (pages - least), sum(shares)
    exact = [free * (share / total) for share in shares] if total else [free / len(shares)] * len(shares)
    whole = [int(part) for part in exact]
    by_rest = sorted(range(len(shares)), key=lambda layer: whole[layer] - exact[layer])
    for layer in by_rest[: free - sum(whole)]:
        whole[layer] += 1
    return [least + part for part in whole]


class LayerBudgets:
    """Page budgets of some layers of a model, for every page budget that a row may have.

    ``layers``: decoder layer indices, in the order of the results' first axis.
    """

    def __init__(self, shares: Mapping[int, float], forced: int, layers: Sequence[int] | None = None) -> None:
        """``shares`` of all sparse layers of the model, of which these are ``layers`` (None: all, ascending).

        ``forced``: pages that every layer selects. Raises ``KeyError`` for a layer without a share.
        """
        every = sorted(shares)
        self.layers = tuple(every if layers is None else layers)
        self.slots = {layer: slot for slot, layer in enumerate(self.layers)}
        self._shares, self._forced = [shares[layer] for layer in every], forced
        places = {layer: place for place, layer in enumerate(every)}
        self._columns = np.array([places[layer] for layer in self.layers], dtype=np.intp)
        self._pages = functools.lru_cache(4096)(self._spread)

    def pages(self, page_budget: int) -> IntArray:
        """``[num_layers]`` page budgets of a row with ``page_budget``; below the forced pages: as with those."""
        return self._pages(max(page_budget, self._forced))

    def _spread(self, page_budget: int) -> IntArray:
        every = np.array(spread(self._shares, page_budget, self._forced), dtype=np.int64)
        return np.minimum(every, np.iinfo(np.int32).max).astype(np.int32)[self._columns]

    def rows(self, page_budgets: IntArray, num_pages: IntArray) -> IntArray:
        """``[num_layers, num_rows]`` page budgets, never more than a row has pages; both arguments ``[num_rows]``.

        A row whose budget covers its context gets all of its pages in every layer.
        """
        if not len(page_budgets):
            return np.zeros((len(self.layers), 0), dtype=np.int32)
        different, which = np.unique(page_budgets, return_inverse=True)
        table = np.stack([self.pages(int(budget)) for budget in different], axis=1)
        spent = np.minimum(table[:, which], num_pages)
        return np.where(page_budgets >= num_pages, num_pages, spent)


def misplaced_shares(config: QuestConfig, sparse: set[int], windowed: set[int], num_layers: int) -> str | None:
    """What layer_shares get wrong, in words; None: they name every sparse layer, and no others.

    ``sparse`` and ``windowed``: those layers of a model with ``num_layers``, or of a part of it. Layers in
    ``dense_layers`` may be named: calibrated shares outlive an operator's choice of those.
    """
    shares = {layer for layer, _ in config.layer_shares}
    for what, which in (
        ("no share for the sparse layers", sparse - shares),
        ("shares for layers with a sliding window", shares & windowed),
        (f"shares for layers beyond the model's {num_layers}", {layer for layer in shares if layer >= num_layers}),
    ):
        if shares and which:
            return f"layer_shares: expected one for each layer that selects pages, got {what} {sorted(which)}"
    return None


@functools.lru_cache(64)
def layer_budgets(config: QuestConfig, layers: tuple[int, ...] | None = None) -> LayerBudgets | None:
    """What ``config`` asks for in ``layers`` (None: all that have a share); None where all have the plain budget."""
    shares = {layer: share for layer, share in config.layer_shares if layer not in config.dense_layers}
    return LayerBudgets(shares, config.sink_pages + config.recent_pages, layers) if shares else None
