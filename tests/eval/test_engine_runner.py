"""The in-process runner: forced tokens, recorded distributions, KL and scores from a real engine."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from quest_vllm.cli import main
from quest_vllm.config import load_config
from quest_vllm.errors import EvalUnavailable
from quest_vllm.eval import engine_runner
from quest_vllm.eval.distributions import compare, mean_nll, new_record
from quest_vllm.eval.engine_runner import EngineRunner, batches, request
from quest_vllm.eval.forcing import FORCED, PROMPT_LENGTH, RECORD, ForcedTokens
from quest_vllm.eval.library import Library
from quest_vllm.eval.plan import Plan, ResultStore, Unit
from quest_vllm.eval.prompts import Codec, build_item
from quest_vllm.eval.text import TEXT, load_text
from tests.eval.conftest import MAX_MODEL_LEN


def sampling(forced: list[int], prompt: list[int], record: Path | None = None, **kwargs: Any) -> Any:
    from vllm import SamplingParams

    extra: dict[str, Any] = {"quest_token_budget": 0, FORCED: forced, PROMPT_LENGTH: len(prompt)}
    if record is not None:
        extra[RECORD] = str(record)
    return SamplingParams(
        temperature=0.0, max_tokens=len(forced), ignore_eos=True, extra_args=extra, detokenize=False, **kwargs
    )


@pytest.mark.engine
def test_recorded_distributions_are_raw_and_in_step(llm: Any, codec: Codec, tmp_path: Path) -> None:
    ids = codec.encode(load_text(None).content[5000:9000])
    prompt, forced = ids[:400], ids[400:412]
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    record = new_record(tmp_path / "dense.npy", len(forced), vocabulary)
    (output,) = llm.generate(
        [{"prompt_token_ids": prompt}], [sampling(forced, prompt, record, logprobs=1)], use_tqdm=False
    )
    assert list(output.outputs[0].token_ids) == forced
    kept = np.load(record)
    assert np.allclose(np.exp(kept.astype(np.float64)).sum(axis=1), 1.0, atol=1e-4)
    # vLLM's own raw log-probabilities of the forced tokens
    theirs = [step[token].logprob for step, token in zip(output.outputs[0].logprobs, forced, strict=True)]
    assert np.allclose(kept[np.arange(len(forced)), forced], theirs, atol=1e-4)
    # and those of the same tokens as a prompt: a record that is off by a step would be far away
    from vllm import SamplingParams

    (read,) = llm.generate(
        [{"prompt_token_ids": prompt + forced}],
        [SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)],
        use_tqdm=False,
    )
    prefilled = [read.prompt_logprobs[400 + step][token].logprob for step, token in enumerate(forced)]
    assert abs(mean_nll(record, forced) + float(np.mean(prefilled[1:]))) < 0.05


@pytest.mark.engine
def test_every_request_of_a_changing_batch_gets_its_own_tokens(llm: Any, codec: Codec) -> None:
    ids = codec.encode(load_text(None).content[:20000])
    lengths = [3, 14, 1, 9, 5, 12, 2, 7, 16, 4]  # more than max_num_seqs: rows are freed, moved and reused
    prompts = [ids[100 * n : 100 * n + 40 + n] for n in range(len(lengths))]
    forced = [ids[3000 + 50 * n :][:length] for n, length in enumerate(lengths)]
    from vllm import SamplingParams

    free = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    params = [sampling(tokens, prompt) for tokens, prompt in zip(forced, prompts, strict=True)]
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate([*requests, requests[0]], [*params, free], use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in outputs[:-1]] == forced
    (alone,) = llm.generate([requests[0]], [free], use_tqdm=False)
    assert outputs[-1].outputs[0].token_ids == alone.outputs[0].token_ids  # who forces nothing is left alone


@pytest.mark.engine
def test_a_chat_templates_end_of_turn_can_be_forced(llm: Any, model_path: Path) -> None:
    from quest_vllm.eval.prompts import load_codec

    chat = load_codec(str(model_path), chat_template=True)
    item = build_item(chat, "few_shot", 512, 0, 0)
    assert chat.tokenizer.eos_token_id in item.question_ids
    prompt, params = request(item, Unit("few_shot", 512, 0, "decode", 0))
    (output,) = llm.generate([prompt], [params], use_tqdm=False)
    tokens = list(output.outputs[0].token_ids)
    assert tokens[: len(item.question_ids)] == item.question_ids
    assert len(tokens) == len(item.question_ids) + item.max_tokens


def read_text(llm: Any, codec: Codec, store: ResultStore, budgets: tuple[int, ...]) -> dict[int, dict[str, Any]]:
    plan = Plan((TEXT,), (768,), 1, ("decode",), budgets, seed=0)
    library = Library(codec, plan, load_text(None), text_tokens=12)
    units = list(plan.units())
    runner = EngineRunner(llm, library, store)
    runner.run([unit for unit in units if not store.is_done(unit)])
    return {record["budget"]: record for record in store.records(units)}


@pytest.mark.engine
def test_kl_grows_as_the_budget_shrinks(llm: Any, codec: Codec, tmp_path: Path) -> None:
    store = ResultStore(tmp_path / "items.jsonl", {})
    read = read_text(llm, codec, store, (0, MAX_MODEL_LEN, 384, 64))
    assert 0 <= read[0]["kl"] < 0.005  # a second dense run
    assert read[MAX_MODEL_LEN]["kl"] < 0.005  # covers the context: dense but for rounding
    assert read[MAX_MODEL_LEN]["kl"] < read[384]["kl"] < read[64]["kl"] < 5
    assert read[64]["top1_agreement"] <= read[0]["top1_agreement"] == 1.0
    assert 0 < read[0]["nll"] < 8
    again = read_text(llm, codec, store, (0, 64, 128))  # dense is measured anew for a budget that came later
    assert read[384]["kl"] < again[128]["kl"] < 1.3 * read[64]["kl"]


@pytest.mark.engine
def test_the_command_line_runs_in_process(
    llm: Any, model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(engine_runner, "start_engine", lambda arguments: llm)
    monkeypatch.setattr(engine_runner, "stop_engine", lambda engine: None)
    arguments = ["eval", str(model_path), "--context", "512", "--items", "2", "--budgets", "dense,96"]
    arguments += ["--tasks", "needle_single,text", "--text-tokens", "8", "--output", str(tmp_path)]
    assert main(arguments) == 0
    document = json.loads((tmp_path / "results.json").read_text())
    cells = {(c["task"], c["mode"], c["budget"]): c for c in document["summary"]["cells"]}
    assert cells["needle_single", "prefill", 0]["score"]["mean"] == 1.0
    assert cells["needle_single", "decode", 0]["score"]["mean"] == 1.0
    assert cells["needle_single", "decode", 96]["score_change"]["mean"] <= 0
    assert cells["text", "decode", 96]["kl"]["mean"] > 0
    assert document["settings"]["rows_in_last_session"]["sparse, budget"] > 0
    assert document["settings"]["policy"]["dense_layers"] == list(load_config(model=str(model_path)).dense_layers)
    # what "auto" became, not "auto"
    assert document["settings"]["policy"]["page_summary"] == "key_codes"
    assert document["settings"]["policy"]["group_reduction"] == "mass"
    assert document["settings"]["modes"] == ["decode", "prefill"]
    monkeypatch.setattr(engine_runner, "start_engine", lambda arguments: pytest.fail("nothing was left to measure"))
    assert main(arguments) == 0
    assert "resuming: 12 of 12" in capsys.readouterr().err


def test_a_run_without_sparse_rows_is_refused() -> None:
    units = [Unit("few_shot", 1024, 0, "decode", 256)]
    with pytest.raises(EvalUnavailable, match="no decode row took the sparse path"):
        engine_runner._check_sparse(units, {"rows_in_last_session": {"dense, unsupported": 90}})
    for reason in ("budget", "window", "two_stage"):
        engine_runner._check_sparse(units, {"rows_in_last_session": {"dense, prefill": 1, f"sparse, {reason}": 9}})
    engine_runner._check_sparse([Unit("few_shot", 1024, 0, "decode", 2048)], {"rows_in_last_session": {}})


def test_a_budget_below_the_smallest_is_bad_usage(model_path: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["eval", str(model_path), "--budgets", "32", "--output", str(tmp_path)]) == 2
    assert "--budgets: expected dense or at least 48, got 32" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_bad_usage(tmp_path: Path, capsys: Any) -> None:
    assert main(["eval", str(tmp_path / "none"), "--output", str(tmp_path)]) == 2
    assert "expected a model folder" in capsys.readouterr().err


def test_batches_keep_an_item_together() -> None:
    plan = Plan(("a", "b"), (1024,), 3, ("decode", "prefill"), (0, 64), seed=0)
    made = list(batches(list(plan.units()), 8))
    assert [len(batch) for batch in made] == [8, 8, 8]
    assert [unit for batch in made for unit in batch] == list(plan.units())
    assert [len(batch) for batch in batches(list(plan.units()), 3)] == [4] * 6


def test_v2_rows_are_found_by_slot_and_length() -> None:
    """Model runner V2: rows in any order, prompts in chunks, slots reused."""
    processor = ForcedTokens(SimpleNamespace(), SimpleNamespace())
    extra = {FORCED: [5, 6, 7], PROMPT_LENGTH: 10}
    assert processor.add_request(4, SimpleNamespace(extra_args=extra))
    assert not processor.add_request(2, SimpleNamespace(extra_args=None))

    def step(slots: list[int], lengths: list[int]) -> list[int]:
        context = SimpleNamespace(idx_mapping_np=np.array(slots), seq_lens_upper_bound_np=np.array(lengths))
        logits = torch.zeros(len(slots), 9)
        logits[:, 1] = 1.0
        return processor.apply(logits, context).argmax(-1).tolist()

    assert step([2, 4], [3, 8]) == [1, 1]  # the second row's prompt is not read to its end
    assert step([4, 2], [10, 4]) == [5, 1]
    assert step([4], [11]) == [6] and step([2, 4], [9, 12]) == [1, 7]
    assert step([4], [13]) == [1]
    assert not processor.add_request(4, SimpleNamespace(extra_args={}))
    assert step([4], [10]) == [1]


def test_divergence_of_known_distributions(tmp_path: Path) -> None:
    def written(name: str, rows: list[list[float]]) -> Path:
        path = new_record(tmp_path / name, len(rows), 2)
        with np.errstate(divide="ignore"):
            np.load(path, mmap_mode="r+")[:] = np.log(rows)
        return path

    dense = written("dense.npy", [[0.1, 0.9], [0.5, 0.5], [1.0, 0.0]])
    sparse = written("sparse.npy", [[0.9, 0.1], [0.25, 0.75], [0.5, 0.5]])
    kl = (0.5 * np.log(2) + 0.5 * np.log(2 / 3) + np.log(2)) / 2
    assert compare(dense, sparse)["kl"] == pytest.approx(kl, rel=1e-6)
    assert compare(dense, dense) == {"kl": 0.0, "top1_agreement": 1.0}
    assert mean_nll(sparse, [0, 1, 0]) == pytest.approx(-(np.log(0.75) + np.log(0.5)) / 2, rel=1e-6)


def test_a_step_that_was_not_recorded_is_an_error(tmp_path: Path) -> None:
    empty = new_record(tmp_path / "empty.npy", 3, 4)
    with pytest.raises(ValueError, match="a step was not recorded"):
        mean_nll(empty, [0, 1, 2])
    with pytest.raises(ValueError, match="a step was not recorded"):
        compare(empty, empty)


def test_bad_server_defaults_are_bad_usage(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("QUEST_PAGE_SIZE", "7")
    assert main(["eval", str(model_path), "--output", str(tmp_path)]) == 2
    assert "page_size: expected one of" in capsys.readouterr().err


def test_questions_are_prefilled_before_any_is_decoded(codec: Codec, tmp_path: Path) -> None:
    """Prefix caching: blocks of a sparsely decoded question must not be there when a prompt holds that question."""
    plan = Plan(("few_shot",), (512,), 2, ("decode", "prefill"), (0, 64), seed=0)
    library = Library(codec, plan, None, text_tokens=8)
    calls: list[list[list[int]]] = []

    def generate(prompts: Any, params: Any, use_tqdm: bool) -> list[Any]:
        calls.append([prompt["prompt_token_ids"] for prompt in prompts])
        answer = [*codec.encode(" red"), codec.tokenizer.eos_token_id, *codec.encode(" rubbish")]
        forced = [sampling.extra_args.get(FORCED, []) for sampling in params]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[*tokens, *answer])]) for tokens in forced]

    model_config = SimpleNamespace(try_get_generation_config=lambda: {"eos_token_id": [1, 2]})
    engine = SimpleNamespace(generate=generate, llm_engine=SimpleNamespace(model_config=model_config))
    store = ResultStore(tmp_path / "items.jsonl", {})
    units = list(plan.units())
    EngineRunner(engine, library, store).run(units)
    items = [library.item("few_shot", 512, index) for index in range(2)]
    assert calls[0] == [item.prompt_ids for item in items for _ in range(2)]
    assert calls[1] == [item.context_ids for item in items for _ in range(2)]
    # what was forced, the end of the answer and what follows it are no part of the answer
    assert {record["answer"] for record in store.records(units)} == {" red"}
