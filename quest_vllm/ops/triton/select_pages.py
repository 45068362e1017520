"""Page selection: an exact Top-K per row by radix select, one program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quest_vllm.config import POLICIES, WINDOW
from quest_vllm.ops.triton.common import padded

MAX_TILE = 8192
WINDOW_POLICY = tl.constexpr(POLICIES.index(WINDOW))


@triton.jit
def ordered_key(score):
    """Map float32 to an int64 in [0, 2^32) that sorts like the score; NaN ranks as +inf, -0.0 as 0.0."""
    score = tl.where(score != score, float("inf"), score)
    score = tl.where(score == 0.0, 0.0, score)
    bits = score.to(tl.int32, bitcast=True)
    flipped = tl.where(bits < 0, ~bits, bits ^ -2147483648)
    return flipped.to(tl.int64) & 0xFFFFFFFF


@triton.jit
def kth_key(score_row, first, last, rank, TILE: tl.constexpr):
    """The ``rank``-th largest key (from 1) among pages ``[first, last)``, and how many of its equals are taken.

    Four passes, eight bits each: histogram the digit of the keys that share the prefix found so far.
    """
    prefix = tl.zeros((), dtype=tl.int64)
    need = rank
    digits = tl.arange(0, 256)
    for step in range(4):
        shift = 24 - 8 * step
        counts = tl.zeros((256,), dtype=tl.int32)
        for start in range(first, last, TILE):
            page = start + tl.arange(0, TILE)
            key = ordered_key(tl.load(score_row + page, mask=page < last, other=0.0))
            match = (page < last) & ((key >> (shift + 8)) == prefix)
            counts += tl.histogram(((key >> shift) & 255).to(tl.int32), 256, mask=match)
        at_least = tl.cumsum(counts, axis=0, reverse=True)
        digit = tl.max(tl.where(at_least >= need, digits, 0), axis=0)
        need -= tl.sum(tl.where(digits > digit, counts, 0), axis=0)
        prefix = (prefix << 8) | digit.to(tl.int64)
    return prefix, need


@triton.jit
def mass_from(score_row, first, last, key, peak, mass_scale, TILE: tl.constexpr):
    """Mass of the pages of ``[first, last)`` whose key is ``key`` or above."""
    mass = tl.zeros((), tl.float32)
    for start in range(first, last, TILE):
        page = start + tl.arange(0, TILE)
        score = tl.load(score_row + page, mask=page < last, other=0.0)
        mine = (page < last) & (ordered_key(score) >= key)
        mass += tl.sum(tl.where(mine, tl.exp(score * mass_scale - peak), 0.0), axis=0)
    return mass


@triton.jit
def one_mass(score_row, first, last, key, peak, mass_scale, TILE: tl.constexpr):
    """Mass of one page of ``[first, last)`` whose key is ``key``."""
    mass = tl.zeros((), tl.float32)
    for start in range(first, last, TILE):
        page = start + tl.arange(0, TILE)
        score = tl.load(score_row + page, mask=page < last, other=0.0)
        mine = (page < last) & (ordered_key(score) == key)
        mass = tl.maximum(mass, tl.max(tl.where(mine, tl.exp(score * mass_scale - peak), 0.0), axis=0))
    return mass


@triton.jit
def taken_peak(score_row, first, last, total, threshold, mass_scale, TILE: tl.constexpr):
    """Largest log mass of a taken page (forced: outside of ``[first, last)``); +inf where one is not finite."""
    peak = tl.full((), float("-inf"), tl.float32)
    for start in range(0, total, TILE):
        page = start + tl.arange(0, TILE)
        score = tl.load(score_row + page, mask=page < total, other=0.0)
        forced = (page < first) | (page >= last)
        taken = (page < total) & (forced | (ordered_key(score) >= threshold))
        log_mass = score * mass_scale
        log_mass = tl.where(log_mass < float("inf"), log_mass, float("inf"))  # NaN too
        peak = tl.maximum(peak, tl.max(tl.where(taken, log_mass, float("-inf")), axis=0))
    return peak


@triton.jit
def key_at_share(score_row, first, last, total, threshold, ties, top_p, mass_scale, TILE: tl.constexpr):
    """Raise ``(threshold, ties)`` of the budget's pages to those that hold ``top_p`` of its mass; see the reference."""
    none = tl.zeros((), tl.int64) + 0x200000000
    peak = taken_peak(score_row, first, last, total, threshold, mass_scale, TILE)
    if (threshold < none) & (peak < float("inf")) & (peak > float("-inf")):
        every = tl.zeros((), tl.int64) - 1
        forced = mass_from(score_row, 0, first, every, peak, mass_scale, TILE)
        forced += mass_from(score_row, last, total, every, peak, mass_scale, TILE)
        above = mass_from(score_row, first, last, threshold + 1, peak, mass_scale, TILE)
        equal = mass_from(score_row, first, last, threshold, peak, mass_scale, TILE) - above
        if threshold >= 0:
            equal = ties.to(tl.float32) * one_mass(score_row, first, last, threshold, peak, mass_scale, TILE)
        wanted = top_p * (forced + above + equal) - forced
        if wanted <= 0.0:
            threshold = none
        else:
            low = threshold  # the keys from here on reach it, those from high on do not
            high = none
            for _ in range(35):
                middle = (low + high) // 2
                reached = mass_from(score_row, first, last, middle, peak, mass_scale, TILE) >= wanted
                reached = reached & (middle > low)
                low = tl.where(reached, middle, low)
                high = tl.where(reached, high, tl.where(middle > threshold, middle, high))
            above = mass_from(score_row, first, last, low + 1, peak, mass_scale, TILE)
            one = one_mass(score_row, first, last, low, peak, mass_scale, TILE)
            needed = tl.ceil((wanted - above) / tl.maximum(one, 1e-37))
            needed = tl.maximum(tl.minimum(needed, 1e9), 1.0).to(tl.int32)
            ties = tl.where(low > threshold, needed, tl.minimum(ties, needed))
            threshold = low
    return threshold, ties


@triton.jit
def select_pages_kernel(
    score_ptr,  # [num_reqs, num_score_heads, max_pages] float32
    seq_lens_ptr,  # [num_reqs] int32
    budget_ptr,  # [num_reqs] int32
    top_p_ptr,  # [num_reqs] float32, unless not HAS_TOP_P
    policy_ptr,  # [num_reqs] int32, unless not HAS_POLICIES
    selected_ptr,  # [num_reqs, num_score_heads, max_page_budget] int32
    taken_ptr,  # [num_reqs, num_score_heads] int32, unless not HAS_TAKEN
    max_page_budget,
    mass_scale,
    score_req_stride,
    score_head_stride,
    selected_req_stride,
    selected_head_stride,
    taken_req_stride,
    PAGE_SIZE: tl.constexpr,
    SINK_PAGES: tl.constexpr,
    RECENT_PAGES: tl.constexpr,
    TILE: tl.constexpr,
    FILL_TAIL: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    HAS_POLICIES: tl.constexpr,
    HAS_TAKEN: tl.constexpr,
):
    """Forced pages are ranges of indices, so only the pages between them are ranked."""
    head = tl.program_id(0).to(tl.int64)
    req = tl.program_id(1).to(tl.int64)
    score_row = score_ptr + req * score_req_stride + head * score_head_stride
    selected_row = selected_ptr + req * selected_req_stride + head * selected_head_stride
    total = tl.cdiv(tl.load(seq_lens_ptr + req), PAGE_SIZE)
    take = tl.maximum(tl.minimum(tl.minimum(tl.load(budget_ptr + req), total), max_page_budget), 0)
    recent = tl.minimum(RECENT_PAGES, take)  # newest first: [total - recent, total)
    if HAS_POLICIES:
        is_window = tl.load(policy_ptr + req) == WINDOW_POLICY
        recent = tl.where(is_window, tl.maximum(recent, take - SINK_PAGES), recent)
    sink = tl.minimum(tl.minimum(SINK_PAGES, tl.maximum(total - RECENT_PAGES, 0)), take - recent)  # [0, sink)
    first = sink
    last = total - recent
    rank = take - recent - sink
    threshold = tl.zeros((), dtype=tl.int64) - 1  # every page
    ties = rank
    if rank == 0:
        threshold = threshold + 0x200000000  # no page
    elif rank < last - first:
        threshold, ties = kth_key(score_row, first, last, rank, TILE)
    if HAS_TOP_P:
        top_p = tl.load(top_p_ptr + req)
        if top_p < 1.0:
            threshold, ties = key_at_share(score_row, first, last, total, threshold, ties, top_p, mass_scale, TILE)
    written = tl.zeros((), dtype=tl.int32)
    equals = tl.zeros((), dtype=tl.int32)
    for start in range(0, tl.where(take > 0, total, 0), TILE):
        page = start + tl.arange(0, TILE)
        ranked = (page >= first) & (page < last)
        key = ordered_key(tl.load(score_row + page, mask=ranked, other=0.0))
        equal = ranked & (key == threshold)
        equal_rank = equals + tl.cumsum(equal.to(tl.int32), axis=0)
        chosen = (page < sink) | ((page >= last) & (page < total))
        chosen = chosen | (ranked & (key > threshold)) | (equal & (equal_rank <= ties))
        position = written + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
        tl.store(selected_row + position, page, mask=chosen)
        written += tl.sum(chosen.to(tl.int32), axis=0)
        equals += tl.sum(equal.to(tl.int32), axis=0)
    if HAS_TAKEN:
        tl.store(taken_ptr + req * taken_req_stride + head, written)
    if FILL_TAIL or HAS_TOP_P:  # a consumer that is told the budgets does not know where a share ends
        end = take
        if FILL_TAIL:
            end = max_page_budget
        for start in range(written, end, TILE):
            entry = start + tl.arange(0, TILE)
            tl.store(selected_row + entry, tl.full((TILE,), -1, tl.int32), mask=entry < end)


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
    out: torch.Tensor | None = None,
    taken: torch.Tensor | None = None,
    fill_tail: bool = True,
) -> torch.Tensor:
    """Choose the best pages of each row; see :func:`quest_vllm.ops.reference.select_pages`.

    ``page_scores`` is ``[num_reqs, num_score_heads, max_pages]`` float32 (read only up to each request's end),
    ``seq_lens``, ``page_budgets`` and ``policies`` are ``[num_reqs]`` int32, ``top_p`` float32. Returns ``out`` (made
    when None), ``[num_reqs, num_score_heads, max_page_budget]`` int32, ascending, -1 padded. ``fill_tail=False`` leaves
    the padding beyond a row's budget as it was: only for a consumer that is told the budgets. ``taken`` ``[num_reqs,
    num_score_heads]`` int32, its last dimension contiguous, receives the number of pages chosen.
    """
    num_reqs, num_heads, max_pages = page_scores.shape
    if out is None:
        out = torch.empty(num_reqs, num_heads, max_page_budget, dtype=torch.int32, device=page_scores.device)
    if out.numel() == 0:
        return out
    tile = min(MAX_TILE, padded(max_pages, 128))
    select_pages_kernel[(num_heads, num_reqs)](
        page_scores,
        seq_lens,
        page_budgets,
        page_budgets if top_p is None else top_p,
        page_budgets if policies is None else policies,
        out,
        seq_lens if taken is None else taken,
        max_page_budget,
        mass_scale,
        *page_scores.stride()[:2],
        *out.stride()[:2],
        0 if taken is None else taken.stride(0),
        PAGE_SIZE=page_size,
        SINK_PAGES=sink_pages,
        RECENT_PAGES=recent_pages,
        TILE=tile,
        FILL_TAIL=fill_tail,
        HAS_TOP_P=top_p is not None,
        HAS_POLICIES=policies is not None,
        HAS_TAKEN=taken is not None,
        num_warps=max(4, min(16, tile // 256)),
    )
    return out
