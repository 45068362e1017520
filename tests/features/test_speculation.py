"""Speculative decoding: verify tokens are sparse rows of their own, and change no text.

On the CPU model runner V1 speculates, which drops plugins' logits processors: budgets must arrive all the same.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quest_vllm import layers
from quest_vllm.compat import UnsupportedVllm
from quest_vllm.metrics_files import FilesCollector, metrics_dir
from tests.features.conftest import audit, counted_rows, engine, logprobs, params

pytestmark = pytest.mark.engine

STEPS, DRAFTS = 16, 3
MAX_MODEL_LEN = 2048


@pytest.fixture(scope="module")
def llm(model_path: Path) -> Iterator[Any]:
    """An engine that proposes three tokens by n-gram look-up, and audits its summaries in every step.

    Under "mass" the newest page, which holds drafts, has a say in how heads weigh (quest_vllm/token_rows.py): a page at
    the threshold may change places. Under "max" drafts change nothing.
    """
    speculation = {"method": "ngram", "num_speculative_tokens": DRAFTS, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    quest = {"quest": {"audit_steps": 1, "group_reduction": "max"}}
    with engine(
        model_path, speculative_config=speculation, max_model_len=MAX_MODEL_LEN, additional_config=quest
    ) as running:
        yield running


@contextlib.contextmanager
def no_drafts(llm: Any) -> Iterator[None]:
    """The same engine without a draft to verify."""

    def silence(worker: Any) -> None:
        worker.model_runner.drafter.propose = lambda _, sampled, *__, **___: [[] for _ in sampled]

    def restore(worker: Any) -> None:
        del worker.model_runner.drafter.propose

    llm.collective_rpc(silence)
    try:
        yield
    finally:
        llm.collective_rpc(restore)


def speculated(llm: Any) -> tuple[int, int]:
    """Tokens drafted and accepted so far."""
    metrics = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    return metrics["vllm:spec_decode_num_draft_tokens"], metrics["vllm:spec_decode_num_accepted_tokens"]


def audited() -> dict[str, int]:
    """Pages that the running audit compared in this process so far, by result."""
    samples = [sample for metric in FilesCollector(metrics_dir()).collect() for sample in metric.samples]
    found = [sample for sample in samples if sample.name == "quest_audit_pages_total"]
    return {sample.labels["result"]: int(sample.value) for sample in found}


def repetitive(words: int, seed: int = 0) -> str:
    """A prompt whose continuation the n-gram look-up finds often, and gets wrong as often."""
    rng = random.Random(seed)
    nouns = [rng.choice(("river", "garden", "engine", "letter", "window", "market")) for _ in range(words // 8)]
    return "".join(f"The {noun} was quiet, then the {rng.choice(nouns)} was not. " for noun in nouns)


@pytest.mark.parametrize(
    ("budget", "decode", "absent"),
    [
        (128, "sparse/budget", "dense/no_budget"),
        (0, "dense/no_budget", "sparse/budget"),
        (MAX_MODEL_LEN, "dense/budget_covers_context", "dense/no_budget"),
        (None, "dense/budget_covers_context", "dense/no_budget"),
    ],
)
def test_budget_arrives_and_every_verify_token_is_a_row(llm: Any, budget: int | None, decode: str, absent: str) -> None:
    rng = random.Random(1)
    unguessable = {"prompt_token_ids": [rng.randint(1000, 40000) for _ in range(700)]}
    drafted, accepted = speculated(llm)
    with counted_rows() as rows:
        llm.generate([repetitive(400), unguessable], params(budget, STEPS), use_tqdm=False)
    drafted, accepted = (now - before for now, before in zip(speculated(llm), (drafted, accepted), strict=True))
    assert drafted > 0 and absent not in rows, rows
    assert set(rows) <= {decode, "dense/prefill"}, rows
    # every step yields the accepted drafts and one token more; what the last one yields beyond STEPS is cut
    least = 2 * (STEPS - 1) + drafted - accepted
    assert least <= rows[decode] <= least + 2 * DRAFTS, (rows, drafted, accepted)


def first_difference(ours: list[dict[int, float]], theirs: list[dict[int, float]]) -> tuple[float, float | None]:
    """How far two greedy runs' two best log-probabilities lie apart as long as their texts agree; and where they part,
    how far apart each run saw those two tokens (None: they never part)."""
    noise = 0.0
    for step_a, step_b in zip(ours, theirs, strict=True):
        best_a, best_b = max(step_a, key=step_a.__getitem__), max(step_b, key=step_b.__getitem__)
        if best_a != best_b:
            return noise, max(
                step[best] - step.get(other, -99.0)
                for step, best, other in ((step_a, best_a, best_b), (step_b, best_b, best_a))
            )
        likely = sorted(step_a, key=step_a.__getitem__)[-2:]
        noise = max([noise, *(abs(step_a[token] - step_b[token]) for token in likely if token in step_b)])
    return noise, None


def test_drafts_change_no_text_at_any_budget(llm: Any) -> None:
    budgets = [0, MAX_MODEL_LEN, 256, 96]
    prompts = [repetitive(280 + 40 * i, seed=i) for i in range(len(budgets))]
    sampling = [params(budget, 32, logprobs=5) for budget in budgets]
    before = speculated(llm)
    with_drafts = llm.generate(prompts, sampling, use_tqdm=False)
    drafted, accepted = (now - then for now, then in zip(speculated(llm), before, strict=True))
    assert drafted > accepted > 12  # text of several tokens a step, and rejected drafts, stand behind this
    with no_drafts(llm):
        without = llm.generate(prompts, sampling, use_tqdm=False)
    assert speculated(llm) == (before[0] + drafted, before[1] + accepted)
    found = [first_difference(logprobs(a), logprobs(b)) for a, b in zip(with_drafts, without, strict=True)]
    # rows of several tokens and of one go through other matrix kernels: the dense rows say what that is worth
    noise = max(0.125, *(noise for noise, _ in found[:2]))  # a bfloat16 logit of 16 or more moves in steps of 0.125
    for budget, (apart, gap) in zip(budgets, found, strict=True):
        assert apart <= 3 * noise, (budget, found)
        assert gap is None or gap <= 2 * noise, (budget, found)  # the two best tokens tied: each may move so far


def test_summaries_are_right_after_rejected_drafts(llm: Any) -> None:
    before = audited()
    sampling = [params(budget, 24, temperature=0.7) for budget in (64, 128, 256, 0)]
    llm.generate([repetitive(200 + 40 * i) for i in range(4)], sampling, use_tqdm=False)
    drafted, accepted = speculated(llm)
    assert drafted > accepted > 0
    audit(llm, 30)
    after = audited()
    assert after["right"] > before["right"] and after["wrong"] == before["wrong"], (before, after)


@pytest.mark.parametrize("worker", ["mine.Worker", "auto"])
def test_speculation_without_the_tap_is_refused(worker: str) -> None:
    config = SimpleNamespace(
        use_v2_model_runner=False,
        speculative_config=SimpleNamespace(),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1, worker_cls=worker),
    )
    with pytest.raises(UnsupportedVllm, match=f"speculative decoding.*{worker}.*budgets would not reach it"):
        layers.refuse_engine_features(config)
