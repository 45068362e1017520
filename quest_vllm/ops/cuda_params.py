"""csrc/cuda/params.h in ctypes, field by field; the library tells its sizes, so that a drift shows at load time."""

from __future__ import annotations

import ctypes

HOPPER = 9  # compute capability, its major part, that the kernels are built for
MOST_CODED_ROWS = 8  # query heads that share a selection by key codes
PAGE_SUMMARIES = {"min_max": 0, "key_codes": 1}
REDUCTIONS = {"max": 0, "per_query_head": 0, "mean": 1, "mass": 2}
SCORE, SELECT, ATTEND = 1, 2, 4


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class DecodeParams(ctypes.Structure):
    """One launch of quest_decode; see csrc/cuda/params.h for the shapes."""

    _fields_ = [
        *_fields(ctypes.c_void_p, "query keys values summaries block_table seq_lens page_budgets top_p policies"),
        *_fields(ctypes.c_void_p, "scores score_scratch listed chosen out taken timeline"),
        *_fields(ctypes.c_int64, "query_req_stride query_head_stride"),
        *_fields(ctypes.c_int64, "key_block_stride key_head_stride key_row_stride"),
        *_fields(ctypes.c_int64, "value_block_stride value_head_stride value_row_stride"),
        *_fields(ctypes.c_int64, "summary_block_stride summary_head_stride summary_page_stride summary_bound_stride"),
        *_fields(ctypes.c_int64, "table_req_stride out_req_stride out_head_stride taken_req_stride"),
        *_fields(ctypes.c_int32, "num_reqs num_select_heads rows heads_per_kv"),
        *_fields(ctypes.c_int32, "page_shift block_shift max_pages"),
        *_fields(ctypes.c_int32, "sink_pages recent_pages reduction stages page_summary"),
        ("cluster_size", ctypes.c_int32),
        ("cluster_inverse", ctypes.c_uint32),
        ("plane_pages", ctypes.c_int32),
        *_fields(ctypes.c_float, "bound_radius scale softcap mass_unit"),
    ]

    def set_cluster(self, size: int) -> None:
        """``size`` CTAs a (request, head)."""
        self.cluster_size, self.cluster_inverse = size, -(-(2**31) // size)


class WriteParams(ctypes.Structure):
    """One launch of write_kv; see csrc/cuda/params.h for the shapes."""

    _fields_ = [
        *_fields(ctypes.c_void_p, "key value keys values summaries slot_mapping"),
        *_fields(ctypes.c_int64, "key_token_stride key_head_stride_in value_token_stride value_head_stride_in"),
        *_fields(ctypes.c_int64, "key_block_stride key_head_stride key_row_stride"),
        *_fields(ctypes.c_int64, "value_block_stride value_head_stride value_row_stride"),
        *_fields(ctypes.c_int64, "summary_block_stride summary_head_stride summary_page_stride summary_bound_stride"),
        *_fields(ctypes.c_int32, "num_tokens num_kv_heads page_shift block_shift page_summary"),
    ]
