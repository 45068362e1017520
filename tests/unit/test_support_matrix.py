"""docs/support-matrix.md is what its script writes now, and every row has a test that exists and passed."""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def matrix() -> ModuleType:
    path = ROOT / "benchmarks/support_matrix.py"
    spec = importlib.util.spec_from_file_location("support_matrix", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["support_matrix"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def results(matrix: ModuleType) -> Any:
    return json.loads(matrix.RESULTS.read_text())


def test_the_page_is_current(matrix: ModuleType, results: Any) -> None:
    assert matrix.PAGE.read_text() == matrix.render(results), "run python benchmarks/support_matrix.py"


def test_every_row_names_tests_that_exist(matrix: ModuleType) -> None:
    for row in matrix.ROWS:
        for test in row.tests:
            path, _, name = test.partition("::")
            tree = ast.parse((ROOT / path).read_text())
            names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert not name or name.partition("[")[0] in names, test


def test_every_row_was_measured(matrix: ModuleType, results: Any) -> None:
    assert {row.feature: matrix.outcome(row, results["tests"]) for row in matrix.ROWS} == {
        row.feature: row.outcome for row in matrix.ROWS
    }


def test_a_row_says_when_its_tests_failed_or_never_ran(matrix: ModuleType) -> None:
    row = matrix.Row("x", matrix.WORKS, "", ("tests/a.py::one", "tests/b.py"))
    passed = {"tests/a.py::one[1]": "passed", "tests/b.py::two": "passed", "tests/b.pyx::three": "failed"}
    assert matrix.outcome(row, passed) == matrix.WORKS
    assert matrix.outcome(row, passed | {"tests/b.py::four": "failed"}) == "test failed"
    assert matrix.outcome(row, {"tests/b.py::two": "passed"}) == "test not run"
