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
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from quest_vllm.ops.api import Ops, load_ops
from quest_vllm.policies import DecodeStep, PagePolicy

BLOCK = 64  # tokens; holds whole pages of every size
ATTENTION = "quest_policy_reference"


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
    """SmolLM2 or another Llama-like model in float32 on the CPU."""

    def __init__(self, path: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.ops: Ops = load_ops("auto", "cpu", "rows")
        self._state: tuple[Prefix, Rows, Run] | None = None
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION, self._attend)

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
    def prefill(self, tokens: list[int], max_rows: int) -> Prefix:
        """Prefill ``tokens`` (a multiple of BLOCK) densely and lay keys and values out in pages."""
        if len(tokens) % BLOCK:
            raise ValueError(f"expected a multiple of {BLOCK} tokens, got {len(tokens)}")
        self.model.set_attn_implementation("sdpa")
        layers = self.model(torch.tensor([tokens]), use_cache=True, logits_to_keep=1).past_key_values.layers
        _, heads, length, dim = layers[0].keys.shape
        per_layer = length // BLOCK
        blocks = len(layers) * per_layer + max_rows
        shape = (blocks, heads, BLOCK, dim)
        prefix = Prefix(length, max_rows, torch.zeros(shape), torch.zeros(shape), {})
        for index, layer in enumerate(layers):
            own = slice(index * per_layer, (index + 1) * per_layer)
            prefix.keys[own] = layer.keys[0].view(heads, -1, BLOCK, dim).transpose(0, 1)
            prefix.values[own] = layer.values[0].view(heads, -1, BLOCK, dim).transpose(0, 1)
        return prefix

    def _summaries(self, prefix: Prefix, run: Run) -> torch.Tensor:
        """``[num_blocks, num_kv_heads, pages_per_block, 2, head_dim]`` as ``run``'s policy wants them."""
        kind = (run.page_size, run.page_summary)
        if kind not in prefix.summaries:
            blocks, heads, _, dim = prefix.keys.shape
            made = torch.zeros(blocks, heads, BLOCK // run.page_size, 2, dim)
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
        policy = None if module.layer_idx in run.dense_layers else run.policy
        selected = every_page(step) if policy is None else policy.choose(step)
        cached = (step.query, step.key_cache, prefix.values, step.block_table, step.seq_lens, selected)
        attended = self.ops.sparse_paged_attention(*cached, page_size=run.page_size, scale=scaling)
        return attended[None], None

    def _write(self, prefix: Prefix, rows: Rows, keys: torch.Tensor, values: torch.Tensor, run: Run) -> None:
        prefix.keys[rows.slots // BLOCK, :, rows.slots % BLOCK] = keys[rows.sources]
        prefix.values[rows.slots // BLOCK, :, rows.slots % BLOCK] = values[rows.sources]
        self.ops.update_page_summaries(
            prefix.keys,
            self._summaries(prefix, run),
            rows.slots,
            page_size=run.page_size,
            page_summary=run.page_summary,
        )


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
    )


def every_page(step: DecodeStep) -> torch.Tensor:
    """A selection of all pages, ``[num_reqs, num_kv_heads, max_pages]``."""
    pages = step.block_table.shape[1] * step.key_cache.shape[2] // step.page_size
    index = torch.arange(pages, dtype=torch.int32).expand(len(step.seq_lens), step.key_cache.shape[1], pages)
    return torch.where(index * step.page_size < step.seq_lens[:, None, None], index, -1)


def dense(run: Run) -> Run:
    """The same pass with every layer attending to everything."""
    return replace(run, policy=None)
