"""The documentation: what it takes from the code is current, it builds with every link checked, it needs no host."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from quest_vllm.config import QuestConfig
from quest_vllm.metrics import METRICS
from tests.conftest import ROOT

DOCS = ROOT / "docs"


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ) | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False, env=environment
    )


def test_generated_pages_are_current() -> None:
    done = run("docs/generate.py", "--check")
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\nrun `make docs-generate`"


def test_references_name_every_key_and_metric() -> None:
    keys, metrics = ((DOCS / f"reference/{name}.md").read_text() for name in ("configuration", "metrics"))
    assert not [key for key in vars(QuestConfig()) if f"| `{key}` |" not in keys]
    assert not [name for name in METRICS if f"| `{name}` |" not in metrics]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    folder = tmp_path_factory.mktemp("site")
    done = run("-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_site_has_every_page_and_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) >= 11
    for page in pages:
        loaded = re.findall(r"<(?:script|img|link|iframe)\b[^>]*?\b(?:src|href)=\"([^\"]+)\"", page.read_text())
        assert loaded
        assert not [url for url in loaded if re.match(r"(https?:)?//", url) and 'rel="canonical"' not in url], page


def test_tables_are_tables(site: Path) -> None:
    for name, rows in (("tune.html", 10), ("results.html", 15), ("reference/configuration.html", 9)):
        assert (site / name).read_text().count("<tr>") > rows, name


def test_no_measured_number_stands_outside_the_generated_page() -> None:
    """A ratio or a time in prose has no raw file behind it."""
    for page in DOCS.rglob("*.md"):
        if page.name in ("results.md", "evaluate.md", "gpu-chain.md", "support-matrix.md"):
            continue
        found = re.findall(r"\b\d+(?:\.\d+)?(?:x faster| ms\b|x speed| tokens/s)|\b\d\.\d+x\b", page.read_text())
        assert not found, f"{page.name}: {found}"


def test_pictures_exist_and_are_small() -> None:
    used = {name for page in DOCS.rglob("*.md") for name in re.findall(r"!\[[^\]]+\]\((img/[^)]+)\)", page.read_text())}
    assert {"img/page-layout.svg", "img/decode-step.svg"} <= used
    assert all((DOCS / name).stat().st_size < 300_000 for name in used)
