"""Page summaries: min/max or codes of every written page, recomputed from the stored keys (Quest, section 3.3)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quest_vllm.ops.reference import check_page_summary
from quest_vllm.ops.triton.common import is_last_of_page, max_with_nan, min_with_nan, padded
from quest_vllm.ops.triton.key_codes import encode_pages


@triton.jit(do_not_specialize=["num_tokens"])
def update_page_summaries_kernel(
    key_ptr,  # [num_blocks, num_kv_heads, block_size, HEAD_DIM]
    summary_ptr,  # [num_blocks, num_kv_heads, pages_per_block, 2, HEAD_DIM]
    slot_ptr,  # [num_tokens] int64
    num_tokens,
    key_block_stride,
    key_head_stride,
    key_row_stride,
    summary_block_stride,
    summary_head_stride,
    summary_page_stride,
    summary_bound_stride,
    PAGE_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """One program per (token, KV head); only the one that holds its page's greatest written offset acts."""
    token = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    if is_last_of_page(slot_ptr, token, num_tokens, PAGE_SIZE, WINDOW):
        slot = tl.load(slot_ptr + token)
        block = slot // BLOCK_SIZE
        row = slot % BLOCK_SIZE
        page = row // PAGE_SIZE
        rows = page * PAGE_SIZE + tl.arange(0, PAGE_SIZE)
        dims = tl.arange(0, PADDED_DIM)
        written = (rows <= row)[:, None]
        inside = (dims < HEAD_DIM)[None, :]
        base = key_ptr + block * key_block_stride + head * key_head_stride
        keys = tl.load(base + rows[:, None] * key_row_stride + dims[None, :], mask=written & inside, other=0.0)
        keys = keys.to(tl.float32)
        low = min_with_nan(tl.where(written, keys, float("inf")), 0)
        high = max_with_nan(tl.where(written, keys, float("-inf")), 0)
        out = summary_ptr + block * summary_block_stride + head * summary_head_stride + page * summary_page_stride
        element = summary_ptr.dtype.element_ty
        tl.store(out + dims, low.to(element), mask=dims < HEAD_DIM)
        tl.store(out + summary_bound_stride + dims, high.to(element), mask=dims < HEAD_DIM)


def update_page_summaries(
    key_cache: torch.Tensor,
    summaries: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    page_size: int,
    page_summary: str = "min_max",
) -> None:
    """Recompute, in place, the summary of every page that ``slot_mapping`` (``[num_tokens]`` int64) wrote to.

    ``key_cache`` is ``[num_blocks, num_kv_heads, block_size, head_dim]``, ``summaries``
    ``[num_blocks, num_kv_heads, pages_per_block, 2, head_dim]`` in the keys' dtype; both may be strided views with
    contiguous rows. Negative slots are padding. The tokens of one page must lie within ``page_size`` positions of one
    another in ``slot_mapping``, in any order: vLLM lays a request's tokens side by side, and a page being written
    belongs to one request. Then one program alone (or several that store the same values) writes each summary.
    ``page_summary`` says what it is; raises ``ValueError`` for one that such pages cannot have.
    """
    num_tokens, head_dim = slot_mapping.shape[0], key_cache.shape[3]
    check_page_summary(page_summary, head_dim, page_size)
    if num_tokens == 0:
        return
    if page_summary == "key_codes":
        encode_pages(key_cache, summaries, slot_mapping)
        return
    update_page_summaries_kernel[(num_tokens, key_cache.shape[1])](
        key_cache,
        summaries,
        slot_mapping,
        num_tokens,
        *key_cache.stride()[:3],
        *summaries.stride()[:4],
        PAGE_SIZE=page_size,
        BLOCK_SIZE=key_cache.shape[2],
        HEAD_DIM=head_dim,
        PADDED_DIM=padded(head_dim),
        WINDOW=padded(2 * page_size),
        num_warps=4,
    )
