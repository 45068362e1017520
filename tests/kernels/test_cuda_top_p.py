"""top_p in the CUDA kernels against the reference, on a Hopper GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quest_vllm.config import GROUP_REDUCTIONS
from quest_vllm.ops import cuda, reference
from tests.kernels.test_cuda_codes import summarised
from tests.kernels.test_cuda_ops import CLUSTERS, DEVICE, assert_near, attending, build, ints, run, warp_counts
from tests.kernels.top_p import assert_same_choice

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a Hopper GPU"),
]

LENGTHS = [0, 1, 100, 583, 1300, 16 * 70 + 3]
BUDGETS = [3, 3, 200, 30, 60, 200]  # pages; the third and the last cover their rows
TOP_PS = [0.5, 0.5, 0.62, 1.0, 0.93, 0.81]


def floats(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, device=DEVICE)


def check(
    got: torch.Tensor, want: torch.Tensor, whole: torch.Tensor, log_mass: torch.Tensor, top_p: torch.Tensor
) -> None:
    """Lists ``got`` are the reference's ``want`` but for a page on the line; ``whole``: all of the budget's."""
    width = log_mass.shape[-1]
    flags = [cuda._as_flags(pages, width).bool() for pages in (got, want, whole)]
    assert_same_choice(*flags, log_mass.double(), top_p)


@pytest.mark.parametrize(("sink_pages", "recent_pages"), [(1, 2), (0, 0), (3, 4)])
@pytest.mark.parametrize("kind", ["flat", "peaked", "ties", "equal", "special", "minus infinite"])
def test_selection_equals_the_reference(kind: str, sink_pages: int, recent_pages: int) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [0, 1, 16, 17, 300, 4000, 4096, 2500]
    scores = torch.randn(len(lengths), 3, 256, generator=generator) * (20 if kind == "peaked" else 3)
    if kind == "ties":
        scores = scores.round()
    elif kind == "equal":
        scores = torch.ones_like(scores)
    elif kind == "special":
        special = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e-40, 3e38])
        rare = torch.rand(scores.shape, generator=generator) < 0.01
        scores = torch.where(rare, special[torch.randint(0, 7, scores.shape, generator=generator)], scores)
    elif kind == "minus infinite":
        scores[torch.rand(scores.shape, generator=generator) < 0.6] = float("-inf")
    scores, seq_lens = scores.to(DEVICE), ints(lengths)
    options: dict[str, Any] = {"page_size": 16, "sink_pages": sink_pages, "recent_pages": recent_pages}
    for budget in (1, 3, 10, 64, 300):
        rows = (scores, seq_lens, ints([budget] * len(lengths)))
        whole = reference.select_pages(*rows, max_page_budget=budget, **options)
        for wanted in (0.11, 0.5703, 0.9499, 0.999):
            top_p = torch.full((len(lengths),), wanted, device=DEVICE)
            top_p[3::4] = 1.0
            share = {"top_p": top_p, "mass_scale": 0.3, "max_page_budget": budget}
            want = reference.select_pages(*rows, **options, **share)
            for cluster in CLUSTERS:
                got = cuda.select_pages(*rows, cluster_size=cluster, **options, **share)
                check(got, want, whole, scores.double() * 0.3, top_p)


def test_a_million_tokens() -> None:
    pages = 65536
    scores = torch.randn(2, 2, pages, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    rows = (scores, ints([16 * pages, 16 * pages - 37]), ints([4096, pages]))
    top_p = floats([0.77, 0.9])
    whole = reference.select_pages(*rows, page_size=16, max_page_budget=pages)
    share = {"page_size": 16, "top_p": top_p, "mass_scale": 2.0, "max_page_budget": pages}
    want = reference.select_pages(*rows, **share)
    for cluster in (1, 8, 16):
        check(cuda.select_pages(*rows, cluster_size=cluster, **share), want, whole, scores.double() * 2, top_p)


@pytest.mark.parametrize("shape", [(2, 4, 128, 16, 16), (2, 2, 64, 16, 32), (1, 7, 64, 16, 16), (2, 1, 256, 16, 32)])
@pytest.mark.parametrize("reduction", GROUP_REDUCTIONS)
@pytest.mark.parametrize("page_summary", ["min_max", "key_codes"])
def test_the_fused_launch_is_its_stages(shape: tuple[int, ...], reduction: str, page_summary: str) -> None:
    case = summarised(page_summary, LENGTHS, shape)
    scale, top_p = case.query.shape[2] ** -0.5, floats(TOP_PS)
    scoring = {"group_reduction": reduction, "page_summary": page_summary}
    mass_scale = reference.mass_scale_of(reduction, scale, page_summary)
    for cluster in CLUSTERS:
        scores = cuda.score_pages(
            case.query,
            case.views.summaries,
            case.block_table,
            case.seq_lens,
            page_size=16,
            scale=scale,
            cluster_size=cluster,
            **scoring,
        )
        rows = (scores, case.seq_lens, ints(BUDGETS))
        width = scores.shape[2]
        whole = reference.select_pages(*rows, page_size=16, max_page_budget=width)
        want = reference.select_pages(*rows, page_size=16, max_page_budget=width, top_p=top_p, mass_scale=mass_scale)
        for warps in warp_counts(shape, reduction):
            chosen = torch.zeros(want.shape, dtype=torch.uint8, device=DEVICE)
            taken = torch.full((3, *want.shape[:2]), -1, dtype=torch.int32, device=DEVICE)
            launch = {"cluster_size": cluster, "warps": warps, "top_p": top_p, **scoring}
            out = run(case, BUDGETS, chosen=chosen, taken=taken[1], **launch)
            got = cuda._as_list(chosen, width)
            check(got, want, whole, scores.double() * mass_scale, top_p)
            assert torch.equal(taken[1], chosen.sum(dim=-1, dtype=torch.int32)) and (taken[[0, 2]] == -1).all()
            assert (taken[1, 2:3] <= reference.num_pages(case.seq_lens, 16)[2]).all()
            assert_near(out, case, attending(got, scale))


@pytest.mark.parametrize("page_summary", ["min_max", "key_codes"])
def test_rows_that_do_not_adapt_and_their_neighbours(page_summary: str) -> None:
    case = summarised(page_summary, LENGTHS, (2, 4, 128, 16, 16))
    launch: dict[str, Any] = {"group_reduction": "mass", "page_summary": page_summary, "cluster_size": 4, "warps": 8}
    counts = torch.zeros(2, len(LENGTHS), 2, dtype=torch.int32, device=DEVICE)
    plain = run(case, BUDGETS, taken=counts[0], **launch)
    adapted = run(case, BUDGETS, taken=counts[1], top_p=floats(TOP_PS), **launch)
    pages = reference.num_pages(case.seq_lens, 16)
    assert torch.equal(counts[0], torch.minimum(pages, ints(BUDGETS))[:, None].expand(-1, 2).int())
    assert (counts[1] <= counts[0]).all() and (counts[1, [2, 4, 5]] < counts[0, [2, 4, 5]]).any()
    assert torch.equal(adapted[3], plain[3]) and torch.equal(counts[1, 3], counts[0, 3])  # its top_p is 1
    for row in range(len(LENGTHS)):  # alone, in a batch of one
        one = slice(row, row + 1)
        rows = (case.block_table[one], case.seq_lens[one], ints(BUDGETS[one]))
        caches = (case.views.keys, case.views.values, case.views.summaries)
        options = {"page_size": 16, "scale": 128**-0.5, "top_p": floats(TOP_PS[one]), **launch}
        alone = cuda.quest_decode(case.query[one], *caches, *rows, **options)
        assert torch.equal(alone[0], adapted[row]), row


def test_a_graph_takes_another_share_at_every_replay() -> None:
    case = summarised("key_codes", LENGTHS, (2, 4, 128, 16, 16))
    top_p, taken = floats([1.0] * len(LENGTHS)), torch.zeros(len(LENGTHS), 2, dtype=torch.int32, device=DEVICE)
    launch: dict[str, Any] = {"group_reduction": "mass", "page_summary": "key_codes", "top_p": top_p, "taken": taken}
    budgets, out = ints(BUDGETS), torch.zeros_like(case.query)
    caches = (case.views.keys, case.views.values, case.views.summaries)
    rows = (case.block_table, case.seq_lens, budgets)

    def decode() -> torch.Tensor:
        return cuda.quest_decode(case.query, *caches, *rows, page_size=16, scale=128**-0.5, out=out, **launch)

    decode()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode()
    for shares in ([1.0] * len(LENGTHS), TOP_PS, TOP_PS[::-1], [1.0] * len(LENGTHS)):
        top_p.copy_(floats(shares))
        graph.replay()
        replayed, counted = out.clone(), taken.clone()
        assert torch.equal(decode(), replayed) and torch.equal(taken, counted)


def test_what_is_refused() -> None:
    case = build([300])
    with pytest.raises(ValueError, match=r"top_p: expected contiguous torch\.float32, got torch\.float64"):
        run(case, [5], top_p=floats([0.5]).double())
    with pytest.raises(ValueError, match=r"taken: expected a shape of \(1, 2\), got \(2, 2\)"):
        run(case, [5], taken=torch.zeros(2, 2, dtype=torch.int32, device=DEVICE))
