"""The Hugging Face reference that policies are measured with, and its texts: what it measures must be what it says."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import hf_reference
import measure_policies
import policy_texts

from quest_vllm.ops import reference
from quest_vllm.policies import BoundPolicy, DecodeStep, HeavyHitterPolicy, WindowPolicy


@pytest.fixture(scope="module")
def model(model_path: Path) -> hf_reference.ReferenceModel:
    return hf_reference.ReferenceModel(model_path)


@pytest.fixture(scope="module")
def tokens(model: hf_reference.ReferenceModel) -> list[int]:
    return model.encode(policy_texts.python_manual()[60_000:64_000])


@pytest.fixture(scope="module")
def prefix(model: hf_reference.ReferenceModel, tokens: list[int]) -> hf_reference.Prefix:
    return model.prefill(tokens[:256], 40)


def test_dense_rows_equal_transformers(
    model: hf_reference.ReferenceModel, tokens: list[int], prefix: hf_reference.Prefix
) -> None:
    branches = [tokens[256:276], tokens[300:312]]
    found = model.decode(prefix, branches, hf_reference.Run(None))
    model.model.set_attn_implementation("sdpa")
    for branch, logits in zip(branches, found, strict=True):
        with torch.inference_mode():
            whole = model.model(torch.tensor([tokens[:256] + branch])).logits[0, 256:]
        torch.testing.assert_close(logits, whole, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("page_size", [16, 32])
def test_a_budget_that_covers_the_context_is_dense_and_a_small_one_is_not(
    model: hf_reference.ReferenceModel, tokens: list[int], prefix: hf_reference.Prefix, page_size: int
) -> None:
    def logits(budget: int | None) -> torch.Tensor:
        policy = None if budget is None else BoundPolicy(model.ops, "mass", 0.25)
        run = hf_reference.Run(policy, page_size, budget or 0)
        return model.decode(prefix, [tokens[256:270]], run)[0]

    torch.testing.assert_close(logits(1024), logits(None), atol=1e-4, rtol=1e-4)
    assert (logits(3 * page_size) - logits(None)).abs().max() > 0.1


@pytest.mark.parametrize(("policy", "page_size"), [("window", 16), ("eviction", 1)])
def test_a_comparison_with_all_of_the_context_is_dense_and_with_little_is_not(
    model: hf_reference.ReferenceModel, tokens: list[int], policy: str, page_size: int
) -> None:
    """Eviction in tokens takes a path of its own through the attention."""
    chosen = WindowPolicy(model.ops) if policy == "window" else HeavyHitterPolicy()
    prefix = model.prefill(tokens[:256], 40, keep_attended=True)
    dense, whole, little = (
        model.decode(prefix, [tokens[256:270]], run)[0]
        for run in (
            hf_reference.Run(None),
            hf_reference.Run(chosen, page_size, 1024),
            hf_reference.Run(chosen, page_size, 64),
        )
    )
    torch.testing.assert_close(whole, dense, atol=1e-3, rtol=1e-4)
    assert (little - dense).abs().max() > 0.1


def test_a_sliding_layer_keeps_the_newest_and_its_row_sees_its_window() -> None:
    kept = torch.arange(1.0, 31).view(1, 30, 1).expand(2, 30, 4)
    blocks = hf_reference.blocks_of(kept, 2 * hf_reference.BLOCK)
    assert blocks.shape == (2, 2, hf_reference.BLOCK, 4)
    assert blocks[1, 1, -1, 0] == 30 and blocks[1, 0, -30, 3] == 1 and not blocks[1, :, :-30].any()
    step = DecodeStep(
        query=torch.zeros(2, 4, 4),
        key_cache=torch.zeros(3, 2, 64, 4),
        summaries=torch.zeros(3, 2, 4, 2, 4),
        block_table=torch.tensor([[0, 1], [0, 2]]).int(),
        seq_lens=torch.tensor([70, 5]).int(),
        page_budgets=torch.tensor([4, 4]).int(),
        max_page_budget=4,
        page_size=16,
        scale=1.0,
    )
    seen = hf_reference.in_window(step, 10)[:, 0]
    assert seen[0].nonzero().flatten().tolist() == list(range(60, 70))
    assert seen[1].nonzero().flatten().tolist() == list(range(5))


def test_each_row_sees_the_summaries_of_its_own_time(
    model: hf_reference.ReferenceModel, tokens: list[int], prefix: hf_reference.Prefix
) -> None:
    """One pass over a continuation ends as a pass over each of its beginnings does."""
    run = hf_reference.Run(BoundPolicy(model.ops, "mass", 0.25), 16, 64)
    together = model.decode(prefix, [tokens[256:280]], run)[0]
    for length in (1, 17, 24):
        alone = model.decode(prefix, [tokens[256 : 256 + length]], run)[0]
        torch.testing.assert_close(alone[-1], together[length - 1], atol=1e-3, rtol=1e-3)


def test_rows_that_do_not_fit_are_refused(prefix: hf_reference.Prefix) -> None:
    with pytest.raises(ValueError, match=r"expected up to 40 rows, 64 in a continuation, got \[30, 11\]"):
        hf_reference.lay_out(prefix, [30, 11])


def test_needles_are_unique_and_the_prefix_has_the_stated_length(model: hf_reference.ReferenceModel) -> None:
    for seed in range(3):
        prefix, questions, values = policy_texts.needles(model.encode, 1024, 6, seed)
        text = model.tokenizer.decode(prefix)
        assert len(prefix) == 1024
        assert Counter(values).most_common(1)[0][1] == 1
        for question, value in zip(questions, values, strict=True):
            asked = model.tokenizer.decode(question.tokens)
            name = asked.split(" of ")[1].split(" is ")[0]
            assert asked.endswith(f" is {value}")
            assert text.count(value) == 1 and f"The secret number of {name} is {value}." in text
            assert model.tokenizer.decode(question.tokens[-question.answer :]) == value


def test_texts_have_the_stated_length_and_differ(model: hf_reference.ReferenceModel) -> None:
    found = policy_texts.texts(model.encode, 512, 16)
    assert {(len(text.prefix), len(text.rows)) for text in found} == {(512, 16)}
    assert len({text.sha256 for text in found}) == len(found) == 12


def test_gap_closed_is_nothing_for_the_original_and_all_for_the_oracle() -> None:
    results = [
        measure_policies.result(name, 128, {"kl": kl})
        for name, kl in (("original", [0.5, 0.7]), ("default", [0.2, 0.3]), ("oracle", [0.1, 0.1]))
    ]
    measure_policies.add_gap_closed(results)
    closed = [one["gap_closed"]["kl"] for one in results]
    assert closed[0] == 0 and closed[2] == 1 and closed[1] == pytest.approx(0.7)
    assert results[0]["kl"]["low"] == 0.5 and results[0]["kl"]["high"] == pytest.approx(0.7)


def test_bytes_of_a_candidate_count_summaries_and_pages(model: hf_reference.ReferenceModel) -> None:
    page, row = 16 * 4 * 64, 4 * 64
    whole = measure_policies.bound(model.ops, "mass", 0.25).kv_bytes(256, 3, 9, 64)
    assert whole == 3 * (4096 // 16 * row + 16 * page)
    assert measure_policies.bound(model.ops, "per_query_head", 0.25).kv_bytes(256, 3, 9, 64) == 3 * whole
    assert reference.GROUP_REDUCTIONS == ("max", "mean", "mass", "per_query_head")
