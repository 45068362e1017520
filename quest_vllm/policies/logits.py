"""Logits of every token of a step. Reads every key: for measuring only."""

from __future__ import annotations

import torch

from quest_vllm.policies.base import DecodeStep


def token_logits(step: DecodeStep) -> torch.Tensor:
    """``[num_reqs, num_kv_heads, group, max_blocks * block_size]`` float32, -inf at and past a request's end.

    Blocks that all rows of a prefix share are multiplied once, for all of them.
    """
    if step.logits is not None:
        return step.logits
    num_blocks, num_kv_heads, block_size, dim = step.key_cache.shape
    num_reqs, max_blocks = step.block_table.shape
    by_prefix = (step.prefixes, num_reqs // step.prefixes)
    query = step.query.float().view(*by_prefix, num_kv_heads, -1, dim) * step.scale
    # past a request's end a table may hold anything
    table = step.block_table.long().clamp(0, num_blocks - 1).view(*by_prefix, max_blocks)
    logits = query.new_empty(*query.shape[:-1], max_blocks, block_size)
    own_columns = (table != table[:, :1]).flatten(0, 1).any(dim=0).nonzero().flatten().tolist()
    for begin, end in between(own_columns, max_blocks):
        keys = step.key_cache[table[:, 0, begin:end]].float()  # [prefixes, blocks, num_kv_heads, block_size, head_dim]
        logits[..., begin:end, :] = torch.einsum("prhgd,pbhtd->prhgbt", query, keys)
    for column in own_columns:
        own = step.key_cache[table[..., column]].float()  # [prefixes, rows, num_kv_heads, block_size, head_dim]
        logits[..., column, :] = torch.einsum("prhgd,prhtd->prhgt", query, own)
    positions = torch.arange(max_blocks * block_size, device=query.device)
    hidden = positions >= step.seq_lens[:, None]
    return logits.flatten(-2).flatten(0, 1).masked_fill(hidden[:, None, None], float("-inf"))


def between(columns: list[int], count: int) -> list[tuple[int, int]]:
    """The runs ``(begin, end)`` of the ``count`` first numbers that are not among ``columns``, which ascend."""
    edges = zip([-1, *columns], [*columns, count], strict=True)
    return [(before + 1, after) for before, after in edges if before + 1 < after]
