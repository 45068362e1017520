"""The operations as portable Triton kernels (sm_80 and later); same semantics as the reference.

Every launch is safe inside a CUDA graph: no host synchronisation, no host branch on device data, and loop bounds read
from ``seq_lens`` on the device. Pass ``out`` (and ``scratch``) to launch without allocating.
"""

from __future__ import annotations

from quest_vllm.ops.triton.quest_decode import quest_decode
from quest_vllm.ops.triton.rerank_pages import rerank_pages
from quest_vllm.ops.triton.score_pages import MassScratch, mass_scratch, score_pages
from quest_vllm.ops.triton.select_pages import select_pages
from quest_vllm.ops.triton.shortlist_pages import shortlist_pages
from quest_vllm.ops.triton.sparse_paged_attention import AttentionScratch, attention_scratch, sparse_paged_attention
from quest_vllm.ops.triton.update_page_summaries import update_page_summaries

__all__ = [
    "AttentionScratch",
    "MassScratch",
    "attention_scratch",
    "mass_scratch",
    "quest_decode",
    "rerank_pages",
    "score_pages",
    "select_pages",
    "shortlist_pages",
    "sparse_paged_attention",
    "update_page_summaries",
]
