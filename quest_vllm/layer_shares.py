"""How a budget is spread over the sparse layers: the same pages in all, more of them where a layer needs more.

``layer_shares`` (configuration) holds a share for each sparse layer. Every layer gets the forced pages; what a budget
has beyond them, times the number of layers, goes to the layers in proportion. Imports neither NumPy nor vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence

from quest_vllm.config import QuestConfig


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


def shares_in_force(config: QuestConfig) -> dict[int, float]:
    """The share of each layer that has one and is not in ``dense_layers``; {} where all have the plain budget."""
    return {layer: share for layer, share in config.layer_shares if layer not in config.dense_layers}


def layer_pages(config: QuestConfig, page_budget: int, num_pages: int) -> list[int]:
    """Pages that each sparse layer takes of a row with ``page_budget`` below ``num_pages``; all alike: one entry."""
    shares = shares_in_force(config)
    if not shares:
        return [page_budget]
    pages = spread(list(shares.values()), page_budget, config.sink_pages + config.recent_pages)
    return [min(own, num_pages) for own in pages]


def misplaced_shares(config: QuestConfig, sparse: set[int], windowed: set[int], num_layers: int) -> str | None:
    """What layer_shares get wrong, in words; None: they name every sparse layer, and no others.

    ``sparse`` and ``windowed``: those layers of a model with ``num_layers``, or of a part of it. Layers in
    ``dense_layers`` may be named: calibrated shares outlive an operator's choice of those.
    """
    shares = {layer for layer, _ in config.layer_shares}
    if not shares:
        return None
    for what, which in (
        ("no share for the sparse layers", sparse - shares),
        ("shares for layers with a sliding window", shares & windowed),
        (f"shares for layers beyond the model's {num_layers}", {layer for layer in shares if layer >= num_layers}),
    ):
        if which:
            return f"layer_shares: expected one for each layer that selects pages, got {what} {sorted(which)}"
    return None
