"""Logits of every token of a step. Reads every key: for measuring only."""

from __future__ import annotations

import torch

from quest_vllm.policies.base import DecodeStep


def token_logits(step: DecodeStep) -> torch.Tensor:
    """``[num_reqs, num_kv_heads, group, max_blocks * block_size]`` float32, -inf at and past a request's end.

    Blocks that all requests share (a common prefix) are multiplied once, for all of them.
    """
    num_blocks, num_kv_heads, block_size, dim = step.key_cache.shape
    num_reqs, max_blocks = step.block_table.shape
    query = step.query.float().view(num_reqs, num_kv_heads, -1, dim) * step.scale
    # past a request's end a table may hold anything
    table = step.block_table.long().clamp(0, num_blocks - 1)
    logits = query.new_empty(*query.shape[:3], max_blocks, block_size)
    shared = (table == table[:1]).all(dim=0)
    keys = step.key_cache[table[0, shared]].float() if num_reqs else step.key_cache[:0].float()
    logits[..., shared, :] = torch.einsum("rhgd,bhtd->rhgbt", query, keys)
    for column in (~shared).nonzero().flatten().tolist():
        own = step.key_cache[table[:, column]].float()  # [num_reqs, num_kv_heads, block_size, head_dim]
        logits[..., column, :] = torch.einsum("rhgd,rhtd->rhgt", query, own)
    positions = torch.arange(max_blocks * block_size, device=query.device)
    hidden = positions >= step.seq_lens[:, None]
    return logits.flatten(-2).masked_fill(hidden[:, None, None], float("-inf"))
