"""Checks that a tag may be released: it is the package's version, and the changelog knows it.

usage: python release/check_tag.py v0.1.0

Needs nothing but Python. Exit code 1, with what was expected and what was found, where it may not.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def package_version() -> str:
    """``__version__`` of the package, read without importing it."""
    found = re.search(r'^__version__ = "([^"]+)"$', (ROOT / "quest_vllm/__init__.py").read_text(), re.M)
    assert found, "quest_vllm/__init__.py: expected a line __version__ = ..."
    return found[1]


def complaints(tag: str, version: str, changelog: str) -> list[str]:
    """Why ``tag`` may not be released; empty where it may."""
    found = []
    if tag != f"v{version}":
        found.append(f"tag: expected v{version} (quest_vllm/__init__.py), got {tag!r}")
    heading = re.search(r"^## (.+)$", changelog, re.M)
    newest = heading[1].strip() if heading else "no heading"
    if not re.fullmatch(rf"{re.escape(version)} \(\d{{4}}-\d\d-\d\d\)", newest):
        found.append(f"CHANGELOG.md: expected the newest heading '## {version} (YYYY-MM-DD)', got {newest!r}")
    return found


def main() -> int:
    """Entry point."""
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    found = complaints(sys.argv[1], package_version(), (ROOT / "CHANGELOG.md").read_text())
    for line in found:
        print(line, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
