"""The C++ operations against the reference, in every packing of vLLM-CPU.

Tolerances are measured, not chosen: the reference in the test's dtype against the reference in float64.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from quest_vllm.ops import cpu, reference

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LAYOUTS = [
    ("rows", torch.bfloat16),
    ("rows", torch.float16),
    ("rows", torch.float32),
    ("vec", torch.bfloat16),
    ("vec", torch.float16),
    ("vec", torch.float32),
    ("vec16", torch.bfloat16),
    ("amx", torch.bfloat16),
]


@pytest.fixture(autouse=True, scope="module")
def _library() -> None:
    try:
        cpu.load()
    except cpu.KernelsUnavailable as error:
        pytest.skip(f"no C++ kernels: {error}")


@dataclass
class Case:
    """One batch: row-layout keys and values, and the packed views of one chunked cache, garbage where unwritten."""

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    summaries: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    page_size: int
    kv_format: str

    @property
    def scale(self) -> float:
        return self.query.shape[-1] ** -0.5

    @property
    def slots(self) -> torch.Tensor:
        """Every written slot."""
        block_size = self.keys.shape[2]
        rows = []
        for row, length in enumerate(self.seq_lens.tolist()):
            tokens = torch.arange(length)
            rows.append(self.block_table[row].long()[tokens // block_size] * block_size + tokens % block_size)
        return torch.cat(rows)

    def attend(self, selected: torch.Tensor, rows: slice = slice(None), softcap: float = 0.0) -> torch.Tensor:
        return cpu.sparse_paged_attention(
            self.query[rows],
            self.key_cache,
            self.value_cache,
            self.block_table[rows],
            self.seq_lens[rows],
            selected[rows],
            page_size=self.page_size,
            scale=self.scale,
            softcap=softcap,
            kv_format=self.kv_format,
        )

    def attend_reference(self, selected: torch.Tensor, dtype: torch.dtype, softcap: float = 0.0) -> torch.Tensor:
        return reference.sparse_paged_attention(
            self.query.to(dtype),
            self.keys.to(dtype),
            self.values.to(dtype),
            self.block_table,
            self.seq_lens,
            selected,
            page_size=self.page_size,
            scale=self.scale,
            softcap=softcap,
        )


def make_case(
    seq_lens: list[int],
    *,
    kv_format: str = "rows",
    dtype: torch.dtype = torch.float32,
    kv_heads: int = 2,
    group: int = 1,
    dim: int = 64,
    block_size: int = 64,
    page_size: int = 16,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    num_reqs = len(seq_lens)
    max_blocks = max(1, -(-max(seq_lens) // block_size)) + 1
    num_blocks = num_reqs * max_blocks + 2
    # strided: every second column of a wider table
    ids = torch.randperm(num_blocks, generator=generator)[: num_reqs * max_blocks].int().view(num_reqs, max_blocks)
    block_table = torch.full((num_reqs, 2 * max_blocks), -7, dtype=torch.int32)[:, ::2]
    block_table.copy_(ids)
    pages_per_block = block_size // page_size
    shape = (num_blocks, kv_heads, block_size, dim)
    keys, values = normal(*shape), normal(*shape)
    for row, length in enumerate(seq_lens):  # what lies past the end may be anything
        for index in range(max_blocks):
            start = min(max(length - index * block_size, 0), block_size)
            keys[ids[row, index], :, start:] = float("nan")
            values[ids[row, index], :, start:] = float("nan")
    chunk = torch.full((num_blocks, kv_heads, 2 * (block_size + pages_per_block) * dim), float("nan"), dtype=dtype)
    half = block_size * dim
    key_cache, value_cache = chunk[..., :half].view(shape), chunk[..., half : 2 * half].view(shape)
    key_cache.copy_(cpu.pack_keys(keys, kv_format))
    value_cache.copy_(cpu.pack_values(values, kv_format))
    summaries = chunk[..., 2 * half :].view(num_blocks, kv_heads, pages_per_block, 2, dim)
    query = normal(num_reqs, kv_heads * group, 2 * dim)[..., :dim]  # strided, as a slice of a fused projection
    lengths = torch.tensor(seq_lens, dtype=torch.int32)
    return Case(query, keys, values, key_cache, value_cache, summaries, block_table, lengths, page_size, kv_format)


def random_selection(case: Case, heads: int, budget: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    max_pages = case.block_table.shape[1] * (case.keys.shape[2] // case.page_size)
    scores = torch.rand(case.query.shape[0], heads, max_pages, generator=generator)
    budgets = torch.full((case.query.shape[0],), budget, dtype=torch.int32)
    return reference.select_pages(scores, case.seq_lens, budgets, page_size=case.page_size, max_page_budget=budget + 3)


def assert_close(actual: torch.Tensor, exact: torch.Tensor, low: torch.Tensor, factor: float = 2.0) -> None:
    """``actual`` may be ``factor`` times as far from ``exact`` (float64) as ``low``, the reference in its dtype."""
    assert actual.shape == exact.shape
    if actual.numel() == 0:
        return
    error, allowed = (actual.double() - exact).abs(), (low.double() - exact).abs().max() * factor + 1e-6
    worst = int(error.argmax())
    assert bool(torch.isfinite(actual).all()), "not finite"
    assert error.max() <= allowed, f"error {error.max():.3e} > {allowed:.3e} at {worst} of {tuple(actual.shape)}"


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vllm")
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("kv_format", "dtype"), [layout for layout in LAYOUTS if layout[0] != "rows"])
def test_packing_is_vllms(kv_format: str, dtype: torch.dtype, dim: int) -> None:
    from vllm import _custom_ops as ops

    if kv_format == "amx" and torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("vLLM's library for processors without AVX-512 knows no AMX packing")
    for block_size in (32, 64, 128):
        rows = torch.randn(3 * block_size, 2, 2, dim).to(dtype)
        chunk = torch.zeros(3, 2, (2 * block_size + 8) * dim, dtype=dtype)
        half, shape = block_size * dim, (3, 2, block_size, dim)
        key_cache, value_cache = chunk[..., :half].view(shape), chunk[..., half : 2 * half].view(shape)
        ops.cpu_attn_reshape_and_cache(
            rows[:, 0].contiguous(),
            rows[:, 1].contiguous(),
            key_cache,
            value_cache,
            torch.arange(3 * block_size),
            kv_format,
            k_scale=1.0,
            v_scale=1.0,
            kv_cache_dtype="auto",
        )
        keys = rows[:, 0].view(3, block_size, 2, dim).transpose(1, 2)
        values = rows[:, 1].view(3, block_size, 2, dim).transpose(1, 2)
        assert torch.equal(cpu.unpack_keys(key_cache, kv_format), keys)
        assert torch.equal(cpu.unpack_values(value_cache, kv_format), values)
        assert torch.equal(cpu.pack_keys(keys, kv_format), key_cache)
        assert torch.equal(cpu.pack_values(values, kv_format), value_cache)


@pytest.mark.parametrize("page_size", [16, 32, 64])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("kv_format", "dtype"), LAYOUTS)
def test_summaries(kv_format: str, dtype: torch.dtype, dim: int, page_size: int) -> None:
    case = make_case([1, 0, 130, 16, 47], kv_format=kv_format, dtype=dtype, dim=dim, page_size=page_size)
    slots = torch.cat([case.slots.flip(0), torch.tensor([-1, -1])])
    expected = case.summaries.clone()
    reference.update_page_summaries(case.keys, expected, slots, page_size=page_size)
    for _ in range(2):  # idempotent
        cpu.update_page_summaries(case.key_cache, case.summaries, slots, page_size=page_size, kv_format=kv_format)
        assert torch.equal(torch.nan_to_num(case.summaries, 1e4), torch.nan_to_num(expected, 1e4))
    assert torch.equal(cpu.unpack_keys(case.key_cache, kv_format).nan_to_num(7), case.keys.nan_to_num(7))


def test_summaries_of_nothing() -> None:
    case = make_case([40])
    before = case.summaries.clone()
    for slots in ([], [-1, -5]):
        slot_mapping = torch.tensor(slots, dtype=torch.int64)
        cpu.update_page_summaries(case.key_cache, case.summaries, slot_mapping, page_size=16)
    assert torch.equal(case.summaries.nan_to_num(3), before.nan_to_num(3))


@pytest.mark.parametrize("radius", [0.25, 1.0])
@pytest.mark.parametrize("group_reduction", reference.GROUP_REDUCTIONS)
@pytest.mark.parametrize("group", [1, 3, 4, 5, 8, 12])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores(dtype: torch.dtype, group: int, group_reduction: str, radius: float) -> None:
    for dim in (64, 80, 256):
        case = make_case([0, 1, 2100, 16, 200], dtype=dtype, group=group, dim=dim)
        reference.update_page_summaries(case.keys, case.summaries, case.slots, page_size=16)
        rest = (case.block_table, case.seq_lens)
        options: dict[str, Any] = {"page_size": 16, "group_reduction": group_reduction, "bound_radius": radius}
        options["scale"] = case.scale
        actual = cpu.score_pages(case.query, case.summaries, *rest, **options)
        low = reference.score_pages(case.query, case.summaries, *rest, **options)
        exact = reference.score_pages(case.query.double(), case.summaries.double(), *rest, **options)
        valid = torch.isfinite(low)
        assert torch.equal(torch.isneginf(actual), ~valid)
        assert_close(actual[valid], exact[valid].double(), low[valid], factor=4)


def test_infinite_and_nan_pages_under_mass() -> None:
    case = make_case([100, 0, 4000], kv_heads=1, group=3)
    reference.update_page_summaries(case.keys, case.summaries, case.slots, page_size=16)
    case.query.abs_()
    rest = (case.query, case.summaries, case.block_table, case.seq_lens)
    for value in (float("nan"), float("inf"), float("-inf")):
        for row, page in ((0, 2), (2, 130)):
            case.summaries[case.block_table[row, page // 4], 0, page % 4] = value
        options: dict[str, Any] = {"page_size": 16, "group_reduction": "mass", "scale": 0.1, "bound_radius": 0.25}
        actual, expected = cpu.score_pages(*rest, **options), reference.score_pages(*rest, **options)
        assert expected[0, 0, 2].isnan() or expected[0, 0, 2] == float("-inf")
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5, equal_nan=True)


def test_scores_refuse_unknown_reductions_and_radii() -> None:
    case = make_case([40])
    rest = (case.query, case.summaries, case.block_table, case.seq_lens)
    with pytest.raises(RuntimeError, match="expected max, mean, mass or per_query_head, got median"):
        cpu.score_pages(*rest, page_size=16, group_reduction="median")
    for radius in (-0.5, 1.25, float("nan")):
        with pytest.raises(RuntimeError, match=f"bound_radius: expected a number from 0 to 1, got {radius}"):
            cpu.score_pages(*rest, page_size=16, bound_radius=radius)


def check_selection(scores: torch.Tensor, lengths: list[int], budgets: list[int], **options: Any) -> None:
    rest = (torch.tensor(lengths, dtype=torch.int32), torch.tensor(budgets, dtype=torch.int32))
    expected = reference.select_pages(scores, *rest, page_size=16, **options)
    assert torch.equal(cpu.select_pages(scores, *rest, page_size=16, **options), expected)


@pytest.mark.parametrize(("sink_pages", "recent_pages"), [(1, 2), (0, 0), (0, 1), (3, 4)])
@pytest.mark.parametrize("kind", ["random", "ties", "special", "equal"])
def test_selection(kind: str, sink_pages: int, recent_pages: int) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [0, 1, 16, 17, 300, 4000, 4096, 2500]
    scores = torch.randn(len(lengths), 3, 256, generator=generator) * 10
    if kind == "ties":
        scores = scores.round() / 4
    elif kind == "equal":
        scores = torch.zeros_like(scores)
    elif kind == "special":
        special = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e-40, -1e-40, 3e38])
        scores = special[torch.randint(0, 8, scores.shape, generator=generator)]
    for budget in (1, 2, 3, 4, 10, 64, 300):
        options = {"sink_pages": sink_pages, "recent_pages": recent_pages}
        check_selection(scores, lengths, [budget] * len(lengths), max_page_budget=budget, **options)
    mixed = [5, 0, 1, 2, 3, 100, 17, 400]
    check_selection(scores, lengths, mixed, max_page_budget=100, sink_pages=sink_pages, recent_pages=recent_pages)


@pytest.mark.parametrize(("sink_pages", "recent_pages"), [(1, 2), (0, 0), (3, 4)])
@pytest.mark.parametrize("kind", ["flat", "peaked", "ties", "special"])
def test_selection_under_top_p(kind: str, sink_pages: int, recent_pages: int) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [0, 1, 16, 17, 300, 4000, 4096, 2500]
    scores = torch.randn(len(lengths), 3, 256, generator=generator) * (20 if kind == "peaked" else 3)
    if kind == "ties":
        scores = scores.round()
    elif kind == "special":
        special = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e-40, 3e38])
        rare = torch.rand(scores.shape, generator=generator) < 0.01
        scores = torch.where(rare, special[torch.randint(0, 7, scores.shape, generator=generator)], scores)
    options = {"sink_pages": sink_pages, "recent_pages": recent_pages, "mass_scale": 0.3}
    for budget in (1, 3, 4, 10, 64, 300):
        for wanted in (0.11, 0.5703, 0.9499, 0.999):
            top_p = torch.full((len(lengths),), wanted)
            top_p[3::4] = 1.0
            budgets = [budget] * len(lengths)
            check_selection(scores, lengths, budgets, max_page_budget=budget, top_p=top_p, **options)


@pytest.mark.parametrize(("dim", "group"), [(64, 3), (80, 4), (96, 8), (128, 1), (128, 4), (256, 2)])
@pytest.mark.parametrize(("kv_format", "dtype"), LAYOUTS)
def test_attention(kv_format: str, dtype: torch.dtype, dim: int, group: int) -> None:
    case = make_case([0, 1, 333, 16, 700], kv_format=kv_format, dtype=dtype, dim=dim, group=group)
    selected = random_selection(case, heads=2, budget=23)
    exact = case.attend_reference(selected, torch.float64)
    actual = case.attend(selected)
    assert actual.dtype == dtype
    assert not actual[0].any()
    assert_close(actual, exact, case.attend_reference(selected, dtype))


@pytest.mark.parametrize("page_size", [32, 64, 128])
@pytest.mark.parametrize(("kv_format", "dtype"), LAYOUTS)
def test_attention_over_larger_pages_and_groups(kv_format: str, dtype: torch.dtype, page_size: int) -> None:
    case = make_case([1, 1111], kv_format=kv_format, dtype=dtype, group=10, block_size=128, page_size=page_size)
    for heads, softcap in ((2, 0.0), (20, 5.0)):  # one selection for a KV head, or for each query head
        selected = random_selection(case, heads=heads, budget=6)
        exact = case.attend_reference(selected, torch.float64, softcap)
        assert_close(case.attend(selected, softcap=softcap), exact, case.attend_reference(selected, dtype, softcap))


@pytest.mark.parametrize(("kv_format", "dtype"), LAYOUTS)
def test_a_row_does_not_depend_on_its_neighbours(kv_format: str, dtype: torch.dtype) -> None:
    case = make_case([900, 3, 555, 31], kv_format=kv_format, dtype=dtype, group=4, dim=128)
    cpu.update_page_summaries(case.key_cache, case.summaries, case.slots, page_size=16, kv_format=kv_format)
    selected = random_selection(case, heads=2, budget=40)
    policy: dict[str, Any] = {"page_size": 16, "group_reduction": "mass", "bound_radius": 0.25, "scale": case.scale}
    scores = cpu.score_pages(case.query, case.summaries, case.block_table, case.seq_lens, **policy)
    together = case.attend(selected)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for row in range(4):
            alone = slice(row, row + 1)
            rest = (case.block_table[alone], case.seq_lens[alone])
            assert torch.equal(case.attend(selected, alone)[0], together[row])
            alone_scores = cpu.score_pages(case.query[alone], case.summaries, *rest, **policy)
            assert torch.equal(alone_scores[0], scores[row])
    finally:
        torch.set_num_threads(threads)


def test_pages_past_the_end_and_padding_are_skipped() -> None:
    case = make_case([100, 40], group=2)
    selected = torch.tensor([[[0, 3, 6], [2, -1, -1]], [[0, 2, -1], [-1, -1, -1]]], dtype=torch.int32)
    stray = torch.cat([torch.full((2, 2, 2), -1, dtype=torch.int32), selected], dim=-1)
    stray[:, :, 0], stray[:, :, 1] = 99999, 7
    assert torch.equal(case.attend(stray), case.attend(selected))
    assert not case.attend(selected)[1, 2:].any()


def test_empty_batch() -> None:
    case = make_case([40])
    empty = slice(0, 0)
    rest = (case.block_table[empty], case.seq_lens[empty])
    for reduction in reference.GROUP_REDUCTIONS:
        scores = cpu.score_pages(case.query[empty], case.summaries, *rest, page_size=16, group_reduction=reduction)
    selected = cpu.select_pages(scores, case.seq_lens[empty], case.seq_lens[empty], page_size=16, max_page_budget=4)
    assert selected.shape == (0, 2, 4)
    assert case.attend(torch.zeros(1, 2, 4, dtype=torch.int32), empty).shape == (0, 2, 64)


def test_bad_arguments_say_what_was_expected_and_what_came() -> None:
    case = make_case([100])
    selected = torch.zeros(1, 2, 1, dtype=torch.int32)
    arguments = [case.query, case.key_cache, case.value_cache, case.block_table, case.seq_lens, selected]

    def fails(message: str, position: int, value: torch.Tensor, **options: object) -> None:
        changed = [*arguments[:position], value, *arguments[position + 1 :]]
        with pytest.raises(RuntimeError, match=message):
            cpu.sparse_paged_attention(*changed, **{"page_size": 16, "scale": 1.0, **options})  # type: ignore[arg-type]

    outside = case.block_table.clone()
    outside[0, 1] = case.key_cache.shape[0]
    fails("block_table.0, 1.: expected a block id from 0 to 4, got 5", 3, outside)
    fails("seq_lens.0.: expected 0 to 192 .*, got 193", 4, case.seq_lens + 93)
    fails("query: expected dtype Float, got Half", 0, case.query.half())
    fails("seq_lens: expected dtype Int, got Long", 4, case.seq_lens.long())
    fails("selected_pages: expected num_kv_heads 2 or num_q_heads 2", 5, selected[:, :1])
    fails("page_size: expected a multiple of 16 .* got 24", 5, selected, page_size=24)
    fails("kv_format: expected amx, vec, vec16 or rows, got neon", 5, selected, kv_format="neon")
    fails("kv_format amx: expected dtype BFloat16, got Float", 5, selected, kv_format="amx")
    fails("query: expected a tensor on cpu, got meta", 0, case.query.to("meta"))
    with pytest.raises(RuntimeError, match=r"slot_mapping.0.: expected a slot below 320, got 320"):
        cpu.update_page_summaries(case.key_cache, case.summaries, torch.tensor([320]), page_size=16)


def test_library_needs_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("QUEST_VLLM_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(cpu.KernelsUnavailable, match=r"no C.. compiler: expected CXX=no-such-compiler on PATH"):
        cpu.cpu_build.build()
