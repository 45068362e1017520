"""Which tokens of which request a worker holds, under either model runner: what the audit of a live worker goes by."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from quest_vllm.compat import live_requests

LAYER = "model.layers.3.self_attn.attn"
GROUPS = SimpleNamespace(
    kv_cache_groups=[SimpleNamespace(layer_names=["other"]), SimpleNamespace(layer_names=["x", LAYER])]
)
BLOCKS = np.array([[7, 2, 0, 0], [5, 1, 4, 9], [3, 0, 0, 0]], dtype=np.int32)


def worker(**runner: Any) -> Any:
    return SimpleNamespace(model_runner=SimpleNamespace(kv_cache_config=GROUPS, **runner))


def test_model_runner_v1_keeps_rows() -> None:
    table = SimpleNamespace(block_table=SimpleNamespace(np=BLOCKS), num_blocks_per_row=np.array([2, 4, 1]))
    batch = SimpleNamespace(block_table=[None, table], num_computed_tokens_cpu=np.array([25, 60, 9]), num_reqs=2)
    assert live_requests(worker(input_batch=batch), LAYER) == [([7, 2], 25), ([5, 1, 4, 9], 60)]


def test_model_runner_v2_keeps_slots() -> None:
    states = SimpleNamespace(
        num_computed_tokens=SimpleNamespace(gpu=torch.tensor([25, 60, 9])), req_id_to_index={"b": 2, "a": 0}
    )
    tables = SimpleNamespace(
        block_tables=[None, SimpleNamespace(gpu=torch.from_numpy(BLOCKS))],
        num_blocks=SimpleNamespace(np=np.array([[0, 0, 0], [2, 4, 1]])),
    )
    assert live_requests(worker(req_states=states, block_tables=tables), LAYER) == [([3], 9), ([7, 2], 25)]
