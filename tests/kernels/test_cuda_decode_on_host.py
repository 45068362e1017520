"""csrc/cuda/quest_decode.cu run on a CPU, a cluster of CTAs at a time: scores, choice and output, without a GPU.

Threads take turns, forwards and backwards, between the places where they wait for one another; asynchronous copies are
there at once, and a product of matrices is summed in float64.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quest_vllm.ops import cuda, cuda_plan, reference
from tests.kernels.cuda_on_host import build
from tests.kernels.paged import PagedCase, make_case, places
from tests.kernels.test_cuda_codes import rounding
from tests.kernels.test_cuda_ops import assert_near, in_float64

# KV heads, group, head_dim, block size
SHAPES = [(1, 4, 128, 32), (1, 8, 128, 16), (2, 3, 64, 16), (1, 7, 64, 16), (1, 2, 256, 16)]
LENGTHS = [0, 1, 100, 583, 1300, 16 * 70 + 3]
BUDGETS = [3, 2**30, 2**30, 5, 20, 40]
CODES: dict[str, Any] = {"page_summary": "key_codes", "group_reduction": "mass"}
BOXES: dict[str, Any] = {"page_summary": "min_max", "group_reduction": "max", "bound_radius": 0.5}


@pytest.fixture(scope="module")
def library_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], ctypes.CDLL]:
    """The kernels for a head dimension and a number of warps, built once: it takes longer than all that they do."""
    folder = tmp_path_factory.mktemp("host")
    return functools.cache(lambda head_dim, warps: build("decode.cpp", head_dim, folder, warps))


@pytest.fixture
def on_host(
    library_of: Callable[[int, int], ctypes.CDLL], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Launches of the CUDA module run here, the threads' order reversed if the test's parameter says so."""
    launch_in(library_of, monkeypatch, int(getattr(request, "param", False)))


def launch_in(
    library_of: Callable[[int, int], ctypes.CDLL], monkeypatch: pytest.MonkeyPatch, backwards: int = 0
) -> None:
    """Have launches of the CUDA module run in the library for their head dimension and warps."""

    def launch(name: str, head_dim: int, params: Any, dtype: torch.dtype, warps: int = 8) -> None:
        assert name == "quest_decode"
        library = library_of(head_dim, warps)
        assert library.quest_decode_on_host(ctypes.byref(params), int(dtype == torch.bfloat16), backwards) == 0, (
            "threads wait for ever"
        )

    monkeypatch.setattr(cuda, "launch", launch)
    monkeypatch.setattr(cuda_plan, "resident_clusters", lambda *_: 10**6)
    cuda_plan.plan.cache_clear()


def make(
    shape: tuple[int, ...],
    page_summary: str,
    dtype: torch.dtype = torch.bfloat16,
    lengths: Sequence[int] = LENGTHS,
    page_size: int = 16,
) -> PagedCase:
    heads, group, dim, block = shape
    sizes = {"head_dim": dim, "block_size": block, "page_size": page_size}
    return make_case(list(lengths), num_kv_heads=heads, group=group, dtype=dtype, page_summary=page_summary, **sizes)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("policy", "size"), [(CODES, 1.0), (CODES | {"group_reduction": "mean"}, 200.0), (BOXES, 1.0)])
@pytest.mark.usefixtures("on_host")
def test_scores(shape: tuple[int, ...], size: float, policy: dict[str, Any]) -> None:
    """At 200 a page's tokens weigh differently by more than a float32 holds."""
    case = make(shape, policy["page_summary"])
    case.query.mul_(size)
    coded = policy["page_summary"] == "key_codes"
    rows = (case.block_table, case.seq_lens)
    options = {"page_size": 16, "scale": 0.09, **policy}
    scores = cuda.score_pages(case.query, case.views.summaries, *rows, cluster_size=3, **options)
    precise = in_float64(case)
    summaries = (case if coded else precise).views.summaries
    exact = reference.score_pages(precise.query, summaries, *rows, **options)
    finite = exact.isfinite()
    assert torch.equal(scores.isfinite(), finite)
    own = rounding(case, 0.09) if coded else 0.0
    off = (scores - exact)[finite].abs().max()
    assert off <= own + 1e-5 * exact[finite].abs().max() + 1e-5, off


@pytest.mark.parametrize(
    ("shape", "cluster", "warps", "on_host"),
    [*((shape, 2, 8, False) for shape in SHAPES), (SHAPES[0], 3, 8, True), (SHAPES[0], 3, 16, False)],
    indirect=["on_host"],
)
@pytest.mark.parametrize(("policy", "top_p"), [(CODES, None), (CODES, 0.6), (BOXES, None)])
@pytest.mark.usefixtures("on_host")
def test_choice_and_output(
    shape: tuple[int, ...], cluster: int, warps: int, policy: dict[str, Any], top_p: float | None
) -> None:
    check(make(shape, policy["page_summary"]), BUDGETS, policy, cluster, warps, top_p)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 900), st.integers(0, 70)), min_size=1, max_size=3),
    group=st.sampled_from([1, 3, 4, 6, 8]),
    policy=st.sampled_from([CODES, BOXES, CODES | {"group_reduction": "per_query_head"}]),
    cluster=st.integers(1, 8),
)
@pytest.mark.usefixtures("on_host")
def test_any_lengths_and_budgets(rows: list[tuple[int, int]], group: int, policy: dict[str, Any], cluster: int) -> None:
    lengths, budgets = zip(*rows, strict=True)
    check(make((1, group, 128, 16), policy["page_summary"], lengths=lengths), budgets, policy, cluster)


@pytest.mark.parametrize(("shape", "top_p"), [(SHAPES[0], None), (SHAPES[1], 0.6), (SHAPES[2], None)])
@pytest.mark.parametrize("policy", [CODES, BOXES | {"group_reduction": "mass"}, BOXES])
@pytest.mark.usefixtures("on_host")
def test_rows_with_a_policy_of_their_own(shape: tuple[int, ...], top_p: float | None, policy: dict[str, Any]) -> None:
    names = ["max", "mean", "window", "max", "mean", "window"]
    if policy["group_reduction"] != "mass":  # its heads' scores are joined as they are made
        names = ["window", "max", "max", "max", "window", "window"]
    budgets = [3, 2**30, 5, 5, 20, 40]
    check(make(shape, policy["page_summary"]), budgets, policy, 3, top_p=top_p, policies=names)


@pytest.mark.parametrize(
    ("shape", "cluster", "warps", "top_p", "on_host"),
    [
        *((shape, 3, 8, None, False) for shape in SHAPES),
        (SHAPES[0], 1, 8, 0.6, True),
        (SHAPES[0], 4, 16, 0.9, False),
        (SHAPES[3], 2, 8, 0.3, False),
    ],
    indirect=["on_host"],
)
@pytest.mark.parametrize("policy", [CODES, BOXES | {"group_reduction": "mass"}])
@pytest.mark.usefixtures("on_host")
def test_two_stages(
    shape: tuple[int, ...], cluster: int, warps: int, top_p: float | None, policy: dict[str, Any]
) -> None:
    """Of rows whose shortlist is all pages but the certain ones, or fewer; of one among them that is not two-stage."""
    lengths = [1, 100, 583, 1300, 1300, 16 * 70 + 3]
    names = ["two_stage"] * 4 + ["mass", "two_stage"]
    check(
        make(shape, policy["page_summary"], lengths=lengths),
        [3, 4, 20, 11, 12, 40],
        policy,
        cluster,
        warps,
        top_p,
        policies=names,
    )


@pytest.mark.parametrize(("group", "page"), [(12, 16), (16, 64), (4, 32)])
@pytest.mark.usefixtures("on_host")
def test_two_stages_with_more_heads_pages_of_several_tiles_and_a_softcap(group: int, page: int) -> None:
    policy = BOXES | {"group_reduction": "mass"}
    case = make((1, group, 64, 128), "min_max", lengths=[0, 700, 3000], page_size=page)
    check(case, [3, 8, 9], policy, softcap=3.0, policies=["two_stage"] * 3)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.usefixtures("on_host")
def test_two_stages_of_keys_that_are_no_numbers(poison: float) -> None:
    case = make(SHAPES[0], "min_max", lengths=[583, 1300])
    block = case.block_table[1, 3]
    case.views.keys[block, :, 5, 0] = poison
    policy = BOXES | {"group_reduction": "mass"}
    reference.update_page_summaries(case.views.keys, case.views.summaries, case.slots(), page_size=16)
    check(case, [9, 11], policy, policies=["two_stage"] * 2, finite=False)


@pytest.mark.parametrize("policy", [CODES, BOXES])
@pytest.mark.usefixtures("on_host")
def test_a_row_does_not_see_its_neighbours(policy: dict[str, Any]) -> None:
    case = make(SHAPES[0], policy["page_summary"])
    caches = (case.views.keys, case.views.values, case.views.summaries)
    budgets = torch.tensor(BUDGETS, dtype=torch.int32)
    options = {"page_size": 16, "scale": 0.09, "cluster_size": 3, "warps": 8, **policy}

    def decode(rows: slice) -> torch.Tensor:
        return cuda.quest_decode(
            case.query[rows], *caches, case.block_table[rows], case.seq_lens[rows], budgets[rows], **options
        )

    together = decode(slice(None))
    for row in range(len(LENGTHS)):
        assert torch.equal(decode(slice(row, row + 1))[0], together[row])


@pytest.mark.parametrize(("group", "dtype"), [(12, torch.bfloat16), (4, torch.float16)])
@pytest.mark.usefixtures("on_host")
def test_more_heads_and_float16_with_a_softcap(group: int, dtype: torch.dtype) -> None:
    check(make((1, group, 64, 16), "min_max", dtype), BUDGETS, BOXES, softcap=3.0)


def in_two_stages(
    case: PagedCase,
    scores: torch.Tensor,
    rows: tuple[torch.Tensor, ...],
    policies: torch.Tensor | None,
    policy: dict[str, Any],
    scale: float,
    softcap: float = 0.0,
) -> torch.Tensor:
    """A kernel's own scores, of shortlisted pages by the reference's arithmetic on keys."""
    page_size, keys, log_sums = case.page_size, case.views.keys, torch.zeros(case.query.shape[:2], device=scores.device)
    options = {"page_size": page_size, "policies": policies}
    reference.score_pages(
        case.query, case.views.summaries, *rows[:2], scale=scale, log_sums=log_sums, **options | policy
    )
    listed = reference.shortlist_pages(scores, *rows[1:], max_page_budget=scores.shape[2], **options)
    softened = {"page_size": page_size, "scale": scale, "softcap": softcap}
    return reference.rerank_pages(scores, log_sums, listed, case.query, keys, *rows[:2], **softened)


def check(
    case: PagedCase,
    page_budgets: Sequence[int],
    policy: dict[str, Any],
    cluster: int = 2,
    warps: int = 8,
    top_p: float | None = None,
    softcap: float = 0.0,
    policies: Sequence[str] | None = None,
    finite: bool = True,
) -> None:
    """The fused launch chooses what the reference chooses by the scores of the stage alone, and attends to that."""
    count, head_dim, block_size = len(page_budgets), case.query.shape[2], case.views.keys.shape[2]
    page_size = case.page_size
    heads = case.query.shape[1] if policy["group_reduction"] == "per_query_head" else case.views.keys.shape[1]
    caches = (case.views.keys, case.views.values, case.views.summaries)
    rows = (case.block_table, case.seq_lens, torch.tensor(page_budgets, dtype=torch.int32))
    own = None if policies is None else places(policies)
    windows = torch.tensor([name == "window" for name in policies or [""] * count])
    shares = None if top_p is None else torch.where(windows, 1.0, torch.full((count,), top_p))
    scale = head_dim**-0.5
    chosen = torch.zeros(count, heads, case.block_table.shape[1] * block_size // page_size, dtype=torch.uint8)
    taken = torch.zeros(count, heads, dtype=torch.int32)
    launch = {
        "page_size": page_size,
        "scale": scale,
        "cluster_size": cluster,
        "warps": warps,
        "policies": own,
        **policy,
    }
    counts = {"chosen": chosen, "taken": taken}
    out = cuda.quest_decode(case.query, *caches, *rows, softcap=softcap, top_p=shares, **counts, **launch)

    launch.pop("warps")
    scores = cuda.score_pages(case.query, case.views.summaries, *rows[:2], **launch)
    unit = reference.mass_scale_of(policy["group_reduction"], scale, policy["page_summary"])
    budgets = {
        "page_size": page_size,
        "max_page_budget": chosen.shape[-1],
        "top_p": shares,
        "mass_scale": unit,
        "policies": own,
    }
    scores = in_two_stages(case, scores, rows, own, policy, scale, softcap)
    pages = reference.select_pages(scores, *rows[1:], **budgets)
    flags = cuda._as_flags(pages, chosen.shape[-1])
    choosing = rows[2] < -(-case.seq_lens // page_size)
    choosing |= torch.zeros_like(choosing) if shares is None else shares < 1
    by_rounding = 0 if top_p is None else 1  # where the share is reached to the last bit
    assert (chosen[choosing] != flags[choosing]).sum() <= by_rounding
    assert torch.equal(taken, torch.where(choosing[:, None], chosen.sum(-1), flags.sum(-1)).int())
    attended = torch.where(choosing[:, None, None], chosen, flags)
    listed = cuda._as_list(attended, chosen.shape[-1])

    def attend(of: PagedCase) -> torch.Tensor:
        return reference.sparse_paged_attention(
            of.query,
            of.views.keys,
            of.views.values,
            *rows[:2],
            listed,
            page_size=page_size,
            scale=scale,
            softcap=softcap,
        )

    if finite:
        assert_near(out, case, attend)


def test_what_32_bits_cannot_count_is_refused() -> None:
    case = make((1, 1, 64, 16), "min_max", lengths=[5])
    keys, values, summaries = case.views.keys[:1], case.views.values[:1], case.views.summaries[:1]
    rows = (case.block_table, case.seq_lens, torch.tensor([3], dtype=torch.int32))

    def apart(tensor: torch.Tensor, elements: int) -> torch.Tensor:
        return tensor.as_strided(tensor.shape, (elements, *tensor.stride()[1:]))

    for caches, message in (
        ((apart(keys, 2**32), values, summaries), r"key_cache: expected strides below 4294967296 elements, got"),
        ((keys, apart(values, 2**32), summaries), r"value_cache: expected strides below 4294967296 elements, got"),
        (
            (keys, values, apart(summaries, 2**36)),
            r"summaries: expected at most 68719476736 bytes .*, got 137438953472",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            cuda.quest_decode(case.query, *caches, *rows, page_size=16, scale=1.0)
