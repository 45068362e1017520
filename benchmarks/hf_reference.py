"""A Hugging Face model whose decode attention goes through our operations: one layer loop, no engine, no sampler.

A prefix is prefilled densely, by transformers. Then every token of one or more teacher-forced continuations is decoded
in one forward pass: each token is a request of its own, whose cache holds the prefix and its continuation up to itself,
with keys and values as the policy under test made them. Requests share the prefix's blocks and own their last one, so
every summary is what it would have been at that step. It equals token-by-token decoding, at a short prefill's price.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from quest_vllm.ops.api import Ops, load_ops
from quest_vllm.policies import NO_SUMMARY, DecodeStep, PagePolicy
from quest_vllm.policies.logits import token_logits

BLOCK = 64  # tokens; holds whole pages of every size
ATTENTION = "quest_policy_reference"
PREFILL = "quest_policy_prefill"
CHUNK = 256  # queries whose attention weights are held at once


@dataclass(frozen=True)
class Prefix:
    """A densely prefilled text and room for ``max_rows`` decode rows, in one paged cache for all layers.

    Layer i owns blocks ``i * length / BLOCK`` on; the last ``max_rows`` blocks serve the rows of whichever layer runs.
    """

    length: int  # tokens, a multiple of BLOCK
    max_rows: int
    keys: torch.Tensor  # [num_blocks, num_kv_heads, BLOCK, head_dim]
    values: torch.Tensor
    summaries: dict[tuple[int, str], torch.Tensor]  # by page size and page_summary, made when first needed
    attended: dict[int, torch.Tensor]  # by layer, [num_kv_heads, length] float32: see DecodeStep.attended

    @property
    def blocks(self) -> int:
        """Blocks of the text in one layer."""
        return self.length // BLOCK


@dataclass(frozen=True)
class Rows:
    """The decode rows of one pass, in the order of the flat query."""

    offset: torch.Tensor  # [rows] int64, place in its continuation
    own_block: torch.Tensor  # [rows] int64
    slots: torch.Tensor  # [writes] int64: where each row's block takes its continuation's tokens so far
    sources: torch.Tensor  # [writes] int64: the row that made each of them


@dataclass(frozen=True)
class Run:
    """How one pass attends. ``policy`` None, or a layer among ``dense_layers``: to everything."""

    policy: PagePolicy | None
    page_size: int = 16
    token_budget: int = 256
    sink_pages: int = 1
    recent_pages: int = 2
    dense_layers: tuple[int, ...] = (0, 1)

    @property
    def page_summary(self) -> str:
        """What the policy reads of a page that it has not chosen."""
        return getattr(self.policy, "page_summary", "min_max")


class ReferenceModel:
    """SmolLM2 or another Llama-like model on the CPU, its weights and cache in ``dtype``, its logits in float32."""

    def __init__(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
        self.dtype = dtype
        head = self.model.lm_head
        head.weight = torch.nn.Parameter(head.weight.float(), requires_grad=False)
        head.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
        self.ops: Ops = load_ops("auto", "cpu", "rows")
        self._state: tuple[Prefix, Rows, Run] | None = None
        self._attended: dict[int, torch.Tensor] = {}
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION, self._attend)
        ALL_ATTENTION_FUNCTIONS.register(PREFILL, self._prefill_attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(PREFILL, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])

    @property
    def shape(self) -> tuple[int, int, int]:
        """``num_kv_heads, num_q_heads, head_dim``."""
        config = self.model.config
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return config.num_key_value_heads, config.num_attention_heads, dim

    def encode(self, text: str) -> list[int]:
        """Tokens of ``text``, without special ones."""
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens

    @torch.inference_mode()
    def prefill(self, tokens: list[int], max_rows: int, keep_attended: bool = False) -> Prefix:
        """Prefill ``tokens`` (a multiple of BLOCK) densely and lay keys and values out in pages.

        ``keep_attended`` also sums up what every token was attended to, at several times the price.
        """
        if len(tokens) % BLOCK:
            raise ValueError(f"expected a multiple of {BLOCK} tokens, got {len(tokens)}")
        self.model.set_attn_implementation(PREFILL if keep_attended else "sdpa")
        self._attended = {}
        layers = self.model(torch.tensor([tokens]), use_cache=True, logits_to_keep=1).past_key_values.layers
        heads, dim, length = layers[0].keys.shape[1], layers[0].keys.shape[3], len(tokens)
        per_layer = length // BLOCK
        shape = (len(layers) * per_layer + max_rows, heads, BLOCK, dim)
        keys, values = torch.zeros(shape, dtype=self.dtype), torch.zeros(shape, dtype=self.dtype)
        for index, layer in enumerate(layers):
            own = slice(index * per_layer, (index + 1) * per_layer)
            for cache, kept in ((keys, layer.keys[0]), (values, layer.values[0])):
                cache[own] = blocks_of(kept, length)
        return Prefix(length, max_rows, keys, values, {}, self._attended)

    def _prefill_attention(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **settings: Any,
    ) -> tuple[torch.Tensor, None]:
        """transformers' own attention, after its weights have been added up where pages are chosen."""
        if window_of(module) is None:
            scaling = settings.get("scaling") or query.shape[-1] ** -0.5
            self._attended[module.layer_idx] = attention_received(query[0], key[0], scaling)
        attended: tuple[torch.Tensor, None] = ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, query, key, value, attention_mask, **settings
        )
        return attended

    def _summaries(self, prefix: Prefix, run: Run) -> torch.Tensor:
        """``[num_blocks, num_kv_heads, pages_per_block, 2, head_dim]`` as ``run``'s policy wants them."""
        kind = (run.page_size, run.page_summary)
        if kind not in prefix.summaries:
            blocks, heads, _, dim = prefix.keys.shape
            shape = (blocks, heads, BLOCK // run.page_size, 2, dim)
            if run.page_summary == NO_SUMMARY:
                prefix.summaries[kind] = torch.zeros((), dtype=self.dtype).expand(shape)
                return prefix.summaries[kind]
            made = torch.zeros(shape, dtype=self.dtype)
            slots = torch.arange((blocks - prefix.max_rows) * BLOCK)
            self.ops.update_page_summaries(
                prefix.keys, made, slots, page_size=run.page_size, page_summary=run.page_summary
            )
            prefix.summaries[kind] = made
        return prefix.summaries[kind]

    @torch.inference_mode()
    def decode(self, prefix: Prefix, continuations: list[list[int]], run: Run) -> list[torch.Tensor]:
        """Logits ``[tokens, vocabulary]`` float32 after each token of each continuation of the prefix."""
        self.model.set_attn_implementation(ATTENTION)
        rows = lay_out(prefix, [len(tokens) for tokens in continuations])
        self._state = (prefix, rows, run)
        flat = torch.tensor([[token for tokens in continuations for token in tokens]])
        logits = self.model(flat, position_ids=(prefix.length + rows.offset)[None], use_cache=False).logits[0]
        return list(logits.split([len(tokens) for tokens in continuations]))

    def _attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """transformers' attention interface: ``query [1, num_q_heads, rows, head_dim]``, keys and values alike."""
        if self._state is None:
            raise RuntimeError("decode() alone may call this attention")
        prefix, rows, run = self._state
        self._write(prefix, rows, key[0].transpose(0, 1), value[0].transpose(0, 1), run)
        step = decode_step(prefix, module.layer_idx, rows, query[0].transpose(0, 1).contiguous(), run, scaling)
        window = window_of(module)
        if window is not None:
            return attend_to_tokens(step, prefix.values, in_window(step, window))[None], None
        policy = None if module.layer_idx in run.dense_layers else run.policy
        if policy is None:
            return attend_to_tokens(step, prefix.values, in_window(step, None))[None], None
        selected = policy.choose(step)
        if run.page_size == 1:  # the operations want whole pages of sixteen
            return attend_to_tokens(step, prefix.values, as_mask(step, selected))[None], None
        cached = (step.query, step.key_cache, prefix.values, step.block_table, step.seq_lens, selected)
        attended = self.ops.sparse_paged_attention(*cached, page_size=run.page_size, scale=scaling)
        return attended[None], None

    def _write(self, prefix: Prefix, rows: Rows, keys: torch.Tensor, values: torch.Tensor, run: Run) -> None:
        prefix.keys[rows.slots // BLOCK, :, rows.slots % BLOCK] = keys[rows.sources]
        prefix.values[rows.slots // BLOCK, :, rows.slots % BLOCK] = values[rows.sources]
        summaries = self._summaries(prefix, run)
        if run.page_summary != NO_SUMMARY:
            self.ops.update_page_summaries(
                prefix.keys, summaries, rows.slots, page_size=run.page_size, page_summary=run.page_summary
            )


def window_of(module: Any) -> int | None:
    """Tokens that a sliding-window layer attends to, itself among them; None: all."""
    window = getattr(module, "sliding_window", None)
    return None if window is None else int(window)


def blocks_of(kept: torch.Tensor, length: int) -> torch.Tensor:
    """``[num_kv_heads, kept, head_dim]``, the newest of ``length`` tokens, to ``[blocks, num_kv_heads, BLOCK, dim]``.

    A sliding-window layer keeps its window alone; what it has dropped is zero, and nothing reads it.
    """
    heads, count, dim = kept.shape
    whole = kept.new_zeros(heads, length, dim)
    whole[:, length - count :] = kept
    return whole.view(heads, -1, BLOCK, dim).transpose(0, 1)


def attention_received(query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    """Causal attention weights summed over queries and the query heads of a group: ``[num_kv_heads, tokens]`` float32.

    ``query`` is ``[num_q_heads, tokens, head_dim]``, ``key`` ``[num_kv_heads, tokens, head_dim]``.
    """
    heads, tokens, dim = key.shape
    received = torch.zeros(heads, tokens)
    grouped = query.view(heads, -1, tokens, dim)
    for start in range(0, tokens, CHUNK):
        end = min(start + CHUNK, tokens)
        logits = torch.einsum("hgqd,htd->hgqt", grouped[:, :, start:end], key[:, :end]).float() * scaling
        later = torch.arange(end) > torch.arange(start, end)[:, None]
        received[:, :end] += logits.masked_fill(later, float("-inf")).softmax(-1).sum(dim=(1, 2))
    return received


def lay_out(prefix: Prefix, lengths: list[int]) -> Rows:
    """Rows of continuations of these lengths. Raises ``ValueError`` where they don't fit."""
    if sum(lengths) > prefix.max_rows or max(lengths) > BLOCK:
        raise ValueError(f"expected up to {prefix.max_rows} rows, {BLOCK} in a continuation, got {lengths}")
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    offsets = [offset for length in lengths for offset in range(length)]
    firsts = [start for start, length in zip(starts, lengths, strict=True) for _ in range(length)]
    own = [len(prefix.keys) - prefix.max_rows + row for row in range(len(offsets))]
    slots = [block * BLOCK + i for block, offset in zip(own, offsets, strict=True) for i in range(offset + 1)]
    sources = [first + i for first, offset in zip(firsts, offsets, strict=True) for i in range(offset + 1)]
    return Rows(*(torch.tensor(values) for values in (offsets, own, slots, sources)))


def decode_step(prefix: Prefix, layer: int, rows: Rows, query: torch.Tensor, run: Run, scale: float) -> DecodeStep:
    """What a policy sees of one layer."""
    count = len(rows.offset)
    table = layer * prefix.blocks + torch.arange(prefix.blocks + 1).repeat(count, 1)
    table[:, -1] = rows.own_block
    budget = -(-run.token_budget // run.page_size)
    return DecodeStep(
        query=query,
        key_cache=prefix.keys,
        summaries=prefix.summaries[run.page_size, run.page_summary],
        block_table=table.int(),
        seq_lens=(prefix.length + rows.offset + 1).int(),
        page_budgets=torch.full((count,), budget, dtype=torch.int32),
        max_page_budget=budget,
        page_size=run.page_size,
        scale=scale,
        sink_pages=run.sink_pages,
        recent_pages=run.recent_pages,
        attended=prefix.attended.get(layer),
    )


def every_page(step: DecodeStep) -> torch.Tensor:
    """A selection of all pages, ``[num_reqs, num_kv_heads, max_pages]``."""
    pages = step.block_table.shape[1] * step.key_cache.shape[2] // step.page_size
    index = torch.arange(pages, dtype=torch.int32).expand(len(step.seq_lens), step.key_cache.shape[1], pages)
    return torch.where(index * step.page_size < step.seq_lens[:, None, None], index, -1)


def in_window(step: DecodeStep, window: int | None) -> torch.Tensor:
    """``[rows, 1, tokens]`` bool: the newest ``window`` tokens of each row; None: all of them."""
    tokens = torch.arange(step.block_table.shape[1] * step.key_cache.shape[2])
    lengths = step.seq_lens[:, None]
    return ((tokens < lengths) & (tokens >= lengths - (window or tokens.numel())))[:, None]


def as_mask(step: DecodeStep, selected: torch.Tensor) -> torch.Tensor:
    """A selection of pages of one token, ``[rows, num_kv_heads, budget]``, as ``[rows, num_kv_heads, tokens]`` bool."""
    tokens = step.block_table.shape[1] * step.key_cache.shape[2]
    mask = torch.zeros(*selected.shape[:2], tokens + 1, dtype=torch.bool)
    mask.scatter_(2, torch.where(selected < 0, tokens, selected).long(), True)
    return mask[..., :tokens]


def attend_to_tokens(step: DecodeStep, values: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Attention of each row to the tokens ``kept [rows, num_kv_heads or 1, tokens]``: the query's shape and dtype.

    The prefix's values are multiplied once for all rows, which share all but their last block.
    """
    weights = token_logits(step).masked_fill(~kept[:, :, None], float("-inf")).softmax(-1)
    block = step.key_cache.shape[2]
    shared, own = step.block_table[0, :-1].long(), step.block_table[:, -1].long()
    prefix = values[shared].transpose(0, 1).flatten(1, 2).float()  # [num_kv_heads, prefix tokens, head_dim]
    out = torch.einsum("rhgt,htd->rhgd", weights[..., :-block], prefix)
    out = out + torch.einsum("rhgt,rhtd->rhgd", weights[..., -block:], values[own].float())
    return out.flatten(1, 2).to(step.query.dtype)


def dense(run: Run) -> Run:
    """The same pass with every layer attending to everything."""
    return replace(run, policy=None)
