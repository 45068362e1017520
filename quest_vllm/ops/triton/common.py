"""What the Triton kernels share: tile sizes and small device functions. Knows nothing of vLLM."""

from __future__ import annotations

import os

import triton
import triton.language as tl

from quest_vllm.config import POLICIES, TWO_STAGE

MIN_DOT_ROWS = 16
"""``tl.dot`` needs at least 16 rows; a GQA group is padded up to it."""
MIN_DOT_COLUMNS = 8  # a GQA group is padded up to it where it is the columns

TWO_STAGE_POLICY = tl.constexpr(POLICIES.index(TWO_STAGE))

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


def padded(size: int, minimum: int = 1) -> int:
    """The next power of two that is at least ``size`` and ``minimum``: Triton tiles have power-of-two sides."""
    return max(minimum, triton.next_power_of_2(size))


def dot_tile(rows: int, row_bytes: int) -> tuple[int, int]:
    """Rows of a tile of ``row_bytes`` each, and pipeline stages.

    They fit the 99 KiB of shared memory of sm_86 and sm_89, but for float32 at 256 dims with 64-token pages (149 KiB).
    """
    return (rows, 3) if row_bytes <= 512 else (rows // 2, 2)


def cdiv(numerator: int, denominator: int) -> int:
    """Ceiling division on the host."""
    return -(-numerator // denominator)


@triton.jit
def max_with_nan(values, axis: tl.constexpr):
    """``max`` that propagates NaN, as torch's ``amax`` does (``tl.max`` drops it)."""
    has_nan = tl.max((values != values).to(tl.int32), axis=axis) > 0
    return tl.where(has_nan, float("nan"), tl.max(values, axis=axis))


@triton.jit
def min_with_nan(values, axis: tl.constexpr):
    """``min`` that propagates NaN, as torch's ``amin`` does."""
    has_nan = tl.max((values != values).to(tl.int32), axis=axis) > 0
    return tl.where(has_nan, float("nan"), tl.min(values, axis=axis))


@triton.jit
def finite_or_zero(values):
    """What may be subtracted before ``exp``: infinities would give NaN."""
    return tl.where(tl.abs(values) == float("inf"), 0.0, values)


@triton.jit
def capped(logits, softcap):
    """``softcap * tanh(logits / softcap)``: tanh(x) = 1 - 2 / (exp(2x) + 1), finite for every x."""
    return softcap * (1.0 - 2.0 / (tl.exp(2.0 * logits / softcap) + 1.0))


@triton.jit
def shortlist_ranks(budget, total, most, SINK_PAGES: tl.constexpr, RECENT_PAGES: tl.constexpr):
    """``(begin, end)``: of the pages that are not forced, best first, a row of two stages lists those of rank begin on.

    Counted from 0 and without ``end``; ``most`` is the largest budget, and none of an int32 overflows.
    """
    take = tl.minimum(tl.minimum(budget, total), most)
    forced = tl.minimum(total, SINK_PAGES + RECENT_PAGES)
    begin = tl.maximum(take // 2 - forced, 0)
    end = tl.minimum(take + (take + 1) // 2, total) - forced
    return begin, tl.where((take > forced) & (take < total), end, begin)


@triton.jit
def is_last_of_page(slot_ptr, token, num_tokens, PAGE_SIZE: tl.constexpr, WINDOW: tl.constexpr):
    """Whether token ``token`` has a slot, the greatest of those that ``slot_ptr [num_tokens]`` names in its page.

    Looks at ``WINDOW >= 2 * PAGE_SIZE`` tokens around it.
    """
    slot = tl.load(slot_ptr + token)
    near = token - PAGE_SIZE + tl.arange(0, WINDOW)
    near_slots = tl.load(slot_ptr + near, mask=(near >= 0) & (near < num_tokens), other=-1)
    same_page = (near_slots >= 0) & (near_slots // PAGE_SIZE == slot // PAGE_SIZE)
    later = tl.sum((same_page & (near_slots > slot)).to(tl.int32), axis=0)
    return (slot >= 0) & (later == 0)


@triton.jit
def dot(left, right, acc):
    """``left @ right + acc`` with float32 accumulation and no TF32 rounding."""
    if INTERPRETED:  # the interpreter keeps bfloat16 as raw bits and would multiply those; the products are the same
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, acc=acc, input_precision="ieee")
