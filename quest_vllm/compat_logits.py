"""vLLM's two logits-processor bases, one per model runner: the only private vLLM import at module level.

A class statement needs its bases, so these cannot be lazy as in :mod:`quest_vllm.compat`. Only
:mod:`quest_vllm.budget_tap` and :mod:`quest_vllm.eval.forcing` import this module, and vLLM imports those, by entry
point or by name, long after it has been imported itself.
"""

from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality
from vllm.v1.sample.logits_processor.interface import LogitsProcessor as V1LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as V2LogitsProcessor

__all__ = ["BatchUpdate", "MoveDirectionality", "V1LogitsProcessor", "V2LogitsProcessor", "process_dict_updates"]
