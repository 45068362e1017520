"""A worker extension for soak.py (``--worker-extension-cls soak_worker.Auditor``): the whole audit, over HTTP."""

from __future__ import annotations

import dataclasses
from typing import Any

from quest_vllm.audit import audit_summaries


class Auditor:
    """Mixed into vLLM's worker."""

    def quest_audit(self) -> dict[str, Any]:
        """Compare every page summary of this worker's KV cache with its keys."""
        return dataclasses.asdict(audit_summaries(self))
