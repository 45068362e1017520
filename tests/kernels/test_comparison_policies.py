"""The policies that ours are compared with: a window, and eviction by attention received."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quest_vllm.ops.api import load_ops
from quest_vllm.policies import NO_SUMMARY, DecodeStep, HeavyHitterPolicy, WindowPolicy
from quest_vllm.policies.logits import token_logits

OPS = load_ops("torch", "cpu")
BLOCK, DIM, HEADS, GROUP = 32, 16, 2, 2


def make_step(prefix: int, lengths: list[int], budget: int, page_size: int = 1, seed: int = 0) -> DecodeStep:
    """Rows of continuations of ``lengths`` tokens after ``prefix`` tokens, whole blocks, with random keys."""
    generator = torch.Generator().manual_seed(seed)
    rows, shared = sum(lengths), prefix // BLOCK
    table = torch.arange(shared + 1).repeat(rows, 1)
    table[:, -1] = shared + torch.arange(rows)
    return DecodeStep(
        query=torch.randn(rows, HEADS * GROUP, DIM, generator=generator),
        key_cache=torch.randn(shared + rows, HEADS, BLOCK, DIM, generator=generator),
        summaries=torch.zeros(()).expand(shared + rows, HEADS, BLOCK // page_size, 2, DIM),
        block_table=table.int(),
        seq_lens=torch.tensor([prefix + i + 1 for length in lengths for i in range(length)]).int(),
        page_budgets=torch.full((rows,), budget, dtype=torch.int32),
        max_page_budget=budget,
        page_size=page_size,
        scale=DIM**-0.5,
        attended=torch.rand(HEADS, prefix, generator=generator) * 20,
    )


def taken(selected: torch.Tensor, row: int, head: int) -> set[int]:
    return {page for page in selected[row, head].tolist() if page >= 0}


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 30), st.integers(2, 12), st.integers(0, 2), st.integers(1, 3))
def test_the_window_is_exactly_sink_and_newest(blocks: int, rows: int, budget: int, sink: int, recent: int) -> None:
    budget = max(budget, sink + recent)
    step = make_step(blocks * BLOCK, [rows], budget, page_size=16)
    step = replace(step, sink_pages=sink, recent_pages=recent)
    selected = WindowPolicy(OPS).choose(step)
    for row, length in enumerate(step.seq_lens.tolist()):
        pages = -(-length // 16)
        first_newest = max(sink, pages - (budget - sink))
        wanted = set(range(min(sink, pages))) | set(range(first_newest, pages))
        assert all(taken(selected, row, head) == wanted for head in range(HEADS))


def evict(step: DecodeStep, rows: range, head: int) -> list[set[int]]:
    """What one continuation keeps, in plain Python: a token joins, the weakest of the older ones goes."""
    budget, size = step.max_page_budget, step.page_size
    assert step.attended is not None
    received = [float(part.sum()) for part in step.attended[head].split(size)]
    kept, found = set(range(len(received))), []
    for row in rows:
        length = int(step.seq_lens[row])
        pages = -(-length // size)
        received += [0.0] * (pages - len(received))
        kept.add(pages - 1)
        while len(kept) > budget:
            older = [page for page in kept if page < pages - (budget - budget // 2)]
            kept.remove(min(older, key=lambda page: received[page]))
        found.append(set(kept))
        tokens = [t for page in sorted(kept) for t in range(page * size, min(length, (page + 1) * size))]
        keys = step.key_cache[step.block_table[row].long()[torch.tensor(tokens) // BLOCK], head]
        keys = keys[torch.arange(len(tokens)), torch.tensor(tokens) % BLOCK].double()
        heads = step.query[row, head * GROUP : (head + 1) * GROUP].double()
        weights = torch.softmax(heads @ keys.T * step.scale, dim=-1).sum(0).tolist()
        for token, weight in zip(tokens, weights, strict=True):
            received[token // size] += weight
    return found


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3),
    st.lists(st.integers(1, 30), min_size=1, max_size=3),
    st.integers(2, 120),
    st.sampled_from([1, 16]),
    st.integers(0, 2**16),
)
def test_eviction_is_that_of_a_plain_loop(
    blocks: int, lengths: list[int], budget: int, page_size: int, seed: int
) -> None:
    step = make_step(blocks * BLOCK, lengths, budget, page_size, seed)
    selected = HeavyHitterPolicy().choose(step)
    start = 0
    for length in lengths:
        rows = range(start, start + length)
        for head in range(HEADS):
            assert [taken(selected, row, head) for row in rows] == evict(step, rows, head)
        start += length


def test_eviction_keeps_the_total_and_what_is_dropped_never_returns() -> None:
    step = make_step(4 * BLOCK, [30, 20], 24)
    selected = HeavyHitterPolicy().choose(step)
    for head in range(HEADS):
        before: set[int] = set(range(4 * BLOCK))
        for row, length in enumerate(step.seq_lens.tolist()):
            kept = taken(selected, row, head)
            if length == 4 * BLOCK + 1:
                before = set(range(4 * BLOCK))  # a continuation of its own
            assert len(kept) == 24
            assert set(range(length - 12, length)) <= kept
            assert kept <= before | {length - 1}
            before = kept


def test_eviction_does_not_know_the_question() -> None:
    """The first row's pages follow from the prefill alone, the most attended first."""
    step = make_step(4 * BLOCK, [1], 24)
    other = replace(step, query=-3 * step.query)
    first = HeavyHitterPolicy().choose(step)
    assert torch.equal(first, HeavyHitterPolicy().choose(other))
    assert step.attended is not None
    heavy = step.attended[:, : 4 * BLOCK + 1 - 12].topk(12).indices
    assert all(set(heavy[head].tolist()) <= taken(first, 0, head) for head in range(HEADS))


def test_eviction_needs_the_prefills_attention() -> None:
    with pytest.raises(ValueError, match="attended: expected the prefill's attention per token, got None"):
        HeavyHitterPolicy().choose(replace(make_step(BLOCK, [1], 4), attended=None))


def test_both_read_their_pages_alone() -> None:
    page, summary = 16 * 2 * 64 * 2, 2 * 64 * 2
    for policy in (WindowPolicy(OPS), HeavyHitterPolicy()):
        assert policy.page_summary == NO_SUMMARY
        assert policy.bytes_read(256, 16, page, summary) == 16 * page
        assert policy.bytes_read(8, 16, page, summary) == 8 * page


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 3), st.lists(st.integers(1, 20), min_size=1, max_size=2), st.booleans(), st.integers(0, 99))
def test_token_logits_are_the_products(blocks: int, lengths: list[int], garbage: bool, seed: int) -> None:
    """Blocks that all rows share, and others; a table may hold anything past a request's end."""
    step = make_step(blocks * BLOCK, lengths, 4, seed=seed)
    if garbage:
        wide = torch.cat([step.block_table, torch.full((len(step.seq_lens), 1), 2**30, dtype=torch.int32)], dim=1)
        step = replace(step, block_table=wide)
    found = token_logits(step)
    for row, length in enumerate(step.seq_lens.tolist()):
        places = torch.arange(length)
        keys = step.key_cache[step.block_table[row].long()[places // BLOCK], :, places % BLOCK]  # [tokens, heads, dim]
        query = step.query[row].view(HEADS, GROUP, DIM)
        wanted = torch.einsum("hgd,thd->hgt", query, keys) * step.scale
        torch.testing.assert_close(found[row, ..., :length], wanted, atol=1e-5, rtol=1e-5)
        assert bool((found[row, ..., length:] == float("-inf")).all())


def test_attention_received_is_that_of_a_causal_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    hf_reference = pytest.importorskip("hf_reference")
    monkeypatch.setattr(hf_reference, "CHUNK", 7)
    query, key = torch.randn(4, 20, 8), torch.randn(2, 20, 8)
    logits = query @ key.repeat_interleave(2, dim=0).transpose(1, 2) * 0.3
    weights = logits.masked_fill(torch.ones(20, 20).triu(1).bool(), float("-inf")).softmax(-1)
    wanted = weights.view(2, 2, 20, 20).sum(dim=(1, 2))
    torch.testing.assert_close(hf_reference.attention_received(query, key, 0.3), wanted)
    assert "hf_reference" in sys.modules
