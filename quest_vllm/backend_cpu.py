"""The CUSTOM attention backend on vLLM-CPU.

Decode rows with a budget go through score, select and sparse attention; every other row goes through vLLM-CPU's own
dense kernel. The KV writer is vLLM's too, so keys and values keep its packing.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from quest_vllm import compat
from quest_vllm.accounting import AdaptiveRows, LayerGroup, adaptive_rows, record_reached, record_step
from quest_vllm.audit_online import OnlineAudit
from quest_vllm.budget import get_budget_table, get_policy_table, get_top_p_table
from quest_vllm.capabilities import QuestCapabilities
from quest_vllm.config import POLICIES, QuestConfig
from quest_vllm.layer_budgets import LayerBudgets, layer_budgets
from quest_vllm.layers import counts_rows, is_sparse_layer, refuse_layer_features, sparse_layers, start_up
from quest_vllm.metadata import RowClasses, classify_rows
from quest_vllm.metrics import get_worker_metrics
from quest_vllm.ops.api import Ops, load_ops, room_for_log_sums
from quest_vllm.ops.reference import mass_scale_of
from quest_vllm.page.trace import TracedRows, get_trace_table, get_trace_writer, traced_rows
from quest_vllm.page_layout import BoundViews, PageViews
from quest_vllm.tally import get_tally_table, get_tally_writer
from quest_vllm.token_rows import StepRows, step_rows

_cpu = compat.cpu_attention()


class QuestCpuBackend(QuestCapabilities, _cpu.CPUAttentionBackend):  # type: ignore[misc,name-defined]
    """Capabilities and factories; see vLLM's ``AttentionBackend``."""

    supported_kv_cache_dtypes = ["auto", "bfloat16", "float16", "float32"]

    @staticmethod
    def get_impl_cls() -> type[QuestCpuImpl]:
        """The per-layer implementation."""
        return QuestCpuImpl

    @staticmethod
    def get_builder_cls() -> type[QuestCpuMetadataBuilder]:
        """The per-step metadata builder."""
        return QuestCpuMetadataBuilder


@dataclass(frozen=True)
class SparseRows:
    """The sparse rows of a step: a decode token each. ``tokens`` is its place in the flat query; all tensors are on
    the CPU."""

    tokens: torch.Tensor  # [num_sparse] int64
    seq_lens: torch.Tensor  # [num_sparse] int32
    page_budgets: torch.Tensor  # [num_sparse] int32; by layer: [num_layers, num_sparse]
    block_table: torch.Tensor  # [num_sparse, max_blocks of these rows] int32
    max_page_budget: int
    budgets: LayerBudgets | None = None
    traced: TracedRows | None = None
    top_p: torch.Tensor | None = None  # [num_sparse] float32; None: 1 in every row
    adaptive: AdaptiveRows | None = None
    policies: torch.Tensor | None = None  # [num_sparse] int32; None: the server's own in every row

    def page_budgets_of(self, layer: int) -> torch.Tensor:
        """``[num_sparse]`` int32: the page budgets of the decoder layer with this index."""
        return self.page_budgets if self.budgets is None else self.page_budgets[self.budgets.slots[layer]]


@dataclass
class QuestCpuMetadata(_cpu.CPUAttentionMetadata):  # type: ignore[misc,name-defined]
    """Stock metadata of the whole step, for dense layers, plus the split for sparse ones.

    ``sparse`` is None when no row is sparse; ``dense`` is the stock metadata of the other rows (None when there are
    none) and ``dense_tokens`` their places in the flat query.
    """

    sparse: SparseRows | None = None
    dense: Any | None = None
    dense_tokens: torch.Tensor | None = None


class QuestCpuMetadataBuilder(_cpu.CPUAttentionMetadataBuilder):  # type: ignore[misc,name-defined]
    """Splits each step into sparse and dense rows."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.config = start_up(vllm_config, kv_cache_spec, layer_names)
        layers = compat.attention_layers(vllm_config, layer_names)
        chosen = tuple(sparse_layers(vllm_config, layers, self.config).values())
        self.audit = OnlineAudit(layers, self.config.audit_steps)
        # files made, kernels built, or either refused, at start-up and not by the first request
        get_tally_writer()
        if self.config.page:
            get_trace_writer()
        load_ops(self.config.implementation, "cpu", self.isa)
        self.group = LayerGroup(
            num_sparse_layers=len(chosen),
            num_kv_heads=self.num_kv_heads,
            num_select_heads=(self.num_heads if self.config.group_reduction == "per_query_head" else self.num_kv_heads),
            head_dim=self.head_dim,
            element_size=kv_cache_spec.dtype.itemsize,
            page_size=self.config.page_size,
            counts_rows=counts_rows(vllm_config, layer_names, self.config),
            budgets=layer_budgets(self.config, chosen),
        )

    def spread_budgets(self, budgets: LayerBudgets | None) -> None:
        """Let layers read ``budgets`` from the next step on, None: alike; for calibration."""
        self.group = dataclasses.replace(self.group, budgets=budgets)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> QuestCpuMetadata:
        """Build the step's metadata; see vLLM's ``AttentionMetadataBuilder.build``."""
        stock = super().build(common_prefix_len, common_attn_metadata, fast_build)
        metadata = QuestCpuMetadata(**{f.name: getattr(stock, f.name) for f in dataclasses.fields(stock)})
        if self.group.num_sparse_layers == 0 or common_attn_metadata.is_prefilling is None:
            return metadata
        common = common_attn_metadata
        prefilling = common.is_prefilling.numpy()
        step = step_rows(common.query_start_loc_cpu.numpy(), common.seq_lens.numpy(), prefilling)
        budgets = get_budget_table().rows(common.num_reqs, common.req_idx)[step.requests]
        top_ps = get_top_p_table().rows(common.num_reqs, common.req_idx)[step.requests]
        policies = get_policy_table().rows(common.num_reqs, common.req_idx)[step.requests]
        chunks = prefilling[step.requests]
        rows = classify_rows(step.query_lens, step.seq_lens, chunks, budgets, self.config, top_ps, policies)
        if not fast_build:  # a draft model's steps are its own affair
            record_step(self.group, rows, step, budgets)
            self.audit.step(rows, step, common.block_table_tensor)
        if rows.sparse.any():
            metadata.sparse = self._sparse_rows(common, rows, step, top_ps, policies)
            self._add_dense_rows(metadata, common, ~rows.sparse, step)
        return metadata

    def _sparse_rows(
        self, common: Any, rows: RowClasses, step: StepRows, top_ps: np.ndarray, policies: np.ndarray
    ) -> SparseRows:
        chosen = np.flatnonzero(rows.sparse)
        requests = step.requests[chosen]
        blocks = -(-int(rows.num_pages[chosen].max()) * self.config.page_size // self.block_size)
        page_budgets = self.group.page_budgets(rows).take(chosen, axis=-1)
        traces = get_trace_table().rows(common.num_reqs, common.req_idx)[requests] if self.config.page else None
        tallies = get_tally_table().rows(common.num_reqs, common.req_idx)[step.requests]
        adaptive = adaptive_rows(self.group, rows, step.seq_lens, tallies)
        others = policies[chosen] != POLICIES.index(self.config.group_reduction)
        return SparseRows(
            tokens=torch.from_numpy(step.starts[chosen]),
            seq_lens=torch.from_numpy(step.seq_lens[chosen]),
            page_budgets=torch.from_numpy(page_budgets),
            block_table=common.block_table_tensor[torch.from_numpy(requests), :blocks].contiguous(),
            max_page_budget=int(page_budgets.max()),
            budgets=self.group.budgets,
            traced=traced_rows(traces) if traces is not None and self.group.counts_rows else None,
            top_p=torch.from_numpy(top_ps[chosen]) if adaptive is not None else None,
            adaptive=adaptive,
            policies=torch.from_numpy(policies[chosen]) if others.any() else None,
        )

    def _add_dense_rows(self, metadata: QuestCpuMetadata, common: Any, dense: np.ndarray, step: StepRows) -> None:
        """Give the ``dense`` rows a compact batch of their own; those of one request are its first tokens."""
        if not dense.any():
            return
        requests, first = np.unique(step.requests[dense], return_index=True)
        index = torch.from_numpy(requests)
        metadata.dense_tokens = torch.from_numpy(step.places(dense))
        query_start = torch.zeros(len(first) + 1, dtype=torch.int32)
        query_start[1:] = torch.from_numpy(np.cumsum(np.add.reduceat(step.query_lens[dense], first)))
        compact = common.replace(
            query_start_loc=query_start,
            query_start_loc_cpu=query_start,
            seq_lens=torch.from_numpy(np.maximum.reduceat(step.seq_lens[dense], first)),
            num_reqs=len(first),
            num_actual_tokens=int(query_start[-1]),
            block_table_tensor=common.block_table_tensor[index],
            slot_mapping=common.slot_mapping[metadata.dense_tokens],
            is_prefilling=common.is_prefilling[index],
        )
        metadata.dense = super().build(0, compact)


class QuestCpuImpl(_cpu.CPUAttentionBackendImpl):  # type: ignore[misc,name-defined]
    """One layer's attention: vLLM-CPU's own, with the sparse rows taken out of it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse_layer_features(self.alibi_slopes, self.sinks)
        self.config: QuestConfig = start_up(compat.current_vllm_config())
        self._ops: Ops | None = None
        self._views = BoundViews(self.head_size, self.config.page_size)
        self._sparse_layer: bool | None = None

    def _layer_ops(self, layer: Any) -> Ops:
        if self._ops is None:
            self._ops = load_ops(self.config.implementation, "cpu", layer.isa)
        return self._ops

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Write ``key`` and ``value`` ``[num_tokens, num_kv_heads, head_dim]``, then refresh the pages they touch."""
        views = self._views.of(kv_cache)
        compat.custom_ops().cpu_attn_reshape_and_cache(
            key, value, views.keys, views.values, slot_mapping, layer.isa, kv_cache_dtype=self.kv_cache_dtype
        )
        if self.sliding_window == -1:
            start = time.perf_counter()
            self._layer_ops(layer).update_page_summaries(
                views.keys,
                views.summaries,
                slot_mapping,
                page_size=self.config.page_size,
                page_summary=self.config.page_summary,
            )
            get_worker_metrics().stage_seconds("update", time.perf_counter() - start)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: QuestCpuMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend; ``query`` and ``output`` are ``[num_tokens, num_q_heads, head_dim]``."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("quest_vllm: fused output quantization is not supported on CPU")
        if attn_metadata is None:  # warm-up
            return output
        views = self._views.of(kv_cache)
        if self._sparse_layer is None:
            self._sparse_layer = is_sparse_layer(layer.layer_name, self, self.config)
        if attn_metadata.sparse is None or not self._sparse_layer:
            count = attn_metadata.num_actual_tokens
            self._attend_dense(query[:count], views, attn_metadata, output[:count])
            return output
        tokens = attn_metadata.sparse.tokens
        output[tokens] = self._attend_sparse(layer, query[tokens], views, attn_metadata.sparse)
        if attn_metadata.dense is not None:
            dense_query = query[attn_metadata.dense_tokens]
            dense_output = torch.empty_like(dense_query)
            self._attend_dense(dense_query, views, attn_metadata.dense, dense_output)
            output[attn_metadata.dense_tokens] = dense_output
        return output

    def _attend_sparse(self, layer: Any, query: torch.Tensor, views: PageViews, rows: SparseRows) -> torch.Tensor:
        ops, config, metrics = self._layer_ops(layer), self.config, get_worker_metrics()
        assert ops.choose_pages is not None  # all implementations for the CPU have it
        index = compat.layer_index(layer.layer_name)
        start = time.perf_counter()
        log_sums = room_for_log_sums(query, rows.policies)
        scores = ops.score_pages(
            query,
            views.summaries,
            rows.block_table,
            rows.seq_lens,
            page_size=config.page_size,
            group_reduction=config.group_reduction,
            bound_radius=config.bound_radius,
            scale=self.scale,
            page_summary=config.page_summary,
            policies=rows.policies,
            log_sums=log_sums,
        )
        scored = time.perf_counter()
        selected = ops.choose_pages(
            scores,
            log_sums,
            query,
            views.keys,
            rows.block_table,
            rows.seq_lens,
            rows.page_budgets_of(index),
            page_size=config.page_size,
            max_page_budget=rows.max_page_budget,
            scale=self.scale,
            softcap=self.logits_soft_cap,
            sink_pages=config.sink_pages,
            recent_pages=config.recent_pages,
            top_p=rows.top_p,
            mass_scale=mass_scale_of(config.group_reduction, self.scale, config.page_summary),
            policies=rows.policies,
        )
        chosen = time.perf_counter()
        attended = ops.sparse_paged_attention(
            query,
            views.keys,
            views.values,
            rows.block_table,
            rows.seq_lens,
            selected,
            page_size=config.page_size,
            scale=self.scale,
            softcap=self.logits_soft_cap,
        )
        metrics.stage_seconds("score", scored - start)
        metrics.stage_seconds("select", chosen - scored)
        metrics.stage_seconds("attend", time.perf_counter() - chosen)
        if rows.adaptive is not None:
            taken = (selected.numpy()[rows.adaptive.rows] >= 0).sum(axis=2, dtype=np.int32)
            record_reached(rows.adaptive, taken[None])
        if rows.traced is not None:
            lengths = rows.seq_lens.numpy()
            get_trace_writer().record(index, rows.traced, lengths, selected.numpy(), config.page_size)
        return attended

    def _attend_dense(self, query: torch.Tensor, views: PageViews, metadata: Any, output: torch.Tensor) -> None:
        compat.custom_ops().cpu_attention_with_kv_cache(
            query=query,
            key_cache=views.keys,
            value_cache=views.values,
            output=output,
            query_start_loc=metadata.query_start_loc,
            seq_lens=metadata.seq_lens,
            scale=self.scale,
            causal=metadata.causal,
            alibi_slopes=None,
            sliding_window=self.sliding_window,
            block_table=metadata.block_table,
            softcap=self.logits_soft_cap,
            scheduler_metadata=metadata.scheduler_metadata,
            s_aux=None,
            dynamic_causal=metadata.dynamic_causal,
            kv_cache_dtype=self.kv_cache_dtype,
        )
