"""KL to dense of any set of sparse layers, by a vLLM engine: what :mod:`quest_vllm.eval.calibrate` chooses with."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quest_vllm import compat
from quest_vllm.eval.calibrate import LayerKl, OpenProbe, Shares
from quest_vllm.eval.distributions import kl_by_record, new_record
from quest_vllm.eval.engine_runner import read_contexts, request
from quest_vllm.eval.plan import DECODE, DENSE, Unit
from quest_vllm.eval.prompts import Item
from quest_vllm.eval.text import TEXT
from quest_vllm.layer_budgets import layer_budgets
from quest_vllm.layers import has_window


def set_sparse_layers(worker: Any, layers: Sequence[int], shares: Shares | None = None) -> list[int]:
    """Let ``layers`` alone select pages from the next step on; returns every layer that could (no sliding window).

    ``shares`` of these layers spread budgets over them; None: alike. For an eager engine without dense_layers: a
    captured graph keeps the layers of its capture. Run it by ``llm.collective_rpc``.
    """
    able = []
    for name, layer in compat.cached_layers(worker).items():
        index = compat.layer_index(name)
        if not has_window(layer.impl):
            able.append(index)
            layer.impl._sparse_layer = index in layers
    for builder in compat.metadata_builders(worker):
        config = replace(builder.config, dense_layers=(), layer_shares=tuple((shares or {}).items()))
        builder.spread_budgets(layer_budgets(config))
    return sorted(able)


def engine_probes(engine: Any) -> OpenProbe:
    """Probes of a vLLM engine that runs eagerly; windows are :class:`~quest_vllm.eval.prompts.Item`."""

    @contextlib.contextmanager
    def opened(windows: Sequence[Item]) -> Iterator[LayerKl]:
        with tempfile.TemporaryDirectory(prefix="quest-calibrate-") as folder:
            yield Probe(engine, windows, Path(folder))

    return opened


@dataclass
class Probe:
    """:class:`LayerKl` by a vLLM engine."""

    engine: Any
    windows: Sequence[Item]
    folder: Path
    layers: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.layers = self.select([])
        read_contexts(self.engine, self.windows)
        self._dense = self._read(DENSE, "dense")

    def select(self, layers: Sequence[int], shares: Shares | None = None) -> list[int]:
        """Make ``layers`` alone sparse, with ``shares``; returns all that could be."""
        (able,) = {tuple(found) for found in self.engine.collective_rpc(set_sparse_layers, args=(list(layers), shares))}
        return list(able)

    def kl(self, dense_layers: Sequence[int], budget: int, shares: Shares | None = None) -> list[float]:
        """See :class:`~quest_vllm.eval.calibrate.LayerKl`."""
        self.select([layer for layer in self.layers if layer not in dense_layers], shares)
        sparse = self._read(budget, "sparse")
        return [kl_by_record(dense, other) for dense, other in zip(self._dense, sparse, strict=True)]

    def kl_alone(self, layer: int, budget: int) -> list[float]:
        """KL to dense of each window with ``layer`` alone at ``budget``."""
        return self.kl([other for other in self.layers if other != layer], budget)

    def _read(self, budget: int, name: str) -> list[Path]:
        """Force every window's text; returns the records."""
        vocabulary = self.engine.llm_engine.model_config.get_vocab_size()
        records, requests = [], []
        for item in self.windows:
            path = self.folder / f"{name}-{item.index}.npy"
            records.append(new_record(path, len(item.question_ids), vocabulary))
            unit = Unit(TEXT, item.context, item.index, DECODE, budget)
            requests.append(request(item, unit, path))
        self.engine.generate(*zip(*requests, strict=True), use_tqdm=False)
        return records
