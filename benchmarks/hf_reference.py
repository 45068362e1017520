"""A Hugging Face model whose decode attention goes through our operations: one layer loop, no engine, no sampler.

A prefix is prefilled densely, by transformers. Then every token of one or more teacher-forced continuations is decoded
in one forward pass: each token is a request of its own, whose cache holds the prefix and its continuation up to itself,
with keys and values as the policy under test made them. Requests share the prefix's blocks and own their last one, so
every summary is what it would have been at that step. It equals token-by-token decoding, at a short prefill's price.

On a CPU the operations are those that serve there. On a GPU they are the PyTorch ones of :mod:`shared_prefix_ops`,
and pages are attended to under a mask: float32 works, and rows are not gathered one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from shared_prefix_ops import shared_prefix_ops
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from quest_vllm.layer_budgets import LayerBudgets
from quest_vllm.ops.api import Ops, load_ops
from quest_vllm.policies import NO_SUMMARY, DecodeStep, PagePolicy
from quest_vllm.policies.logits import token_logits

BLOCK = 64  # tokens; holds whole pages of every size
ATTENTION = "quest_policy_reference"
PREFILL = "quest_policy_prefill"
CHUNK = 256  # queries whose attention weights are held at once


@dataclass(frozen=True)
class Prefix:
    """Densely prefilled texts of one length and room for ``max_rows`` decode rows, in one paged cache for all layers.

    Layer i's blocks of text n begin at ``(i * texts + n) * length / BLOCK``; the last ``max_rows`` blocks serve the
    rows of whichever layer runs.
    """

    length: int  # tokens, a multiple of BLOCK
    max_rows: int
    keys: torch.Tensor  # [num_blocks, num_kv_heads, BLOCK, head_dim]
    values: torch.Tensor
    summaries: dict[tuple[int, str], torch.Tensor]  # by page size and page_summary, made when first needed
    attended: dict[int, torch.Tensor]  # by layer, [num_kv_heads, length] float32: see DecodeStep.attended
    texts: int = 1

    @property
    def blocks(self) -> int:
        """Blocks of a text in one layer."""
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
    """How one pass attends. ``policy`` None, or a layer among ``dense_layers``: to everything.

    ``layer_pages``, by layer, stand in for the budget of all rows.
    """

    policy: PagePolicy | None
    page_size: int = 16
    token_budget: int = 256
    sink_pages: int = 1
    recent_pages: int = 2
    dense_layers: tuple[int, ...] = ()
    layer_pages: tuple[int, ...] | None = None

    def spread(self, shares: Mapping[int, float]) -> Run:
        """The same with its budget spread over layers, see :mod:`quest_vllm.layer_shares`."""
        budgets = LayerBudgets(shares, self.sink_pages + self.recent_pages)
        own = dict(zip(budgets.layers, budgets.pages(self.token_budget // self.page_size).tolist(), strict=True))
        return replace(self, layer_pages=tuple(own.get(layer, 0) for layer in range(1 + max(own))))

    @property
    def page_summary(self) -> str:
        """What the policy reads of a page that it has not chosen."""
        return getattr(self.policy, "page_summary", "min_max")


@dataclass(frozen=True)
class Pass:
    """What every layer of one decode pass shares."""

    prefix: Prefix
    rows: Rows
    run: Run
    block_table: torch.Tensor  # [rows, blocks + 1] int32: its text's of layer 0, and its own
    seq_lens: torch.Tensor  # [rows] int32
    page_budgets: torch.Tensor  # [rows] int32
    max_page_budget: int


class ReferenceModel:
    """SmolLM2 or another Llama-like model, its weights and cache in ``dtype`` on ``device``, its logits in float32."""

    def __init__(self, path: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval().to(self.device)
        self.dtype = dtype
        head = self.model.lm_head
        head.weight = torch.nn.Parameter(head.weight.float(), requires_grad=False)
        head.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
        self.masked = self.device.type != "cpu"  # attend under a mask, not to gathered pages
        self.ops: Ops = shared_prefix_ops() if self.masked else load_ops("auto", "cpu", "rows")
        self._pass: Pass | None = None
        self._attended: dict[int, torch.Tensor] | None = None
        # transformers keeps them by name for all models
        self._attention, self._prefilling = f"{ATTENTION}_{id(self)}", f"{PREFILL}_{id(self)}"
        ALL_ATTENTION_FUNCTIONS.register(self._attention, self._attend)
        ALL_ATTENTION_FUNCTIONS.register(self._prefilling, self._prefill_attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(self._prefilling, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])

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
        return self.prefill_texts([tokens], max_rows, keep_attended)

    @torch.inference_mode()
    def prefill_texts(self, texts: list[list[int]], max_rows: int, keep_attended: bool = False) -> Prefix:
        """Prefill ``texts`` of one length together; ``max_rows`` is of all. See :meth:`prefill`."""
        length = len(texts[0])
        if length % BLOCK or any(len(tokens) != length for tokens in texts):
            raise ValueError(f"expected a multiple of {BLOCK} tokens, got {[len(tokens) for tokens in texts]}")
        if keep_attended and len(texts) > 1:
            raise ValueError(f"expected one text where attention is kept, got {len(texts)}")
        self.model.set_attn_implementation(self._prefilling if keep_attended or self.masked else "sdpa")
        self._attended = {} if keep_attended else None
        inputs = torch.tensor(texts, device=self.device)
        layers = self.model(inputs, use_cache=True, logits_to_keep=1).past_key_values.layers
        heads, dim = layers[0].keys.shape[1], layers[0].keys.shape[3]
        per_layer = length // BLOCK * len(texts)
        shape = (len(layers) * per_layer + max_rows, heads, BLOCK, dim)
        keys, values = (torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2))
        for index, layer in enumerate(layers):
            own = slice(index * per_layer, (index + 1) * per_layer)
            for cache, kept in ((keys, layer.keys), (values, layer.values)):
                cache[own] = torch.cat([blocks_of(text, length) for text in kept])
        return Prefix(length, max_rows, keys, values, {}, self._attended or {}, len(texts))

    def _prefill_attention(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **settings: Any,
    ) -> tuple[torch.Tensor, None]:
        """transformers' own attention, its weights added up where pages are chosen and that is asked."""
        scaling = settings.get("scaling") or query.shape[-1] ** -0.5
        if self._attended is not None and window_of(module) is None:
            self._attended[module.layer_idx] = attention_received(query[0], key[0], scaling)
        if attention_mask is None and query.is_cuda and query.dtype == torch.float32:
            # the kernel that is fast in float32 takes no grouped heads: transformers would fall back to a plain product
            group = query.shape[1] // key.shape[1]
            repeated = (side.repeat_interleave(group, dim=1) for side in (key, value))
            out = torch.nn.functional.scaled_dot_product_attention(query, *repeated, is_causal=True, scale=scaling)
            return out.transpose(1, 2).contiguous(), None
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
                prefix.summaries[kind] = prefix.keys.new_zeros(()).expand(shape)
                return prefix.summaries[kind]
            made = prefix.keys.new_zeros(shape)
            slots = torch.arange((blocks - prefix.max_rows) * BLOCK, device=self.device)
            self.ops.update_page_summaries(
                prefix.keys, made, slots, page_size=run.page_size, page_summary=run.page_summary
            )
            prefix.summaries[kind] = made
        return prefix.summaries[kind]

    @torch.inference_mode()
    def decode(
        self, prefix: Prefix, continuations: list[list[int]], run: Run, budgets: Sequence[int] | None = None
    ) -> list[torch.Tensor]:
        """Logits ``[tokens, vocabulary]`` float32 after each token of each continuation of the prefix.

        With several texts, the continuations of each follow one another, as many rows of each. ``budgets``, one a
        continuation and in tokens, stand in for ``run.token_budget``.
        """
        self.model.set_attn_implementation(self._attention)
        lengths = [len(tokens) for tokens in continuations]
        self._pass = begin_pass(prefix, lengths, run, budgets or [run.token_budget] * len(lengths))
        flat = torch.tensor([[token for tokens in continuations for token in tokens]], device=self.device)
        positions = (prefix.length + self._pass.rows.offset)[None]
        logits = self.model(flat, position_ids=positions, use_cache=False).logits[0]
        return list(logits.split(lengths))

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
        if self._pass is None:
            raise RuntimeError("decode() alone may call this attention")
        prefix, run = self._pass.prefix, self._pass.run
        self._write(prefix, self._pass.rows, key[0].transpose(0, 1), value[0].transpose(0, 1), run)
        step = decode_step(self._pass, module.layer_idx, query[0].transpose(0, 1).contiguous(), scaling)
        window = window_of(module)
        policy = None if window is not None or module.layer_idx in run.dense_layers else run.policy
        if policy is None:
            return attend_to_tokens(step, prefix.values, in_window(step, window))[None], None
        if self.masked:  # attention needs them in any case
            step = replace(step, logits=token_logits(step))
        selected = policy.choose(step)
        if self.masked or run.page_size == 1:  # the operations want whole pages of sixteen
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
    received = torch.zeros(heads, tokens, device=key.device)
    grouped = query.view(heads, -1, tokens, dim)
    for start in range(0, tokens, CHUNK):
        end = min(start + CHUNK, tokens)
        logits = torch.einsum("hgqd,htd->hgqt", grouped[:, :, start:end], key[:, :end]).float() * scaling
        order = torch.arange(end, device=key.device)
        later = order > order[start:, None]
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
    device = prefix.keys.device
    return Rows(*(torch.tensor(values, device=device) for values in (offsets, own, slots, sources)))


def begin_pass(prefix: Prefix, lengths: list[int], run: Run, budgets: Sequence[int]) -> Pass:
    """A pass over continuations of ``lengths`` tokens at ``budgets`` tokens each."""
    rows = lay_out(prefix, lengths)
    device, count = prefix.keys.device, len(rows.offset)
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    if count % prefix.texts or not set(range(count // prefix.texts, count + 1, count // prefix.texts)) <= set(ends):
        raise ValueError(f"expected as many rows of each of {prefix.texts} texts, got {lengths}")
    table = torch.arange(prefix.blocks + 1, device=device, dtype=torch.int32).repeat(count, 1)
    table += torch.arange(prefix.texts, device=device).repeat_interleave(count // prefix.texts)[:, None] * prefix.blocks
    table[:, -1] = rows.own_block
    pages = [
        -(-budget // run.page_size) for budget, length in zip(budgets, lengths, strict=True) for _ in range(length)
    ]
    seq_lens = (prefix.length + rows.offset + 1).int()
    return Pass(prefix, rows, run, table, seq_lens, torch.tensor(pages, dtype=torch.int32, device=device), max(pages))


def decode_step(now: Pass, layer: int, query: torch.Tensor, scale: float) -> DecodeStep:
    """What a policy sees of one layer."""
    prefix, run = now.prefix, now.run
    table = now.block_table + layer * prefix.texts * prefix.blocks
    table[:, -1] = now.block_table[:, -1]
    budgets, largest = now.page_budgets, now.max_page_budget
    if run.layer_pages is not None:
        largest = run.layer_pages[layer]
        budgets = torch.full_like(budgets, largest)
    return DecodeStep(
        query=query,
        key_cache=prefix.keys,
        summaries=prefix.summaries[run.page_size, run.page_summary],
        block_table=table,
        seq_lens=now.seq_lens,
        page_budgets=budgets,
        max_page_budget=largest,
        page_size=run.page_size,
        scale=scale,
        sink_pages=run.sink_pages,
        recent_pages=run.recent_pages,
        prefixes=prefix.texts,
        attended=prefix.attended.get(layer),
    )


def every_page(step: DecodeStep) -> torch.Tensor:
    """A selection of all pages, ``[num_reqs, num_kv_heads, max_pages]``."""
    pages = step.block_table.shape[1] * step.key_cache.shape[2] // step.page_size
    every = torch.arange(pages, dtype=torch.int32, device=step.seq_lens.device)
    index = every.expand(len(step.seq_lens), step.key_cache.shape[1], pages)
    return torch.where(index * step.page_size < step.seq_lens[:, None, None], index, -1)


def in_window(step: DecodeStep, window: int | None) -> torch.Tensor:
    """``[rows, 1, tokens]`` bool: the newest ``window`` tokens of each row; None: all of them."""
    tokens = torch.arange(step.block_table.shape[1] * step.key_cache.shape[2], device=step.seq_lens.device)
    lengths = step.seq_lens[:, None]
    return ((tokens < lengths) & (tokens >= lengths - (window or tokens.numel())))[:, None]


def as_mask(step: DecodeStep, selected: torch.Tensor) -> torch.Tensor:
    """A selection ``[rows, num_select_heads, budget]`` of pages as ``[rows, num_select_heads, tokens]`` bool."""
    pages = step.block_table.shape[1] * step.key_cache.shape[2] // step.page_size
    mask = torch.zeros(*selected.shape[:2], pages + 1, dtype=torch.bool, device=selected.device)
    mask.scatter_(2, torch.where(selected < 0, pages, selected).long(), True)
    return mask[..., :pages].repeat_interleave(step.page_size, dim=2)


def attend_to_tokens(step: DecodeStep, values: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Attention of each row to the tokens ``kept [rows, heads, tokens]``: the query's shape and dtype.

    ``heads`` is 1, or ``num_kv_heads``, or ``num_q_heads`` where they differ in a group.
    A prefix's values are multiplied once for all its rows, which share all but their last block.
    """
    num_kv_heads, block = step.key_cache.shape[1:3]
    by_group = kept.unflatten(1, (min(num_kv_heads, kept.shape[1]), -1))
    weights = token_logits(step).masked_fill(~by_group, float("-inf")).softmax(-1)
    by_prefix = (step.prefixes, len(weights) // step.prefixes)
    shared, own = step.block_table[:: by_prefix[1], :-1].long(), step.block_table[:, -1].long()
    prefix = values[shared].transpose(1, 2).flatten(2, 3).float()  # [prefixes, num_kv_heads, prefix tokens, head_dim]
    out = torch.einsum("prhgt,phtd->prhgd", weights[..., :-block].unflatten(0, by_prefix), prefix).flatten(0, 1)
    out = out + torch.einsum("rhgt,rhtd->rhgd", weights[..., -block:], values[own].float())
    return out.flatten(1, 2).to(step.query.dtype)


def dense(run: Run) -> Run:
    """The same pass with every layer attending to everything."""
    return replace(run, policy=None)
