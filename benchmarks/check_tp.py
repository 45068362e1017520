"""Do several ranks choose what one rank chooses? Checks on real processes, which bench_gpu_tp.py runs.

Small models with random weights stand in for real ones unless a folder is named; engines are eager, because the pages
that each rank selects are recorded (quest_vllm/audit_ranks.py). Every engine runs in a process group of its own.

- one against N ranks, grouped KV heads: same rows, as many pages, same greedy tokens;
- one against N ranks, a single KV head that every rank holds a copy of, selection per query head;
- two pipeline stages of N/2 ranks (model runner V1, the only one that tells every stage the budgets);
- two engines of N/2 ranks behind one client (data parallelism): metrics are the sums of both.

In every engine no rank may disagree on rows, budgets or a shared KV head, and every summary must match its keys. On a
CPU, in float32, selections and tokens must be equal to the bit. A GPU computes in bfloat16, where sums of other shapes
round otherwise: there the share of equal hashes is reported, and answers may part only where the two tokens are as
close as FLASH_ATTN's are where its own one and N ranks part, or TIE.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engine_case import LLAMA_8B, write_config
from process_group import last_lines, run_group

STEPS, PAGE = 24, 16
LENGTHS = (1500, 733, 1024, 257)
BUDGETS = (256, 128, 512, 128)
MAX_MODEL_LEN = 2048
TIE = 0.25


@dataclass(frozen=True)
class Job:
    """One engine: a model, a backend and a layout."""

    name: str
    model: str
    backend: str = "CUSTOM"
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    quest: dict[str, Any] = field(default_factory=dict)
    cuda: bool = False
    custom_all_reduce: bool = True

    @property
    def ranks(self) -> int:
        """How many devices it needs."""
        return self.tensor * self.pipeline * self.data


def write_model(folder: Path, query_heads: int, kv_heads: int, cuda: bool) -> Path:
    """A model folder with random weights, large enough that attention is far from uniform."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    hidden = 64 * query_heads if cuda else 128
    changes = {
        "hidden_size": hidden,
        "intermediate_size": 256 if not cuda else 128 * query_heads,
        "num_attention_heads": query_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128 if cuda else 64,  # on a GPU that of the benchmark: no other kernels to build
        "vocab_size": 512,
        "max_position_embeddings": MAX_MODEL_LEN,
        "initializer_range": 0.15 * (128 / hidden) ** 0.5,
    }
    folder.mkdir(parents=True)
    write_config(folder, LLAMA_8B | changes, layers=4)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    write_config(folder, LLAMA_8B | changes, layers=4)  # transformers wrote its own
    return folder


def prompts(vocabulary: int) -> list[dict[str, Any]]:
    """Random tokens that repeat now and then, so that real models have something to continue."""
    rng = random.Random(5)
    found = []
    for length in LENGTHS:
        phrase = [rng.randrange(3, vocabulary) for _ in range(97)]
        ids = [token for _ in range(length) for token in phrase][:length]
        found.append({"prompt_token_ids": ids})
    return found


def sampling(job: Job, budget: int) -> Any:
    """Greedy, with the log-probabilities that tell a tie."""
    from vllm import SamplingParams

    extra = {"quest_token_budget": budget} if job.backend == "CUSTOM" else None
    return SamplingParams(
        temperature=0, max_tokens=STEPS, ignore_eos=True, logprobs=5, detokenize=False, extra_args=extra
    )


def engine_settings(job: Job) -> dict[str, Any]:
    """Arguments of an engine."""
    settings: dict[str, Any] = {
        "model": job.model,
        "skip_tokenizer_init": True,
        "tensor_parallel_size": job.tensor,
        "pipeline_parallel_size": job.pipeline,
        "disable_custom_all_reduce": not job.custom_all_reduce,
        "enforce_eager": True,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_batched_tokens": 4096,  # no prompt is prefilled in two chunks
        "max_num_seqs": 8,
        "num_gpu_blocks_override": 400,
        "seed": 0,
        "additional_config": {"quest": job.quest},
    }
    if job.tensor * job.pipeline > 1:
        settings["distributed_executor_backend"] = "mp"
    if job.cuda:
        # several jobs share a GPU, so nothing may be derived from what is free on it
        memory = {"gpu_memory_utilization": 0.2, "kv_cache_memory_bytes": 2**28}
        return settings | memory | {"attention_backend": job.backend, "dtype": "bfloat16"}
    own = {"attention_backend": "CUSTOM"} if job.backend == "CUSTOM" else {}
    return settings | own | {"block_size": 32, "dtype": "float32"}


def counted() -> dict[str, float]:
    """What this plugin's metrics hold by now, of all processes of this engine."""
    from quest_vllm.metrics_files import FilesCollector, metrics_dir

    found: dict[str, float] = {}
    for metric in FilesCollector(metrics_dir()).collect():
        for sample in metric.samples:
            if sample.name in ("quest_decode_rows_total", "quest_pages_selected_total"):
                found["/".join([sample.name, *sample.labels.values()])] = sample.value
    return found


def answers(outputs: list[Any]) -> dict[str, Any]:
    """Tokens and the likeliest tokens' log-probabilities."""
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "logprobs": [
            [{str(token): entry.logprob for token, entry in step.items()} for step in output.outputs[0].logprobs]
            for output in outputs
        ],
    }


def run_offline(job: Job) -> dict[str, Any]:
    """Run a job whose engine core lives in this process."""
    from vllm import LLM

    from quest_vllm.audit import audit_summaries
    from quest_vllm.audit_ranks import record_selections, recorded_selections

    llm = LLM(**engine_settings(job))
    ours = job.backend == "CUSTOM"
    if ours:
        llm.collective_rpc(record_selections)
    before = counted()
    vocabulary = llm.llm_engine.vllm_config.model_config.get_vocab_size()
    outputs = llm.generate(prompts(vocabulary), [sampling(job, budget) for budget in BUDGETS], use_tqdm=False)
    found = answers(outputs) | {"metrics": {key: value - before.get(key, 0) for key, value in counted().items()}}
    if ours:
        reports = llm.collective_rpc(audit_summaries)
        found["audits"] = [{"pages": report.pages_checked, "errors": report.errors[:5]} for report in reports]
        found["ranks"] = [asdict(rank) for rank in llm.collective_rpc(recorded_selections)]
    llm.llm_engine.engine_core.shutdown()
    return found


def run_data_parallel(job: Job) -> dict[str, Any]:
    """Run a job of several engines, each in processes of its own, behind one client; every prompt goes in twice."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    async def answer(engine: Any, number: int, copy: int, prompt: dict[str, Any]) -> Any:
        last = None
        parameters = sampling(job, BUDGETS[number])
        async for output in engine.generate(prompt, parameters, f"{number}-{copy}", data_parallel_rank=copy):
            last = output
        return last

    async def run() -> dict[str, Any]:
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**engine_settings(job), data_parallel_size=job.data))
        try:
            every = prompts(engine.vllm_config.model_config.get_vocab_size())
            jobs = [answer(engine, n, copy, prompt) for copy in range(job.data) for n, prompt in enumerate(every)]
            outputs = await asyncio.gather(*jobs)
            return answers(list(outputs)) | {"metrics": counted()}
        finally:
            engine.shutdown()

    return asyncio.run(run())


def child(text: str) -> None:
    """Run the job that ``text`` holds as JSON and leave what it found in the file that it names."""
    values = json.loads(text)
    target = Path(values.pop("target"))
    job = Job(**values)
    target.write_text(json.dumps(run_data_parallel(job) if job.data > 1 else run_offline(job)))


def run_job(job: Job, variables: dict[str, str], limit: float, gpu: int | None = None) -> dict[str, Any]:
    """Run a job in a process group of its own; what it found, or ``{"log": ...}``."""
    variables = variables | {"VLLM_CPU_OMP_THREADS_BIND": "|".join("01"[rank % 2] for rank in range(job.ranks))}
    if job.pipeline > 1:
        variables["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    if job.data > 1:
        variables.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    if gpu is not None:
        variables["CUDA_VISIBLE_DEVICES"] = str(gpu)
    with tempfile.TemporaryDirectory() as folder:
        target, log = Path(folder, "found"), Path(folder, "log")
        values = json.dumps(asdict(job) | {"target": str(target)})
        begin = time.monotonic()
        status = run_group([sys.executable, str(Path(__file__).resolve()), "--child", values], variables, log, limit)
        print(f"ENGINE {job.name}: exit {status} after {time.monotonic() - begin:.0f} s", flush=True)
        if not target.exists():
            print(last_lines(log), flush=True)
            return {"log": last_lines(log, 30)}
        return json.loads(target.read_text())


def part(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """How long two engines' answers agree, and how close the two tokens are, at most, where they part."""
    agreed, widest = [], 0.0
    for number, (mine, other) in enumerate(zip(ours["tokens"], theirs["tokens"], strict=True)):
        place = next((i for i, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b), len(mine))
        agreed.append(place)
        if place < len(mine):
            here, there = ours["logprobs"][number][place], theirs["logprobs"][number][place]
            mine_token, other_token, never = str(mine[place]), str(other[place]), -1e9
            gaps = here[mine_token] - here.get(other_token, never), there[other_token] - there.get(mine_token, never)
            widest = max(widest, *gaps)
    return {"agreed_tokens": agreed, "of": len(ours["tokens"][0]), "widest_gap": widest}


def expected_metrics(copies: int = 1) -> dict[str, float]:
    """Rows of ``copies`` runs; each answer's first token comes from its prefill."""
    rows = "quest_decode_rows_total"
    return {
        f"{rows}/sparse/budget": copies * len(LENGTHS) * (STEPS - 1),
        f"{rows}/dense/prefill": copies * len(LENGTHS),
    }


def faults_of(found: dict[str, Any], kv_heads: int, copies: int = 1) -> list[str]:
    """What is wrong inside one engine."""
    from quest_vllm.audit_ranks import RankSelections, disagreements

    if "log" in found:
        return ["the engine ended early"]
    rows = {key: value for key, value in found["metrics"].items() if "rows" in key and value}
    faults = [] if rows == expected_metrics(copies) else [f"rows: expected {expected_metrics(copies)}, got {rows}"]
    for audit in found.get("audits", ()):
        faults += audit["errors"] or ([] if audit["pages"] else ["an audit saw no page"])
    if "ranks" in found:
        ranks = [RankSelections(**rank) for rank in found["ranks"]]
        faults += disagreements(ranks, kv_heads)
        pages = sum(rank.num_pages for rank in ranks)
        # a pipeline's ranks may have let go of the last batch by now; the keys matter where ranks share a KV head
        peers = 1 + max(rank.tensor_rank for rank in ranks)
        if peers > kv_heads and not all(rank.stored_tokens for rank in ranks):
            faults.append("a rank that shares a KV head had no running request's keys to compare")
        if pages != found["metrics"].get("quest_pages_selected_total"):
            faults.append(f"pages: ranks selected {pages}, metrics say {found['metrics']}")
    return faults


def compare(one: dict[str, Any], many: dict[str, Any], kv_heads: int, tie: float, exact: bool) -> dict[str, Any]:
    """The verdict on ``many`` ranks against one."""
    from quest_vllm.audit_ranks import RankSelections, by_head

    faults = faults_of(one, kv_heads) + faults_of(many, kv_heads)
    if "log" in one or "log" in many:
        return {"ok": False, "faults": faults, "log": many.get("log") or one.get("log")}
    first, second = (by_head([RankSelections(**rank) for rank in run["ranks"]]) for run in (one, many))
    pairs = [(a, b) for name in first for a, b in zip(first[name], second.get(name, ()), strict=False)]
    heads = sum(map(len, first.values()))
    verdict = part(many, one) | {
        "selecting_heads": heads,
        "heads_with_equal_selections": sum(a == b for a, b in pairs),
        "pages_selected": [run["metrics"]["quest_pages_selected_total"] for run in (one, many)],
    }
    if {name: len(found) for name, found in first.items()} != {name: len(found) for name, found in second.items()}:
        faults.append("the engines select in different layers or heads")
    if len(set(verdict["pages_selected"])) > 1:
        faults.append(f"pages selected: {verdict['pages_selected']}")
    if exact and verdict["heads_with_equal_selections"] != heads:
        faults.append(f"selections: {verdict['heads_with_equal_selections']} of {heads} heads equal")
    if 8 * sum(verdict["agreed_tokens"]) < STEPS * len(LENGTHS):
        faults.append(f"answers agree for {verdict['agreed_tokens']} tokens alone")
    if verdict["widest_gap"] > tie:
        faults.append(f"answers part where tokens are {verdict['widest_gap']:.3f} apart, ties are up to {tie:.3f}")
    return {"ok": not faults, "faults": faults, "tie": tie, **verdict}


def compare_copies(found: dict[str, Any], one: dict[str, Any], copies: int, tie: float) -> dict[str, Any]:
    """The verdict on data parallelism: every engine's answers, and the sums of their metrics."""
    faults = faults_of(found, 1, copies)
    if "log" in found or "log" in one:
        return {"ok": False, "faults": faults or ["nothing to compare with"], "log": found.get("log")}
    pages, expected = (run["metrics"]["quest_pages_selected_total"] for run in (found, one))
    if pages != copies * expected:
        faults.append(f"pages selected: expected {copies * expected}, got {pages}")
    size = len(LENGTHS)
    parts = []
    for copy in range(copies):
        share = {key: found[key][copy * size : (copy + 1) * size] for key in ("tokens", "logprobs")}
        parts.append(part(share, one))
        if parts[-1]["widest_gap"] > tie:
            faults.append(f"engine {copy} parts by {parts[-1]['widest_gap']:.3f}, ties are up to {tie:.3f}")
    return {"ok": not faults, "faults": faults, "engines": parts, "pages_selected": [expected, pages]}


def jobs_of(arguments: Any, folder: Path) -> dict[str, Job]:
    """Every engine that this machine allows, by name."""
    count, cuda = arguments.gpus, arguments.cuda
    grouped = str(write_model(folder / "grouped", 4 * count, 2 * count, cuda))
    single = str(write_model(folder / "single", 2 * count, 1, cuda))
    finer = {"group_reduction": "per_query_head"}
    jobs = [
        Job("grouped, 1 rank", grouped),
        Job(f"grouped, {count} ranks", grouped, tensor=count),
        Job("one KV head, 1 rank", single, quest=finer),
        Job(f"one KV head, {count} ranks", single, tensor=count, quest=finer),
    ]
    if cuda:
        jobs += [Job("FLASH_ATTN, 1 rank", grouped, "FLASH_ATTN")]
        jobs += [Job(f"FLASH_ATTN, {count} ranks", grouped, "FLASH_ATTN", tensor=count)]
    if arguments.model:
        real = str(arguments.model.resolve())
        jobs += [Job("real, 1 rank", real), Job(f"real, {count} ranks", real, tensor=count)]
    if count % 2 == 0:
        jobs += [Job("two stages", grouped, tensor=count // 2, pipeline=2)]
        jobs += [Job("two engines", grouped, tensor=count // 2, data=2)]
    here = {"cuda": cuda, "custom_all_reduce": not arguments.no_custom_all_reduce}
    return {job.name: Job(**asdict(job) | here) for job in jobs}


def alone(name: str) -> str:
    """The job of one rank that a job of several is compared with."""
    return f"{'grouped' if name.startswith('two') else name.split(',')[0]}, 1 rank"


def run(arguments: Any, results: Any, variables: dict[str, str]) -> None:
    """Run the checks and put the verdicts into ``results.checks`` as they come."""
    count, exact = arguments.gpus, not arguments.cuda

    def keep(name: str, verdict: dict[str, Any]) -> None:
        results.checks[name] = verdict
        results.write()
        print("CHECK " + json.dumps({"check": name} | verdict), flush=True)

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(3 if arguments.cuda else 1) as pool:
        jobs = jobs_of(arguments, Path(folder)).values()
        large = [job for job in jobs if job.ranks > 1 and arguments.check in job.name]
        large.sort(key=lambda job: job.backend != "FLASH_ATTN")
        small = [job for job in jobs if job.ranks == 1 and job.name in {alone(job.name) for job in large}]
        places = [number % count if arguments.cuda else None for number in range(len(small))]
        ones = pool.map(lambda job, gpu: run_job(job, variables, arguments.limit, gpu), small, places)
        found = dict(zip((job.name for job in small), ones, strict=True))
        tie = TIE
        for job, many in zip(large, pool.map(lambda job: run_job(job, variables, arguments.limit), large), strict=True):
            one = found[alone(job.name)]
            if job.backend == "FLASH_ATTN":
                if "log" not in one and "log" not in many:
                    noise = part(many, one)
                    tie = max(tie, 2 * noise["widest_gap"])
                    keep(job.name, {"ok": True, **noise})
            elif job.data > 1:
                keep(job.name, compare_copies(many, one, job.data, tie))
            else:
                config = json.loads(Path(job.model, "config.json").read_text())
                keep(job.name, compare(one, many, config["num_key_value_heads"], tie, exact))


if __name__ == "__main__":
    if sys.argv[1:2] != ["--child"]:
        sys.exit("usage: bench_gpu_tp.py --gpus N --parts checks")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    child(sys.argv[2])
