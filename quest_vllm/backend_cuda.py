"""The CUSTOM attention backend on Hopper and other CUDA GPUs, inside vLLM's decode CUDA graphs.

Decode steps (one query token a row) run the Quest chain for every row, with the page budgets in a buffer at a fixed
address: a row without a budget asks for all of its pages. Nothing branches on a budget on the host, so one captured
graph serves any mix. Steps that hold prefill chunks or several query tokens a row are never captured by a
uniform-decode graph; there FlashAttention serves those rows and the sparse rows are taken out.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from quest_vllm import compat
from quest_vllm.accounting import LayerGroup, record_step
from quest_vllm.audit_online import OnlineAudit
from quest_vllm.budget import get_budget_table
from quest_vllm.capabilities import QuestCapabilities
from quest_vllm.config import QuestConfig
from quest_vllm.layers import (
    count_sparse_layers,
    counts_rows,
    is_sparse_layer,
    refuse_layer_features,
    refuse_top_p,
    start_up,
)
from quest_vllm.metadata import RowClasses, classify_rows
from quest_vllm.ops.api import LayerShape, Ops, load_ops
from quest_vllm.page_layout import BoundViews, PageViews

_flash = compat.flash_attention()
_backend = compat.attention_backend()

ALL_PAGES = np.iinfo(np.int32).max


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
    """Rows that the Quest chain serves; all tensors on the GPU. ``tokens`` is None when they are the whole step."""

    tokens: torch.Tensor | None  # [num_rows] int64, place of each row in the flat query
    seq_lens: torch.Tensor  # [num_rows] int32
    page_budgets: torch.Tensor  # [num_rows] int32
    block_table: torch.Tensor  # [num_rows, max_blocks] int32


@dataclass
class QuestCudaMetadata(_flash.FlashAttentionMetadata):  # type: ignore[misc,name-defined]
    """Stock metadata, for dense layers, plus the split for sparse ones.

    ``rest`` is stock metadata in which the sparse rows see one token, so that FlashAttention passes over them cheaply;
    None when the chain serves the whole step.
    """

    sparse: SparseRows | None = None
    rest: Any | None = None


class QuestCudaMetadataBuilder(_flash.FlashAttentionMetadataBuilder):  # type: ignore[misc,name-defined]
    """Fills the budget buffer and splits mixed steps."""

    _cudagraph_support = _backend.AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    supports_update_block_table = False

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.supports_draft_decode_metadata_update = False
        self.config = start_up(vllm_config, kv_cache_spec, layer_names)
        refuse_top_p(self.config)
        layers = compat.attention_layers(vllm_config, layer_names)
        self.num_sparse_layers = count_sparse_layers(layers, self.config)
        self.audit = OnlineAudit(layers, self.config.audit_steps)
        max_num_reqs = max(vllm_config.scheduler_config.max_num_seqs, self.max_cudagraph_size or 0)
        self.page_budgets = torch.full((max_num_reqs,), ALL_PAGES, dtype=torch.int32, device=device)
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

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> QuestCudaMetadata:
        """Build the step's metadata; see vLLM's ``AttentionMetadataBuilder.build``."""
        common = common_attn_metadata
        metadata = self._stock(common, fast_build)
        if self.num_sparse_layers == 0:
            return metadata
        rows = self._classify(common)
        if common.max_query_len == 1:
            metadata.sparse = self._whole_step(common, rows)
        elif rows is not None and rows.sparse.any():
            # the second build below reuses the builder's scheduler buffer
            if metadata.scheduler_metadata is not None:
                metadata.scheduler_metadata = metadata.scheduler_metadata.clone()
            metadata.sparse = self._some_rows(common, rows)
            metadata.rest = self._without(common, metadata.sparse, rows)
        return metadata

    def _stock(self, common: Any, fast_build: bool = False) -> QuestCudaMetadata:
        stock = super().build(0, common, fast_build)
        return QuestCudaMetadata(**{f.name: getattr(stock, f.name) for f in dataclasses.fields(stock)})

    def _classify(self, common: Any) -> RowClasses | None:
        """Sort the rows on the host; None while a graph is captured, when there are no requests behind the rows."""
        if common.req_idx is None or common.seq_lens_cpu_upper_bound is None:
            return None
        num_reqs = min(common.num_reqs, len(common.req_idx))
        query_lens = np.diff(common.query_start_loc_cpu.numpy())[:num_reqs]
        seq_lens = common.seq_lens_cpu_upper_bound.numpy()[:num_reqs].astype(np.int32)
        prefilling = np.zeros(num_reqs, dtype=bool)
        if common.is_prefilling is not None:
            prefilling = common.is_prefilling.numpy()[:num_reqs]
        budgets = get_budget_table().rows(num_reqs, common.req_idx[:num_reqs])
        rows = classify_rows(query_lens, seq_lens, prefilling, budgets, self.config)
        record_step(self.group, rows, seq_lens, budgets)
        self.audit.step(rows, seq_lens, common.block_table_tensor)
        return rows

    def _whole_step(self, common: Any, rows: RowClasses | None) -> SparseRows:
        num_reqs = common.num_reqs
        if rows is not None:
            host = np.full(num_reqs, ALL_PAGES, dtype=np.int32)
            known = rows.sparse.shape[0]
            host[:known][rows.sparse] = rows.page_budgets[rows.sparse]
            # a fresh pinned copy each step: the previous step's transfer may still be reading the last one
            staged = torch.from_numpy(host).pin_memory()
            self.page_budgets[:num_reqs].copy_(staged, non_blocking=True)
        return SparseRows(
            tokens=None,
            seq_lens=common.seq_lens,
            page_budgets=self.page_budgets[:num_reqs],
            block_table=common.block_table_tensor,
        )

    def _some_rows(self, common: Any, rows: RowClasses) -> SparseRows:
        chosen = np.flatnonzero(rows.sparse)
        starts = common.query_start_loc_cpu.numpy()[chosen].astype(np.int64)
        page_budgets = rows.page_budgets[chosen]

        def on_device(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array).pin_memory().to(self.device, non_blocking=True)

        index = on_device(chosen.astype(np.int64))
        return SparseRows(
            tokens=on_device(starts),
            seq_lens=common.seq_lens[index],
            page_budgets=on_device(page_budgets),
            block_table=common.block_table_tensor[index],
        )

    def _without(self, common: Any, sparse: SparseRows, rows: RowClasses) -> QuestCudaMetadata:
        index = torch.from_numpy(np.flatnonzero(rows.sparse)).to(self.device, non_blocking=True)
        return self._stock(common.replace(seq_lens=common.seq_lens.index_fill(0, index, 1)))


class QuestCudaImpl(_flash.FlashAttentionImpl):  # type: ignore[misc,name-defined]
    """One layer's attention: the Quest chain for decode rows, FlashAttention for the rest."""

    supports_dcp = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse_layer_features(self.alibi_slopes, self.sinks)
        vllm_config: Any = compat.current_vllm_config()
        self.config: QuestConfig = start_up(vllm_config)
        self._ops: Ops = load_ops(self.config.implementation, "cuda", shape=self._shape(vllm_config))
        self._views = BoundViews(self.head_size, self.config.page_size)
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
        if has_summaries and self._ops.write_kv is not None:
            caches = (views.keys, views.values, views.summaries)
            self._ops.write_kv(key, value, *caches, slot_mapping, page_size=page_size)
            return
        compat.custom_ops().reshape_and_cache_flash(
            key,
            value,
            views.keys.transpose(1, 2),
            views.values.transpose(1, 2),
            slot_mapping,
            self.kv_cache_dtype,
            layer._k_scale,
            layer._v_scale,
        )
        if has_summaries:
            self._ops.update_page_summaries(views.keys, views.summaries, slot_mapping, page_size=page_size)

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
        elif sparse.tokens is None:
            self._attend_sparse(query[:count], views, sparse, output[:count])
        else:
            self._attend_dense(query[:count], views, attn_metadata.rest, output[:count])
            attended = torch.empty((sparse.tokens.shape[0], *query.shape[1:]), dtype=query.dtype, device=query.device)
            self._attend_sparse(query[sparse.tokens], views, sparse, attended)
            output[sparse.tokens] = attended
        return output

    def _attend_sparse(self, query: torch.Tensor, views: PageViews, rows: SparseRows, output: torch.Tensor) -> None:
        config = self.config
        self._ops.quest_decode(
            query,
            views.keys,
            views.values,
            views.summaries,
            rows.block_table,
            rows.seq_lens,
            rows.page_budgets,
            page_size=config.page_size,
            scale=self.scale,
            softcap=self.logits_soft_cap,
            group_reduction=config.group_reduction,
            bound_radius=config.bound_radius,
            sink_pages=config.sink_pages,
            recent_pages=config.recent_pages,
            out=output,
        )

    def _attend_dense(self, query: torch.Tensor, views: PageViews, metadata: Any, output: torch.Tensor) -> None:
        compat.flash_attn_varlen_func()(
            q=query,
            k=views.keys.transpose(1, 2),
            v=views.values.transpose(1, 2),
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
