"""The CUDA backend's metadata, on CPU tensors: which rows the chain serves, which FlashAttention, at which addresses.

vLLM's own builder needs a GPU; here it returns what it was given. Everything of ours runs as it is.
"""

from __future__ import annotations

import dataclasses
import gc
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from quest_vllm import backend_cuda, row_buffers
from quest_vllm.accounting import LayerGroup
from quest_vllm.audit_online import OnlineAudit
from quest_vllm.backend_cuda import ALL_PAGES, QuestCudaImpl, QuestCudaMetadata, QuestCudaMetadataBuilder
from quest_vllm.budget import BudgetTable
from quest_vllm.config import POLICIES, QuestConfig
from quest_vllm.layer_budgets import layer_budgets
from quest_vllm.reached import ReachedCounts, collect_reached, counts_on_device
from quest_vllm.row_buffers import RowBuffer
from quest_vllm.token_rows import VerifyBuffers

MAX_REQS, BLOCK, WIDTH = 8, 16, 4
LAYERS = ("model.layers.2.attn", "model.layers.3.attn")


class Builder(QuestCudaMetadataBuilder):
    """Ours, without what vLLM's constructor asks of a GPU."""

    def __init__(self, table: BudgetTable, verify: bool = True, config: QuestConfig | None = None) -> None:
        self.device, self.block_size, self.config = torch.device("cpu"), BLOCK, config or QuestConfig()
        budgets = layer_budgets(self.config, (2, 3))
        layers = budgets and len(budgets.layers)
        self.num_sparse_layers, self.audit, self.is_v2 = 28, OnlineAudit({}, 0), True
        self.group = LayerGroup(2, 3, 3, 64, 2, 16, True, budgets)
        self.counted: list[tuple[Any, ...]] = []
        self.read_back: list[tuple[Any, ...]] = []
        add, add_reached = (lambda *step: self.counted.append(step)), (lambda *read: self.read_back.append(read))
        self.step_log: Any = SimpleNamespace(add=add, add_reached=add_reached)
        self.reached = ReachedCounts(LAYERS, MAX_REQS * WIDTH, 3, self.device, self.step_log)
        self.page_budgets = RowBuffer(MAX_REQS, ALL_PAGES, torch.int32, self.device, layers)
        self.top_ps = RowBuffer(MAX_REQS, 1.0, torch.float32, self.device)
        self.policies = RowBuffer(MAX_REQS, 0, torch.int32, self.device)
        self.verify_width = WIDTH
        self.verify = VerifyBuffers(MAX_REQS * WIDTH, 64, self.device, layers) if verify else None
        self.stock_builds: list[tuple[torch.Tensor, bool]] = []

    def _stock(self, common: Any, fast_build: bool = False) -> QuestCudaMetadata:
        self.stock_builds.append((common.seq_lens, fast_build))
        names = [f.name for f in dataclasses.fields(QuestCudaMetadata) if f.name not in ("sparse", "rest")]
        given = dict.fromkeys(names) | {
            "seq_lens": common.seq_lens,
            "scheduler_metadata": None if fast_build else torch.zeros(4),
            "num_actual_tokens": common.num_actual_tokens,
        }
        return QuestCudaMetadata(**given)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> BudgetTable:
    """The process's budgets, by slot."""
    budgets = BudgetTable()
    monkeypatch.setattr(backend_cuda, "get_budget_table", lambda: budgets)
    return budgets


@pytest.fixture
def shares(monkeypatch: pytest.MonkeyPatch) -> BudgetTable:
    """The process's top_p, by slot."""
    top_ps = BudgetTable(empty=1.0, dtype=np.float32)
    monkeypatch.setattr(backend_cuda, "get_top_p_table", lambda: top_ps)
    return top_ps


@pytest.fixture
def policies(monkeypatch: pytest.MonkeyPatch) -> BudgetTable:
    """The process's policies, by slot."""
    places = BudgetTable()
    monkeypatch.setattr(backend_cuda, "get_policy_table", lambda: places)
    return places


def common_metadata(
    query_lens: list[int],
    seq_lens: list[int],
    slots: list[int] | None,
    padded_to: int = 0,
    prefilling: tuple[int, ...] = (),
) -> Any:
    """A step as model runner V2 describes it; ``padded_to`` requests in a graph of uniform decode."""
    num_reqs = max(padded_to, len(query_lens))
    padding = num_reqs - len(query_lens)
    query_start = np.cumsum([0, *query_lens, *[0] * padding]).astype(np.int32)
    tokens = int(query_start[-1]) if not padded_to else num_reqs * max(query_lens)
    generator = torch.Generator().manual_seed(len(query_lens))
    common = SimpleNamespace(
        num_reqs=num_reqs,
        num_actual_tokens=tokens,
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
        query_start_loc_cpu=torch.from_numpy(query_start),
        seq_lens=torch.tensor([*seq_lens, *[0] * padding], dtype=torch.int32),
        seq_lens_cpu_upper_bound=torch.tensor(seq_lens, dtype=torch.int32),
        is_prefilling=torch.tensor([row in prefilling for row in range(len(query_lens))]),
        req_idx=None if slots is None else np.array(slots),
        block_table_tensor=torch.randint(0, 999, (num_reqs, 70), dtype=torch.int32, generator=generator),
    )
    common.replace = lambda **changed: SimpleNamespace(**{**vars(common), **changed})
    return common


def test_a_captured_verify_step_finds_its_inputs_where_they_were(table: BudgetTable) -> None:
    builder = Builder(table)
    captured = builder.build_for_cudagraph_capture(common_metadata([WIDTH] * 4, [WIDTH] * 4, None))
    assert captured.sparse.served.shape == (16,)
    for slot, budget in ((5, 128), (2, 0), (7, 512)):
        table.set(slot, budget)
    # slot 7's budget covers its context; the graph has room for a fourth request
    common = common_metadata([WIDTH] * 3, [700, 900, 300], [5, 2, 7], padded_to=4)
    replayed = builder.build(0, common)
    for field in ("seq_lens", "page_budgets", "top_ps", "policies", "block_table", "served"):
        ours, theirs = getattr(replayed.sparse, field), getattr(captured.sparse, field)
        assert (ours.data_ptr(), ours.shape) == (theirs.data_ptr(), theirs.shape), field
    assert replayed.rest.seq_lens.data_ptr() == captured.rest.seq_lens.data_ptr()
    assert captured.sparse.seq_lens.tolist() == [697, 698, 699, 700] + [0] * 12
    assert captured.sparse.page_budgets.tolist() == [8] * 4 + [0] * 12
    assert captured.sparse.served.tolist() == [True] * 4 + [False] * 12
    assert captured.rest.seq_lens.tolist() == [1, 900, 300, 0]
    assert captured.sparse.block_table[:4, :44].tolist() == common.block_table_tensor[:1, :44].tolist() * 4
    assert replayed.seq_lens is common.seq_lens  # dense layers
    assert [fast for _, fast in builder.stock_builds] == [False, True] * 2


def test_drafts_of_unlike_number_beside_a_prefill_chunk(table: BudgetTable) -> None:
    builder = Builder(table)
    for slot in range(4):
        table.set(slot, 64)
    # covered but for its last two tokens; sparse; a chunk; covered
    common = common_metadata([4, 2, 7, 1], [66, 500, 90, 64], [0, 1, 2, 3], prefilling=(2,))
    metadata = builder.build(0, common)
    rows = metadata.sparse
    assert rows.served is None and rows.tokens.tolist() == [0, 1, 2, 3, 4, 5]
    assert rows.seq_lens.tolist() == [63, 64, 65, 66, 499, 500]
    assert rows.page_budgets.tolist() == [4] * 6
    assert rows.block_table.tolist() == common.block_table_tensor[[0, 0, 0, 0, 1, 1]].tolist()
    assert metadata.rest.seq_lens.tolist() == [1, 1, 90, 64]
    assert metadata.seq_lens.tolist() == [66, 500, 90, 64]


def test_one_token_a_request_is_a_decode_step(table: BudgetTable) -> None:
    builder = Builder(table)
    table.set(3, 256)
    metadata = builder.build(0, common_metadata([1, 1], [800, 800], [3, 1], padded_to=4))
    assert metadata.rest is None and metadata.sparse.served is None
    assert metadata.sparse.page_budgets.tolist() == [16, ALL_PAGES, ALL_PAGES, ALL_PAGES]


def test_budgets_travel_only_when_they_change(
    table: BudgetTable, policies: BudgetTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder, sent = Builder(table), list[list[int]]()
    monkeypatch.setattr(row_buffers, "staged", lambda array, _: sent.append(array.tolist()) or torch.from_numpy(array))
    table.set(3, 256)
    for lengths, slots in (([800, 90], [3, 1]), ([801, 91], [3, 1]), ([802], [3]), ([92, 803], [1, 3]), ([804], [3])):
        rows = builder.build(0, common_metadata([1] * len(slots), lengths, slots)).sparse
        assert rows.page_budgets.tolist() == [16 if slot == 3 else ALL_PAGES for slot in slots]
    assert sent == [[16, ALL_PAGES], [ALL_PAGES, 16], [16]]
    assert [step.seq_lens.tolist() for _, step, _ in builder.counted[:2]] == [[800, 90], [801, 91]]


@pytest.mark.parametrize(("width", "room"), [(WIDTH, False), (WIDTH + 1, True)])
def test_uniform_steps_that_no_graph_holds_are_split(table: BudgetTable, width: int, room: bool) -> None:
    builder = Builder(table, verify=room)
    table.set(0, 64)
    metadata = builder.build(0, common_metadata([width] * 2, [500, 500], [0, 1]))
    assert metadata.sparse.tokens.tolist() == list(range(width))
    assert metadata.rest.seq_lens.tolist() == [1, 500]


def test_a_draft_models_steps_are_stock(table: BudgetTable) -> None:
    builder = Builder(table)
    table.set(0, 64)
    drafts = common_metadata([1, 1], [800, 800], None)
    assert builder.build(0, drafts).sparse is None
    assert builder.build_for_drafting(drafts, 0).sparse is None
    builder.is_v2 = False  # V1 names no requests: slots are the batch's rows
    assert builder.build(0, drafts).sparse.page_budgets.tolist() == [4, ALL_PAGES]


def test_prefill_alone_is_stock(table: BudgetTable) -> None:
    builder = Builder(table)
    table.set(0, 64)
    metadata = builder.build(0, common_metadata([40], [500], [0], prefilling=(0,)))
    assert metadata.sparse is None and metadata.rest is None


def layers_count(rows: Any, taken: dict[int, int]) -> None:
    """What the kernels of a step do: layer l writes 10 l more pages than ``taken`` has by row, else 7."""
    for number, layer in enumerate(LAYERS):
        counts = rows.reached.of(layer, len(rows.seq_lens))
        counts.fill_(7)
        for row, pages in taken.items():
            counts[row] = pages + 10 * number


def test_shares_reach_the_kernels_and_their_counts_come_back_with_the_next_step(
    table: BudgetTable, shares: BudgetTable
) -> None:
    builder = Builder(table)
    for slot, budget, top_p in ((4, 128, 0.9), (2, 128, 1.0), (6, 0, 0.9), (1, 4096, 0.5)):
        table.set(slot, budget)
        shares.set(slot, top_p)
    first = builder.build(0, common_metadata([1] * 4, [800, 801, 802, 803], [4, 2, 6, 1], padded_to=5)).sparse
    # dense rows do not adapt; a budget that covers does, up to its pages
    assert first.top_ps.tolist() == pytest.approx([0.9, 1, 1, 0.5, 1])
    assert first.page_budgets.tolist() == [8, 8, ALL_PAGES, 51, ALL_PAGES]
    layers_count(first, {0: 5, 3: 20})
    assert builder.read_back == []
    second = builder.build(0, common_metadata([1] * 2, [802, 804], [2, 1])).sparse
    assert second.top_ps.tolist() == [1, 0.5]
    ((adaptive, places, counts, wait),) = builder.read_back
    wait()
    assert counts[:, places, 0].tolist() == [[5, 20], [15, 30]]
    assert adaptive.seq_lens.tolist() == [800, 803] and adaptive.num_pages.tolist() == [50, 51]
    layers_count(second, {1: 3})  # does not reach the copy
    assert counts[:, places, 0].tolist() == [[5, 20], [15, 30]]
    third = builder.build(0, common_metadata([1], [803], [2])).sparse
    assert builder.read_back[1][2][:, builder.read_back[1][1], 2].tolist() == [[3], [13]]
    layers_count(third, {})
    builder.build(0, common_metadata([1], [804], [2]))
    assert len(builder.read_back) == 2  # nobody adapted in the third step


def test_each_row_has_its_requests_policy_in_every_kind_of_step(table: BudgetTable, policies: BudgetTable) -> None:
    builder = Builder(table)
    captured = builder.build_for_cudagraph_capture(common_metadata([1] * 4, [1] * 4, None)).sparse
    window, mean, staged = (POLICIES.index(name) for name in ("window", "mean", "two_stage"))
    for slot, policy in ((0, mean), (1, window), (2, staged), (3, window)):
        table.set(slot, 128)
        policies.set(slot, policy)
    table.set(2, 0)
    decode = builder.build(0, common_metadata([1] * 3, [800, 801, 802], [3, 0, 2], padded_to=4)).sparse
    assert decode.policies.tolist()[:3] == [window, mean, staged]
    assert decode.policies.data_ptr() == captured.policies.data_ptr()
    classes = builder.counted[-1][0]
    assert classes.windows.tolist() == [True, False, False]
    assert not classes.two_stage.any(), "a row without a budget is dense"
    table.set(2, 128)
    verify = builder.build(0, common_metadata([WIDTH] * 2, [700, 900], [1, 0])).sparse
    assert verify.policies.tolist() == [window] * WIDTH + [mean] * WIDTH
    mixed = builder.build(0, common_metadata([7, 2, 1], [90, 500, 800], [2, 1, 0], prefilling=(0,))).sparse
    assert mixed.policies.tolist() == [window, window, mean]
    assert builder.counted[-1][0].windows.tolist() == [False, True, True, False]
    staged_too = builder.build(0, common_metadata([1] * 2, [803, 900], [0, 2])).sparse
    assert staged_too.policies.tolist() == [mean, staged]
    assert builder.counted[-1][0].two_stage.tolist() == [False, True]


def test_shares_of_verify_steps_and_of_rows_beside_a_prefill_chunk(table: BudgetTable, shares: BudgetTable) -> None:
    builder = Builder(table)
    for slot in (0, 1):
        table.set(slot, 128)
        shares.set(slot, 0.75)
    verify = builder.build(0, common_metadata([WIDTH] * 2, [700, 900], [3, 1])).sparse
    assert verify.top_ps.tolist() == [1] * WIDTH + [0.75] * WIDTH
    layers_count(verify, {row: row for row in range(2 * WIDTH)})
    mixed = builder.build(0, common_metadata([7, 2, 1], [90, 500, 800], [3, 1, 2], prefilling=(0,))).sparse
    assert mixed.tokens.tolist() == [7, 8] and mixed.top_ps.tolist() == [0.75] * 2
    layers_count(mixed, {0: 6, 1: 7})
    builder.build(0, common_metadata([1], [804], [2]))
    found = [counts[:, places, 1].tolist() for _, places, counts, _ in builder.read_back]
    assert found == [[[4, 5, 6, 7], [14, 15, 16, 17]], [[6, 7], [16, 17]]]


@pytest.mark.parametrize("next_step", ["logits", "capture", "draft"])
def test_counts_are_read_back_before_anything_else_runs(
    table: BudgetTable, shares: BudgetTable, next_step: str
) -> None:
    builder = Builder(table)
    table.set(1, 128)
    shares.set(1, 0.5)
    rows = builder.build(0, common_metadata([1], [800], [1])).sparse
    layers_count(rows, {0: 5})
    if next_step == "logits":
        assert counts_on_device()
        collect_reached()
    elif next_step == "capture":  # or a dummy step, whose kernels write counts too
        builder.build_for_cudagraph_capture(common_metadata([1], [1], None))
    else:
        builder.build(0, common_metadata([1], [800], None))
    ((adaptive, places, counts, _),) = builder.read_back
    assert adaptive.seq_lens.tolist() == [800] and counts[:, places, 0].tolist() == [[5], [15]]
    layers_count(rows, {0: 9})
    builder.build(0, common_metadata([1], [801], [1]))
    assert len(builder.read_back) == 1  # once


def test_groups_that_go_are_not_read(table: BudgetTable) -> None:
    builder = Builder(table)
    gone = weakref.ref(builder.reached)
    assert counts_on_device()
    del builder
    gc.collect()
    assert gone() is None


def test_a_verify_step_adapts_a_token_at_a_time(table: BudgetTable, shares: BudgetTable) -> None:
    builder = Builder(table)
    table.set(4, 96)
    shares.set(4, 0.5)
    # the forced pages cover the request's first two tokens, which the chain serves all the same
    rows = builder.build(0, common_metadata([WIDTH], [50], [4], padded_to=2)).sparse
    assert rows.top_ps.tolist() == [1, 1, 0.5, 0.5] + [1] * WIDTH
    assert rows.served.tolist() == [True] * WIDTH + [False] * WIDTH
    layers_count(rows, {2: 3, 3: 4})
    builder.build_for_cudagraph_capture(common_metadata([1], [1], None))
    ((adaptive, places, counts, _),) = builder.read_back
    assert places.tolist() == [2, 3] and adaptive.seq_lens.tolist() == [49, 50]
    assert counts[0, places, 0].tolist() == [3, 4]


@pytest.mark.parametrize("kind", ["decode", "verify", "mixed"])
def test_each_layer_hands_its_rows_to_the_kernel(table: BudgetTable, shares: BudgetTable, kind: str) -> None:
    builder = Builder(table)
    for slot in range(3):
        table.set(slot, 64)
        shares.set(slot, 0.5)
    query_lens = {"decode": [1] * 3, "verify": [WIDTH] * 3, "mixed": [1, 7, 1]}[kind]
    prefilling = (1,) if kind == "mixed" else ()
    rows = builder.build(0, common_metadata(query_lens, [500] * 3, [0, 1, 2], prefilling=prefilling)).sparse
    given: list[dict[str, Any]] = []
    impl = QuestCudaImpl.__new__(QuestCudaImpl)
    impl.config, impl.scale, impl.logits_soft_cap = QuestConfig(), 1.0, 0.0
    impl._ops = SimpleNamespace(quest_decode=lambda *tensors, **options: given.append({"query": tensors[0], **options}))
    query = torch.zeros(sum(query_lens), 4, 8)
    attend = impl._attend_sparse if kind == "decode" else impl._add_sparse
    for layer in LAYERS:
        attend(layer, query, SimpleNamespace(keys=None, values=None, summaries=None), rows, torch.zeros_like(query))
    count = {"decode": 3, "verify": 12, "mixed": 2}[kind]
    for layer, call in zip(LAYERS, given, strict=True):
        assert len(call["query"]) == count and call["top_p"].tolist() == [0.5] * count
        place = builder.reached.of(layer, count)
        assert call["taken"].data_ptr() == place.data_ptr() and call["taken"].shape == (count, 3)


UNEVEN = QuestConfig(layer_shares={2: 1, 3: 3})  # type: ignore[arg-type]
"""Beyond three forced pages, layer 3 gets three times what layer 2 gets."""


def test_layers_read_their_own_budgets_at_addresses_that_do_not_move(table: BudgetTable) -> None:
    builder = Builder(table, config=UNEVEN)
    captured = builder.build_for_cudagraph_capture(common_metadata([1] * 4, [1] * 4, None)).sparse
    for slot, budget in ((3, 256), (1, 0), (2, 112)):
        table.set(slot, budget)
    replayed = builder.build(0, common_metadata([1] * 3, [900, 800, 120], [3, 1, 2], padded_to=4)).sparse
    for layer, expected in zip(LAYERS, ([10, ALL_PAGES, 5, ALL_PAGES], [22, ALL_PAGES, 8, ALL_PAGES]), strict=True):
        ours, theirs = replayed.page_budgets_of(layer), captured.page_budgets_of(layer)
        assert ours.tolist() == expected  # 2 x 13 pages as 7 and 19; 2 x 4 as 2 and 6, of which one is not there
        assert ours.data_ptr() == theirs.data_ptr() and ours.is_contiguous()


def test_layers_read_their_own_budgets_in_verify_steps_and_beside_chunks(table: BudgetTable) -> None:
    builder = Builder(table, config=UNEVEN)
    for slot, budget in ((5, 256), (2, 0)):
        table.set(slot, budget)
    verify = builder.build(0, common_metadata([WIDTH] * 2, [700, 900], [5, 2])).sparse
    assert verify.served.tolist() == [True] * 4 + [False] * 4
    assert [verify.page_budgets_of(layer).tolist() for layer in LAYERS] == [[10] * 4 + [0] * 4, [22] * 4 + [0] * 4]
    for count in (1, 2):
        lengths = [700, 600][:count]
        common = common_metadata([*[1] * count, 7], [*lengths, 90], [*[5] * count, 2], prefilling=(count,))
        own = [builder.build(0, common).sparse.page_budgets_of(layer) for layer in LAYERS]
        assert [pages.tolist() for pages in own] == [[10] * count, [22] * count]
        assert all(pages.stride() == (1,) for pages in own)  # as the kernels want them
