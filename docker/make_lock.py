"""Writes docker/lock-cpu.txt and docker/lock-wheel.txt: what the images install, each file by its SHA-256.

usage: python docker/make_lock.py

pip resolves requirements-cpu.txt and requirements-build.txt without installing anything, and says which files it would
take: those of this Python and machine (the CPU image's are Python 3.11 on x86-64). The stubs' hashes hold everywhere,
because stub_wheels.py writes the same bytes everywhere. lock-wheel.txt holds what builds our own wheel.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from stub_wheels import STUBS, write_stub

DOCKER = Path(__file__).resolve().parent
WANTED = ("requirements-cpu.txt", "requirements-build.txt")
HEAD = "# Written by docker/make_lock.py for Python {python} on {machine}; not to be edited.\n"


def resolve(stubs: Path) -> list[dict[str, Any]]:
    """pip's installation report for the image's requirements."""
    report = stubs / "report.json"
    files = [word for name in WANTED for word in ("-r", str(DOCKER / name))]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    subprocess.run([*command, "--report", str(report), "--find-links", str(stubs), *files], check=True)
    found: list[dict[str, Any]] = json.loads(report.read_text())["install"]
    return found


def line(entry: dict[str, Any]) -> str:
    """``name==version --hash=sha256:...``."""
    name, version = entry["metadata"]["name"], entry["metadata"]["version"]
    digest = entry["download_info"]["archive_info"]["hashes"]["sha256"]
    return f"{name.lower().replace('_', '-')}=={version} --hash=sha256:{digest}"


def main() -> int:
    """Entry point."""
    if sys.version_info[:2] != (3, 11) or platform.machine() != "x86_64":
        found = f"{platform.python_version()} on {platform.machine()}"
        print(f"make_lock: expected the CPU image's Python 3.11 on x86_64, got {found}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        for name, version, requires in STUBS:
            write_stub(Path(folder), name, version, requires)
        lines = sorted(map(line, resolve(Path(folder))))
    head = HEAD.format(python="3.11", machine="x86_64")
    (DOCKER / "lock-cpu.txt").write_text("\n".join([head + lines[0], *lines[1:]]) + "\n")
    wheel = [found for found in lines if found.startswith("setuptools==")]
    (DOCKER / "lock-wheel.txt").write_text(HEAD.format(python="3", machine="any machine") + wheel[0] + "\n")
    print(f"make_lock: {len(lines)} files")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
