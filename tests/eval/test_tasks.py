"""Generated tasks: exact lengths, one right answer, scores that can be trusted."""

from __future__ import annotations

import itertools

import pytest

from quest_vllm.errors import QuestValueError
from quest_vllm.eval.library import Library, score
from quest_vllm.eval.plan import Plan
from quest_vllm.eval.prompts import Codec, Item, build_item, load_codec
from quest_vllm.eval.scoring import RULES, agreement
from quest_vllm.eval.tasks import TASKS, make_draft
from quest_vllm.eval.text import CONTINUATION, TEXT, TextSource, load_text, window_start
from tests.eval.solvers import SOLVERS, solve

CONTEXTS = (2048, 4097)


def items_of(codec: Codec, task: str, seed: int = 0) -> list[Item]:
    return [build_item(codec, task, context, index, seed) for context in CONTEXTS for index in range(4)]


def text_of(codec: Codec, item: Item) -> str:
    return codec.decode(item.prompt_ids)


@pytest.mark.parametrize("task", TASKS)
def test_prompts_have_the_stated_number_of_tokens(codec: Codec, task: str) -> None:
    for item in items_of(codec, task):
        assert len(item.prompt_ids) == item.context
        # the ids are what a tokenizer makes of such a text: joining units costs next to nothing
        again = len(codec.encode(text_of(codec, item)))
        assert abs(again - item.context) <= 0.01 * item.context


@pytest.mark.parametrize("task", TASKS)
def test_a_solver_that_only_reads_the_prompt_scores_one(codec: Codec, task: str) -> None:
    for item in items_of(codec, task):
        text = text_of(codec, item)
        assert score(item, SOLVERS[task](text)) == 1.0
        assert solve(text) == SOLVERS[task](text)


@pytest.mark.parametrize("task", TASKS)
def test_wrong_answers_score_zero(codec: Codec, task: str) -> None:
    for item in items_of(codec, task):
        others = build_item(codec, task, item.context, item.index + 100, seed=1)
        for wrong in (
            "",
            " I do not know.",
            " 1234 5678\n12 + 3 = 15",
            " " + ", ".join(f"x{r}1" for r in item.references),
        ):
            assert score(item, wrong) == 0.0
        if task not in ("few_shot", "question_answering", "arithmetic_chain"):  # there, answers come from few words
            assert score(item, " " + ", ".join(others.references)) == 0.0


@pytest.mark.parametrize("task", TASKS)
def test_items_differ_and_repeat_by_seed(codec: Codec, task: str) -> None:
    first = items_of(codec, task, seed=5)
    assert first == items_of(codec, task, seed=5)
    prompts = {tuple(item.prompt_ids) for item in (*first, *items_of(codec, task, seed=6))}
    assert len(prompts) == 2 * len(first)


@pytest.mark.parametrize("task", TASKS)
def test_the_answer_fits_into_its_tokens(codec: Codec, task: str) -> None:
    item = build_item(codec, task, 2048, 0, 0)
    draft, _ = make_draft(task, 2048, 0, 0)
    assert len(codec.encode(draft.expected)) < item.max_tokens < 160
    assert score(item, draft.expected) == 1.0


def test_needles_are_unique_and_spread_over_the_text(codec: Codec) -> None:
    places = []
    for index in range(40):
        text = text_of(codec, build_item(codec, "needle_single", 2048, index, 0))
        (number,) = build_item(codec, "needle_single", 2048, index, 0).references
        assert text.count(number) == 1
        places.append(text.index(number) / len(text))
    for low, high in itertools.pairwise((0.0, 0.25, 0.5, 0.75, 1.0)):
        assert sum(low <= place < high for place in places) >= 4


def test_facts_keep_their_order(codec: Codec) -> None:
    draft, _ = make_draft("variable_tracking", 2048, 0, 0)
    text = text_of(codec, build_item(codec, "variable_tracking", 2048, 0, 0))
    places = [text.index(fact) for fact in draft.facts]
    assert places == sorted(places)


def test_a_context_that_cannot_hold_the_facts_is_refused(codec: Codec) -> None:
    with pytest.raises(QuestValueError, match=r"--context: expected at least \d+ tokens for common_words, got 128"):
        build_item(codec, "common_words", 128, 0, 0)
    minimum = min(n for n in range(64, 400) if _fits(codec, "needle_single", n))
    assert len(build_item(codec, "needle_single", minimum, 0, 0).prompt_ids) == minimum


def _fits(codec: Codec, task: str, context: int) -> bool:
    try:
        return bool(build_item(codec, task, context, 0, 0))
    except QuestValueError:
        return False


def test_chat_template_stands_around_the_prompt(codec: Codec, model_path: object) -> None:
    chat = load_codec(str(model_path), chat_template=True)
    item = build_item(chat, "needle_single", 1024, 0, 0)
    assert len(item.prompt_ids) == 1024
    raw = str(chat.tokenizer.decode(item.prompt_ids))
    assert raw.startswith("<|im_start|>system")
    assert raw.index("<|im_start|>assistant\nAnswer: ") > raw.index("Question:")
    assert score(item, solve(chat.decode(item.prompt_ids))) == 1.0


@pytest.mark.parametrize(
    ("rule", "answer", "references", "expected"),
    [
        ("all", " 1234567 and 7654321", ("1234567", "7654321"), 1.0),
        ("all", " 1234567", ("1234567", "7654321"), 0.5),
        ("all", " 91234567", ("1234567",), 0.0),
        ("all", " Amber Lantern.", ("amber lantern",), 1.0),
        ("first_line", "\n\n red\nblue", ("red",), 1.0),
        ("first_line", " blue\nred", ("red",), 0.0),
        ("first_line", " redder", ("red",), 0.0),
        ("steps", " 4 = 4\nEntry 2: 4 + 9 = 13\nEntry 3: 13 + 1 = 15", ("4", "13", "14", "20"), 0.5),
        ("steps", " 4 = 5\nEntry 1: 0 + 4 = 4", ("4",), 0.0),  # the first answer counts
        ("steps", "", ("4",), 0.0),
    ],
)
def test_scoring_rules(rule: str, answer: str, references: tuple[str, ...], expected: float) -> None:
    assert RULES[rule](answer, references) == expected


def test_agreement_is_the_common_beginning() -> None:
    assert agreement("abcd", "abcd") == agreement("", "") == 1.0
    assert agreement("abXd", "abcd") == 0.5
    assert agreement("ab", "abcd") == agreement("abcd", "ab") == 0.5
    assert agreement("", "abcd") == 0.0


def plan_of(task: str, items: int = 3) -> Plan:
    return Plan(tasks=(task,), contexts=(512,), items=items, modes=("prefill",), budgets=(0,), seed=2)


def test_running_text_is_cut_to_exact_windows(codec: Codec) -> None:
    source = load_text(None)
    library = Library(codec, plan_of(TEXT), source, text_tokens=16)
    items = [library.item(TEXT, 512, index) for index in range(3)]
    assert len({tuple(item.context_ids) for item in items}) == 3
    for item in items:
        assert (len(item.context_ids), len(item.question_ids)) == (512, 16)
        assert codec.decode(item.prompt_ids)[:200] in source.content
    more = Library(codec, plan_of(TEXT, items=9), source, text_tokens=16)
    assert more.item(TEXT, 512, 2) == items[2]  # more items leave the first ones as they were


def test_continuations_have_no_right_answer(codec: Codec) -> None:
    library = Library(codec, plan_of(CONTINUATION), load_text(None), text_tokens=16)
    item = library.item(CONTINUATION, 512, 0)
    assert (len(item.prompt_ids), item.max_tokens) == (512, 16)
    assert score(item, "anything") is None


def test_windows_cover_a_text_evenly_and_refuse_a_short_one(codec: Codec) -> None:
    starts = sorted(window_start(1000, 100, index, 0) for index in range(30))
    assert starts[0] >= 0 and starts[-1] <= 900
    assert max(later - earlier for earlier, later in itertools.pairwise(starts)) <= 3 * 900 / 30
    with pytest.raises(QuestValueError, match="--text: expected at least 101 tokens for this context, got 100"):
        window_start(100, 101, 0, 0)
    with pytest.raises(QuestValueError, match="--text: expected at least 528 tokens"):
        Library(codec, plan_of(TEXT), TextSource("mine", "too short"), 16).check()
