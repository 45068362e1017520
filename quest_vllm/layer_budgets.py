"""Page budgets of rows by layer, for steps: :mod:`quest_vllm.layer_shares` on arrays. Knows nothing of vLLM."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np

from quest_vllm.config import QuestConfig
from quest_vllm.layer_shares import shares_in_force, spread
from quest_vllm.metadata import IntArray


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


@functools.lru_cache(64)
def layer_budgets(config: QuestConfig, layers: tuple[int, ...] | None = None) -> LayerBudgets | None:
    """What ``config`` asks for in ``layers`` (None: all that have a share); None where all have the plain budget."""
    shares = shares_in_force(config)
    return LayerBudgets(shares, config.sink_pages + config.recent_pages, layers) if shares else None
