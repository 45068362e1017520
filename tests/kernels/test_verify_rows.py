"""Verify tokens as decode rows: drafts behind a row, and rejected ones, change nothing of what it attends to."""

from __future__ import annotations

import pytest
import torch

from quest_vllm.ops import reference, torch_ops
from quest_vllm.ops.api import Ops, load_ops
from quest_vllm.page_layout import split_chunks
from tests.kernels.paged import PagedCase, make_case

PAGE, BLOCK, BUDGET = 16, 32, 4
DRAFTS = 20  # more than a page: some rows' newest page is full of later drafts, and a page of its own follows
REDUCTIONS = ("max", "mean", "per_query_head")


def stored(length: int, drafts: int) -> PagedCase:
    """A request of ``length`` tokens, of which the last ``drafts`` came in one step, after the others."""
    case = make_case([length], block_size=BLOCK, page_size=PAGE)
    case.views.summaries.fill_(float("nan"))
    for written in (case.slots()[: length - drafts], case.slots()[length - drafts :]):
        reference.update_page_summaries(case.views.keys, case.views.summaries, written, page_size=PAGE)
    return case


def attend(ops: Ops, case: PagedCase, query: torch.Tensor, lengths: list[int], reduction: str) -> torch.Tensor:
    rows = len(lengths)
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    return ops.quest_decode(
        query,
        case.views.keys,
        case.views.values,
        case.views.summaries,
        case.block_table.expand(rows, -1).contiguous(),
        seq_lens,
        torch.full((rows,), BUDGET, dtype=torch.int32),
        page_size=PAGE,
        scale=0.125,
        group_reduction=reduction,
        bound_radius=0.5,
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ["reference", "torch", "cpu"])
def test_a_verify_token_attends_as_if_the_drafts_behind_it_were_not_there(name: str, reduction: str) -> None:
    ops = load_ops(name, "cpu")
    length = 250
    case = stored(length, DRAFTS)
    lengths = list(range(length - DRAFTS + 1, length + 1))
    query = torch.randn(DRAFTS, 4, 64, generator=torch.Generator().manual_seed(5))
    together = attend(ops, case, query, lengths, reduction)
    for row, own in enumerate(lengths):
        alone = make_case([own], block_size=BLOCK, page_size=PAGE)
        for ours, theirs in ((alone.views.keys, case.views.keys), (alone.views.values, case.views.values)):
            ours.fill_(float("nan"))
            flat = alone.slots()
            theirs_at = case.slots()[:own]
            ours[flat // BLOCK, :, flat % BLOCK] = theirs[theirs_at // BLOCK, :, theirs_at % BLOCK]
        alone.views.summaries.fill_(float("nan"))
        reference.update_page_summaries(alone.views.keys, alone.views.summaries, alone.slots(), page_size=PAGE)
        single = attend(ops, alone, query[row : row + 1], [own], reduction)
        assert torch.equal(together[row : row + 1], single), f"token {row}, context {own}"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "cuda"])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_verify_tokens_and_passed_over_rows_in_one_launch(name: str) -> None:
    """As in a graph: rows of one request share a block table, rows that the chain passes over have length 0."""
    ops = load_ops(name, "cuda")
    case = make_case([250, 400], block_size=BLOCK, page_size=PAGE, dtype=torch.bfloat16)
    lengths = [247, 248, 249, 250, 0, 0, 0, 0, 397, 398, 399, 400]
    budgets = [BUDGET] * 4 + [0] * 4 + [6] * 4
    query = torch.randn(12, 4, 64, generator=torch.Generator().manual_seed(5)).bfloat16()
    table = case.block_table[[0] * 4 + [1] * 8].contiguous()
    rows = (torch.tensor(lengths, dtype=torch.int32), torch.tensor(budgets, dtype=torch.int32))
    caches = (case.views.keys, case.views.values, case.views.summaries)
    wanted = load_ops("reference", "cpu").quest_decode(query, *caches, table, *rows, page_size=PAGE, scale=0.125)
    content = torch.cat([part.flatten(2) for part in caches], dim=2).cuda()
    views = split_chunks(content.unflatten(2, (BLOCK, -1)), 64, PAGE)
    on_gpu = (views.keys, views.values, views.summaries, table.cuda(), *(row.cuda() for row in rows))
    found = ops.quest_decode(query.cuda(), *on_gpu, page_size=PAGE, scale=0.125).cpu()
    served = torch.tensor(budgets) > 0
    torch.testing.assert_close(found[served], wanted[served], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("update", [reference.update_page_summaries, torch_ops.update_page_summaries])
def test_summaries_bound_the_valid_keys_whatever_was_rejected(update) -> None:
    """Steps of 1 + 3 tokens of which few are accepted: exact where the last write ended, never below a valid key."""
    case = make_case([64], block_size=BLOCK, page_size=PAGE)
    keys, summaries = case.views.keys, case.views.summaries
    keys.fill_(float("nan"))
    slots, generator = case.slots(), torch.Generator().manual_seed(3)
    valid, accepted = 0, [0, 3, 1, 0, 2, 3, 0, 0, 1, 2, 0, 3, 3, 1, 0, 2, 0, 3]
    for step, count in enumerate(accepted):
        drafts = 3 - step % 2  # steps of unlike width: the last slot of a wider one is left behind
        written = slots[valid : valid + 1 + drafts]
        keys[written // BLOCK, :, written % BLOCK] = torch.randn(len(written), 2, 64, generator=generator) * (step + 1)
        update(keys, summaries, written, page_size=PAGE)
        last = valid + drafts
        valid += 1 + min(count, drafts)
        for page in range(-(-valid // PAGE)):
            rows = slots[page * PAGE : min((page + 1) * PAGE, max(last + 1, valid))]
            held = keys[rows // BLOCK, :, rows % BLOCK]
            ours = summaries[rows[0] // BLOCK, :, rows[0] % BLOCK // PAGE]
            assert torch.equal(ours[:, 0], held.amin(0)) and torch.equal(ours[:, 1], held.amax(0)), (step, page)
