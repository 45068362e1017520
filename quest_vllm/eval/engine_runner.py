"""Runs units in a vLLM engine of this process, where a question and a text can be read in decode."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quest_vllm import compat
from quest_vllm.budget import XARG
from quest_vllm.config import AUTO, QuestConfig, load_config
from quest_vllm.errors import EvalUnavailable, QuestError, QuestValueError
from quest_vllm.eval.distributions import compare, mean_nll, new_record
from quest_vllm.eval.forcing import FORCED, PROMPT_LENGTH, RECORD
from quest_vllm.eval.library import Library, score
from quest_vllm.eval.plan import DECODE, DENSE, PREFILL, ResultStore, Unit
from quest_vllm.eval.progress import Progress
from quest_vllm.eval.prompts import Item, load_codec
from quest_vllm.eval.session import Options, Session, open_session
from quest_vllm.eval.text import TEXT, TextSource
from quest_vllm.runtime import config_of

CPU_KVCACHE_GIB = "4"
"""vLLM-CPU takes nearly all of a machine's memory unless told otherwise."""


def run_in_process(options: Options, source: TextSource | None) -> tuple[dict[str, Any], Session]:
    """Load the model, measure what is left; returns facts for the report, and the session.

    Raises :class:`QuestValueError` for options that cannot be, :class:`EvalUnavailable` where the engine does not
    start, or where no decode row took the sparse path.
    """
    _check_budgets(options)
    codec = load_codec(options.tokenizer or options.target, options.chat_template)
    library = Library(codec, options.plan, source, options.text_tokens)
    library.check()
    arguments = _engine_args(options, library)
    config = served_config(arguments)
    session = open_session(options, options.target, source, policy(config))
    left = session.left
    facts: dict[str, Any] = {"runner": "in process", "engine_args": arguments}
    if left:
        engine = start_engine(facts["engine_args"])
        try:
            with Progress(len(session.planned), len(session.planned) - len(left)) as progress:
                runner = EngineRunner(engine, library, session.store, options.xargs or {})
                for batch in batches(left, options.concurrency * len(options.plan.modes)):
                    runner.run(batch)
                    progress.advance(len(batch))
            facts |= _engine_facts(engine, config)
        finally:
            stop_engine(engine)
        _check_sparse(left, facts)
    return facts, session


def _check_budgets(options: Options) -> None:
    """Raise :class:`QuestError` for server defaults that cannot be and for budgets below the smallest."""
    config = load_config((options.engine_args or {}).get("additional_config"), model=options.target)
    for budget in options.plan.budgets:
        if DENSE < budget < config.min_token_budget:
            raise QuestValueError(f"--budgets: expected dense or at least {config.min_token_budget}, got {budget}")


def served_config(arguments: dict[str, Any]) -> QuestConfig:
    """The server defaults as an engine of ``arguments`` resolves them, without "auto"; loads no model.

    Raises :class:`EvalUnavailable` where vLLM cannot make a configuration of them.
    """
    config = load_config(arguments.get("additional_config"), model=arguments["model"])
    if config.page_summary != AUTO:
        return config.resolved()
    engine_args_type, eager = _vllm().EngineArgs, _eager_on_cpu()
    with _reason(arguments["model"]):
        return config_of(engine_args_type(**eager | arguments).create_engine_config())


def policy(config: QuestConfig) -> dict[str, Any]:
    """How pages are chosen: everything in the configuration but what a request, a machine or HTTP sets for itself."""
    own = {"token_budget", "metrics_dir", "implementation"}
    own |= {"min_budget", "max_budget", "allow_override", "aliases", "max_body_bytes"}
    return {key: list(v) if isinstance(v, tuple) else v for key, v in vars(config).items() if key not in own}


def _engine_args(options: Options, library: Library) -> dict[str, Any]:
    longest = max(max(options.plan.contexts) + library.longest_answer(), *options.plan.budgets)
    return engine_args(options.target, longest, options.concurrency, options.engine_args or {})


def engine_args(model: str, max_model_len: int, max_num_seqs: int, own: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``vllm.LLM``; the user's ``own`` win."""
    return {
        "model": model,
        "attention_backend": "CUSTOM",
        "logits_processors": ["quest_vllm.eval.forcing:ForcedTokens"],
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "enable_prefix_caching": True,
        "disable_log_stats": False,
        "seed": 0,
        **own,
    }


def start_engine(arguments: dict[str, Any]) -> Any:
    """A ``vllm.LLM`` in this process. Raises :class:`EvalUnavailable` with the reason where it does not start."""
    vllm, eager = _vllm(), _eager_on_cpu()
    print("loading the model", file=sys.stderr)
    with _reason(arguments["model"]):
        return vllm.LLM(**eager | arguments)


def _vllm() -> Any:
    """The package, with our defaults in the environment. Raises :class:`EvalUnavailable` where it is not installed."""
    defaults = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_KVCACHE_SPACE": CPU_KVCACHE_GIB,
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    try:
        import vllm
    except ImportError as error:
        raise EvalUnavailable(f"loading a model needs vLLM ({error}); to ask a server, give its URL") from error
    return vllm


def _eager_on_cpu() -> dict[str, Any]:
    return {"enforce_eager": True} if compat.is_cpu_platform() else {}


@contextlib.contextmanager
def _reason(model: str) -> Iterator[None]:
    """Whatever stops vLLM as :class:`EvalUnavailable`, with vLLM's words."""
    try:
        yield
    except QuestError:
        raise
    except Exception as error:  # a missing model, too little memory, a bad argument: all are vLLM's to explain
        raise EvalUnavailable(f"vLLM could not load {model!r}: {error}") from error


def stop_engine(engine: Any) -> None:
    """Free what :func:`start_engine` took."""
    engine.llm_engine.engine_core.shutdown()


def _engine_facts(engine: Any, config: QuestConfig) -> dict[str, Any]:
    """What the engine did since it started: preemptions, and decode rows by attention path and reason."""
    from quest_vllm.metrics_files import FilesCollector, metrics_dir

    counters = {metric.name: metric.value for metric in engine.get_metrics() if hasattr(metric, "value")}
    rows = {
        f"{sample.labels['path']}, {sample.labels['reason']}": int(sample.value)
        for metric in FilesCollector(metrics_dir(config.metrics_dir)).collect()
        for sample in metric.samples
        if sample.name == "quest_decode_rows_total"
    }
    return {"preemptions": counters.get("vllm:num_preemptions"), "rows_in_last_session": rows}


def _check_sparse(units: Sequence[Unit], facts: dict[str, Any]) -> None:
    """A table of dense numbers under sparse headings must not be: the engine's own counters decide."""
    rows = facts["rows_in_last_session"]
    is_sparse = any(count for kind, count in rows.items() if kind.startswith("sparse, "))
    if any(DENSE < unit.budget < unit.context for unit in units) and not is_sparse:
        raise EvalUnavailable(f"no decode row took the sparse path; rows by path and reason: {rows}")


def batches(units: Sequence[Unit], size: int) -> Iterator[list[Unit]]:
    """Units in batches of at most ``size``; those of one item stay together, however many."""
    batch: list[Unit] = []
    for _, group in itertools.groupby(units, key=lambda unit: unit[:3]):
        of_item = list(group)
        if batch and len(batch) + len(of_item) > size:
            yield batch
            batch = []
        batch += of_item
    if batch:
        yield batch


@dataclass
class EngineRunner:
    """Measures batches of units with one engine (a ``vllm.LLM`` that loads ForcedTokens)."""

    engine: Any
    library: Library
    store: ResultStore
    xargs: Mapping[str, Any] = field(default_factory=dict)

    def run(self, batch: Sequence[Unit]) -> None:
        """Measure ``batch`` and keep the results."""
        # prefix caching shares a context between both modes, so order matters: decode leaves KV of a sparsely read
        # question in the cache, which no prompt that holds the question may find
        for mode in (PREFILL, DECODE):
            self._answer([unit for unit in batch if unit.task != TEXT and unit.mode == mode])
        texts = [unit for unit in batch if unit.task == TEXT]
        for _, group in itertools.groupby(texts, key=lambda unit: unit[:3]):
            self._read_text(list(group))

    def _answer(self, units: Sequence[Unit]) -> None:
        if not units:
            return
        ends = end_tokens(self.engine, self.library.codec.tokenizer)
        requests = [request(self.library.of(unit), unit, None, self.xargs) for unit in units]
        began = time.monotonic()
        outputs = self.engine.generate(*zip(*requests, strict=True), use_tqdm=False)
        seconds = round((time.monotonic() - began) / len(units), 3)
        for unit, output in zip(units, outputs, strict=True):
            item = self.library.of(unit)
            read = len(item.question_ids) if unit.mode == DECODE else 0
            tokens = itertools.takewhile(lambda token: token not in ends, output.outputs[0].token_ids[read:])
            answer = self.library.codec.decode(list(tokens))
            self.store.add(unit, {"score": score(item, answer), "answer": answer, "seconds": seconds})

    def _read_text(self, units: Sequence[Unit]) -> None:
        """One text at all budgets, each against one more dense run."""
        item = self.library.of(units[0])
        everything = [units[0]._replace(budget=DENSE), *units]
        vocabulary = self.engine.llm_engine.model_config.get_vocab_size()
        with tempfile.TemporaryDirectory(prefix="quest-eval-") as folder:
            records = [
                new_record(Path(folder) / f"{number}.npy", len(item.question_ids), vocabulary)
                for number in range(len(everything))
            ]
            requests = [
                request(item, unit, record, self.xargs) for unit, record in zip(everything, records, strict=True)
            ]
            read_contexts(self.engine, [item])
            self.engine.generate(*zip(*requests, strict=True), use_tqdm=False)
            for unit, record in zip(units, records[1:], strict=True):
                self.store.add(unit, _distances(records[0], record, item.question_ids))


def read_contexts(engine: Any, items: Sequence[Item]) -> None:
    """Put the KV of contexts into the prefix cache, so that all runs to be compared start from the same numbers."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False, extra_args={XARG: DENSE})
    engine.generate([{"prompt_token_ids": item.context_ids} for item in items], sampling, use_tqdm=False)


def _distances(dense: Path, record: Path, forced: Sequence[int]) -> dict[str, Any]:
    try:
        return {"nll": mean_nll(record, forced), **compare(dense, record), "tokens": len(forced) - 1}
    except ValueError as problem:
        return {"error": str(problem)}


def request(
    item: Item, unit: Unit, record: Path | None = None, xargs: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], Any]:
    """A prompt and greedy sampling parameters that measure ``unit``.

    In decode mode the prompt ends with the context, and the question is forced token by token.
    """
    from vllm import SamplingParams

    extra: dict[str, Any] = {**(xargs or {}), XARG: unit.budget}
    forced = item.question_ids if unit.mode == DECODE else []
    ids = item.context_ids if unit.mode == DECODE else item.prompt_ids
    if forced:
        extra |= {FORCED: forced, PROMPT_LENGTH: len(ids)}
    if record is not None:
        extra[RECORD] = str(record)
    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=len(forced) + (0 if unit.task == TEXT else item.max_tokens),
        ignore_eos=True,  # a chat template's end of turn may be among the forced tokens
        detokenize=False,
        extra_args=extra,
    )
    return {"prompt_token_ids": ids}, sampling


def end_tokens(engine: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer."""
    configured = engine.llm_engine.model_config.try_get_generation_config().get("eos_token_id")
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in (*ids, tokenizer.eos_token_id) if token is not None)
