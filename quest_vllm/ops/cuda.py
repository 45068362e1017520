"""The operations as CUDA C++ kernels for Hopper (csrc/cuda), and the whole chain in one launch, :func:`quest_decode`.

Shapes and semantics are those of :mod:`quest_vllm.ops.reference`. The three stages run by themselves for tests and
measurement; serving uses the fused launch, in which scores and partial results never leave the chip. Every launch is
safe inside a CUDA graph. Limits, each checked: bfloat16 or float16, head_dim 64, 128 or 256, page_size a power of two
from 16 to 256, at most 16 query heads a selection (8 at head_dim 256); with key codes bfloat16, page_size 16 and at
most 8 query heads. Nothing falls back.
"""

from __future__ import annotations

import math

import torch

from quest_vllm.ops import cuda_build, key_codes
from quest_vllm.ops.build_tools import KernelsUnavailable
from quest_vllm.ops.cuda_library import launch
from quest_vllm.ops.cuda_params import (
    ATTEND,
    HOPPER,
    MOST_CODED_ROWS,
    PAGE_SUMMARIES,
    REDUCTIONS,
    SCORE,
    SELECT,
    DecodeParams,
    WriteParams,
)
from quest_vllm.ops.cuda_plan import MAX_CLUSTER, Shape, plan
from quest_vllm.ops.reference import mass_scale_of

PAGE_SIZES = (16, 32, 64, 128, 256)
MOST_STRIDE = 2**32  # elements of a cache; attention multiplies 32 bits by 32
MOST_SUMMARY_BYTES = 2**36  # the kernels count chunks of 16 bytes in 32 bits
LOG2_E = math.log2(math.e)


def check_device() -> None:
    """Raise :class:`KernelsUnavailable` unless the current GPU is a Hopper."""
    if not torch.cuda.is_available():
        raise KernelsUnavailable("no CUDA GPU is visible")
    capability = torch.cuda.get_device_capability()
    if capability[0] != HOPPER:
        raise KernelsUnavailable(f"the CUDA kernels are built for compute capability 9.0, this GPU has {capability}")


def check_layer(head_dim: int, rows: int, page_size: int, block_size: int, dtype: torch.dtype) -> None:
    """Raise :class:`KernelsUnavailable` for a layer that the kernels cannot serve; ``rows`` share a selection."""
    if dtype not in (torch.bfloat16, torch.float16):
        raise KernelsUnavailable(f"dtype: expected bfloat16 or float16, got {dtype}")
    if head_dim not in cuda_build.HEAD_DIMS:
        raise KernelsUnavailable(f"head_dim: expected one of {cuda_build.HEAD_DIMS}, got {head_dim}")
    if rows > _most_rows(head_dim):
        raise KernelsUnavailable(
            f"query heads a selection: expected at most {_most_rows(head_dim)} at head_dim {head_dim}, got {rows}"
        )
    pages = block_size // page_size
    if page_size not in PAGE_SIZES or block_size % page_size or pages & (pages - 1):
        raise KernelsUnavailable(
            f"page_size: expected one of {PAGE_SIZES} that divides the block size {block_size} into 1, 2, 4 or more "
            f"pages, got {page_size}"
        )


def check_page_summary(page_summary: str, rows: int, page_size: int, dtype: torch.dtype) -> None:
    """Raise :class:`KernelsUnavailable` for summaries that the kernels do not know, or not for such a layer."""
    if page_summary not in PAGE_SUMMARIES:
        raise KernelsUnavailable(f"page_summary: expected one of {tuple(PAGE_SUMMARIES)}, got {page_summary}")
    if page_summary == "min_max":
        return
    for name, fits, expected, got in (
        ("dtype", dtype == torch.bfloat16, "bfloat16", dtype),
        ("page_size", page_size == key_codes.TOKENS, key_codes.TOKENS, page_size),
        ("query heads a selection", rows <= MOST_CODED_ROWS, f"at most {MOST_CODED_ROWS}", rows),
    ):
        if not fits:
            raise KernelsUnavailable(f"{name}: expected {expected} with page_summary {page_summary}, got {got}")


def _most_rows(head_dim: int) -> int:
    return 8 if head_dim > 128 else 16


def _check_rows(tensor: torch.Tensor, name: str, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise ValueError(f"{name}: expected {dtype}, got {tensor.dtype}")
    if tensor.stride(-1) != 1 or any(stride * tensor.element_size() % 16 for stride in tensor.stride()[:-1]):
        raise ValueError(f"{name}: expected contiguous rows on 16-byte boundaries, got strides {tensor.stride()}")


def _check_index(tensor: torch.Tensor, name: str, dtype: torch.dtype = torch.int32) -> None:
    if tensor.dtype != dtype or tensor.stride(-1) != 1:
        raise ValueError(f"{name}: expected contiguous {dtype}, got {tensor.dtype} with strides {tensor.stride()}")


def _launch_decode(
    params: DecodeParams,
    shape: Shape,
    query: torch.Tensor,
    cluster_size: int | None,
    warps: int | None = None,
    timeline: torch.Tensor | None = None,
) -> None:
    """Launch with the scores where they fit."""
    planes = shape.rows if params.reduction == REDUCTIONS["mass"] else 1
    size, warps, pages = plan(shape, planes, params.page_summary, cluster_size, warps)
    params.set_cluster(size)
    if timeline is not None and timeline.shape[2] != size:
        raise ValueError(f"timeline: expected a cluster_size of {size}, got {tuple(timeline.shape)}")
    rows = (shape.num_reqs, shape.num_select_heads)
    # keeps the scratches alive until the launch is queued; the allocator reuses them in stream order
    scratch = None
    params.plane_pages = pages
    if not pages:
        params.plane_pages = -(-shape.max_pages // 8) * 8 + 16 * MAX_CLUSTER  # each CTA's part is rounded up
        scratch = torch.empty((*rows, planes, params.plane_pages), dtype=torch.float32, device=query.device)
        params.score_scratch = scratch.data_ptr()
    listed = torch.empty((*rows, shape.max_pages + MAX_CLUSTER), dtype=torch.int32, device=query.device)
    params.listed = listed.data_ptr()
    launch("quest_decode", shape.head_dim, params, query.dtype, warps)
    del scratch, listed


def _common(
    query: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    page_budgets: torch.Tensor,
    per_query_head: bool,
    page_size: int,
) -> tuple[DecodeParams, Shape]:
    """Fill what every stage needs. ``cache`` is the keys or the summaries."""
    num_reqs, num_q_heads, head_dim = query.shape
    num_kv_heads = cache.shape[1]
    select_heads = num_q_heads if per_query_head else num_kv_heads
    pages_per_block = cache.shape[2] if cache.dim() == 5 else cache.shape[2] // page_size
    _check_rows(query, "query", query.dtype)
    _check_index(block_table, "block_table")
    _check_index(seq_lens, "seq_lens")
    _check_index(page_budgets, "page_budgets")
    shape = Shape(num_reqs, select_heads, num_q_heads // select_heads, head_dim, block_table.shape[1] * pages_per_block)
    check_layer(head_dim, shape.rows, page_size, pages_per_block * page_size, query.dtype)
    params = DecodeParams(
        query=query.data_ptr(),
        block_table=block_table.data_ptr(),
        seq_lens=seq_lens.data_ptr(),
        page_budgets=page_budgets.data_ptr(),
        query_req_stride=query.stride(0),
        query_head_stride=query.stride(1),
        table_req_stride=block_table.stride(0),
        num_reqs=num_reqs,
        num_select_heads=select_heads,
        rows=shape.rows,
        heads_per_kv=num_q_heads // num_kv_heads,
        page_shift=page_size.bit_length() - 1,
        block_shift=pages_per_block.bit_length() - 1,
        max_pages=shape.max_pages,
        bound_radius=1.0,
        scale=1.0,
    )
    return params, shape


def _set_summaries(
    params: DecodeParams | WriteParams, summaries: torch.Tensor, dtype: torch.dtype, page_summary: str
) -> None:
    """``params`` knows the page's size."""
    rows = params.rows if isinstance(params, DecodeParams) else 1
    check_page_summary(page_summary, rows, 1 << params.page_shift, dtype)
    _check_rows(summaries, "summaries", dtype)
    if page_summary == "key_codes":
        key_codes.code_bytes(summaries)
    params.page_summary = PAGE_SUMMARIES[page_summary]
    params.summaries = summaries.data_ptr()
    block, head, page, bound = summaries.stride()[:4]
    size = summaries.shape[0] * block * summaries.element_size()
    if size > MOST_SUMMARY_BYTES:
        raise ValueError(f"summaries: expected at most {MOST_SUMMARY_BYTES} bytes from first to last, got {size}")
    params.summary_block_stride, params.summary_head_stride = block, head
    params.summary_page_stride, params.summary_bound_stride = page, bound


def _set_caches(
    params: DecodeParams | WriteParams, keys: torch.Tensor, values: torch.Tensor, dtype: torch.dtype
) -> None:
    _check_rows(keys, "key_cache", dtype)
    _check_rows(values, "value_cache", dtype)
    for name, cache in (("key_cache", keys), ("value_cache", values)):
        if max(cache.stride()) >= MOST_STRIDE:
            raise ValueError(f"{name}: expected strides below {MOST_STRIDE} elements, got {cache.stride()}")
    params.keys, params.values = keys.data_ptr(), values.data_ptr()
    params.key_block_stride, params.key_head_stride, params.key_row_stride = keys.stride()[:3]
    params.value_block_stride, params.value_head_stride, params.value_row_stride = values.stride()[:3]


def quest_decode(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    summaries: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    page_budgets: torch.Tensor,
    *,
    page_size: int,
    scale: float,
    softcap: float = 0.0,
    group_reduction: str = "max",
    bound_radius: float = 1.0,
    page_summary: str = "min_max",
    sink_pages: int = 1,
    recent_pages: int = 2,
    top_p: torch.Tensor | None = None,
    policies: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    taken: torch.Tensor | None = None,
    chosen: torch.Tensor | None = None,
    timeline: torch.Tensor | None = None,
    cluster_size: int | None = None,
    warps: int | None = None,
) -> torch.Tensor:
    """Score, select and attend in one launch: the composition of the reference's three operations.

    ``query`` is ``[num_reqs, num_q_heads, head_dim]``; a row whose ``page_budgets`` entry covers its context attends to
    all of it, or, with ``top_p``, to the pages that hold that share of its mass. ``taken`` as in
    :func:`quest_vllm.ops.api.compose`. Returns ``out`` (made when None), the query's shape and dtype. ``chosen`` (zeros
    ``[num_reqs, num_select_heads, max_pages]`` uint8) receives a 1 for each page of the rows that choose; ``timeline``
    (``[num_reqs, num_select_heads, cluster_size, 6]`` int64) each CTA's clock at the stages' ends. ``warps`` of a CTA:
    8, or 16 (head_dim up to 128, at most 8 query heads a selection); None chooses.
    """
    params, shape = _common(
        query,
        key_cache,
        block_table,
        seq_lens,
        page_budgets,
        group_reduction == "per_query_head",
        page_size,
    )
    out = torch.empty_like(query) if out is None else out
    if out.numel() == 0:
        return out
    _set_caches(params, key_cache, value_cache, query.dtype)
    _set_summaries(params, summaries, query.dtype, page_summary)
    _check_rows(out, "out", query.dtype)
    params.chosen, params.out = None if chosen is None else chosen.data_ptr(), out.data_ptr()
    params.out_req_stride, params.out_head_stride = out.stride()[:2]
    params.timeline = None if timeline is None else timeline.data_ptr()
    params.sink_pages, params.recent_pages = sink_pages, recent_pages
    params.reduction, params.stages = REDUCTIONS[group_reduction], SCORE | SELECT | ATTEND
    params.bound_radius, params.scale, params.softcap = bound_radius, scale, softcap
    # masses that are joined over heads are powers of two until they leave the kernel
    unit = 1.0 if group_reduction == "mass" else LOG2_E * mass_scale_of(group_reduction, scale, page_summary)
    _set_top_p(params, top_p, unit)
    _set_policies(params, policies)
    _set_taken(params, taken)
    _launch_decode(params, shape, query, cluster_size, warps, timeline)
    return out


def _set_top_p(params: DecodeParams, top_p: torch.Tensor | None, unit: float) -> None:
    """``unit``: what a score is multiplied by to be log2 of a mass."""
    params.mass_unit = unit
    if top_p is not None:
        _check_index(top_p, "top_p", torch.float32)
        params.top_p = top_p.data_ptr()


def _set_policies(params: DecodeParams, policies: torch.Tensor | None) -> None:
    if policies is not None:
        _check_index(policies, "policies")
        params.policies = policies.data_ptr()


def _set_taken(params: DecodeParams, taken: torch.Tensor | None) -> None:
    if taken is None:
        return
    _check_index(taken, "taken")
    shape = (params.num_reqs, params.num_select_heads)
    if taken.shape != shape:
        raise ValueError(f"taken: expected a shape of {shape}, got {tuple(taken.shape)}")
    params.taken, params.taken_req_stride = taken.data_ptr(), taken.stride(0)


def score_pages(
    query: torch.Tensor,
    summaries: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    page_size: int,
    group_reduction: str = "max",
    bound_radius: float = 1.0,
    scale: float = 1.0,
    page_summary: str = "min_max",
    policies: torch.Tensor | None = None,
    cluster_size: int | None = None,
) -> torch.Tensor:
    """Run the score stage alone; see :func:`quest_vllm.ops.reference.score_pages`."""
    budgets = torch.zeros_like(seq_lens)
    per_query_head = group_reduction == "per_query_head"
    params, shape = _common(query, summaries, block_table, seq_lens, budgets, per_query_head, page_size)
    size = (shape.num_reqs, shape.num_select_heads, shape.max_pages)
    scores = torch.full(size, float("-inf"), dtype=torch.float32, device=query.device)
    if scores.numel() == 0:
        return scores
    _set_summaries(params, summaries, query.dtype, page_summary)
    params.scores, params.reduction, params.stages = scores.data_ptr(), REDUCTIONS[group_reduction], SCORE
    params.bound_radius, params.scale = bound_radius, scale
    _set_policies(params, policies)
    _launch_decode(params, shape, query, cluster_size)
    return scores


def select_pages(
    page_scores: torch.Tensor,
    seq_lens: torch.Tensor,
    page_budgets: torch.Tensor,
    *,
    page_size: int,
    sink_pages: int = 1,
    recent_pages: int = 2,
    max_page_budget: int,
    top_p: torch.Tensor | None = None,
    mass_scale: float = 1.0,
    policies: torch.Tensor | None = None,
    cluster_size: int | None = None,
) -> torch.Tensor:
    """Run the selection stage alone; see :func:`quest_vllm.ops.reference.select_pages`."""
    num_reqs, heads, max_pages = page_scores.shape
    device = page_scores.device
    chosen = torch.zeros(num_reqs, heads, max_pages, dtype=torch.uint8, device=device)
    if chosen.numel() == 0 or max_page_budget == 0:
        return torch.full((num_reqs, heads, max_page_budget), -1, dtype=torch.int32, device=device)
    head_dim = cuda_build.HEAD_DIMS[0]  # the stage reads no key
    query = torch.zeros(num_reqs, heads, head_dim, dtype=torch.bfloat16, device=device)
    cache = query.new_zeros(1, heads, page_size, head_dim)
    table = torch.zeros(num_reqs, max_pages, dtype=torch.int32, device=device)
    budgets = page_budgets.clamp(max=max_page_budget)
    params, shape = _common(query, cache, table, seq_lens, budgets, False, page_size)
    scores = page_scores.contiguous()
    params.scores, params.chosen, params.stages = scores.data_ptr(), chosen.data_ptr(), SELECT
    params.sink_pages, params.recent_pages = sink_pages, recent_pages
    _set_top_p(params, top_p, LOG2_E * mass_scale)
    _set_policies(params, policies)
    _launch_decode(params, shape, query, cluster_size)
    return _as_list(chosen, max_page_budget)


def _as_list(chosen: torch.Tensor, width: int) -> torch.Tensor:
    """Flags ``[..., max_pages]`` as ascending page numbers ``[..., width]`` int32, -1 padded."""
    max_pages = chosen.shape[-1]
    pages = torch.arange(max_pages, dtype=torch.int32, device=chosen.device).expand(chosen.shape)
    ascending = pages.masked_fill(chosen == 0, max_pages).sort(dim=-1).values[..., :width]
    ascending = torch.nn.functional.pad(ascending, (0, width - ascending.shape[-1]), value=max_pages)
    return ascending.masked_fill(ascending == max_pages, -1)


def _as_flags(selected_pages: torch.Tensor, max_pages: int) -> torch.Tensor:
    """The inverse of :func:`_as_list`; entries below 0 are skipped."""
    size = (*selected_pages.shape[:-1], max_pages + 1)  # the last place takes what is skipped
    flags = torch.zeros(size, dtype=torch.uint8, device=selected_pages.device)
    places = torch.where(selected_pages < 0, max_pages, selected_pages).long()
    return flags.scatter_(-1, places, 1)[..., :max_pages].contiguous()


def sparse_paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    selected_pages: torch.Tensor,
    *,
    page_size: int,
    scale: float,
    softcap: float = 0.0,
    cluster_size: int | None = None,
) -> torch.Tensor:
    """Run the attention stage alone; see :func:`quest_vllm.ops.reference.sparse_paged_attention`."""
    out = torch.zeros_like(query)
    width = selected_pages.shape[2]
    if out.numel() == 0 or width == 0:
        return out
    budgets = torch.full_like(seq_lens, width)
    per_query_head = selected_pages.shape[1] == query.shape[1]
    params, shape = _common(query, key_cache, block_table, seq_lens, budgets, per_query_head, page_size)
    _set_caches(params, key_cache, value_cache, query.dtype)
    chosen = _as_flags(selected_pages, shape.max_pages)
    params.chosen, params.out = chosen.data_ptr(), out.data_ptr()
    params.out_req_stride, params.out_head_stride = out.stride()[:2]
    params.stages, params.scale, params.softcap = ATTEND, scale, softcap
    _launch_decode(params, shape, query, cluster_size)
    return out


def _cache_params(
    key_cache: torch.Tensor, value_cache: torch.Tensor, summaries: torch.Tensor, page_size: int, page_summary: str
) -> WriteParams:
    check_layer(key_cache.shape[3], 1, page_size, key_cache.shape[2], key_cache.dtype)
    params = WriteParams(
        num_kv_heads=key_cache.shape[1],
        page_shift=page_size.bit_length() - 1,
        block_shift=key_cache.shape[2].bit_length() - 1,
    )
    _set_summaries(params, summaries, key_cache.dtype, page_summary)
    _set_caches(params, key_cache, value_cache, key_cache.dtype)
    return params


def _set_slots(params: WriteParams, slot_mapping: torch.Tensor) -> None:
    _check_index(slot_mapping, "slot_mapping", torch.int64)
    params.slot_mapping, params.num_tokens = slot_mapping.data_ptr(), slot_mapping.shape[0]


def summary_params(
    key_cache: torch.Tensor,
    summaries: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    page_size: int,
    page_summary: str = "min_max",
) -> WriteParams:
    """Parameters of a launch that refreshes summaries and stores nothing."""
    params = _cache_params(key_cache, key_cache, summaries, page_size, page_summary)
    _set_slots(params, slot_mapping)
    return params


def update_page_summaries(
    key_cache: torch.Tensor,
    summaries: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    page_size: int,
    page_summary: str = "min_max",
) -> None:
    """Refresh the summaries alone; see :func:`quest_vllm.ops.reference.update_page_summaries`.

    The tokens of one page must lie within ``page_size`` positions of one another in ``slot_mapping``.
    """
    params = summary_params(key_cache, summaries, slot_mapping, page_size=page_size, page_summary=page_summary)
    launch("quest_write_kv", key_cache.shape[3], params, key_cache.dtype)


class KvWriter:
    """Stores keys and values into one layer's cache and refreshes the summaries, in one launch a call.

    What depends on the cache alone is worked out once: in an eager step every microsecond of Python counts. Caches and
    summaries as for :func:`quest_vllm.ops.reference.update_page_summaries`, ``value_cache`` like ``key_cache``.
    """

    def __init__(
        self,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        summaries: torch.Tensor,
        *,
        page_size: int,
        page_summary: str = "min_max",
    ) -> None:
        self._params = _cache_params(key_cache, value_cache, summaries, page_size, page_summary)
        self._head_dim, self._dtype = key_cache.shape[3], key_cache.dtype

    def fill(self, key: torch.Tensor, value: torch.Tensor, slot_mapping: torch.Tensor) -> WriteParams:
        """Parameters of the next launch, valid until the next call."""
        params = self._params
        _check_rows(key, "key", self._dtype)
        _check_rows(value, "value", self._dtype)
        _set_slots(params, slot_mapping)
        params.key, params.value = key.data_ptr(), value.data_ptr()
        params.key_token_stride, params.key_head_stride_in = key.stride()[:2]
        params.value_token_stride, params.value_head_stride_in = value.stride()[:2]
        return params

    def __call__(self, key: torch.Tensor, value: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """Store ``key`` and ``value`` ``[num_tokens, num_kv_heads, head_dim]``.

        Slots below 0 are padding; ``slot_mapping`` may be shorter than ``key``, and is ordered as for
        :func:`update_page_summaries`.
        """
        launch("quest_write_kv", self._head_dim, self.fill(key, value, slot_mapping), self._dtype, 8)
