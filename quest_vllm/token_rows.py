"""A step's tokens as rows of attention. Host arithmetic on numpy, and what a verify step needs on the device; no vLLM.

A prefill chunk is one row. Every decode token is a row of its own, the drafts that a speculating request verifies too:
own query, context up to and including itself, its request's budget and block table. Page summaries may hold keys of
drafts behind it, and of rejected ones. That loosens the bound of a row's newest page alone, and that page is always
selected; what a row attends to ends at its own length. So drafts change nothing of it, but for the weights that
``group_reduction`` "mass" gives a group's heads: there the newest page's bound counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from quest_vllm.metadata import BoolArray, IntArray
from quest_vllm.row_buffers import RowBuffer


@dataclass(frozen=True)
class StepRows:
    """The rows of a step in the order of the flat query, all ``[num_rows]``.

    ``requests``: row of the batch; ``starts``: place of the first token in the flat query; ``query_lens``: tokens (1,
    but for prefill chunks); ``seq_lens``: context, up to and including the last token; ``lags``: tokens of the same
    request behind it; ``stored``: the request's tokens in the KV cache before the step.
    """

    requests: npt.NDArray[np.intp]
    starts: npt.NDArray[np.int64]
    query_lens: IntArray
    seq_lens: IntArray
    lags: IntArray
    stored: IntArray

    def served(self, sparse: BoolArray) -> BoolArray:
        """Rows of the requests that have a ``sparse`` row, ``[num_rows]``."""
        return np.isin(self.requests, self.requests[sparse])

    def places(self, chosen: BoolArray) -> npt.NDArray[np.int64]:
        """Places of the ``chosen`` rows' tokens in the flat query, ascending."""
        lengths = self.query_lens[chosen]
        return np.repeat(self.starts[chosen], lengths) + _within(lengths)


def step_rows(query_start: IntArray, seq_lens: IntArray, is_prefilling: BoolArray) -> StepRows:
    """Cut a step into rows.

    ``query_start`` is ``[num_reqs + 1]``; ``seq_lens`` (the step's tokens included) and ``is_prefilling`` are
    ``[num_reqs]``. A request without tokens has no row.
    """
    lengths = query_start[1:] - query_start[:-1]
    if (lengths == 1).all() and not is_prefilling.any():  # plain decode: quicker than the general way
        return _one_each(seq_lens)
    counts = np.where(is_prefilling, lengths > 0, lengths).astype(np.int32)
    requests = np.repeat(np.arange(len(lengths)), counts)
    within = _within(counts)
    lags = np.where(is_prefilling[requests], 0, lengths[requests] - 1 - within).astype(np.int32)
    return StepRows(
        requests=requests,
        starts=query_start[:-1][requests].astype(np.int64) + within,
        query_lens=np.where(is_prefilling, lengths, 1)[requests].astype(np.int32),
        seq_lens=(seq_lens[requests] - lags).astype(np.int32),
        lags=lags,
        stored=(seq_lens - lengths)[requests].astype(np.int32),
    )


def _one_each(seq_lens: IntArray) -> StepRows:
    """One decode token a request."""
    count = len(seq_lens)
    index, ones = np.arange(count), np.ones(count, np.int32)
    return StepRows(index, index, ones, seq_lens.astype(np.int32), np.zeros(count, np.int32), seq_lens - ones)


def _within(counts: IntArray) -> npt.NDArray[np.int64]:
    """``0 .. count - 1`` for each count, one after the other."""
    ends = np.cumsum(counts, dtype=np.int64)
    return np.arange(ends[-1] if ends.size else 0) - np.repeat(ends - counts, counts)


def uniform_width(query_start: IntArray) -> int:
    """Tokens a request where all have equally many, requests without tokens at the end apart; otherwise 0."""
    lengths = np.diff(query_start)
    width = int(lengths[0]) if lengths.size else 0
    busy = int(np.count_nonzero(lengths))
    return width if (lengths[:busy] == width).all() else 0


class VerifyBuffers:
    """The chain's inputs in steps of ``width`` query tokens a request, at fixed addresses for CUDA graphs.

    ``seq_lens`` and ``page_budgets`` are ``[max_tokens]`` int32 (budgets by layer: ``[layers, max_tokens]``),
    ``top_ps`` float32, ``policies`` int32, ``block_table`` ``[max_tokens, max_blocks]`` int32, ``sparse``
    ``[max_tokens]`` bool: the tokens that the chain serves. The others have length 0 in ``seq_lens``: the chain passes
    over them. ``dense_lens`` ``[max_tokens]`` int32, by request, is the reverse: one token for the requests that the
    chain serves.
    """

    def __init__(self, max_tokens: int, max_blocks: int, device: torch.device, layers: int | None = None) -> None:
        """Room for ``max_tokens`` query tokens of requests with up to ``max_blocks`` blocks."""
        self.max_tokens = max_tokens
        self.seq_lens = torch.zeros(max_tokens, dtype=torch.int32, device=device)
        self.page_budgets = RowBuffer(max_tokens, 0, torch.int32, device, layers)
        self.top_ps = RowBuffer(max_tokens, 1.0, torch.float32, device)
        self.policies = RowBuffer(max_tokens, 0, torch.int32, device)
        self.block_table = torch.zeros(max_tokens, max_blocks, dtype=torch.int32, device=device)
        self.sparse = torch.zeros(max_tokens, dtype=torch.bool, device=device)
        self.dense_lens = torch.zeros(max_tokens, dtype=torch.int32, device=device)

    def fill(self, width: int, seq_lens: torch.Tensor, block_table: torch.Tensor, num_blocks: int) -> None:
        """Spread requests over their tokens; ``page_budgets`` holds each token's already, 0 for dense requests.

        ``seq_lens`` ``[num_reqs]`` (0: padding) and ``block_table`` ``[num_reqs, >= num_blocks]`` are on the device;
        no request has more than ``num_blocks`` blocks. Waits for nothing.
        """
        num_reqs = seq_lens.shape[0]
        count = num_reqs * width
        budgets = self.page_budgets.tensor.view(-1, self.max_tokens)[0]  # sparse in one layer, sparse in all
        sparse = budgets[:count].view(num_reqs, width) > 0
        lags = torch.arange(width - 1, -1, -1, dtype=torch.int32, device=seq_lens.device)
        own = (seq_lens[:, None] - lags).clamp(min=0)
        self.sparse[:count].copy_(sparse.flatten())
        self.seq_lens[:count].copy_((own * sparse).flatten())
        self.dense_lens[:num_reqs].copy_(torch.where(sparse[:, 0], seq_lens.clamp(max=1), seq_lens))
        table = self.block_table[:count].view(num_reqs, width, -1)
        table[:, :, :num_blocks].copy_(block_table[:, None, :num_blocks].expand(-1, width, -1))
