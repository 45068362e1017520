"""Runs tests in every environment of the matrix, and writes what came of it into docs/upgrade-vllm.md.

usage: python release/test_matrix.py [--only NAME ...] [--tests PATH ...]     run (long: an environment is 4 to 8 GB)
       python release/test_matrix.py --render                               write the page's table anew

Results are kept in benchmarks/results/cpu/test-matrix.json. Exit code 1 where a test failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from release.matrix_envs import ENTRIES, ROOT, CannotMake, Entry

RESULTS = ROOT / "benchmarks/results/cpu/test-matrix.json"
PAGE = ROOT / "docs/upgrade-vllm.md"
BEGIN, END = "<!-- matrix:begin -->", "<!-- matrix:end -->"
TESTS = (
    *("tests/unit", "tests/kernels/test_api.py", "tests/kernels/test_cpu_ops.py", "tests/engine"),
    *("tests/e2e/test_server.py", "tests/features"),
)
VERSIONS = (
    "import json, platform, torch; from quest_vllm.compat import vllm_version;"
    "print(json.dumps({'python': platform.python_version(), 'torch': torch.__version__, 'vllm': vllm_version()}))"
)


def environment() -> dict[str, str]:
    """This checkout's package in every environment, on the CPU, without spinning threads."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_WAIT_POLICY": "passive"}


def run_tests(python: Path, tests: list[str]) -> dict[str, Any]:
    """Run ``tests`` with ``python``; versions, counts, and the names of those that failed."""
    shown = subprocess.run([python, "-c", VERSIONS], capture_output=True, text=True, check=True, env=environment())
    found: dict[str, Any] = json.loads(shown.stdout.strip().splitlines()[-1])
    # as `make kernels`: minutes, which would count against the first tests' time limits
    subprocess.run([python, "-m", "quest_vllm.ops.cpu_build"], cwd=ROOT, check=True, env=environment())
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command = [str(python), "-m", "pytest", "-q", "-m", "not gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
        subprocess.run([*command, "-o", "junit_family=xunit1", *tests], cwd=ROOT, check=False, env=environment())
        return {**found, "tests": tests, **counts(ElementTree.parse(report).getroot())}


def counts(report: ElementTree.Element) -> dict[str, Any]:
    """Passed, skipped and failed tests of a JUnit report."""
    found: dict[str, Any] = {"passed": 0, "skipped": 0, "failed": []}
    for case in report.iter("testcase"):
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            found["failed"].append(f"{case.get('file')}::{case.get('name')}")
        else:
            found["skipped" if "skipped" in kinds else "passed"] += 1
    return found


def measure(entries: list[Entry], tests: list[str]) -> dict[str, Any]:
    """Results by entry, kept as each comes in; an environment that cannot be had keeps its reason."""
    results: dict[str, Any] = {}
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for entry in entries:
        print(f"== {entry.name}", flush=True)
        try:
            found = {"commit": commit.stdout.strip(), **run_tests(entry.python(), tests)}
        except CannotMake as error:
            found = {"commit": commit.stdout.strip(), "not_made": str(error)}
        # read anew: another run may have added its entry meanwhile
        results = {**(json.loads(RESULTS.read_text()) if RESULTS.exists() else {}), entry.name: found}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    return results


def table(results: dict[str, Any]) -> str:
    """The page's part between its markers."""
    lines = ["| environment | versions | passed | skipped | failed | commit |", "|---|---|---|---|---|---|"]
    for entry in ENTRIES:
        found = results.get(entry.name)
        if found is None or "not_made" in found:
            why = found["not_made"] if found else "never" if entry.make else "by `make test` and CI instead"
            lines.append(f"| {entry.name}: {entry.note} | not run here: {why} | | | | |")
            continue
        versions = f"Python {found['python']}, vLLM {found['vllm']}, torch {found['torch']}"
        failed = "<br>".join(f"`{name.removeprefix('tests/')}`" for name in found["failed"]) or "0"
        counted = f"{found['passed']} | {found['skipped']} | {failed} | {found['commit']}"
        again = (
            f" {len(found['again']['tests'])} of them run again: {found['again']['why']}." if "again" in found else ""
        )
        lines.append(f"| {entry.name}: {entry.note}{again} | {versions} | {counted} |")
    return "\n".join(lines)


def render(page: str, results: dict[str, Any]) -> str:
    """``page`` with the table of ``results``."""
    return re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{table(results)}\n{END}", page, flags=re.S)


def main() -> int:
    """Entry point."""
    names = [entry.name for entry in ENTRIES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--tests", nargs="+", default=list(TESTS), metavar="PATH", help=f"default: {' '.join(TESTS)}")
    parser.add_argument("--render", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    if arguments.render:
        results = json.loads(RESULTS.read_text())
    else:
        results = measure([entry for entry in ENTRIES if entry.name in arguments.only], arguments.tests)
    PAGE.write_text(render(PAGE.read_text(), results))
    chosen = [results[name] for name in arguments.only if name in results]
    return 1 if any(found.get("failed") for found in chosen) else 0


if __name__ == "__main__":
    raise SystemExit(main())
