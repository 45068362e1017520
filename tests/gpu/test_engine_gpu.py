"""A real model in vLLM on a GPU: model runner V2, decode CUDA graphs, this plugin's backend against FLASH_ATTN.

QUEST_TEST_MODEL names the model's folder (SmolLM2-135M-Instruct: docs/develop.md). Engines start one after the other in
this process, each does its runs and goes; the tests compare. QUEST_TEST_DEVICE=cpu runs the same code, smaller, on
vLLM-CPU, whose own backend then stands for FLASH_ATTN.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from quest_vllm.config import QuestConfig
from quest_vllm.step_log import LAG
from quest_vllm.tally import Tally, find_tally, new_tally
from tests.features.conftest import counted_rows, engine, samples
from tests.gpu.engine_runs import (
    SETTINGS,
    Load,
    Run,
    Setting,
    audit,
    captured_widths,
    check_equal,
    counters,
    device,
    engine_settings,
    graphs,
    mixed_load,
    parting,
    prompt,
    reference_error,
    run,
)

pytestmark = [pytest.mark.gpu, pytest.mark.engine, pytest.mark.timeout(600)]
DRAFTS, TOP_P = 3, 0.8
SPARSE = 2
"""Ties of sparse answers are wider: a page at the threshold may change places for the last bit of its score."""
POLICIES = ["window", "two_stage", "two_stage", "mean", "mass", "max", "mean", "window"]


@pytest.fixture(scope="module")
def where() -> str:
    """The device."""
    found = device()
    if found is None:
        pytest.skip("no CUDA device; QUEST_TEST_DEVICE=cpu runs this module, smaller, on vLLM-CPU")
    return found


@pytest.fixture(scope="module")
def setting(where: str) -> Setting:
    """The sizes on that device."""
    return SETTINGS[where]


@pytest.fixture(scope="module")
def model() -> Path:
    """The model's folder."""
    folder = os.environ.get("QUEST_TEST_MODEL")
    if not folder:
        pytest.skip("QUEST_TEST_MODEL is not set: expected the folder of a small real model")
    if not (Path(folder) / "config.json").exists():
        pytest.skip(f"QUEST_TEST_MODEL: expected a folder with a config.json, got {folder}")
    return Path(folder)


@pytest.fixture(scope="module", autouse=True)
def environment(where: str) -> Iterator[None]:
    """vLLM's environment, for as long as the module's engines live."""
    with pytest.MonkeyPatch.context() as patch:
        if where == "cuda":
            patch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "0")
        yield


@pytest.fixture(scope="module")
def tie(model: Path, setting: Setting, where: str) -> float:
    """How far apart two tokens may be for two runs in bfloat16 to take either: each errs as the reference does."""
    error = reference_error(model, prompt(setting.lines, 0), where)
    assert 0 < error < 1, error
    return 2 * error


@pytest.fixture(scope="module")
def prompts(setting: Setting) -> list[str]:
    """As many prompts as the graph has rows, which fit into the KV cache together."""
    lines = [setting.lines - row * setting.lines // 16 for row in range(setting.max_num_seqs)]
    return [prompt(count, seed) for seed, count in enumerate(lines)]


@pytest.fixture(scope="module")
def budgets(setting: Setting) -> list[int]:
    """A budget for each prompt."""
    return [96, 0, 128, setting.max_model_len, 96, 256, 160, 192][: setting.max_num_seqs]


@pytest.fixture(scope="module")
def stock(model: Path, setting: Setting, prompts: list[str]) -> list[Run]:
    """vLLM's own backend, graphs on."""
    plain = engine_settings(setting, attention_backend=setting.stock, **graphs(setting, 8))
    with engine(model, **plain) as llm:
        return run(llm, prompts[:4], [0] * 4, setting.tokens)


@dataclass
class Adapted:
    """A batch under a top_p; heads of rows that adapted, the tokens they read, pages taken, of how many; each row's."""

    answers: list[Run]
    reached: list[float]
    tallies: list[Tally | None]


@dataclass
class Graphed:
    """Runs of the plugin's engine with decode graphs and a small KV cache."""

    covered: list[Run]
    mixed: list[Run]
    adapted: Adapted
    own_policies: list[Run]
    policy_rows: dict[str, int]
    alone: dict[tuple[int, int], Run]
    swapped: dict[tuple[int, int], Run]
    rows: dict[str, int]
    widths: list[int]
    load: Load


@pytest.fixture(scope="module")
def graphed(model: Path, setting: Setting, prompts: list[str], budgets: list[int]) -> Graphed:
    """All runs of that engine, in the order of the fields."""
    pair, small, large = prompts[:2], 96, 128
    with engine(model, **engine_settings(setting, **graphs(setting, 8))) as llm:
        covered = run(llm, prompts[:4], [setting.max_model_len] * 4, setting.tokens)
        mixed = run(llm, prompts, budgets, setting.tokens // 2)
        adapted = adapt(llm, prompts, budgets, setting)
        with counted_rows() as policy_rows:
            own_policies = run(llm, prompts, budgets, setting.tokens // 2, policies=POLICIES)
        # prefixes are cached by now: prefill does the same for all of these
        alone, swapped = {}, {}
        with counted_rows() as rows:
            for budget in (small, large):
                for row, text in enumerate(pair):
                    alone[row, budget] = run(llm, [text], [budget], setting.tokens // 2)[0]
            for first, second in ((small, large), (large, small)):
                both = run(llm, pair, [first, second], setting.tokens // 2)
                swapped[0, first], swapped[1, second] = both
        widths = llm.collective_rpc(captured_widths)[0] if setting.graphs else [1]
        load = mixed_load(llm, setting)
        policies = (own_policies, dict(policy_rows))
        return Graphed(covered, mixed, adapted, *policies, alone, swapped, dict(rows), widths, load)


def adapt(llm: Any, prompts: list[str], budgets: list[int], setting: Setting) -> Adapted:
    """Answer the mixed batch under a top_p, and count."""
    names = ("quest_tokens_reached_count", "quest_tokens_reached_sum")
    names += ("quest_pages_selected_total", "quest_pages_available_total")
    before = [samples(name) for name in names]
    numbers = [new_tally() for _ in prompts]
    runs = run(llm, prompts, budgets, setting.tokens // 2, TOP_P, numbers)
    if setting.graphs:
        time.sleep(3 * LAG)
    found = [samples(name).get("", 0) - old.get("", 0) for name, old in zip(names, before, strict=True)]
    return Adapted(runs, found, [find_tally(number) for number in numbers])


@dataclass
class Eager:
    """Runs of the plugin's engine without graphs."""

    mixed: list[Run]
    adapted: Adapted
    own_policies: list[Run]


@pytest.fixture(scope="module")
def eager(model: Path, setting: Setting, prompts: list[str], budgets: list[int]) -> Eager:
    """All runs of that engine, in the order of the fields."""
    with engine(model, **engine_settings(setting)) as llm:
        mixed = run(llm, prompts, budgets, setting.tokens // 2)
        adapted = adapt(llm, prompts, budgets, setting)
        return Eager(mixed, adapted, run(llm, prompts, budgets, setting.tokens // 2, policies=POLICIES))


def run_spread(
    model: Path, setting: Setting, prompts: list[str], budgets: list[int], **changed: Any
) -> tuple[list[Run], float]:
    """The mixed batch with budgets spread over the layers, and the pages that were counted."""
    layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    uneven = {"quest": {"layer_shares": {layer: 1 + layer % 4 for layer in range(layers)}}}
    with engine(model, **engine_settings(setting, additional_config=uneven, **changed)) as llm:
        before = samples("quest_pages_selected_total").get("", 0)
        answers = run(llm, prompts, budgets, setting.tokens // 2)
        time.sleep(3 * LAG)
        return answers, samples("quest_pages_selected_total")[""] - before


@dataclass
class Speculated:
    """Runs of the plugin's engine with n-gram drafts, and the same without."""

    answers: list[Run]
    drafted: int
    accepted: int
    rows: dict[str, int]
    widths: list[int]
    audited: Load


@pytest.fixture(scope="module")
def speculated(model: Path, setting: Setting, prompts: list[str], budgets: list[int]) -> Speculated:
    """The mixed batch of :class:`Graphed`, with drafts."""
    drafts = {"method": "ngram", "num_speculative_tokens": DRAFTS, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    captured = graphs(setting, 8 * (1 + DRAFTS))
    with engine(model, **engine_settings(setting, speculative_config=drafts, **captured)) as llm:
        with counted_rows() as rows:
            answers = run(llm, prompts, budgets, setting.tokens // 2)
        counted, audited = counters(llm), Load()
        audit(llm, audited)
        widths = llm.collective_rpc(captured_widths)[0] if setting.graphs else [1 + DRAFTS]
        drafted, accepted = (int(counted[f"vllm:spec_decode_num_{kind}_tokens"]) for kind in ("draft", "accepted"))
        return Speculated(answers, drafted, accepted, dict(rows), widths, audited)


def test_a_budget_that_covers_the_context_says_what_stock_attention_says(
    stock: list[Run], graphed: Graphed, tie: float
) -> None:
    check_equal(graphed.covered, stock, tie, "covering budget against stock")


def test_graph_replay_equals_eager_with_budgets_mixed_in_one_batch(graphed: Graphed, eager: Eager, tie: float) -> None:
    assert graphed.widths == [1]
    check_equal(graphed.mixed, eager.mixed, SPARSE * tie, "graphs against eager")


def test_each_row_of_a_graph_has_its_own_policy(graphed: Graphed, eager: Eager, tie: float) -> None:
    check_equal(graphed.own_policies, eager.own_policies, SPARSE * tie, "policies in graphs against eager")
    window, scored = graphed.own_policies[0], graphed.mixed[0]
    assert window.logprobs[1:] != scored.logprobs[1:], "a window sees what scores choose"
    print(graphed.policy_rows)
    assert graphed.policy_rows["sparse/window"] > 0 and graphed.policy_rows["sparse/two_stage"] > 0


def test_budgets_adapt_in_graphs_as_in_eager_steps_and_are_counted(graphed: Graphed, eager: Eager, tie: float) -> None:
    check_equal(graphed.adapted.answers, eager.adapted.answers, SPARSE * tie, "top_p in graphs against eager")
    heads, tokens, pages, available = graphed.adapted.reached
    print(f"{heads:.0f} heads took {tokens / heads:.0f} tokens on average, {pages / available:.2f} of their pages")
    assert heads > 0 and pages < available
    assert tokens / heads >= 48  # the forced pages


def test_what_adaptive_rows_took_is_counted_to_the_last_step(
    graphed: Graphed, eager: Eager, budgets: list[int], setting: Setting, model: Path
) -> None:
    config = json.loads((model / "config.json").read_text())
    layers = config["num_hidden_layers"] - len(QuestConfig().dense_layers)
    for adapted in (graphed.adapted, eager.adapted):
        counted = [(budget, tally) for budget, tally in zip(budgets, adapted.tallies, strict=True) if tally is not None]
        assert [budget for budget, _ in counted] == [budget for budget in budgets if budget]  # dense rows do not adapt
        for budget, tally in counted:
            assert tally.steps == pytest.approx(setting.tokens // 2 - 1)  # prefill makes the first token
            assert 3 <= tally.pages / tally.steps <= budget / 16
            assert 0 <= 16 * tally.pages - tally.tokens < 16 * tally.steps  # the newest page alone is partial
        rows = len(counted) * (setting.tokens // 2 - 1)
        assert adapted.reached[0] == rows * layers * config["num_key_value_heads"]


def test_budgets_spread_over_layers_in_graphs_as_in_eager_steps(
    model: Path, setting: Setting, prompts: list[str], budgets: list[int], graphed: Graphed, tie: float
) -> None:
    captured, pages = run_spread(model, setting, prompts, budgets, **graphs(setting, 8))
    stepped, pages_stepped = run_spread(model, setting, prompts, budgets)
    check_equal(captured, stepped, SPARSE * tie, "spread budgets, graphs against eager")
    assert pages == pages_stepped > 0
    different = [a.logprobs != b.logprobs for a, b in zip(captured, graphed.mixed, strict=True)]
    assert any(different)  # or the shares reached no kernel


def test_budgets_exchanged_between_rows_of_a_captured_graph(graphed: Graphed, tie: float) -> None:
    keys = list(graphed.alone)
    together = [graphed.swapped[key] for key in keys]
    check_equal(together, list(graphed.alone.values()), SPARSE * tie, "exchanged budgets against solo runs")
    assert graphed.rows["sparse/budget"] > 0 and not graphed.rows.keys() - {"sparse/budget", "dense/prefill"}
    small, large = sorted({budget for _, budget in keys})
    for row in (0, 1):  # or an exchange would prove nothing
        first, second = graphed.alone[row, small], graphed.alone[row, large]
        assert parting(first, second) or first.logprobs != second.logprobs, row


def test_summaries_are_right_under_mixed_load_with_preemption(graphed: Graphed, setting: Setting, model: Path) -> None:
    load, config = graphed.load, json.loads((model / "config.json").read_text())
    print(load)
    assert load.errors == ()
    assert load.tokens >= setting.load_tokens * 0.9  # one request is aborted
    assert load.preemptions > 0 and load.prefix_hits > 0
    assert load.layers == config["num_hidden_layers"]
    assert load.audits > 1 and load.live_pages > 0
    assert load.pages >= setting.room // 16 * load.layers // 2


def test_drafts_change_no_answer_at_any_budget(
    graphed: Graphed, speculated: Speculated, tie: float, setting: Setting
) -> None:
    assert speculated.drafted >= speculated.accepted > 0
    print(f"{speculated.drafted} drafted, {speculated.accepted} accepted; rows {speculated.rows}")
    assert speculated.widths == [1 + DRAFTS]
    check_equal(speculated.answers, graphed.mixed, SPARSE * tie, "drafts against none")
    assert speculated.rows["sparse/budget"] > speculated.rows["dense/no_budget"] > 0, speculated.rows
    assert speculated.rows.keys() <= {
        "sparse/budget",
        "dense/no_budget",
        "dense/budget_covers_context",
        "dense/prefill",
    }, speculated.rows
    assert speculated.audited.errors == () and speculated.audited.live_pages > 0
