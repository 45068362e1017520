"""Real engines in this process, one after another, and what the tests measure on them."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from quest_vllm.audit import AuditReport, audit_summaries
from quest_vllm.metrics_files import FilesCollector, metrics_dir
from quest_vllm.step_log import LAG
from tests.conftest import DTYPE


@contextlib.contextmanager
def engine(model: Path, **settings: Any) -> Iterator[Any]:
    """An ``LLM`` with sparse decode in this process, shut down and taken apart at the end."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

    defaults: dict[str, Any] = {
        "attention_backend": "CUSTOM",
        "dtype": DTYPE,
        "enforce_eager": True,
        "max_model_len": 2048,
        "max_num_batched_tokens": 512,
        "max_num_seqs": 8,
        "block_size": 32,
        "num_gpu_blocks_override": 80,  # 2560 tokens: an audit reads every block, used or not
        "seed": 0,
        "disable_log_stats": False,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_NO_USAGE_STATS", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        # vLLM looks at a model class that is new to this machine in a process of its own: an import of vLLM each
        patch.setattr("vllm.model_executor.models.registry._run_in_subprocess", lambda look: look(), raising=False)
        try:
            llm = LLM(model=str(model), **{**defaults, **settings})
            try:
                yield llm
            finally:
                llm.llm_engine.engine_core.shutdown()
        finally:
            # also after a start that failed half-way: the next one needs a clean process
            ensure_kv_transfer_shutdown()
            gc.collect()
            cleanup_dist_env_and_memory()


def params(budget: int | None, max_tokens: int = 16, **settings: Any) -> Any:
    """Greedy sampling with a token budget."""
    from vllm import SamplingParams

    extra = None if budget is None else {"quest_token_budget": budget}
    return SamplingParams(
        **{"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True, "extra_args": extra, **settings}
    )


def samples(name: str) -> dict[str, float]:
    """Values so far of a metric, of this process and the workers that it started, by its labels' values."""
    return {
        "/".join(sample.labels.values()): sample.value
        for metric in FilesCollector(metrics_dir()).collect()
        for sample in metric.samples
        if sample.name == name
    }


def row_counts() -> dict[str, float]:
    """Rows so far in this process, by "path/reason"."""
    if torch.cuda.is_available():  # steps are counted there a little later
        time.sleep(3 * LAG)
    return samples("quest_decode_rows_total")


@contextlib.contextmanager
def counted_rows() -> Iterator[dict[str, int]]:
    """Yield a dict that, at the block's end, holds the rows counted inside it, by "path/reason"; no zeros."""
    before, found = row_counts(), dict[str, int]()
    yield found
    for kind, count in row_counts().items():
        grown = int(count - before.get(kind, 0))
        if grown:
            found[kind] = grown


def audit(llm: Any, layers: int) -> AuditReport:
    """Audit every summary of ``llm``, of which ``layers`` layers must have some; none may be wrong."""
    (report,) = llm.collective_rpc(audit_summaries)
    assert report.layers == layers
    assert not report.errors, report.errors[:5]
    assert report.live_pages_checked > 0  # vLLM keeps the last batch until the next step
    return report


def logprobs(output: Any, answer: int = 0) -> list[dict[int, float]]:
    """Log-probabilities of each step of one answer, by token."""
    return [{token: entry.logprob for token, entry in step.items()} for step in output.outputs[answer].logprobs]


def largest_difference(first: Sequence[dict[int, float]], second: Sequence[dict[int, float]]) -> float:
    """Largest difference of the log-probabilities that two runs share, over the steps before their texts part."""
    found = 0.0
    for step_a, step_b in zip(first, second, strict=True):
        shared = step_a.keys() & step_b.keys()
        found = max([found, *(abs(step_a[token] - step_b[token]) for token in shared)])
        if max(step_a, key=step_a.__getitem__) != max(step_b, key=step_b.__getitem__):
            break
    return found
