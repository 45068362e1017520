"""What every result file says of where it came from."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def commit(short: bool = False) -> str:
    """``$QUEST_COMMIT`` where whoever copied the tree says it, else the checkout's commit; "unknown" outside one."""
    if told := os.environ.get("QUEST_COMMIT"):
        return told
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", *(["--short"] if short else []), "HEAD"]
    found = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return found or "unknown"


def cpu_model() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def save(document: Mapping[str, Any], output: Path | None) -> None:
    """Write a result file, its folder too, whole or not at all; None: nowhere."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        unfinished = output.with_name(output.name + ".tmp")
        unfinished.write_text(json.dumps(document, indent=1) + "\n")
        unfinished.replace(output)
