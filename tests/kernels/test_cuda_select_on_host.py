"""csrc/cuda's selection run on a CPU, a cluster of CTAs at a time: what it chooses, without a GPU.

Threads take turns, forwards and backwards, between the places where they wait for one another.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch

from quest_vllm.ops import cuda, cuda_plan, reference
from quest_vllm.ops.cuda_params import SELECT, DecodeParams
from tests.kernels.cuda_on_host import build
from tests.kernels.top_p import assert_same_choice

SHARES = [0.05, 0.3, 0.5703, 0.9, 0.9499, 0.999]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build("decode.cpp", 64, tmp_path_factory.mktemp("host"))


@pytest.fixture
def select(library: ctypes.CDLL) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """The selection stage: flags ``[num_reqs, heads, max_pages]`` and counts of pages ``[num_reqs, heads]``."""

    def run(
        scores: torch.Tensor,
        pages: list[int],
        budgets: list[int],
        top_p: torch.Tensor | None = None,
        mass_scale: float = 1.0,
        cluster: int = 3,
        backwards: bool = False,
        forced: tuple[int, int] = (1, 2),
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_reqs, heads, max_pages = scores.shape
        lengths, budget = ints([16 * n - 5 if n else 0 for n in pages]), ints(budgets)
        query = torch.zeros(num_reqs, heads, 64, dtype=torch.bfloat16)
        cache, table = query.new_zeros(1, heads, 16, 64), torch.zeros(num_reqs, max_pages, dtype=torch.int32)
        params, _ = cuda._common(query, cache, table, lengths, budget, False, 16)
        listed = torch.empty(num_reqs, heads, max_pages + cuda_plan.MAX_CLUSTER, dtype=torch.int32)
        chosen = torch.zeros(num_reqs, heads, max_pages, dtype=torch.uint8)
        taken = torch.full((num_reqs, heads + 3), -7, dtype=torch.int32)[:, :heads]
        params.scores, params.chosen, params.stages = scores.data_ptr(), chosen.data_ptr(), SELECT
        params.listed, params.plane_pages = listed.data_ptr(), max_pages + 8
        params.sink_pages, params.recent_pages = forced
        params.set_cluster(cluster)
        cuda._set_top_p(params, top_p, cuda.LOG2_E * mass_scale)
        cuda._set_taken(params, taken)
        assert library.quest_decode_on_host(ctypes.byref(params), 1, int(backwards)) == 0, "threads wait for ever"
        assert torch.equal(taken, chosen.sum(-1).int())
        return chosen.bool(), taken

    return run


def ints(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def of_reference(
    scores: torch.Tensor, pages: list[int], budgets: list[int], forced: tuple[int, int] = (1, 2), **options: object
) -> torch.Tensor:
    """The reference's choice as flags."""
    lengths, width = ints([16 * n - 5 if n else 0 for n in pages]), scores.shape[2]
    named = {"page_size": 16, "sink_pages": forced[0], "recent_pages": forced[1], "max_page_budget": width}
    return cuda._as_flags(reference.select_pages(scores, lengths, ints(budgets), **named, **options), width).bool()


def scores_of(kind: str, pages: int, rows: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(pages)
    scores = torch.randn(rows, 2, pages, generator=generator) * {"flat": 0.3, "peaked": 20.0}.get(kind, 3.0)
    if kind == "ties":
        scores = (scores * 2).round() / 2
    elif kind == "constant":
        scores.zero_()
    elif kind == "low":
        scores[:] = torch.where(torch.rand(scores.shape, generator=generator) < 0.6, float("-inf"), scores)
    elif kind == "sink":
        scores[..., 0] += 60
    elif kind == "outlier":  # most pages fall into one bin
        scores[..., pages // 3] = -1e5
    return scores


@pytest.mark.parametrize("kind", ["normal", "ties", "constant", "low"])
@pytest.mark.parametrize("pages", [40, 1300])
def test_the_budgets_pages_are_the_references(select: Callable, kind: str, pages: int) -> None:
    scores = scores_of(kind, pages)
    for budgets in ([1, 3, 4], [pages // 3, pages - 1, pages], [2 * pages, 0, 30]):
        lengths = [pages, pages - 2, pages // 2]
        want = of_reference(scores, lengths, budgets)
        assert torch.equal(select(scores, lengths, budgets)[0], want)
        one = torch.tensor([1.0, 2.0, float("nan")])
        assert torch.equal(select(scores, lengths, budgets, one)[0], want)


@pytest.mark.parametrize("kind", ["normal", "flat", "peaked", "ties", "constant", "low", "sink", "outlier"])
@pytest.mark.parametrize("pages", [7, 40, 300, 1300])
@pytest.mark.parametrize("wanted", SHARES)
def test_a_share_of_the_mass_is_the_references(select: Callable, kind: str, pages: int, wanted: float) -> None:
    scores, lengths = scores_of(kind, pages), [pages, pages - 2, pages // 2]
    top_p = torch.tensor([wanted, wanted, 1 - wanted / 2])
    for budgets in ([pages, pages // 2, pages], [3, 2 * pages, 5]):
        whole = of_reference(scores, lengths, budgets)
        want = of_reference(scores, lengths, budgets, top_p=top_p, mass_scale=0.3)
        got, _ = select(scores, lengths, budgets, top_p, 0.3)
        assert_same_choice(got, want, whole, scores.double() * 0.3, top_p)


@pytest.mark.parametrize("kind", ["normal", "ties", "constant"])
def test_no_order_of_threads_and_no_cluster_changes_a_share(select: Callable, kind: str) -> None:
    scores = scores_of(kind, 900)
    rows = (scores, [900, 620, 31], [900, 500, 8], torch.tensor([0.8, 0.97, 0.5]))
    want = select(*rows)[0]
    for cluster in (1, 2, 5):
        for backwards in (False, True):
            assert torch.equal(select(*rows, cluster=cluster, backwards=backwards)[0], want)


@pytest.mark.parametrize("forced", [(0, 0), (0, 1), (4, 8), (100, 100)])
def test_forced_pages_count_first(select: Callable, forced: tuple[int, int]) -> None:
    scores, lengths, budgets = scores_of("normal", 60), [60, 31, 1], [60, 20, 1]
    for wanted in SHARES:
        top_p = torch.full((3,), wanted)
        want = of_reference(scores, lengths, budgets, forced, top_p=top_p)
        got = select(scores, lengths, budgets, top_p, forced=forced)[0]
        assert_same_choice(got, want, of_reference(scores, lengths, budgets, forced), scores.double(), top_p)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_mass_that_is_not_finite_spends_the_budget(select: Callable, value: float) -> None:
    scores, lengths, budgets = scores_of("normal", 200), [200] * 3, [50, 50, 200]
    top_p = torch.full((3,), 0.5)
    scores[0, 0, 77] = scores[1, 0, 0] = scores[2, 0, 199] = value
    scores[:, 1] = float("-inf")
    whole = of_reference(scores, lengths, budgets)
    assert torch.equal(of_reference(scores, lengths, budgets, top_p=top_p), whole)
    assert torch.equal(select(scores, lengths, budgets, top_p)[0], whole)


def test_a_long_row(select: Callable) -> None:
    scores = scores_of("flat", 9000, 1)
    scores[0, 1] = scores[0, 1].round()  # thousands of equal scores
    for wanted in (0.2, 0.9, 0.9995):
        top_p = torch.tensor([wanted])
        want = of_reference(scores, [9000], [8800], top_p=top_p)
        got = select(scores, [9000], [8800], top_p, cluster=4)[0]
        assert_same_choice(got, want, of_reference(scores, [9000], [8800]), scores.double(), top_p)


def test_parameters_that_do_not_fit_are_refused() -> None:
    params = DecodeParams(num_reqs=2, num_select_heads=3)
    with pytest.raises(ValueError, match="top_p: expected contiguous torch.float32, got torch.float64"):
        cuda._set_top_p(params, torch.ones(2, dtype=torch.float64), 1.0)
    with pytest.raises(ValueError, match=r"taken: expected a shape of \(2, 3\), got \(2, 4\)"):
        cuda._set_taken(params, torch.zeros(2, 4, dtype=torch.int32))
