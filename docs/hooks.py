"""Puts pages that another part of the project brings into the navigation, where they exist."""

from __future__ import annotations

from pathlib import Path
from typing import Any

OPTIONAL = {
    "api.md": "The API",
    "evaluate.md": "Evaluate",
    "support-matrix.md": "What is supported",
    "gpu-chain.md": "The GPU chain",
}


def on_config(config: Any) -> Any:
    """MkDocs calls this once it has read mkdocs.yml."""
    docs = Path(config["docs_dir"])
    found = [{title: name} for name, title in OPTIONAL.items() if (docs / name).is_file()]
    place = next(index for index, entry in enumerate(config["nav"]) if "Measured" in entry)
    config["nav"][place:place] = found
    return config
