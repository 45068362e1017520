"""The Hugging Face reference that policies are measured with, and its texts: what it measures must be what it says."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import calibrate_reference
import hf_reference
import measure_policies
import policy_sweeps
import policy_texts
import shared_prefix_ops

from quest_vllm.ops import reference
from quest_vllm.policies import BoundPolicy, DecodeStep, HeavyHitterPolicy, KeyCodesPolicy, WindowPolicy


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


@pytest.fixture(scope="module")
def masked_model(model_path: Path) -> hf_reference.ReferenceModel:
    """What runs on a GPU, on the CPU."""
    found = hf_reference.ReferenceModel(model_path)
    found.masked, found.ops = True, shared_prefix_ops.shared_prefix_ops()
    return found


@pytest.mark.parametrize("sweep", ["gap", "characterise"])
def test_what_runs_on_a_gpu_gives_what_the_served_operations_give(
    model: hf_reference.ReferenceModel, masked_model: hf_reference.ReferenceModel, tokens: list[int], sweep: str
) -> None:
    text = policy_texts.Text("manual", "", tokens[:256], tokens[256:260])
    found = []
    for one in (model, masked_model):
        task = measure_policies.TextTask(one, [text], 16, 2, True)
        found.append(
            [
                values
                for candidate in policy_sweeps.SWEEPS[sweep](one.ops, 16)
                for run, budgets in measure_policies.passes(candidate, (96, 128))
                for values in task.measure(run, tuple(map(candidate.spent, budgets)))
            ]
        )
    assert len(found[0]) == 2 * len(policy_sweeps.SWEEPS[sweep](model.ops, 16))
    for served, other in zip(*found, strict=True):
        for metric in ("kl", "text_nll"):
            assert served[metric] == pytest.approx(other[metric], abs=1e-4)


def test_several_texts_and_budgets_in_one_pass_are_those_of_passes_of_their_own(
    masked_model: hf_reference.ReferenceModel, tokens: list[int]
) -> None:
    texts = [policy_texts.Text("manual", "", tokens[i : i + 192], tokens[i + 192 : i + 200]) for i in (0, 100, 300)]
    candidate = policy_sweeps.codes(masked_model.ops, "mass")
    together = measure_policies.TextTask(masked_model, texts, 16, 2, False).measure(candidate.run(64), (64, 96))
    for i, text in enumerate(texts):
        alone = measure_policies.TextTask(masked_model, [text], 16, 1, False)
        for values, budget in zip(together, (64, 96), strict=True):
            (wanted,) = alone.measure(candidate.run(budget), (budget,))
            assert {m: v[i] for m, v in values.items()} == pytest.approx({m: v[0] for m, v in wanted.items()}, abs=1e-4)
    assert together[0]["kl"] != together[1]["kl"]


def test_the_reference_tells_calibration_what_each_layer_loses(
    masked_model: hf_reference.ReferenceModel, tokens: list[int]
) -> None:
    texts = [policy_texts.Text("manual", "", tokens[i : i + 256], tokens[i + 256 : i + 260]) for i in (0, 150, 300)]
    probe = calibrate_reference.ReferenceProbe(masked_model, texts, 2)
    assert probe.layers == list(range(30))
    assert probe.kl(probe.layers, 64) == pytest.approx([0.0] * 3, abs=1e-5)
    every, alone = probe.kl([], 64), probe.kl_alone(20, 64)
    assert alone == probe.kl([layer for layer in range(30) if layer != 20], 64)
    assert all(0 < one < whole for one, whole in zip(alone, every, strict=True))
    assert probe.kl([], 320) == pytest.approx([0.0] * 3, abs=1e-4)  # covers the context
    # alike, the plain budget; where all layers but one can read everything, that one alone with the forced pages
    assert probe.kl([], 64, dict.fromkeys(range(30), 1.0)) == every
    forced = probe.kl_alone(20, 48)
    assert probe.kl([], 272, {layer: float(layer != 20) for layer in range(30)}) == pytest.approx(forced, abs=1e-4)


def test_layers_are_compared_with_what_is_served(
    masked_model: hf_reference.ReferenceModel, tokens: list[int], tmp_path: Path
) -> None:
    settings = tmp_path / "calibrated.yaml"
    settings.write_text("settings: {dense_layers: [], layer_shares: {0: 3, 1: 0.5, 2: 1}}")
    served, dense = policy_sweeps.layer_sweep(masked_model.ops, 16)
    spread = replace(served, name="spread", layer_shares=policy_sweeps.shares_in(settings))
    assert spread.run(128).layer_pages == (3 + 10, 3 + 2, 3 + 3)  # 3 x 5 beyond the forced, as 6 : 1 : 2
    assert measure_policies.passes(spread, (128, 64)) == [(spread.run(b), (b,)) for b in (128, 64)]
    every = replace(spread, layer_shares=tuple(dict.fromkeys(range(30), 1.0).items()))
    texts = [policy_texts.Text("manual", "", tokens[:192], tokens[192:200])]
    stream = iter([measure_policies.TextTask(masked_model, texts, 16, 2, False)])
    (cells,) = measure_policies.measure([served, dense, every], stream, 16, (64, 96))
    results = measure_policies.results_of(cells, [served, dense, every], masked_model.shape, 192)
    measure_policies.add_minus_served(results)
    by_name = {(one["policy"], one["budget"]): one for one in results}
    assert "minus_served" not in by_name[served.name, 64]
    assert by_name["spread", 64]["minus_served"]["kl"]["mean"] == pytest.approx(0, abs=1e-6)
    kl = [by_name[name, 96]["kl"]["mean"] for name in (served.name, dense.name)]
    assert kl[0] != kl[1]
    assert by_name[dense.name, 96]["minus_served"]["kl"]["mean"] == pytest.approx(kl[1] - kl[0], abs=2e-5)


def test_texts_without_as_many_rows_of_each_are_refused(
    masked_model: hf_reference.ReferenceModel, tokens: list[int]
) -> None:
    prefix = masked_model.prefill_texts([tokens[:64], tokens[64:128]], 8)
    with pytest.raises(ValueError, match=r"as many rows of each of 2 texts, got \[3, 2\]"):
        masked_model.decode(prefix, [tokens[:3], tokens[:2]], hf_reference.Run(None))


@pytest.mark.parametrize("page_summary", ["min_max", "key_codes"])
@pytest.mark.parametrize("reduction", reference.GROUP_REDUCTIONS)
def test_scores_of_rows_that_share_a_prefix_are_the_references(page_summary: str, reduction: str) -> None:
    generator = torch.Generator().manual_seed(3)
    prefixes, rows, blocks, heads, dim = 2, 3, 2, 2, 64
    total = prefixes * (blocks + rows)
    keys = torch.randn(total, heads, 64, dim, generator=generator)
    summaries = torch.zeros(total, heads, 4, 2, dim)
    lengths = torch.tensor([129, 150, 192, 130, 144, 145]).int()
    every = torch.arange(prefixes * blocks * 64)
    last = [(prefixes * blocks + row) * 64 + i for row, n in enumerate(lengths.tolist()) for i in range(n - 128)]
    slots = torch.cat([every, torch.tensor(last)])
    reference.update_page_summaries(keys, summaries, slots, page_size=16, page_summary=page_summary)
    table = torch.arange(prefixes * blocks).view(prefixes, blocks).repeat_interleave(rows, dim=0)
    own = prefixes * blocks + torch.arange(prefixes * rows)
    block_table = torch.cat([table, own[:, None]], dim=1).int()
    query = torch.randn(prefixes * rows, 3 * heads, dim, generator=generator)
    found, wanted = (
        score(
            query,
            summaries,
            block_table,
            lengths,
            page_size=16,
            group_reduction=reduction,
            bound_radius=0.5,
            scale=0.125,
            page_summary=page_summary,
        )
        for score in (shared_prefix_ops.score_pages, reference.score_pages)
    )
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-5)


def test_no_operation_of_a_policy_leaves_its_device() -> None:
    """On the meta device, which takes part in no mixed operation, as a GPU takes part in none."""
    rows, blocks, heads, dim = 4, 2, 2, 64
    caches = torch.zeros(blocks + rows, heads, 64, dim, device="meta")
    ops = shared_prefix_ops.shared_prefix_ops()
    step = DecodeStep(
        query=torch.zeros(rows, 3 * heads, dim, device="meta"),
        key_cache=caches,
        summaries=torch.zeros(blocks + rows, heads, 4, 2, dim, device="meta"),
        block_table=torch.zeros(rows, blocks + 1, dtype=torch.int32, device="meta"),
        seq_lens=torch.zeros(rows, dtype=torch.int32, device="meta"),
        page_budgets=torch.zeros(rows, dtype=torch.int32, device="meta"),
        max_page_budget=8,
        page_size=16,
        scale=0.1,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_prefix_ops, "count_prefixes", lambda table: 1)  # reads a value, and there is none
        for policy in (BoundPolicy(ops, "mass", 0.5, top_p=0.9), KeyCodesPolicy(ops, "mass"), WindowPolicy(ops)):
            selected = policy.choose(step)
            assert selected.device.type == "meta" and selected.shape == (rows, heads, 8)
            assert hf_reference.as_mask(step, selected).device.type == "meta"
    assert hf_reference.in_window(step, 5).device.type == hf_reference.every_page(step).device.type == "meta"
    assert hf_reference.attention_received(step.query, step.query, 0.1).device.type == "meta"


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
    try:
        policy_texts.package_file("idlelib", "NEWS.txt")
    except FileNotFoundError as error:  # a system's Python without IDLE
        pytest.skip(str(error))
    found = policy_texts.texts(model.encode, 512, 16)
    assert {(len(text.prefix), len(text.rows)) for text in found} == {(512, 16)}
    assert len({text.sha256 for text in found}) == len(found) == 12


def test_many_places_are_as_many_texts_whose_decoded_tokens_do_not_overlap(model: hf_reference.ReferenceModel) -> None:
    length, rows = 448, 32
    found = policy_texts.texts(model.encode, length, rows, (), policy_texts.places(200, length + rows))
    assert len(found) == len({text.name for text in found}) == len({text.sha256 for text in found}) == 200
    starts: dict[str, list[int]] = {"opticks": [], "python-manual": []}
    for text in found:
        source, place = text.name.split("@")
        starts[source].append(int(place) + len(model.tokenizer.decode(text.prefix)))
        starts[source].append(int(place) + len(model.tokenizer.decode(text.prefix + text.rows)))
    assert all(places == sorted(places) and len(places) == 200 for places in starts.values())
    with pytest.raises(ValueError, match="opticks: 1000 texts of 4128 tokens would begin 502 characters apart"):
        policy_texts.places(2000, 4128)


def test_needles_of_a_long_prefix_find_enough_prose(model: hf_reference.ReferenceModel) -> None:
    for seed in range(2):
        assert len(policy_texts.needles(model.encode, 32_768, 8, seed)[0]) == 32_768


def test_differences_to_dense_are_paired() -> None:
    results = [
        measure_policies.result("dense", 0, {"needle_nll": [1.0, 3.0]}),
        measure_policies.result("default", 128, {"needle_nll": [1.5, 3.5], "kl": [0.1, 0.2]}),
    ]
    measure_policies.add_minus_dense(results)
    assert results[1]["minus_dense"] == {"needle_nll": {"mean": 0.5, "low": 0.5, "high": 0.5}}
    assert "minus_dense" not in results[0]


def test_two_stages_with_two_thirds_of_the_pages_read_what_one_stage_reads(model: hf_reference.ReferenceModel) -> None:
    sizes = {c.name: c.kv_bytes(256, 3, 9, 64) for c in policy_sweeps.gap_sweep(model.ops, 16)}
    page = 3 * 16 * 4 * 64
    assert sizes["key codes, mass"] == sizes["original"]
    assert abs(sizes["two-stage, two thirds of the pages"] - sizes["key codes, mass"]) <= page
    assert sizes["two-stage"] - sizes["key codes, mass"] == 16 * page // 2


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
    whole = policy_sweeps.bound(model.ops, "mass", 0.25).kv_bytes(256, 3, 9, 64)
    assert whole == 3 * (4096 // 16 * row + 16 * page)
    assert policy_sweeps.bound(model.ops, "per_query_head", 0.25).kv_bytes(256, 3, 9, 64) == 3 * whole
    assert reference.GROUP_REDUCTIONS == ("max", "mean", "mass", "per_query_head")
