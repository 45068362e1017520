"""Key codes: a page's bytes from its stored keys, and page scores from those (:mod:`quest_vllm.ops.key_codes`).

Coding is minima, maxima, multiplications by powers of two and one correctly rounded division, so that no bit depends on
how a compiler contracts them, and conversions are integer arithmetic: sm_80 has none to float8_e4m3fn.

Scoring runs on tensor cores. For a code c of 0 to 3, ``step * c`` has six significant bits: exact in bfloat16, like
base and rest. A wider query is the sum of several bfloat16 ones, so that nothing is rounded before the accumulation.
Pages are the rows of the products: with a query of few heads in their place, most of each would be padding.
"""

from __future__ import annotations

from math import gcd

import torch
import triton
import triton.language as tl

from quest_vllm.ops.key_codes import code_bytes
from quest_vllm.ops.triton.common import (
    MIN_DOT_COLUMNS,
    dot,
    finite_or_zero,
    is_last_of_page,
    max_with_nan,
    min_with_nan,
    padded,
)

CODED_PAGES_PER_TILE = 32
TOKENS_AT_ONCE = 2  # of each page of a tile: more take more registers than leave room for other programs
PAIRS_PER_CHUNK = 64
QUERY_PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
"""How many bfloat16 numbers, of eight significant bits each, a query's number is the sum of."""


def pairs_per_chunk(head_dim: int) -> int:
    """Pairs of channels that a kernel holds at once: they divide ``head_dim / 2``."""
    return gcd(head_dim // 2, PAIRS_PER_CHUNK)


@triton.jit
def to_fp8(x):
    """To float8_e4m3fn in an int32: nearest and ties to even, saturated at 448; every NaN is 0x7f."""
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    magnitude = tl.where(tl.abs(x) > 448.0, 448.0, tl.abs(x))
    bits = magnitude.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960  # 120 << 3: between the exponents of the two formats
    subnormal = (magnitude + 16384.0).to(tl.int32, bitcast=True) & 0xF  # 2^14: its last place is worth 2^-9
    code = tl.where(magnitude < 0.015625, subnormal, normal)
    return tl.where(x == x, code | sign, 0x7F)


@triton.jit
def fp8_magnitude(code):
    """float32 of the lower seven bits of float8_e4m3fn, an int32."""
    normal = ((code + 960) << 20).to(tl.float32, bitcast=True)
    value = tl.where(code < 8, code.to(tl.float32) * 0.001953125, normal)
    return tl.where(code == 0x7F, float("nan"), value)


@triton.jit
def to_bfloat16(x):
    """The bits of bfloat16 in an int32: nearest and ties to even; every NaN is 0x7fc0."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x == x, rounded & 0xFFFF, 0x7FC0)


@triton.jit
def to_level(x):
    """0 to 3 in an int32: nearest and ties to even; a NaN is 0."""
    x = tl.where(x > 0.0, x, 0.0)
    x = tl.where(x < 3.0, x, 3.0)
    return (x + 8388608.0).to(tl.int32, bitcast=True) & 3  # 2^23: its last place is worth 1


@triton.jit
def field_shifts():
    """Where the codes of a word's sixteen pairs begin."""
    pair = tl.arange(0, 16)
    return (pair & 14) + ((pair & 1) << 4)


@triton.jit
def first_of_pair(pair, QUARTER: tl.constexpr):
    """Channel; the pair's second lies ``QUARTER`` behind it."""
    return tl.where(pair < QUARTER, pair, pair + QUARTER)


@triton.jit
def encode_pages_kernel(
    key_ptr,  # [num_blocks, num_kv_heads, block_size, HEAD_DIM]
    coded_ptr,  # [num_blocks, num_kv_heads, pages_per_block, 4 * HEAD_DIM] uint8
    slot_ptr,  # [num_tokens] int64
    num_tokens,
    key_block_stride,
    key_head_stride,
    key_row_stride,
    coded_block_stride,
    coded_head_stride,
    coded_page_stride,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program per (token, KV head); only the one that holds its page's greatest written offset acts."""
    token = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    if is_last_of_page(slot_ptr, token, num_tokens, 16, 32):
        slot = tl.load(slot_ptr + token)
        block = slot // BLOCK_SIZE
        row = slot % BLOCK_SIZE
        page = row // 16
        tokens = tl.arange(0, 16)
        written = (page * 16 + tokens <= row)[:, None]
        base = key_ptr + block * key_block_stride + head * key_head_stride
        rows = base + (page * 16 + tokens)[:, None] * key_row_stride
        out = coded_ptr + block * coded_block_stride + head * coded_head_stride + page * coded_page_stride
        for start in tl.static_range(0, HEAD_DIM // 2, CHUNK):
            pair = start + tl.arange(0, CHUNK)
            channel = first_of_pair(pair, HEAD_DIM // 4)[None, :]
            first = tl.load(rows + channel, mask=written, other=0.0).to(tl.float32)
            second = tl.load(rows + channel + HEAD_DIM // 4, mask=written, other=0.0).to(tl.float32)
            first_low = min_with_nan(tl.where(written, first, float("inf")), 0)
            first_high = max_with_nan(tl.where(written, first, float("-inf")), 0)
            second_low = min_with_nan(tl.where(written, second, float("inf")), 0)
            second_high = max_with_nan(tl.where(written, second, float("-inf")), 0)
            swap = second_high - second_low > first_high - first_low
            low = tl.where(swap, second_low, first_low)
            step_code = to_fp8((tl.where(swap, second_high, first_high) - low) * 0.25) & 0x7F
            rest_sum = tl.where(swap, first_low, second_low) + tl.where(swap, first_high, second_high)
            step = fp8_magnitude(step_code)
            base_bits = to_bfloat16(low + step * 0.5)
            coded = tl.where(swap[None, :], second, first)
            offset = coded - (base_bits << 16).to(tl.float32, bitcast=True)[None, :]
            has_range = (step > 0.0)[None, :]  # neither 0 nor NaN
            divisor = tl.broadcast_to(tl.where(has_range, step[None, :], 1.0), (16, CHUNK))
            level = to_level(tl.div_rn(offset, divisor))
            level = tl.where(has_range & written, level, 0)
            fields = tl.reshape(level, (16, CHUNK // 16, 16)) << field_shifts()[None, None, :]
            words = tl.sum(fields, axis=2)  # disjoint bits
            word = start + 16 * tl.arange(0, CHUNK // 16)[None, :] + tokens[:, None]
            tl.store(out.to(tl.pointer_type(tl.int16)) + pair, base_bits.to(tl.int16))
            tl.store(out + HEAD_DIM + pair, (step_code | tl.where(swap, 0x80, 0)).to(tl.uint8))
            tl.store(out + HEAD_DIM + HEAD_DIM // 2 + pair, to_fp8(rest_sum * 0.5 + 0.0).to(tl.uint8))
            tl.store(out.to(tl.pointer_type(tl.int32)) + HEAD_DIM // 2 + word, words)


@triton.jit
def load_step(row, pair, valid, HEAD_DIM: tl.constexpr):
    """Whether the second channel of each pair is coded, and its step: two of ``[pages, pairs]``."""
    signed = tl.load(row[:, None] + HEAD_DIM + pair[None, :], mask=valid[:, None], other=0).to(tl.int32)
    return signed >= 0x80, fp8_magnitude(signed & 0x7F)


@triton.jit
def dot_pairs(first, second, query, used, acc, HEAD_DIM: tl.constexpr, PARTS: tl.constexpr):
    """``acc`` plus the products of both channels of pairs, bfloat16, with the query behind ``query [pairs, group]``."""
    first_rest = tl.load(query, mask=used[None, :], other=0.0).to(tl.float32)
    second_rest = tl.load(query + HEAD_DIM // 4, mask=used[None, :], other=0.0).to(tl.float32)
    for _ in tl.static_range(PARTS):
        first_part = first_rest.to(tl.bfloat16)
        second_part = second_rest.to(tl.bfloat16)
        acc = dot(second, second_part, dot(first, first_part, acc))
        first_rest -= first_part.to(tl.float32)
        second_rest -= second_part.to(tl.float32)
    return acc


@triton.jit
def score_codes_kernel(
    query_ptr,  # [num_reqs, num_kv_heads * GROUP, HEAD_DIM]
    coded_ptr,  # [num_blocks, num_kv_heads, PAGES_PER_BLOCK, 4 * HEAD_DIM] uint8
    block_table_ptr,  # [num_reqs, max_blocks] int32
    seq_lens_ptr,  # [num_reqs] int32
    score_ptr,  # [num_reqs, num_score_heads, max_pages] float32; a head's bounds for "mass"
    lse_ptr,  # [num_reqs, num_q_heads, tiles of max_pages] float32, for "mass"
    max_pages,
    scale,
    query_req_stride,
    query_head_stride,
    coded_block_stride,
    coded_head_stride,
    coded_page_stride,
    table_req_stride,
    score_req_stride,
    score_head_stride,
    lse_req_stride,
    lse_head_stride,
    PAGES_PER_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
    REDUCTION: tl.constexpr,
    FILL_TAIL: tl.constexpr,
):
    """One program per (tile of pages, KV head, request), striding over the tiles that the request really has."""
    head = tl.program_id(1).to(tl.int64)
    req = tl.program_id(2).to(tl.int64)
    length = tl.load(seq_lens_ptr + req)
    total = tl.cdiv(length, 16)
    group = tl.arange(0, PADDED_GROUP)
    used = group < GROUP
    heads = head * GROUP + group
    query_rows = query_ptr + req * query_req_stride + heads[None, :] * query_head_stride
    end = max_pages if FILL_TAIL else total
    for tile in range(tl.program_id(0), tl.cdiv(end, TILE), tl.num_programs(0)):
        page = tile * TILE + tl.arange(0, TILE)
        valid = page < total
        block = tl.load(block_table_ptr + req * table_req_stride + page // PAGES_PER_BLOCK, mask=valid, other=0)
        row = coded_ptr + head * coded_head_stride
        row = row + block.to(tl.int64) * coded_block_stride + (page % PAGES_PER_BLOCK) * coded_page_stride
        shared = tl.zeros((TILE, PADDED_GROUP), tl.float32)
        for start in tl.static_range(0, HEAD_DIM // 2, CHUNK):
            pair = start + tl.arange(0, CHUNK)
            base = tl.load(row.to(tl.pointer_type(tl.int16))[:, None] + pair[None, :], mask=valid[:, None], other=0)
            base = (base.to(tl.int32) << 16).to(tl.float32, bitcast=True)
            swap, step = load_step(row, pair, valid, HEAD_DIM)
            rest = tl.load(row[:, None] + HEAD_DIM + HEAD_DIM // 2 + pair[None, :], mask=valid[:, None], other=0)
            rest = rest.to(tl.int32)
            rest = tl.where(rest >= 0x80, -fp8_magnitude(rest & 0x7F), fp8_magnitude(rest))
            first_shared = tl.where(swap, rest, base).to(tl.bfloat16)
            second_shared = tl.where(swap, base, rest).to(tl.bfloat16)
            query = query_rows + first_of_pair(pair, HEAD_DIM // 4)[:, None]
            shared = dot_pairs(first_shared, second_shared, query, used, shared, HEAD_DIM, PARTS)
        top = tl.full((TILE, PADDED_GROUP), float("-inf"), tl.float32)
        mass = tl.zeros((TILE, PADDED_GROUP), tl.float32)
        for first_token in range(0, 16, TOKENS):
            token = first_token + tl.arange(0, TOKENS)
            own = tl.zeros((TILE * TOKENS, PADDED_GROUP), tl.float32)
            for start in tl.static_range(0, HEAD_DIM // 2, CHUNK):
                pair = start + tl.arange(0, CHUNK)
                swap, step = load_step(row, pair, valid, HEAD_DIM)
                word = HEAD_DIM // 2 + start + 16 * tl.arange(0, CHUNK // 16)[None, None, :] + token[None, :, None]
                words = row.to(tl.pointer_type(tl.int32))[:, None, None] + word
                words = tl.load(words, mask=valid[:, None, None], other=0)
                levels = (words[:, :, :, None] >> field_shifts()[None, None, None, :]) & 3
                levels = tl.reshape(levels, (TILE, TOKENS, CHUNK)).to(tl.float32)
                first_own = (levels * tl.where(swap, 0.0, step)[:, None, :]).to(tl.bfloat16)
                second_own = (levels * tl.where(swap, step, 0.0)[:, None, :]).to(tl.bfloat16)
                first_own = tl.reshape(first_own, (TILE * TOKENS, CHUNK))
                second_own = tl.reshape(second_own, (TILE * TOKENS, CHUNK))
                query = query_rows + first_of_pair(pair, HEAD_DIM // 4)[:, None]
                own = dot_pairs(first_own, second_own, query, used, own, HEAD_DIM, PARTS)
            logits = tl.reshape(own * scale, (TILE, TOKENS, PADDED_GROUP))
            has_token = page[:, None] * 16 + token[None, :] < length
            logits = tl.where(has_token[:, :, None], logits, float("-inf"))
            new_top = tl.maximum(top, tl.max(logits, axis=1))
            shift = finite_or_zero(new_top)
            mass = mass * tl.exp(top - shift) + tl.sum(tl.exp(logits - shift[:, None, :]), axis=1)  # NaN stays
            top = new_top
        bound = shared * scale + finite_or_zero(top) + tl.log(mass)
        if REDUCTION == 2 or REDUCTION == 3:
            out = score_ptr + req * score_req_stride + heads[None, :] * score_head_stride + page[:, None]
            bound = tl.where(valid[:, None], bound, float("-inf"))
            tl.store(out, bound, mask=used[None, :] & (page < end)[:, None])
        if REDUCTION == 3:
            counted = tl.where(bound == bound, bound, float("-inf"))
            row_top = finite_or_zero(tl.max(counted, axis=0))
            lse = row_top + tl.log(tl.sum(tl.exp(counted - row_top[None, :]), axis=0))
            tl.store(lse_ptr + req * lse_req_stride + heads * lse_head_stride + tile, lse, mask=used)
        if REDUCTION == 0 or REDUCTION == 1:
            if REDUCTION == 0:
                score = max_with_nan(tl.where(used[None, :], bound, float("-inf")), 1)
            else:
                score = tl.sum(tl.where(used[None, :], bound, 0.0), axis=1) / GROUP
            out = score_ptr + req * score_req_stride + head * score_head_stride + page
            tl.store(out, tl.where(valid, score, float("-inf")), mask=page < end)


def encode_pages(key_cache: torch.Tensor, summaries: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Code, in place, every page that ``slot_mapping`` wrote to; shapes as in ``update_page_summaries``."""
    num_tokens = slot_mapping.shape[0]
    head_dim = key_cache.shape[3]
    coded = code_bytes(summaries)
    encode_pages_kernel[(num_tokens, key_cache.shape[1])](
        key_cache,
        coded,
        slot_mapping,
        num_tokens,
        *key_cache.stride()[:3],
        *coded.stride()[:3],
        BLOCK_SIZE=key_cache.shape[2],
        HEAD_DIM=head_dim,
        CHUNK=pairs_per_chunk(head_dim),
        num_warps=4,
        enable_fp_fusion=False,
    )


def score_codes(
    query: torch.Tensor,
    summaries: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    reduction: int,
    scale: float,
    fill_tail: bool,
    programs: int,
) -> None:
    """Launch ``programs`` a row and KV head; arguments as ``score_pages`` prepares them."""
    num_reqs, num_q_heads, head_dim = query.shape
    num_kv_heads, pages_per_block = summaries.shape[1:3]
    coded = code_bytes(summaries)
    group = num_q_heads // num_kv_heads
    score_codes_kernel[(programs, num_kv_heads, num_reqs)](
        query,
        coded,
        block_table,
        seq_lens,
        out,
        lse,
        block_table.shape[1] * pages_per_block,
        float(scale),
        *query.stride()[:2],
        *coded.stride()[:3],
        block_table.stride(0),
        *out.stride()[:2],
        *lse.stride()[:2],
        PAGES_PER_BLOCK=pages_per_block,
        GROUP=group,
        PADDED_GROUP=padded(group, MIN_DOT_COLUMNS),
        HEAD_DIM=head_dim,
        CHUNK=pairs_per_chunk(head_dim),
        PARTS=QUERY_PARTS[query.dtype],
        TILE=CODED_PAGES_PER_TILE,
        TOKENS=TOKENS_AT_ONCE,
        REDUCTION=reduction,
        FILL_TAIL=fill_tail,
        num_warps=4,
        num_stages=1,
    )
