"""The CUSTOM attention backend on Hopper and other CUDA GPUs, inside vLLM's decode CUDA graphs.

Decode steps (one query token a request) run the Quest chain for every row, with the page budgets in a buffer at a fixed
address: a row without a budget asks for all of its pages. Verify steps (1 + k query tokens a request) run the chain for
the tokens of sparse requests, each a row of its own, and FlashAttention for the other requests: both over the whole
batch, each with length 0 or 1 where the other one serves. Nothing branches on a budget on the host, so one captured
graph serves any mix. Other steps, with prefill chunks or unlike numbers of drafts, are never captured by a
uniform-decode graph; there FlashAttention serves the dense rows and the sparse ones are taken out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from quest_vllm import compat
from quest_vllm.accounting import LayerGroup, adaptive_rows
from quest_vllm.audit_online import OnlineAudit
from quest_vllm.budget import get_budget_table, get_policy_table, get_top_p_table
from quest_vllm.capabilities import QuestCapabilities
from quest_vllm.config import QuestConfig
from quest_vllm.layer_budgets import LayerBudgets, layer_budgets
from quest_vllm.layers import (
    counts_rows,
    is_sparse_layer,
    refuse_layer_features,
    sparse_layers,
    start_up,
)
from quest_vllm.metadata import FloatArray, IntArray, RowClasses, classify_rows
from quest_vllm.ops.api import LayerShape, Ops, load_ops
from quest_vllm.page_layout import BoundViews, PageViews
from quest_vllm.reached import ReachedCounts
from quest_vllm.row_buffers import RowBuffer, staged
from quest_vllm.step_log import StepLog
from quest_vllm.tally import get_tally_table, get_tally_writer
from quest_vllm.token_rows import StepRows, VerifyBuffers, step_rows, uniform_width

_flash = compat.flash_attention()
_backend = compat.attention_backend()

ALL_PAGES = np.iinfo(np.int32).max
STOCK_FIELDS = tuple(field.name for field in dataclasses.fields(_flash.FlashAttentionMetadata))


class QuestCudaBackend(QuestCapabilities, _flash.FlashAttentionBackend):  # type: ignore[misc,name-defined]
    """Capabilities and factories; see vLLM's ``AttentionBackend``."""

    supported_kv_cache_dtypes = ["auto", "bfloat16", "float16"]

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        """Any multiple of 16; a page size above the block size is refused at start-up."""
        return [_backend.MultipleOf(16)]

    @staticmethod
    def get_impl_cls() -> type[QuestCudaImpl]:
        """The per-layer implementation."""
        return QuestCudaImpl

    @staticmethod
    def get_builder_cls() -> type[QuestCudaMetadataBuilder]:
        """The per-step metadata builder."""
        return QuestCudaMetadataBuilder

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: str | None) -> bool:
        """FP8 caches need FP8 summaries, which are not built yet."""
        return kv_cache_dtype is None or kv_cache_dtype in cls.supported_kv_cache_dtypes


@dataclass(frozen=True)
class SparseRows:
    """Rows that the Quest chain serves; all tensors on the GPU. ``tokens`` is None when they are the whole step.

    ``served`` is set in verify steps: the chain gets every token, and its output counts for those. ``reached``: where
    layers write how many pages they took.
    """

    tokens: torch.Tensor | None  # [num_rows] int64, place of each row in the flat query
    seq_lens: torch.Tensor  # [num_rows] int32
    page_budgets: torch.Tensor  # [num_rows] int32; by layer: [num_layers, num_rows]
    top_ps: torch.Tensor  # [num_rows] float32
    policies: torch.Tensor  # [num_rows] int32
    block_table: torch.Tensor  # [num_rows, max_blocks] int32
    reached: ReachedCounts
    served: torch.Tensor | None = None  # [num_rows] bool
    budgets: LayerBudgets | None = None

    def page_budgets_of(self, layer_name: str) -> torch.Tensor:
        """``[num_rows]`` int32: the page budgets of that layer."""
        if self.budgets is None:
            return self.page_budgets
        return self.page_budgets[self.budgets.slots[compat.layer_index(layer_name)]]


@dataclass(frozen=True)
class SortedStep:
    """A step's rows, the class of each, its top_p and its policy."""

    rows: StepRows
    classes: RowClasses
    top_ps: FloatArray
    policies: IntArray


@dataclass
class QuestCudaMetadata(_flash.FlashAttentionMetadata):  # type: ignore[misc,name-defined]
    """Stock metadata, for dense layers, plus the split for sparse ones.

    ``rest`` is stock metadata in which the requests that the chain serves see one token, so that FlashAttention passes
    over them cheaply; None when the chain serves the whole step.
    """

    sparse: SparseRows | None = None
    rest: Any | None = None


class QuestCudaMetadataBuilder(_flash.FlashAttentionMetadataBuilder):  # type: ignore[misc,name-defined]
    """Fills the budget buffer and splits mixed steps."""

    _cudagraph_support = _backend.AttentionCGSupport.UNIFORM_BATCH
    supports_update_block_table = False

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.supports_draft_decode_metadata_update = False
        self.config = start_up(vllm_config, kv_cache_spec, layer_names)
        layers = compat.attention_layers(vllm_config, layer_names)
        sparse = sparse_layers(vllm_config, layers, self.config)
        self.num_sparse_layers = len(sparse)
        self.audit = OnlineAudit(layers, self.config.audit_steps)
        max_num_reqs = max(vllm_config.scheduler_config.max_num_seqs, self.max_cudagraph_size or 0)
        self.top_ps = RowBuffer(max_num_reqs, 1.0, torch.float32, device)
        self.policies = RowBuffer(max_num_reqs, 0, torch.int32, device)  # no matter in a dense row
        self.is_v2 = bool(vllm_config.use_v2_model_runner)
        self.verify_width = compat.verify_width(vllm_config)
        per_query_head = self.config.group_reduction == "per_query_head"
        self.group = LayerGroup(
            num_sparse_layers=self.num_sparse_layers,
            num_kv_heads=self.num_heads_kv,
            num_select_heads=self.num_heads_q if per_query_head else self.num_heads_kv,
            head_dim=self.headdim,
            element_size=kv_cache_spec.dtype.itemsize,
            page_size=self.config.page_size,
            counts_rows=counts_rows(vllm_config, layer_names, self.config),
        )
        self.spread_budgets(layer_budgets(self.config, tuple(sparse.values())))
        self.step_log = StepLog(self.group)
        get_tally_writer()  # its file is made, or refused, at start-up and not by the first request
        most_rows = max(max_num_reqs, vllm_config.scheduler_config.max_num_seqs * self.verify_width)
        self.reached = ReachedCounts(list(sparse), most_rows, self.group.num_select_heads, device, self.step_log)

    def spread_budgets(self, budgets: LayerBudgets | None) -> None:
        """Let layers read ``budgets`` from the next step on, None: alike. Graphs are to be captured after it."""
        self.group = dataclasses.replace(self.group, budgets=budgets)
        layers = len(budgets.layers) if budgets else None
        self.page_budgets = RowBuffer(len(self.top_ps.tensor), ALL_PAGES, torch.int32, self.device, layers)
        self.verify = self._verify_buffers(layers)

    def _verify_buffers(self, layers: int | None) -> VerifyBuffers | None:
        """Room for the largest verify step that a graph is captured for; None without speculation or graphs."""
        if self.verify_width == 1 or self.num_sparse_layers == 0 or not self.use_full_cuda_graph:
            return None
        scheduler = self.vllm_config.scheduler_config
        max_tokens = min(scheduler.max_num_seqs * self.verify_width, self.max_cudagraph_size or 0)
        # drafts may lie past the last position
        max_blocks = -(-(self.model_config.max_model_len + self.verify_width) // self.block_size)
        return VerifyBuffers(max_tokens, max_blocks, self.device, layers)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> QuestCudaMetadata:
        """Build the step's metadata; see vLLM's ``AttentionMetadataBuilder.build``."""
        self.reached.collect()
        if self._is_draft(common_attn_metadata):
            return self._stock(common_attn_metadata, fast_build)
        return self._build(common_attn_metadata, self._classify(common_attn_metadata))

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> QuestCudaMetadata:
        """As :meth:`build`; there are no requests behind the rows, so nothing is counted."""
        self.reached.collect()  # also for dummy steps of a data-parallel rank, whose kernels write counts too
        return self._build(common_attn_metadata, None)

    def build_for_drafting(self, common_attn_metadata: Any, draft_index: int) -> QuestCudaMetadata:
        """Drafts are dense (model runner V1)."""
        return self._stock(common_attn_metadata, fast_build=True)

    def _is_draft(self, common: Any) -> bool:
        """Model runner V2 names the requests of every step but a draft model's, which are dense."""
        return common.req_idx is None and self.is_v2

    def _build(self, common: Any, step: SortedStep | None) -> QuestCudaMetadata:
        metadata = self._stock(common)
        if self.num_sparse_layers == 0:
            return metadata
        if common.max_query_len == 1:
            metadata.sparse = self._whole_step(common, step)
        elif self.verify is not None and self._fits(common, width := uniform_width(common.query_start_loc_cpu.numpy())):
            metadata.sparse = self._verify_step(common, step, self.verify, width)
            # its own schedule is made in the launch: the builder has one buffer, which the dense layers' needs
            rest = common.replace(seq_lens=self.verify.dense_lens[: common.num_reqs])
            metadata.rest = self._stock(rest, fast_build=True)
        elif step is not None and step.classes.sparse.any():
            # the second build below reuses the builder's scheduler buffer
            if metadata.scheduler_metadata is not None:
                metadata.scheduler_metadata = metadata.scheduler_metadata.clone()
            metadata.sparse = self._some_rows(common, step)
            metadata.rest = self._without(common, step)
        return metadata

    def _fits(self, common: Any, width: int) -> bool:
        """Whether the step may be a captured verify step: 1 < ``width`` tokens for every request, and room for them."""
        count = common.num_reqs * width
        largest = 0 if self.verify is None else self.verify.max_tokens
        return 1 < width <= self.verify_width and count == common.num_actual_tokens <= largest

    def _stock(self, common: Any, fast_build: bool = False) -> QuestCudaMetadata:
        stock = super().build(0, common, fast_build)
        return QuestCudaMetadata(**{name: getattr(stock, name) for name in STOCK_FIELDS})

    def _classify(self, common: Any) -> SortedStep | None:
        """Sort the step's rows on the host, and count them; None where the host does not know their lengths.

        Under async scheduling the host's lengths suppose that every draft was accepted: a row may be taken for sparse
        whose budget just covers it; the chain then selects all of its pages.
        """
        if common.seq_lens_cpu_upper_bound is None:
            return None
        slots = common.req_idx  # V1: None, the rows themselves
        num_reqs = common.num_reqs if slots is None else min(common.num_reqs, len(slots))
        seq_lens = common.seq_lens_cpu_upper_bound.numpy()[:num_reqs].astype(np.int32)
        prefilling = np.zeros(num_reqs, dtype=bool)
        if common.is_prefilling is not None:
            prefilling = common.is_prefilling.numpy()[:num_reqs]
        rows = step_rows(common.query_start_loc_cpu.numpy()[: num_reqs + 1], seq_lens, prefilling)
        budgets = get_budget_table().rows(num_reqs, slots)[rows.requests]
        top_ps = get_top_p_table().rows(num_reqs, slots)[rows.requests]
        policies = get_policy_table().rows(num_reqs, slots)[rows.requests]
        chunks = prefilling[rows.requests]
        classes = classify_rows(rows.query_lens, rows.seq_lens, chunks, budgets, self.config, top_ps, policies)
        self.step_log.add(classes, rows, budgets)
        self.audit.step(classes, rows, common.block_table_tensor)
        return SortedStep(rows, classes, top_ps, policies)

    def _expect(self, common: Any, step: SortedStep, places: np.ndarray) -> None:
        """Have the step's adaptive rows counted; ``places`` ``[num_rows]`` of the rows among those of the chain."""
        adaptive = None
        if step.classes.adaptive.any():
            tallies = get_tally_table().rows(common.num_reqs, common.req_idx)[step.rows.requests]
            adaptive = adaptive_rows(self.group, step.classes, step.rows.seq_lens, tallies)
        self.reached.expect(adaptive, places[step.classes.adaptive])

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return staged(array, self.device).to(self.device, non_blocking=True)

    def _whole_step(self, common: Any, step: SortedStep | None) -> SparseRows:
        num_reqs = common.num_reqs
        if step is not None:
            places, sparse, adaptive = step.rows.requests, step.classes.sparse, step.classes.adaptive
            self.page_budgets.put_at(num_reqs, places[sparse], self.group.page_budgets(step.classes)[..., sparse])
            self.top_ps.put_at(num_reqs, places[adaptive], step.top_ps[adaptive])
            self.policies.put_at(num_reqs, places, step.policies)
            self._expect(common, step, places)
        return SparseRows(
            tokens=None,
            seq_lens=common.seq_lens,
            page_budgets=self.page_budgets.tensor[..., :num_reqs],
            top_ps=self.top_ps.tensor[:num_reqs],
            policies=self.policies.tensor[:num_reqs],
            block_table=common.block_table_tensor,
            reached=self.reached,
            budgets=self.group.budgets,
        )

    def _verify_step(self, common: Any, step: SortedStep | None, buffers: VerifyBuffers, width: int) -> SparseRows:
        count = common.num_actual_tokens
        if step is not None:
            places, adaptive = step.rows.starts, step.classes.adaptive
            served = step.rows.served(step.classes.sparse)
            buffers.page_budgets.put_at(count, places[served], self.group.page_budgets(step.classes)[..., served])
            buffers.top_ps.put_at(count, places[adaptive], step.top_ps[adaptive])
            buffers.policies.put_at(count, places, step.policies)
            self._expect(common, step, places)
        blocks = -(-common.max_seq_len // self.block_size)
        buffers.fill(width, common.seq_lens, common.block_table_tensor, min(blocks, buffers.block_table.shape[1]))
        return SparseRows(
            tokens=None,
            seq_lens=buffers.seq_lens[:count],
            page_budgets=buffers.page_budgets.tensor[..., :count],
            top_ps=buffers.top_ps.tensor[:count],
            policies=buffers.policies.tensor[:count],
            block_table=buffers.block_table[:count],
            reached=self.reached,
            budgets=self.group.budgets,
            served=buffers.sparse[:count],
        )

    def _some_rows(self, common: Any, step: SortedStep) -> SparseRows:
        chosen, adaptive = step.rows.served(step.classes.sparse), step.classes.adaptive
        self._expect(common, step, np.cumsum(chosen) - 1)
        index = self._to_device(step.rows.requests[chosen].astype(np.int64))
        return SparseRows(
            tokens=self._to_device(step.rows.starts[chosen]),
            seq_lens=common.seq_lens[index] - self._to_device(step.rows.lags[chosen]),
            page_budgets=self._to_device(self.group.page_budgets(step.classes).compress(chosen, axis=-1)),
            top_ps=self._to_device(np.where(adaptive, step.top_ps, 1)[chosen].astype(np.float32)),
            policies=self._to_device(step.policies[chosen]),
            block_table=common.block_table_tensor[index],
            reached=self.reached,
            budgets=self.group.budgets,
        )

    def _without(self, common: Any, step: SortedStep) -> QuestCudaMetadata:
        served = np.unique(step.rows.requests[step.classes.sparse]).astype(np.int64)
        return self._stock(common.replace(seq_lens=common.seq_lens.index_fill(0, self._to_device(served), 1)))


class QuestCudaImpl(_flash.FlashAttentionImpl):  # type: ignore[misc,name-defined]
    """One layer's attention: the Quest chain for decode rows, FlashAttention for the rest."""

    supports_dcp = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse_layer_features(self.alibi_slopes, self.sinks)
        vllm_config: Any = compat.current_vllm_config()
        self.config: QuestConfig = start_up(vllm_config)
        self._ops: Ops = load_ops(
            self.config.implementation,
            "cuda",
            shape=self._shape(vllm_config),
            page_summary=self.config.page_summary,
        )
        self._views = BoundViews(self.head_size, self.config.page_size)
        self._writer: tuple[PageViews, Callable[..., None]] | None = None
        self._attend = compat.flash_attn_varlen_func()
        self._sparse_layer: bool | None = None

    def _shape(self, vllm_config: Any) -> LayerShape:
        per_query_head = self.config.group_reduction == "per_query_head"
        return LayerShape(
            head_dim=self.head_size,
            rows=1 if per_query_head else self.num_heads // self.num_kv_heads,
            page_size=self.config.page_size,
            block_size=vllm_config.cache_config.block_size or self.config.page_size,
            dtype=vllm_config.model_config.dtype,
        )

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Write ``key`` and ``value`` ``[num_tokens, num_kv_heads, head_dim]``, then refresh the pages they touch."""
        views, page_size = self._views.of(kv_cache), self.config.page_size
        has_summaries = self.sliding_window == (-1, -1)
        if has_summaries and self._ops.kv_writer is not None:
            if self._writer is None or self._writer[0] is not views:
                caches = (views.keys, views.values, views.summaries)
                summary = self.config.page_summary
                self._writer = (views, self._ops.kv_writer(*caches, page_size=page_size, page_summary=summary))
            self._writer[1](key, value, slot_mapping)
            return
        scales = (layer._k_scale, layer._v_scale)
        compat.custom_ops().reshape_and_cache_flash(
            key, value, *views.by_token, slot_mapping, self.kv_cache_dtype, *scales
        )
        if has_summaries:
            self._ops.update_page_summaries(
                views.keys,
                views.summaries,
                slot_mapping,
                page_size=page_size,
                page_summary=self.config.page_summary,
            )

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: QuestCudaMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend; ``query`` and ``output`` are ``[num_tokens, num_q_heads, head_dim]``."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("quest_vllm: fused output quantization is not supported")
        if attn_metadata is None:  # memory profiling
            return output.fill_(0)
        views = self._views.of(kv_cache)
        if self._sparse_layer is None:
            self._sparse_layer = is_sparse_layer(layer.layer_name, self, self.config)
        count, sparse = attn_metadata.num_actual_tokens, attn_metadata.sparse
        if sparse is None or not self._sparse_layer:
            self._attend_dense(query[:count], views, attn_metadata, output[:count])
        elif sparse.tokens is None and attn_metadata.rest is None:
            self._attend_sparse(layer.layer_name, query[:count], views, sparse, output[:count])
        else:
            self._attend_dense(query[:count], views, attn_metadata.rest, output[:count])
            self._add_sparse(layer.layer_name, query[:count], views, sparse, output[:count])
        return output

    def _add_sparse(
        self, layer: str, query: torch.Tensor, views: PageViews, rows: SparseRows, output: torch.Tensor
    ) -> None:
        """Put what the chain makes of its rows in the place of FlashAttention's ``output`` for them."""
        if rows.served is not None:
            attended = torch.empty_like(query)
            self._attend_sparse(layer, query, views, rows, attended)
            torch.where(rows.served[:, None, None], attended, output, out=output)
            return
        chosen = query[rows.tokens]
        attended = torch.empty_like(chosen)
        self._attend_sparse(layer, chosen, views, rows, attended)
        output[rows.tokens] = attended

    def _attend_sparse(
        self, layer: str, query: torch.Tensor, views: PageViews, rows: SparseRows, output: torch.Tensor
    ) -> None:
        config = self.config
        self._ops.quest_decode(
            query,
            views.keys,
            views.values,
            views.summaries,
            rows.block_table,
            rows.seq_lens,
            rows.page_budgets_of(layer),
            page_size=config.page_size,
            scale=self.scale,
            softcap=self.logits_soft_cap,
            group_reduction=config.group_reduction,
            bound_radius=config.bound_radius,
            sink_pages=config.sink_pages,
            recent_pages=config.recent_pages,
            top_p=rows.top_ps,
            policies=rows.policies,
            taken=rows.reached.of(layer, len(rows.seq_lens)),
            out=output,
            page_summary=config.page_summary,
        )

    def _attend_dense(self, query: torch.Tensor, views: PageViews, metadata: Any, output: torch.Tensor) -> None:
        keys, values = views.by_token
        self._attend(
            q=query,
            k=keys,
            v=values,
            out=output,
            cu_seqlens_q=metadata.query_start_loc,
            max_seqlen_q=metadata.max_query_len,
            seqused_k=metadata.seq_lens,
            max_seqlen_k=metadata.max_seq_len,
            softmax_scale=self.scale,
            causal=metadata.causal,
            window_size=list(self.sliding_window),
            block_table=metadata.block_table,
            softcap=self.logits_soft_cap,
            scheduler_metadata=metadata.scheduler_metadata,
            fa_version=self.vllm_flash_attn_version,
            num_splits=metadata.max_num_splits,
        )
