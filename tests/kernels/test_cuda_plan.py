"""How a fused launch is shaped: clusters and warps by what the GPU can run at a time. No GPU needed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from quest_vllm.ops import cuda_plan
from quest_vllm.ops.cuda_params import PAGE_SUMMARIES, DecodeParams

# clusters that one H100 runs at a time, by their size (cudaOccupancyMaxActiveClusters)
WITH_16_WARPS = {1: 132, 2: 66, 3: 39, 4: 30, 5: 22, 6: 17, 7: 15, 8: 15}
MAX_PAGES = 8192
CODES = PAGE_SUMMARIES["key_codes"]


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, int, int]]:
    """``_plan`` of eight KV heads on that H100: by the number of requests, and what else differs."""

    def resident(head_dim: int, warps: int, rows: int, size: int, pages: int, page_summary: int) -> int:
        most = 78 if warps == 16 else 33  # KiB of scores beside which a CTA of 16, or two of 8, fit an SM
        return WITH_16_WARPS[size] * (1 if warps == 16 or 4 * pages > most * 1024 else 2)

    monkeypatch.setattr(cuda_plan, "resident_clusters", resident)
    cuda_plan.plan.cache_clear()

    def run(num_reqs: int, rows: int = 4, head_dim: int = 128, planes: int = 4, **named: int | None) -> tuple[int, ...]:
        shape = cuda_plan.Shape(num_reqs, 8, rows, head_dim, named.pop("max_pages", None) or MAX_PAGES)
        return cuda_plan.plan(shape, planes, CODES, named.get("cluster_size"), named.get("warps"))

    return run


@pytest.fixture(autouse=True)
def clear() -> object:
    """Nothing of the pretended GPU outlives a test."""
    yield
    cuda_plan.plan.cache_clear()


@pytest.mark.parametrize(
    ("num_reqs", "cluster_size", "warps"),
    [(1, 8, 16), (2, 4, 16), (3, 4, 16), (4, 3, 16), (5, 2, 16), (8, 2, 16), (9, 2, 8), (64, 2, 8)],
)
def test_clusters_are_as_large_as_all_of_them_run_at_a_time(
    plan: Callable[..., tuple[int, int, int]], num_reqs: int, cluster_size: int, warps: int
) -> None:
    assert plan(num_reqs)[:2] == (cluster_size, warps)


def test_scores_lie_in_shared_memory_where_they_fit(plan: Callable[..., tuple[int, int, int]]) -> None:
    size, _, pages = plan(1)
    assert MAX_PAGES / size < pages <= cuda_plan.ALL_SCORE_BYTES / 4 / 4
    assert plan(1, max_pages=65536)[2] == 0


def test_eight_warps_leave_room_for_two_ctas_where_clusters_would_wait(
    plan: Callable[..., tuple[int, int, int]],
) -> None:
    size, warps, pages = plan(4, rows=16, max_pages=2 * MAX_PAGES)  # 16 warps have no registers for so many heads
    assert (size, warps, pages) == (4, 8, 0)
    assert plan(4, rows=16, max_pages=1024)[2] > 0


def test_what_is_named_stays(plan: Callable[..., tuple[int, int, int]]) -> None:
    assert plan(64, cluster_size=5, warps=16)[:2] == (5, 16)
    assert plan(1, cluster_size=5, warps=8)[:2] == (5, 8)
    assert plan(1, cluster_size=5)[:2] == (5, 16)
    assert plan(64, cluster_size=4)[:2] == (4, 8)


@pytest.mark.parametrize("size", range(1, cuda_plan.MAX_CLUSTER + 1))
def test_the_inverse_divides_every_number_of_pages(size: int) -> None:
    params = DecodeParams()
    params.set_cluster(size)
    numbers = [*range(3 * size), *(k * size + d for k in (4095, 65536, 2**27 // size - 2) for d in (-1, 0, 1))]
    assert [2 * n * params.cluster_inverse >> 32 for n in numbers] == [n // size for n in numbers]
