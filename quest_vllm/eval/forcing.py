"""The logits processor that makes a model read a text token by token in decode, and keeps what it thought of it.

Loaded by the evaluation's own engine alone, never by a server: one of its parameters is a file to write to. A request
in ``SamplingParams.extra_args``:

- :data:`FORCED`: token ids; output token i is ``forced[i]``, after them decoding is free;
- :data:`PROMPT_LENGTH`: tokens of the prompt;
- :data:`RECORD` (optional): an ``.npy`` file, float32 ``[len(forced), vocab_size]``, made by the caller; row i becomes
  the natural-log distribution from which output token i would have been drawn. Row 0 comes from the dense prefill.

The logits are raw here as long as a request sets no penalty, logit bias, bad words or ``min_tokens``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from quest_vllm.compat_logits import V1LogitsProcessor, V2LogitsProcessor, process_dict_updates

if TYPE_CHECKING:
    import torch

    from quest_vllm.compat_logits import BatchUpdate

FORCED = "quest_eval_forced"
PROMPT_LENGTH = "quest_eval_prompt_length"
RECORD = "quest_eval_record"


@dataclass
class _Forced:
    """One request. ``output`` is vLLM's own growing list of its output tokens (V1 only)."""

    tokens: list[int]
    prompt_length: int
    record: np.ndarray[Any, np.dtype[np.float32]] | None
    output: list[int] | None = None


def _forced(sampling_params: Any, output: list[int] | None = None) -> _Forced | None:
    extra = sampling_params.extra_args or {}
    if not extra.get(FORCED):
        return None
    record = np.load(extra[RECORD], mmap_mode="r+") if RECORD in extra else None
    return _Forced(list(extra[FORCED]), int(extra[PROMPT_LENGTH]), record, output)


class ForcedTokens(V1LogitsProcessor, V2LogitsProcessor):
    """Forces and records; rows of requests that ask for neither stay untouched."""

    def __init__(self, *_: Any) -> None:
        """Called as ``(vllm_config, device, is_pin_memory)`` by V1 and ``(vllm_config, req_states)`` by V2."""
        self._rows: dict[int, _Forced] = {}

    def is_argmax_invariant(self) -> bool:
        """False: the point is another argmax."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """V1: keep batch row -> request."""
        process_dict_updates(self._rows, batch_update, lambda params, _prompt, output: _forced(params, output))

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """V2: a request takes slot ``req_idx``. Whether its logits are to change."""
        self._rows.pop(req_idx, None)
        forced = _forced(sampling_params)
        if forced is not None:
            self._rows[req_idx] = forced
        return forced is not None

    def apply(self, logits: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        """``logits`` ``[rows, vocab_size]``, changed in place: all but the forced token become -inf."""
        for row, step, forced in self._steps(ctx):
            if 0 <= step < len(forced.tokens):
                if forced.record is not None:
                    # a prefill in chunks comes by more than once with step 0; its last chunk comes last
                    forced.record[step] = logits[row].float().log_softmax(-1).cpu().numpy()
                logits[row] = float("-inf")
                logits[row, forced.tokens[step]] = 0.0
        return logits

    def _steps(self, ctx: Any) -> Iterator[tuple[int, int, _Forced]]:
        """Yield (row of the logits, index of the output token that it decides, request)."""
        if ctx is None:
            for row, forced in self._rows.items():
                yield row, len(forced.output or ()), forced
            return
        for row, slot in enumerate(ctx.idx_mapping_np.tolist()):
            if (state := self._rows.get(slot)) is not None:
                # negative while a prompt is prefilled in chunks
                yield row, int(ctx.seq_lens_upper_bound_np[row]) - state.prompt_length, state
