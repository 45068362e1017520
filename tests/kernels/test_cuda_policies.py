"""A policy of each row's own in the CUDA kernels against the reference, on a Hopper GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quest_vllm.ops import cuda, reference
from tests.kernels.paged import places
from tests.kernels.test_cuda_codes import summarised
from tests.kernels.test_cuda_decode_on_host import in_two_stages
from tests.kernels.test_cuda_ops import CLUSTERS, DEVICE, assert_near, attending, build, ints, run, warp_counts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a Hopper GPU"),
]

LENGTHS = [0, 1, 100, 583, 1300, 4000, 16 * 70 + 3, 2000]
BUDGETS = [3, 3, 200, 30, 60, 40, 200, 17]  # pages; the third and the last but one cover their rows
NAMES = ["max", "window", "mean", "window", "max", "mean", "window", "mass"]


@pytest.mark.parametrize("shape", [(2, 4, 128, 16, 16), (2, 2, 64, 16, 32), (1, 7, 64, 16, 16), (2, 1, 256, 16, 32)])
@pytest.mark.parametrize(
    ("page_summary", "reduction"), [("min_max", "max"), ("min_max", "mass"), ("key_codes", "mass")]
)
def test_the_fused_launch_is_its_stages(shape: tuple[int, ...], page_summary: str, reduction: str) -> None:
    case = summarised(page_summary, LENGTHS, shape)
    scale, policies = case.query.shape[2] ** -0.5, places(NAMES, DEVICE)
    tensors = (case.query, case.views.summaries, case.block_table, case.seq_lens)
    scoring: dict[str, Any] = {"group_reduction": reduction, "page_summary": page_summary, "policies": policies}
    for cluster in CLUSTERS:
        scores = cuda.score_pages(*tensors, page_size=16, scale=scale, cluster_size=cluster, **scoring)
        rows, width = (case.seq_lens, ints(BUDGETS)), scores.shape[2]
        want = reference.select_pages(scores, *rows, page_size=16, max_page_budget=width, policies=policies)
        options = {"page_size": 16, "max_page_budget": width, "policies": policies, "cluster_size": cluster}
        assert torch.equal(cuda.select_pages(scores, *rows, **options), want)
        for warps in warp_counts(shape, reduction):
            chosen = torch.zeros(scores.shape, dtype=torch.uint8, device=DEVICE)
            out = run(case, BUDGETS, chosen=chosen, cluster_size=cluster, warps=warps, **scoring)
            choosing = rows[1] < reference.num_pages(rows[0], 16)
            assert torch.equal(chosen[choosing], cuda._as_flags(want, width)[choosing])
            assert_near(out, case, attending(want, scale))


@pytest.mark.parametrize("page_summary", ["min_max", "key_codes"])
def test_scores_of_a_row_are_those_of_a_launch_with_that_reduction(page_summary: str) -> None:
    case = summarised(page_summary, LENGTHS, (2, 4, 128, 16, 16))
    tensors = (case.query, case.views.summaries, case.block_table, case.seq_lens)
    options: dict[str, Any] = {"page_size": 16, "scale": 128**-0.5, "page_summary": page_summary}
    mixed = cuda.score_pages(*tensors, group_reduction="mass", policies=places(NAMES, DEVICE), **options)
    for row, name in enumerate(NAMES):
        if name != "window":
            alone = cuda.score_pages(*tensors, group_reduction=name, **options)[row]
            unit = reference.mass_scale_of(name, 128**-0.5, page_summary)
            torch.testing.assert_close(mixed[row], alone * unit, rtol=1e-5, atol=1e-5)


TWICE_LENGTHS = [1, 100, 583, 1300, 4000, 2000, 16 * 70 + 3, 1300]
TWICE_BUDGETS = [3, 4, 30, 11, 60, 17, 40, 12]  # pages; the third's shortlist ends with its row
TWICE_NAMES = ["two_stage"] * 4 + ["mass", "two_stage", "two_stage", "window"]


@pytest.mark.parametrize(
    "shape",
    [(2, 4, 128, 16, 16), (2, 2, 64, 16, 32), (1, 7, 64, 16, 16), (2, 1, 256, 16, 32), (1, 12, 128, 32, 64)],
)
@pytest.mark.parametrize("page_summary", ["min_max", "key_codes"])
def test_two_stages_choose_by_keys_where_scores_leave_it_open(shape: tuple[int, ...], page_summary: str) -> None:
    """What the reference chooses, by the kernel's own scores and float32 masses: but for masses that round alike."""
    size = shape[3]
    if page_summary == "key_codes" and (size != 16 or shape[1] > 8):
        pytest.skip("no key codes for such a shape")
    case = summarised(page_summary, TWICE_LENGTHS, shape)
    scale, policies = case.query.shape[2] ** -0.5, places(TWICE_NAMES, DEVICE)
    tables, options = (case.block_table, case.seq_lens), {"page_size": size, "policies": policies}
    scoring: dict[str, Any] = {"group_reduction": "mass", "page_summary": page_summary, "policies": policies}
    budgets = ints([max(3, pages * 16 // size) for pages in TWICE_BUDGETS])
    for cluster in CLUSTERS:
        views = case.views
        scores = cuda.score_pages(
            case.query, views.summaries, *tables, page_size=size, scale=scale, cluster_size=cluster, **scoring
        )
        again = in_two_stages(case, scores, (*tables, budgets), policies, scoring, scale)
        width = scores.shape[2]
        want = reference.select_pages(again, case.seq_lens, budgets, max_page_budget=width, **options)
        for warps in warp_counts(shape, "mass"):
            chosen = torch.zeros(scores.shape, dtype=torch.uint8, device=DEVICE)
            out = run(case, budgets.tolist(), chosen=chosen, cluster_size=cluster, warps=warps, **scoring)
            choosing = budgets < reference.num_pages(case.seq_lens, size)
            assert (chosen[choosing] != cuda._as_flags(want, width)[choosing]).sum() <= 2
            attended = torch.where(choosing[:, None, None], chosen, cuda._as_flags(want, width))
            assert_near(out, case, attending(cuda._as_list(attended, width), scale))


def test_a_graph_takes_other_policies_at_every_replay() -> None:
    case = summarised("key_codes", LENGTHS, (2, 4, 128, 16, 16))
    policies = places(["mass"] * len(LENGTHS), DEVICE)
    launch: dict[str, Any] = {"group_reduction": "mass", "page_summary": "key_codes", "policies": policies}
    rows, out = (case.block_table, case.seq_lens, ints([17] * len(LENGTHS))), torch.zeros_like(case.query)
    caches = (case.views.keys, case.views.values, case.views.summaries)

    def decode() -> torch.Tensor:
        return cuda.quest_decode(case.query, *caches, *rows, page_size=16, scale=128**-0.5, out=out, **launch)

    decode()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode()
    seen = []
    for names in (NAMES, NAMES[::-1], ["window"] * len(LENGTHS), ["mass"] * len(LENGTHS), TWICE_NAMES):
        policies.copy_(places(names, DEVICE))
        graph.replay()
        seen.append(out.clone())
        assert torch.equal(decode(), seen[-1])
    assert torch.equal(seen[0][7], seen[3][7]) and torch.equal(seen[0][6], seen[2][6])
    assert not torch.equal(seen[2][6], seen[3][6])
    assert torch.equal(seen[4][4], seen[3][4]) and not torch.equal(seen[4][5], seen[3][5])


def test_policies_of_another_type_are_refused() -> None:
    with pytest.raises(ValueError, match=r"policies: expected contiguous torch\.int32, got torch\.int64"):
        run(build([300]), [5], policies=places(["max"], DEVICE).long())
