"""vLLM's CPU worker, plus the budget tap that model runner V1 drops under speculative decoding.

V1 builds no plugin's logits processors when it speculates, since they would see logits that rejection changes. The tap
changes no logits; without it no budget would reach the worker and every row would be dense. :mod:`platform_cpu` puts
this worker in the stock one's place. It can go once V1 keeps argmax-invariant processors, or is gone itself.
"""

from __future__ import annotations

from quest_vllm import compat
from quest_vllm.budget_tap import QuestBudgetTap


class QuestCpuWorker(compat.cpu_worker().CPUWorker):  # type: ignore[misc,name-defined]
    """The stock worker whose batch tells :class:`QuestBudgetTap` of every request."""

    def init_device(self) -> None:
        """Make the model runner, then give its batch the tap unless it has one."""
        super().init_device()
        processors = self.model_runner.input_batch.logitsprocs
        if not any(isinstance(processor, QuestBudgetTap) for processor in processors.all):
            processors.argmax_invariant.append(QuestBudgetTap(self.vllm_config))
