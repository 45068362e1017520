"""Key codes: a page summary that knows each of its tokens, in the bytes of a 16-bit min/max. Eager reference.

The box of a page forgets which token was where, and so do means of neighbours: one outlying key among sixteen, a
needle, is lost in them. Here half of a page's channels keep two bits a token, the others the middle of their range:

* Channels are paired, D/4 apart: under rotary embeddings a fast channel with a slow one. Of each pair the page codes
  the one whose keys range wider; ties go to the first.
* A coded channel d with keys from ``lo`` to ``hi`` has ``step = (hi - lo) / 4``, ``base = lo + step / 2``, and for each
  token t the code ``c_td`` in 0..3 nearest to its key, so ``k_td`` is about ``base_d + step_d * c_td``.
* The other channel of the pair is ``(lo + hi) / 2`` for every token.

Only minima, maxima and correctly rounded operations on single keys: every implementation gives the same bits. With
D = head_dim, a page's first 4 * D bytes hold

    base   [D / 2]             bfloat16        of pair p; pairs 0 .. D/4 - 1 start at channel p, the others at p + D/4
    step   [D / 2]             float8_e4m3fn   the sign bit says that the second channel of the pair is coded
    rest   [D / 2]             float8_e4m3fn   of the other channel, saturated at 448
    codes  [D / 32, 16] words  uint32          word (w, t) of token t: pair 16 w + 2 i in bits 2 i and 2 i + 1, and
                                               16 w + 2 i + 1 sixteen bits above, so that a shift serves two lanes

A page's score for a query head is the log of the attention mass that the estimates promise its tokens: the log-sum-exp
of ``scale * q.k`` over those of its tokens that the request has. Knows tensors only.
"""

from __future__ import annotations

import torch

from quest_vllm.config import KEY_CODE_CHANNELS as CHANNELS  # head_dim is a multiple: pairs in whole vectors of sixteen
from quest_vllm.config import KEY_CODE_PAGE_SIZE as TOKENS

FP8_MAX = 448.0
FIELD_SHIFTS = tuple(pair // 2 * 2 + pair % 2 * 16 for pair in range(16))
"""Where a pair's code begins in its word."""


def check_sizes(head_dim: int, page_size: int) -> None:
    """Raise ``ValueError`` unless pages of ``page_size`` keys of ``head_dim`` channels can be coded."""
    if page_size != TOKENS:
        raise ValueError(f"page_size: expected {TOKENS} with page_summary key_codes, got {page_size}")
    if head_dim % CHANNELS or head_dim <= 0:
        raise ValueError(f"head_dim: expected a multiple of {CHANNELS} with page_summary key_codes, got {head_dim}")


def code_bytes(summaries: torch.Tensor) -> torch.Tensor:
    """The codes inside ``summaries [..., 2, D]``, a view ``[..., 4 * D]`` uint8: all of 16-bit rows, or the start."""
    flat = summaries.view(torch.uint8).flatten(-2)
    if flat.data_ptr() != summaries.data_ptr():
        raise ValueError(f"summaries: expected contiguous rows, got strides {summaries.stride()}")
    return flat[..., : 4 * summaries.shape[-1]]


def split_pairs(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first and the second channel of every pair: ``[..., D]`` to twice ``[..., D / 2]``."""
    quarters = rows.unflatten(-1, (2, 2, -1))
    return quarters[..., 0, :].flatten(-2), quarters[..., 1, :].flatten(-2)


def _to_fp8(values: torch.Tensor) -> torch.Tensor:
    return torch.where(values.isnan(), float("nan"), values.clamp(-FP8_MAX, FP8_MAX)).to(torch.float8_e4m3fn)


def _to_bfloat16(values: torch.Tensor) -> torch.Tensor:
    """With one NaN, so that bytes can be compared."""
    quiet = torch.tensor(0x7FC0, dtype=torch.int16, device=values.device).view(torch.bfloat16)
    return torch.where(values.isnan(), quiet, values.bfloat16())


def encode(keys: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
    """Code pages: ``keys [..., 16, D]``, of which ``written [...]`` (1 to 16) rows count, to ``[..., 4 * D]`` uint8.

    A NaN key spoils its page alone; infinite ones saturate where they are coded.
    """
    keys = keys.float()
    hidden = (torch.arange(TOKENS, device=keys.device) >= written[..., None])[..., None]
    low = keys.masked_fill(hidden, float("inf")).amin(dim=-2)
    high = keys.masked_fill(hidden, float("-inf")).amax(dim=-2)
    (first_low, second_low), (first_high, second_high) = split_pairs(low), split_pairs(high)
    second = second_high - second_low > first_high - first_low  # [..., D / 2]
    low = torch.where(second, second_low, first_low)
    step = _to_fp8((torch.where(second, second_high, first_high) - low) * 0.25)
    base = _to_bfloat16(low + step.float() * 0.5)
    middle = torch.where(second, first_low, second_low) + torch.where(second, first_high, second_high)
    rest = _to_fp8(middle * 0.5 + 0.0)  # which zero a minimum is differs between implementations
    coded = torch.where(second[..., None, :], *reversed(split_pairs(keys)))  # [..., 16, D / 2]
    levels = (coded - base.float()[..., None, :]) / step.float()[..., None, :]
    levels = torch.where(levels > 0, levels.clamp(max=3), 0.0).round().long()  # NaN is none; ties go to even
    levels = levels.masked_fill((step.float() == 0)[..., None, :] | hidden, 0)
    shifts = torch.tensor(FIELD_SHIFTS, device=keys.device)
    words = (levels.unflatten(-1, (-1, 16)) << shifts).sum(-1).transpose(-1, -2)  # [..., D / 32, 16]
    signed = step.view(torch.uint8) & 127 | second.to(torch.uint8) << 7
    parts = (base.view(torch.uint8), signed, rest.view(torch.uint8), _little_endian(words).flatten(-3))
    return torch.cat(parts, dim=-1)


def _little_endian(words: torch.Tensor) -> torch.Tensor:
    return (words[..., None] >> torch.tensor([0, 8, 16, 24], device=words.device) & 255).to(torch.uint8)


def split_logits(query: torch.Tensor, coded: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """What a page's tokens share of their logits, and what each adds to it.

    ``query`` is ``[..., group, D]``, ``coded [..., pages, 4 * D]`` uint8; returns ``[..., group, pages]`` and ``[...,
    group, pages, 16]``, times ``scale``.
    """
    half = query.shape[-1] // 2
    base, step, rest, codes = coded.split((2 * half, half, half, 4 * half), dim=-1)
    second = step >= 128
    step = (step & 127).contiguous().view(torch.float8_e4m3fn).to(query.dtype)
    base = base.contiguous().view(torch.bfloat16).to(query.dtype)
    rest = rest.contiguous().view(torch.float8_e4m3fn).to(query.dtype)
    # each half of the query [..., group, 1, D / 2] against the pages' [..., 1, pages, D / 2]
    ours, others = (side.unsqueeze(-2) for side in split_pairs(query))
    second, step, base, rest = (part.unsqueeze(-3) for part in (second, step, base, rest))
    coded_query, other_query = torch.where(second, others, ours), torch.where(second, ours, others)
    shared = (coded_query * base + other_query * rest).sum(-1)
    levels = _levels(codes).to(query.dtype)  # [..., pages, 16, D / 2]
    own = torch.einsum("...gpd,...ptd->...gpt", coded_query * step, levels)
    return shared * scale, own * scale


def _levels(codes: torch.Tensor) -> torch.Tensor:
    """``[..., 2 * D]`` bytes to the codes ``[..., 16, D / 2]`` uint8."""
    by_token = codes.unflatten(-1, (-1, TOKENS, 4)).transpose(-3, -2)  # [..., 16, D / 32, 4]
    fields = by_token[..., None] >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=codes.device) & 3
    halves = fields.flatten(-2).unflatten(-1, (2, 8))  # [..., 16, D / 32, 2, 8]
    return halves.transpose(-1, -2).flatten(-3)


def page_logits(query: torch.Tensor, coded: torch.Tensor, tokens: torch.Tensor, *, scale: float) -> torch.Tensor:
    """Log of the mass that each page promises, ``[..., group, pages]``; -inf for one without a token.

    ``tokens [..., pages]`` int says how many of a page's tokens the request has (0 to 16); the rest as
    :func:`split_logits`.
    """
    shared, own = split_logits(query, coded, scale)
    hidden = torch.arange(TOKENS, device=tokens.device) >= tokens[..., None]
    return shared + own.masked_fill(hidden.unsqueeze(-3), float("-inf")).logsumexp(-1)
