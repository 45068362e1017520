"""vLLM's CPU worker, plus the budget tap that model runner V1 drops under speculative decoding, and working seeds.

V1 builds no plugin's logits processors when it speculates, since they would see logits that rejection changes. The tap
changes no logits; without it no budget would reach the worker and every row would be dense. :mod:`platform_cpu` puts
this worker in the stock one's place. It can go once V1 keeps argmax-invariant processors, or is gone itself.

Seeds: :mod:`quest_vllm.compat_seeds`. Pipeline stages: vLLM-CPU allocates what a later stage receives into while it
warms up what it compiles, so without torch.compile the first request ends the engine with a bare AssertionError. Can go
once it allocates that anyway.
"""

from __future__ import annotations

from typing import Any

from quest_vllm import compat
from quest_vllm.budget_tap import QuestBudgetTap
from quest_vllm.compat_seeds import keep_seeds


class QuestCpuWorker(compat.cpu_worker().CPUWorker):  # type: ignore[misc,name-defined]
    """The stock worker whose batch tells :class:`QuestBudgetTap` of every request."""

    def init_device(self) -> None:
        """Make the model runner, then give its batch the tap unless it has one."""
        super().init_device()
        batch = getattr(self.model_runner, "input_batch", None)  # runner V2 has none, and neither of the two faults
        if batch is None:
            return
        processors = batch.logitsprocs
        if not any(isinstance(processor, QuestBudgetTap) for processor in processors.all):
            processors.argmax_invariant.append(QuestBudgetTap(self.vllm_config))

    def compile_or_warm_up_model(self) -> Any:
        """As the stock worker, then the buffers of a later pipeline stage, if nothing has made them yet."""
        result = super().compile_or_warm_up_model()
        compat.give_stage_buffers(self.model_runner)
        return result

    def sample_tokens(self, *arguments: Any, **named: Any) -> Any:
        """The step's sampling, after which draws for unfinished prefills are taken back."""
        if hasattr(self.model_runner, "input_batch"):
            keep_seeds(self.model_runner)
        return super().sample_tokens(*arguments, **named)
