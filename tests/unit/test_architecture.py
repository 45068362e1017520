"""House rules, as tests."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import quest_vllm

PACKAGE = Path(quest_vllm.__file__).parent
SEAMS = {"compat.py", "compat_logits.py", "compat_metrics.py", "compat_seeds.py"}


def imported_modules(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
    return found


def test_only_the_seam_imports_private_vllm() -> None:
    offenders = {
        f"{path.relative_to(PACKAGE)}: {module}"
        for path in PACKAGE.rglob("*.py")
        if path.name not in SEAMS
        for module in imported_modules(path)
        if module.split(".")[0] == "vllm" and ".v1" in module
    }
    assert not offenders


def test_importing_the_package_has_no_side_effect() -> None:
    code = (
        "import os, sys; before = dict(os.environ); import quest_vllm, quest_vllm.plugin, quest_vllm.config;"
        "assert 'vllm' not in sys.modules and 'torch' not in sys.modules, 'heavy import';"
        "assert dict(os.environ) == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_no_file_is_longer_than_600_lines() -> None:
    root = PACKAGE.parent
    folders = [root / name for name in ("quest_vllm", "tests", "benchmarks", "csrc", "docker")]
    sources = [p for folder in folders for p in folder.rglob("*") if p.suffix in {".py", ".cpp", ".h", ".cu", ".cuh"}]
    assert not [str(path) for path in sources if len(path.read_text().splitlines()) > 600]
