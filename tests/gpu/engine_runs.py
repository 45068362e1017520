"""What the GPU engine tests run, and how they compare runs. Knows both devices: a CPU stands in for a dry run."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quest_vllm.audit import audit_summaries
from quest_vllm.budget import POLICY_XARG
from quest_vllm.tally import TALLY_XARG

NOUNS = ("river", "garden", "engine", "letter", "window", "market", "bridge", "forest", "mirror", "harbour")


@dataclass(frozen=True)
class Setting:
    """How large everything is on one device. ``stock`` is vLLM's own backend there; ``graphs``: decode CUDA graphs."""

    stock: str | None
    block_size: int
    num_blocks: int
    max_model_len: int
    max_num_seqs: int
    lines: int  # of a prompt, about 14 tokens each
    tokens: int  # of a greedy answer
    load_tokens: int
    load_answer: int
    graphs: bool

    @property
    def room(self) -> int:
        """Tokens that the KV cache holds."""
        return self.num_blocks * self.block_size


SETTINGS = {
    "cuda": Setting("FLASH_ATTN", 16, 330, 4096, 8, 30, 200, 100_000, 300, True),
    "cpu": Setting(None, 32, 30, 768, 4, 10, 8, 1_500, 60, False),
}


def device() -> str | None:
    """The device to test: QUEST_TEST_DEVICE if that is set, else "cuda" where there is a GPU, else None."""
    return os.environ.get("QUEST_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else None)


def engine_settings(setting: Setting, **changed: Any) -> dict[str, Any]:
    """Arguments of an ``LLM``: eager unless ``changed`` asks for graphs."""
    return {
        "attention_backend": "CUSTOM",
        "enforce_eager": True,
        "max_model_len": setting.max_model_len,
        "max_num_batched_tokens": 512,
        "max_num_seqs": setting.max_num_seqs,
        "block_size": setting.block_size,
        "num_gpu_blocks_override": setting.num_blocks,
        "enable_prefix_caching": True,
        "seed": 0,
        **({"gpu_memory_utilization": 0.3} if setting.graphs else {}),
        **changed,
    }


def graphs(setting: Setting, *tokens: int) -> dict[str, Any]:
    """Arguments that capture decode graphs of so many query tokens; eager where the device has no graphs."""
    if not setting.graphs:
        return {}
    sizes = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": list(tokens)}
    return {"enforce_eager": False, "compilation_config": sizes}


def captured_widths(worker: Any) -> list[int]:
    """Query tokens a request of every captured decode graph; for ``collective_rpc`` (model runner V2)."""
    return sorted({graph.uniform_token_count for graph in worker.model_runner.cudagraph_manager.graphs})


def prompt(lines: int, seed: int) -> str:
    """Text that a small model continues with some confidence, different for every seed."""
    rng = random.Random(seed)
    facts = [
        f"The {rng.choice(NOUNS)} near the {rng.choice(NOUNS)} has number {rng.randint(10, 99)}." for _ in range(7)
    ]
    return f"List {seed}. " + "".join(f"Line {line}: {facts[line * line % 7]}\n" for line in range(lines))


def params(budget: int, tokens: int, top_p: float = 1.0, **settings: Any) -> Any:
    """Greedy sampling with a token budget, and the log-probabilities that :func:`parting` needs; ``top_p``: quest's."""
    from vllm import SamplingParams

    extra = {"quest_token_budget": budget, "quest_top_p": top_p}
    defaults = {"temperature": 0.0, "max_tokens": tokens, "ignore_eos": True, "logprobs": 5, "extra_args": extra}
    return SamplingParams(**{**defaults, **settings})


@dataclass(frozen=True)
class Run:
    """One greedy answer: its tokens, and the likeliest tokens' log-probabilities at each of them."""

    tokens: list[int]
    logprobs: list[dict[int, float]]


def run(
    llm: Any,
    prompts: Sequence[str],
    budgets: Sequence[int],
    tokens: int,
    top_p: float = 1.0,
    tallies: Sequence[int] = (),
    policies: Sequence[str] = (),
) -> list[Run]:
    """Answer ``prompts`` in one batch, each with its budget and policy, and counted under its number in ``tallies``."""
    sampling = [params(budget, tokens, top_p) for budget in budgets]
    for one, policy in zip(sampling, policies, strict=False):
        one.extra_args[POLICY_XARG] = policy
    for one, number in zip(sampling, tallies, strict=False):
        one.extra_args[TALLY_XARG] = number
    outputs = llm.generate(list(prompts), sampling, use_tqdm=False)
    return [
        Run(
            list(output.outputs[0].token_ids),
            [{token: entry.logprob for token, entry in step.items()} for step in output.outputs[0].logprobs],
        )
        for output in outputs
    ]


@dataclass(frozen=True)
class Parting:
    """Where two greedy answers part, and how far apart the two tokens were there, in the run that saw more."""

    place: int
    gap: float


def parting(ours: Run, theirs: Run) -> Parting | None:
    """None where the answers are equal. A token that the other run does not list counts as infinitely unlikely."""
    assert len(ours.tokens) == len(theirs.tokens)
    for place, (mine, other) in enumerate(zip(ours.tokens, theirs.tokens, strict=True)):
        if mine != other:
            here, there = ours.logprobs[place], theirs.logprobs[place]
            never = float("-inf")
            return Parting(place, max(here[mine] - here.get(other, never), there[other] - there.get(mine, never)))
    return None


def check_equal(ours: Sequence[Run], theirs: Sequence[Run], tie: float, what: str) -> None:
    """Assert that answers are equal up to ties of at most ``tie``, and for long enough that this says something."""
    partings = [parting(a, b) for a, b in zip(ours, theirs, strict=True)]
    agreed = [part.place if part else len(a.tokens) for part, a in zip(partings, ours, strict=True)]
    print(
        f"{what}: {partings.count(None)} of {len(partings)} equal, tokens agreed on {agreed}, tie {tie:.3f}: {partings}"
    )
    for number, part in enumerate(partings):
        assert part is None or part.gap <= tie, f"{what}: answer {number} parts at {part}, ties are up to {tie:.3f}"
    assert sum(agreed) >= len(ours[0].tokens) * len(ours) / 8, f"{what}: agreed on {agreed} tokens alone"


def reference_error(model: Path, text: str, where: str) -> float:
    """How wrong bfloat16 gets the gap of the two best tokens: the largest difference to float32, over ``text``.

    Transformers' implementation of the model, all positions at once.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = torch.tensor([AutoTokenizer.from_pretrained(model)(text).input_ids], device=where)
    logits = []
    for dtype in (torch.float32, torch.bfloat16):
        network = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(where).eval()
        with torch.inference_mode():
            logits.append(network(ids).logits[0].float())
    best = logits[0].topk(2).indices
    exact, rounded = (values.gather(1, best) for values in logits)
    return float(((exact[:, 0] - exact[:, 1]) - (rounded[:, 0] - rounded[:, 1])).abs().max())


@dataclass
class Load:
    """What a mixed load did."""

    tokens: int = 0
    preemptions: int = 0
    prefix_hits: int = 0
    audits: int = 0
    live_pages: int = 0
    pages: int = 0
    layers: int = 0
    errors: tuple[str, ...] = ()


def mixed_load(llm: Any, setting: Setting) -> Load:
    """Serve ``load_tokens`` tokens: shared prefixes, chunked prefill, sampling, budgets of all sizes, aborts.

    The KV cache holds fewer tokens than the running requests want: vLLM preempts.
    """
    rng, load, engine = random.Random(7), Load(), llm.llm_engine
    shared = prompt(setting.lines, 99)
    before, number, wanted = counters(llm), 0, 0
    while wanted < setting.load_tokens:
        text = shared + f"{number}\n" if number % 3 == 0 else prompt(rng.randint(5, 2 * setting.lines), number)
        answer = rng.randint(setting.load_answer // 2, setting.load_answer)
        budget = rng.choice([0, 64, 128, 256, setting.max_model_len])
        sampling = params(budget, answer, temperature=0.8, logprobs=None)
        engine.add_request(f"load-{number}", text, sampling)
        wanted += answer + len(llm.get_tokenizer()(text).input_ids)
        number += 1
    lengths: dict[str, int] = {}
    step, aborted = 0, number // 2
    every = max(40, wanted // 100)
    while engine.has_unfinished_requests():
        for output in engine.step():
            lengths[output.request_id] = len(output.prompt_token_ids) + len(output.outputs[0].token_ids)
        step += 1
        if step == every // 2:
            engine.abort_request([f"load-{aborted}"])
        if step % every == 0:
            audit(llm, load)
    audit(llm, load)
    load.tokens = sum(lengths.values())
    grown = {name: int(value - before.get(name, 0)) for name, value in counters(llm).items()}
    load.preemptions, load.prefix_hits = grown["vllm:num_preemptions"], grown["vllm:prefix_cache_hits"]
    return load


def audit(llm: Any, load: Load) -> None:
    """Compare every summary on the device with its keys."""
    (report,) = llm.collective_rpc(audit_summaries)
    load.audits += 1
    load.layers, load.pages = report.layers, max(load.pages, report.pages_checked)
    load.live_pages += report.live_pages_checked
    load.errors += tuple(report.errors[:5])


def counters(llm: Any) -> dict[str, float]:
    """vLLM's counters so far, by name."""
    return {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
