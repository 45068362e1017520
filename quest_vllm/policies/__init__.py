"""How a decode step's pages are chosen: one small file a policy, behind one interface.

Served are :class:`BoundPolicy` and :class:`KeyCodesPolicy`, of which a server has one, and by request
:class:`WindowPolicy`, :class:`TwoStagePolicy` on the server's own, or another ``group_reduction``: every implementation
has their operations. The others are written in PyTorch and exist to measure how far those are from what could be had;
no backend offers them.
"""

from __future__ import annotations

from quest_vllm.policies.base import NO_SUMMARY, DecodeStep, PagePolicy
from quest_vllm.policies.bound import BoundPolicy
from quest_vllm.policies.heavy_hitters import HeavyHitterPolicy
from quest_vllm.policies.key_codes import KeyCodesPolicy
from quest_vllm.policies.oracle import OraclePolicy
from quest_vllm.policies.shared_pool import SharedPoolPolicy
from quest_vllm.policies.split_boxes import SplitBoxPolicy
from quest_vllm.policies.two_stage import TwoStagePolicy
from quest_vllm.policies.window import WindowPolicy

__all__ = [
    "NO_SUMMARY",
    "BoundPolicy",
    "DecodeStep",
    "HeavyHitterPolicy",
    "KeyCodesPolicy",
    "OraclePolicy",
    "PagePolicy",
    "SharedPoolPolicy",
    "SplitBoxPolicy",
    "TwoStagePolicy",
    "WindowPolicy",
]
