"""Which metadata builder of which rank counts a step's rows: exactly one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from quest_vllm import compat, layers
from quest_vllm.config import QuestConfig


def name(index: int) -> str:
    return f"model.layers.{index}.self_attn.attn"


def model(windows: set[int], indices: range) -> dict[str, Any]:
    """Attention modules of the layers in ``indices``, those in ``windows`` with a sliding window."""
    return {name(i): SimpleNamespace(impl=SimpleNamespace(sliding_window=128 if i in windows else -1)) for i in indices}


@pytest.mark.parametrize(
    ("stages", "groups", "windows", "dense_layers"),
    [
        ([range(0, 8)], [set(range(8))], set(), (0, 1)),
        ([range(0, 4), range(4, 8)], [set(range(8))], set(), (0, 1)),
        ([range(0, 2), range(2, 8)], [set(range(8))], set(), (0, 1)),  # the first stage has nothing sparse
        ([range(0, 8)], [{0, 4}, {1, 2}, {3, 5}, {6, 7}], {0, 4}, ()),  # three groups with sparse layers
        ([range(3, 8)], [set(range(8))], set(), (0, 1)),  # layers before the first attention layer are of another kind
    ],
)
@pytest.mark.parametrize("tensor_ranks", [1, 2])
def test_one_builder_counts(
    monkeypatch: pytest.MonkeyPatch,
    stages: list[range],
    groups: list[set[int]],
    windows: set[int],
    dense_layers: tuple[int, ...],
    tensor_ranks: int,
) -> None:
    config = QuestConfig(dense_layers=dense_layers)
    counting = 0
    for stage, indices in enumerate(stages):
        every = model(windows, indices)
        monkeypatch.setattr(compat, "attention_layers", lambda _config, _names, every=every: every)
        for tensor_rank in range(tensor_ranks):
            rank = stage * tensor_ranks + tensor_rank
            parallel = SimpleNamespace(rank=rank, tensor_parallel_size=tensor_ranks)
            for group in groups:
                names = [name(i) for i in sorted(group & set(indices))]
                counting += layers.counts_rows(SimpleNamespace(parallel_config=parallel), names, config)
    assert counting == 1


@pytest.mark.parametrize(
    ("settings", "head_dim", "said"),
    [
        ({}, 80, None),
        ({"page_summary": "key_codes"}, 128, None),
        ({"page_summary": "key_codes"}, 80, "head_dim that is a multiple of 64, got 80; set page_summary to min_max"),
    ],
)
def test_page_summaries_that_cannot_be_served(settings: dict, head_dim: int, said: str | None) -> None:
    config = QuestConfig(**settings)
    if said is None:
        layers.refuse_page_summary(config, head_dim)
    else:
        with pytest.raises(compat.UnsupportedVllm, match=said):
            layers.refuse_page_summary(config, head_dim)
