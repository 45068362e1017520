"""Sparse decode inside a real vLLM engine, with a real model, in this process."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from quest_vllm import compat
from quest_vllm.audit import AuditReport, audit_summaries
from tests.conftest import DTYPE

pytestmark = pytest.mark.engine

MAX_MODEL_LEN = 2048


@pytest.fixture(scope="module")
def llm(model_path: Path, monkeypatch_module: pytest.MonkeyPatch) -> Iterator[Any]:
    """An engine whose KV cache holds about two long requests, so that load preempts."""
    monkeypatch_module.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch_module.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM

    engine = LLM(
        model=str(model_path),
        attention_backend="CUSTOM",
        dtype=DTYPE,
        enforce_eager=True,
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=512,
        max_num_seqs=8,
        block_size=32,
        num_gpu_blocks_override=82,
        enable_prefix_caching=True,
        seed=0,
        disable_log_stats=False,
    )
    yield engine
    engine.llm_engine.engine_core.shutdown()


def params(budget: int | None, max_tokens: int = 16, **kwargs: Any) -> Any:
    from vllm import SamplingParams

    extra = None if budget is None else {"quest_token_budget": budget}
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, extra_args=extra, **kwargs)


def passkey_prompt(key: int, filler_lines: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    nouns = ("river", "garden", "engine", "letter", "window", "market")
    lines = [
        f"Line {i}: the {rng.choice(nouns)} near the {rng.choice(nouns)} was quiet today." for i in range(filler_lines)
    ]
    lines.insert(filler_lines // 3, f"The pass key is {key}. Remember it. {key} is the pass key.")
    return "\n".join(lines) + "\nWhat is the pass key? The pass key is"


def audit(llm: Any) -> AuditReport:
    (report,) = llm.collective_rpc(audit_summaries)
    assert report.layers == 30
    assert not report.errors, report.errors[:5]
    return report


def first_logprobs(output: Any) -> list[dict[int, float]]:
    return [{token: entry.logprob for token, entry in step.items()} for step in output.outputs[0].logprobs]


def test_passkey_is_found_at_a_budget_that_should_find_it(llm: Any) -> None:
    prompt = passkey_prompt(48213, 90)
    dense, sparse = llm.generate([prompt, prompt], [params(0, 8), params(512, 8)], use_tqdm=False)
    assert len(dense.prompt_token_ids) > 1200
    assert "48213" in dense.outputs[0].text
    assert "48213" in sparse.outputs[0].text


def largest_difference(first: Any, second: Any) -> float:
    """Largest difference of the log-probabilities that two runs share, over the steps before their texts part."""
    found = 0.0
    for step_a, step_b in zip(first_logprobs(first), first_logprobs(second), strict=True):
        shared = step_a.keys() & step_b.keys()
        found = max([found, *(abs(step_a[token] - step_b[token]) for token in shared)])
        if max(step_a, key=step_a.__getitem__) != max(step_b, key=step_b.__getitem__):
            break
    return found


def alone_against_batched(llm: Any, prompts: list[str], budgets: list[int]) -> float:
    """How far the rows of one batch are from their solo runs."""
    together = llm.generate(prompts, [params(b, 4, logprobs=5) for b in budgets], use_tqdm=False)
    solo = [
        llm.generate([prompt], [params(budget, 4, logprobs=5)], use_tqdm=False)[0]
        for prompt, budget in zip(prompts, budgets, strict=True)
    ]
    return max(largest_difference(a, b) for a, b in zip(solo, together, strict=True))


def test_budget_that_covers_the_context_equals_dense(llm: Any) -> None:
    prompt = passkey_prompt(7, 40)
    sampling = [params(budget, 4, logprobs=5) for budget in (0, 0, MAX_MODEL_LEN)]
    dense, again, covered = llm.generate([prompt] * 3, sampling, use_tqdm=False)
    # the same kernel serves all three rows: two dense ones show how much the batch position alone changes
    assert largest_difference(dense, covered) <= 2 * max(largest_difference(dense, again), 0.02)


def test_rows_of_different_budgets_equal_their_solo_runs(llm: Any) -> None:
    prompts = [passkey_prompt(11111, 60, seed=1), passkey_prompt(22222, 50, seed=2)]
    noise = alone_against_batched(llm, prompts, [0, 0])  # bf16 noise of the stock kernels between batch shapes
    assert alone_against_batched(llm, prompts, [128, 512]) <= 3 * max(noise, 0.05)


def test_a_seed_survives_a_prefill_in_chunks(llm: Any) -> None:
    """vLLM-CPU alone ends here; the draws of unfinished prefills must leave no trace in the answer either."""
    from vllm import SamplingParams

    prompt = passkey_prompt(5, 90, seed=77)
    sampling = [SamplingParams(temperature=2.0, seed=seed, max_tokens=12) for seed in (3, 3, 4)]
    in_chunks, from_cache, other = (llm.generate([prompt], one, use_tqdm=False)[0] for one in sampling)
    assert len(in_chunks.prompt_token_ids) > 2 * 512
    assert from_cache.num_cached_tokens > 1024  # one chunk is left to prefill
    assert list(in_chunks.outputs[0].token_ids) == list(from_cache.outputs[0].token_ids)
    assert in_chunks.outputs[0].token_ids != other.outputs[0].token_ids


def test_top_p_is_each_rows_own_and_is_counted(llm: Any) -> None:
    """Rows of one batch reach what they reach alone, between the forced pages and the budget; 1 spends the budget."""
    from quest_vllm.tally import Tally, find_tally

    # short enough for the cache to hold all three: a preempted request would take its steps again
    prompts = [passkey_prompt(number, 50, seed=1) for number in (11111, 22222, 33333)]
    shares = [0.5, 0.95, 1]

    def sampling(top_p: float, number: int) -> Any:
        made = params(512, 5, ignore_eos=True)
        made.extra_args |= {"quest_top_p": top_p, "quest_tally": number}
        return made

    def tally(number: int) -> Tally:
        found = find_tally(number)
        assert found is not None and round(found.steps, 6) == 4
        assert found.pages * 16 - 4 * 16 < found.tokens <= found.pages * 16
        return found

    llm.generate(prompts, [sampling(p, 901 + row) for row, p in enumerate(shares)], use_tqdm=False)
    for row in (0, 1):
        llm.generate([prompts[row]], [sampling(shares[row], 911 + row)], use_tqdm=False)
        # bf16 noise between batch shapes moves the line between two pages now and then
        assert tally(911 + row).pages == pytest.approx(tally(901 + row).pages, rel=0.1)
    assert 4 * 3 < tally(901).pages < tally(902).pages < 4 * 32
    assert find_tally(903) is None  # a fixed budget: usage follows from lengths


def test_policy_is_each_rows_own(llm: Any) -> None:
    """A window has not seen the number in the middle; its neighbours have, however their heads are joined."""
    prompt = passkey_prompt(48213, 90)
    names = ["mass", "window", "max", "two_stage", "window", "mean"]
    sampling = [params(512, 8) for _ in names]
    for made, name in zip(sampling, names, strict=True):
        made.extra_args |= {"quest_policy": name}
    texts = [output.outputs[0].text for output in llm.generate([prompt] * len(names), sampling, use_tqdm=False)]
    assert ["48213" in text for text in texts] == [name != "window" for name in names], texts
    alone = llm.generate([prompt], [sampling[1]], use_tqdm=False)[0].outputs[0].text
    assert "48213" not in alone


def watched(choose_pages: Callable[..., Any], isa: str, held: list[torch.Tensor]) -> Callable[..., Any]:
    """``choose_pages``, which also adds to ``held`` how much of its group's attention each head's pages hold.

    ``[4, heads]``: of the pages chosen, of those that the reference chooses, with the best summaries, and the best.
    """
    from quest_vllm.ops.api import load_ops
    from quest_vllm.ops.cpu import unpack_keys
    from quest_vllm.policies import DecodeStep, OraclePolicy

    reference = load_ops("reference", "cpu")
    oracle = OraclePolicy(reference)

    def choose(*tensors: Any, **options: Any) -> Any:
        scores, log_sums, query, packed, *rows = tensors
        found, keys = choose_pages(*tensors, **options), unpack_keys(packed, isa)
        assert reference.choose_pages is not None
        expected = reference.choose_pages(scores, log_sums, query, keys, *rows, **options)
        sizes = {name: options[name] for name in ("page_size", "max_page_budget")}
        step = DecodeStep(query, keys, torch.empty(0), *rows, scale=options["scale"], **sizes)
        choices = (found, expected, reference.select_pages(scores, *rows[1:], **sizes), oracle.choose(step))
        mass = oracle.scores(step).exp()
        taken = [mass.gather(-1, pages.clamp(min=0).long()).where(pages >= 0, 0) for pages in choices]
        held.append(torch.stack(taken).sum(dim=-1).flatten(1))
        return found

    return choose


def test_two_stages_choose_by_keys(llm: Any) -> None:
    """In every layer and step as the reference does: better pages than the summaries alone choose."""
    held: list[torch.Tensor] = []

    def watch(worker: Any) -> None:
        for layer in compat.cached_layers(worker).values():
            ops = layer.impl._layer_ops(layer)
            layer.impl._ops = dataclasses.replace(ops, choose_pages=watched(ops.choose_pages, layer.isa, held))

    def stop(worker: Any) -> None:
        for layer in compat.cached_layers(worker).values():
            layer.impl._ops = None  # found again

    sampling = params(256, 4, ignore_eos=True)
    sampling.extra_args |= {"quest_policy": "two_stage"}
    llm.collective_rpc(watch)
    try:
        llm.generate([passkey_prompt(48213, 90)], [sampling], use_tqdm=False)
    finally:
        llm.collective_rpc(stop)
    assert len(held) == 30 * 3
    ours, expected, summarised, best = torch.cat(held, dim=1)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0)  # pages may differ that hold the same
    assert (ours <= best * (1 + 1e-5)).all()
    assert (best - ours).mean() < 0.8 * (best - summarised).mean()


def counters(llm: Any) -> dict[str, float]:
    """vLLM's own, so far."""
    return {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}


def test_summaries_survive_mixed_load(llm: Any) -> None:
    """Prefix hits, chunked prefill, preemption, n>1, aborts and budgets that swap between reused rows."""
    from vllm import SamplingParams

    rng = random.Random(3)
    engine = llm.llm_engine
    shared = passkey_prompt(9, 40, seed=9)
    before = counters(llm)
    for number in range(10):
        text = shared + f" {number}" if number % 3 == 0 else passkey_prompt(number, rng.randint(5, 60), seed=number)
        sampling = SamplingParams(
            temperature=0.8,
            max_tokens=rng.randint(50, 110),
            ignore_eos=True,
            n=2 if number % 5 == 0 else 1,
            extra_args={
                "quest_token_budget": rng.choice([0, 64, 128, 512, MAX_MODEL_LEN]),
                "quest_top_p": 0.9 if number % 4 == 1 else 1.0,
            },
        )
        engine.add_request(f"load-{number}", text, sampling)
    steps, live_checked = 0, 0
    while engine.has_unfinished_requests():
        engine.step()
        steps += 1
        if steps == 12:
            engine.abort_request(["load-3"])
        if steps % 50 == 0:
            live_checked += audit(llm).live_pages_checked
    assert steps > 40
    after = counters(llm)
    assert after["vllm:num_preemptions"] > before["vllm:num_preemptions"], after
    assert after["vllm:prefix_cache_hits"] > before["vllm:prefix_cache_hits"]
    assert live_checked > 0
    assert audit(llm).pages_checked > 1000
