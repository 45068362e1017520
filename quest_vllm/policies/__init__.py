"""How a decode step's pages are chosen: one small file a policy, behind one interface.

The served policy is :class:`BoundPolicy`, whose two operations every implementation has. The others are written in
PyTorch and exist to measure how far it is from what could be had; no backend offers them.
"""

from __future__ import annotations

from quest_vllm.policies.base import DecodeStep, PagePolicy
from quest_vllm.policies.bound import BoundPolicy
from quest_vllm.policies.oracle import OraclePolicy
from quest_vllm.policies.split_boxes import SplitBoxPolicy
from quest_vllm.policies.two_stage import TwoStagePolicy

__all__ = ["BoundPolicy", "DecodeStep", "OraclePolicy", "PagePolicy", "SplitBoxPolicy", "TwoStagePolicy"]
