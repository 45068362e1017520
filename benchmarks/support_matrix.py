"""Writes docs/support-matrix.md: what start-up accepts and refuses, and what was tried on a real engine.

usage: python benchmarks/support_matrix.py            render the page
       python benchmarks/support_matrix.py --measure  run the tests behind it first (minutes)

The first table asks the code that refuses at start-up (quest_vllm.support). The second takes each row's outcome from
the results of the tests that it names, kept as JSON with versions and commit. A row whose tests failed says so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/cpu/support.json"
PAGE = ROOT / "docs/support-matrix.md"
WORKS, REFUSED, VLLM = "works", "refused at start-up", "not in vLLM-CPU"
_F = "tests/features"


@dataclass(frozen=True)
class Row:
    """A feature, what its tests show when they pass, and those tests (a file means all of it)."""

    feature: str
    outcome: str
    note: str
    tests: tuple[str, ...]


ROWS = (
    Row(
        "LoRA, adapters switched per request",
        WORKS,
        "In a batch with adapters vLLM-CPU gives a request without one the last adapter's weights, on any backend. "
        "It cannot return prompt log-probabilities while LoRA is on.",
        (f"{_F}/test_lora.py",),
    ),
    Row(
        "n > 1",
        WORKS,
        "Every answer has the request's budget.",
        (f"{_F}/test_requests.py::test_several_answers_each_have_the_budget",),
    ),
    Row(
        "Structured output (JSON schema)",
        WORKS,
        "",
        (f"{_F}/test_requests.py::test_structured_output_keeps_its_schema_at_a_small_budget",),
    ),
    Row(
        "logprobs, prompt_logprobs",
        WORKS,
        "",
        (f"{_F}/test_requests.py::test_logprobs_of_prompt_and_answer",),
    ),
    Row(
        "Chunked prefill",
        WORKS,
        "Decode rows stay sparse in steps that hold prefill chunks. vLLM-CPU fails on a request with a seed of its own "
        'whose prefill is cut ("CPU Generator does not use offset"), on any backend.',
        (f"{_F}/test_requests.py::test_sparse_rows_decode_beside_prefill_chunks",),
    ),
    Row(
        "Prefix caching",
        WORKS,
        "",
        (
            f"{_F}/test_requests.py::test_prefix_hits_carry_their_summaries",
            "tests/engine/test_engine.py::test_summaries_survive_mixed_load",
        ),
    ),
    Row("Preemption", WORKS, "", ("tests/engine/test_engine.py::test_summaries_survive_mixed_load",)),
    Row(
        "Speculative decoding (n-gram)",
        WORKS,
        "Every token that is verified is a sparse row of its own. With a --worker-cls of one's own: refused.",
        (f"{_F}/test_speculation.py",),
    ),
    Row(
        "KV connector: save, restart, load; producer and consumer",
        WORKS,
        "vLLM's ExampleConnector; every loaded summary audited.",
        (f"{_F}/test_kv_connectors.py::test_save_restart_load",),
    ),
    Row(
        "KV offloading (OffloadingConnector, SimpleCPUOffloadConnector)",
        VLLM,
        '"CPU Offloading is currently only supported on CUDA-alike and XPU GPUs"; "_StreamPlaceholder has no attribute '
        'priority_range".',
        (f"{_F}/test_kv_connectors.py::test_connectors_that_vllm_cpu_cannot_start",),
    ),
    Row(
        "LMCache",
        REFUSED,
        "It stores keys and values by token, and nothing shows that the summaries travel. On a CPU LMCache 0.5.6 "
        'stores nothing at all ("No supported cpu connector found"), and lets vLLM recompute.',
        (
            f"{_F}/test_kv_connectors.py::test_connectors_that_leave_summaries_behind_are_refused",
            f"{_F}/test_kv_connectors.py::test_lmcache_is_refused_at_start_up",
        ),
    ),
    Row(
        "Sleep mode",
        VLLM,
        '"Sleep mode is not supported on current platform."',
        (f"{_F}/test_start_up.py::test_sleep_mode_is_refused_by_vllm",),
    ),
    Row(
        "Async scheduling",
        VLLM,
        "vLLM-CPU switches it off without a word and goes on.",
        (f"{_F}/test_start_up.py::test_async_scheduling_is_switched_off_by_vllm_and_sparse_decode_goes_on",),
    ),
    Row("torch.compile (no --enforce-eager)", WORKS, "", (f"{_F}/test_start_up.py::test_torch_compile",)),
    Row("FP8 KV cache", REFUSED, "", (f"{_F}/test_start_up.py::test_fp8_kv_cache_is_refused",)),
    Row("Qwen2", WORKS, "Random weights, tiny shape.", (f"{_F}/test_models.py::test_family[qwen2-4-2]",)),
    Row("Qwen3 (QK-norm)", WORKS, "Random weights, tiny shape.", (f"{_F}/test_models.py::test_family[qwen3-4-2]",)),
    Row("Mistral", WORKS, "Random weights, tiny shape.", (f"{_F}/test_models.py::test_family[mistral-4-2]",)),
    Row(
        "MoE: Mixtral, Qwen3-MoE",
        WORKS,
        "Random weights, tiny shapes.",
        (f"{_F}/test_models.py::test_family[mixtral-4-2]", f"{_F}/test_models.py::test_family[qwen3_moe-4-2]"),
    ),
    Row(
        "Gemma 3 (sliding windows)",
        WORKS,
        "Random weights, tiny shapes. Sliding-window layers dense, global ones sparse.",
        (
            f"{_F}/test_models.py::test_family[gemma3-2-2]",
            f"{_F}/test_models.py::test_family[gemma3_few_windows-6-5]",
        ),
    ),
    Row(
        "gpt-oss (attention sinks)",
        REFUSED,
        "",
        (f"{_F}/test_models.py::test_refused_family[gpt_oss-attention sinks]",),
    ),
    Row("Bloom (ALiBi)", REFUSED, "", (f"{_F}/test_models.py::test_refused_family[bloom-ALiBi]",)),
    Row(
        "Tensor parallelism (2 ranks)",
        WORKS,
        "Same pages selected as on one rank. Where ranks share a KV head, each selects for its own query heads: more "
        "pages in all than one rank would read, as with group_reduction per_query_head.",
        (
            f"{_F}/test_parallel.py::test_tensor_parallel_selects_what_one_rank_selects",
            f"{_F}/test_parallel.py::test_replicated_kv_heads_select_for_the_query_heads_of_their_rank",
        ),
    ),
    Row(
        "Tensor parallelism by Ray",
        VLLM,
        '"current platform cpu does not support ray": tried with Ray 2.60.',
        (f"{_F}/test_parallel.py::test_ray_is_refused_by_vllm_cpu",),
    ),
    Row("Pipeline parallelism (2 stages)", WORKS, "", (f"{_F}/test_parallel.py::test_pipeline_parallel",)),
    Row(
        "Pipeline (2 stages) x tensor parallelism (2 ranks), without torch.compile",
        WORKS,
        "With our worker: vLLM-CPU's own makes no buffers for a stage then, and ends at the first request.",
        (f"{_F}/test_parallel.py::test_tensor_and_pipeline_parallel",),
    ),
    Row(
        "Data parallelism (2 engines, 2 API servers)",
        WORKS,
        "One /metrics with the sums of both.",
        (f"{_F}/test_data_parallel.py",),
    ),
)


def measure(only: Sequence[str]) -> None:
    """Run the tests that rows name, file by file, and merge their outcomes into RESULTS; all, or files or ids."""
    wanted = list(dict.fromkeys(test for row in ROWS for test in row.tests))
    for part in only or dict.fromkeys(test.partition("::")[0] for test in wanted):
        chosen = [test for test in wanted if test == part or test.startswith(f"{part}::")]
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "junit.xml"
            command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", "-o", "junit_family=xunit1"]
            environment = {**os.environ, "QUEST_SLOW_TESTS": "1"}
            subprocess.run([*command, *chosen], cwd=ROOT, check=False, env=environment)
            outcomes = dict(_outcomes(report))
        before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        kept = {test: result for test, result in before.get("tests", {}).items() if not _is_part(test, part)}
        tests = dict(sorted({**kept, **outcomes}.items()))
        header = _environment()
        if only:  # the header speaks of the last whole run; parts that were run since have their own commit
            later = {**before.get("later", {}), part: header["commit"]}
            header = {**{key: value for key, value in before.items() if key != "tests"}, "later": later}
        RESULTS.write_text(json.dumps({**header, "tests": tests}, indent=1) + "\n")


def _outcomes(report: Path) -> Iterable[tuple[str, str]]:
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        failed = kinds & {"failure", "error"}
        outcome = "failed" if failed else "skipped" if "skipped" in kinds else "passed"
        yield f"{case.attrib['file']}::{case.attrib['name']}", outcome


def _environment() -> dict[str, str]:
    import torch

    from quest_vllm import compat

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {
        "benchmark": "support",
        "command": "benchmarks/support_matrix.py --measure",
        "commit": commit.stdout.strip(),
        "vllm": compat.vllm_version() or "",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def outcome(row: Row, tests: dict[str, str]) -> str:
    """The row's outcome where all of its tests passed, else what became of them."""
    found = {}
    for wanted in row.tests:
        matching = {name: result for name, result in tests.items() if _is_part(name, wanted)}
        found.update(matching or {wanted: "not run"})
    bad = sorted({result for result in found.values() if result != "passed"})
    return row.outcome if not bad else "test " + ", ".join(bad)


def _is_part(test: str, wanted: str) -> bool:
    """Whether ``test`` is ``wanted``, a case of it, or inside that file."""
    return test == wanted or test.startswith((f"{wanted}::", f"{wanted}["))


def render(results: dict[str, Any]) -> str:
    """The page, as Markdown."""
    return "\n".join([*_head(), *_probe_table(), "", *_test_table(results), ""])


def _head() -> list[str]:
    return [
        "# Support matrix",
        "",
        "Written by `python benchmarks/support_matrix.py`; a test keeps it current. `quest-vllm check` does this for "
        "the machine it runs on.",
        "",
    ]


def _probe_table() -> list[str]:
    from quest_vllm.support import probe

    cpu, cuda = ({finding.feature: finding for finding in probe(device)} for device in ("cpu", "cuda"))
    lines = [
        "## What start-up accepts and refuses",
        "",
        "Asked of the checks themselves. A refusal stops the server with these words.",
        "",
        "| feature | CPU | CUDA |",
        "|---|---|---|",
    ]
    for name in dict.fromkeys([*cpu, *cuda]):
        lines.append(f"| {name} | {_verdict(cpu.get(name))} | {_verdict(cuda.get(name))} |")
    return lines


def _verdict(finding: Any) -> str:
    if finding is None:
        return "-"
    words = "yes" if finding.supported else "refused"
    return f"{words}: {finding.reason}" if finding.reason else words


def _test_table(results: dict[str, Any]) -> list[str]:
    lines = [
        "## Tried on a real engine",
        "",
        f"On a CPU with vLLM {results['vllm']}, commit {results['commit']}, by the tests named "
        "([raw](../benchmarks/results/cpu/support.json)).",
        *_run_since(results.get("later", {})),
        "",
        "| feature | outcome | notes | tests |",
        "|---|---|---|---|",
    ]
    for row in ROWS:
        names = "<br>".join(f"`{test.removeprefix('tests/')}`" for test in row.tests)
        lines.append(f"| {row.feature} | {outcome(row, results['tests'])} | {row.note} | {names} |")
    return lines


def _run_since(later: dict[str, str]) -> list[str]:
    """A line that names the tests of a later commit than the rest; none where there are none."""
    if not later:
        return []
    names = (f"`{test.removeprefix('tests/')}` ({commit})" for test, commit in later.items())
    return [f"Run since, at the commit in brackets: {', '.join(names)}."]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs="*", metavar="TEST", help="run the tests first: all, or these files or ids")
    arguments = parser.parse_args()
    if arguments.measure is not None:
        measure(arguments.measure)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(render(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
