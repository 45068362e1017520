"""Races in csrc/cuda/quest_decode.cu: every access to what a cluster's threads share, run on a CPU.

compute-sanitizer's racecheck does not get through one launch of these kernels in minutes. Here the compiler marks the
accesses, and two of them race unless a barrier lies between (cuda_on_host/races.h). Not seen: what an asynchronous copy
does before it is waited for, and what other launches read: the output, and flags of the chosen pages.
"""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from quest_vllm.ops import build_tools, cuda, cuda_plan
from tests.kernels.cuda_on_host import build, take_races
from tests.kernels.paged import places
from tests.kernels.test_cuda_decode_on_host import BOXES, CODES, launch_in, make

# rows without tokens, of one page, covered, a window, three that choose, two of them by top_p, and three in two stages,
# one by top_p, one whose shortlist is all pages
LENGTHS = [0, 1, 100, 583, 1300, 1123, 700, 1300, 1123, 583]
BUDGETS = [3, 2**30, 2**30, 5, 20, 40, 12, 20, 12, 30]
TOP_PS = [1.0, 1.0, 0.5, 1.0, 0.6, 0.9, 1.0, 1.0, 0.6, 1.0]
NAMES = ["mass", "mass", "mass", "window", "max", "mean", "mass", "two_stage", "two_stage", "two_stage"]
LONG = 16 * 700  # several rounds a warp
KINDS = [(CODES, 4), (CODES, 8), (BOXES | {"group_reduction": "mass"}, 3), (BOXES, 4)]


def races_of(
    library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, warps: int, dim: int, group: int, policy: dict[str, Any]
) -> list[str]:
    """The races of a mixed batch, of long rows, and of rows whose scores are all equal, or all infinite."""
    launch_in(lambda *_: library, monkeypatch)
    scored = policy["group_reduction"]
    names = [name if scored == "mass" or name == "window" else scored for name in NAMES]
    mixed = {"policies": places(names), "top_p": torch.tensor(TOP_PS), "cluster_size": 3}
    most = 600 if dim == 64 else 40  # a list beyond shared memory, where attending to it takes less
    batches = [(LENGTHS, BUDGETS, mixed, 1.0), ([LONG], [most], {"cluster_size": 1}, 1.0)]
    if scored == "mass":
        twice = {"cluster_size": 2, "policies": places(["two_stage"])}
        batches += [([LONG], [most], twice, 1.0)]
    alike = {"cluster_size": 2, "top_p": torch.tensor([0.7])}
    batches += [([LONG], [40], alike, 0.0), ([LONG], [40], alike, float("nan"))]
    races = []
    for lengths, budgets, options, size in batches:
        case = make((1, group, dim, 16), policy["page_summary"], lengths=lengths)
        case.query.mul_(size)
        caches = (case.views.keys, case.views.values, case.views.summaries)
        rows = (case.block_table, case.seq_lens, torch.tensor(budgets, dtype=torch.int32))
        taken = torch.zeros(len(lengths), 1, dtype=torch.int32)
        launch_options = {"page_size": 16, "scale": dim**-0.5, "warps": warps, "taken": taken, **policy, **options}
        cuda.quest_decode(case.query, *caches, *rows, **launch_options)
        races += take_races(library)
    return races


def test_no_two_threads_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = build("decode.cpp", 128, tmp_path, 16, races=True)
    for policy, group in KINDS:
        assert races_of(library, monkeypatch, 16, 128, group, policy) == [], (policy, group)


def test_no_two_threads_race_for_scores_off_chip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for room in ("SHARED_SCORE_BYTES", "ALL_SCORE_BYTES"):
        monkeypatch.setattr(cuda_plan, room, 0)
    library = build("decode.cpp", 64, tmp_path, 8, races=True)
    for policy, group in KINDS[1:]:
        assert races_of(library, monkeypatch, 8, 64, group, policy) == [], (policy, group)


@pytest.mark.parametrize(
    ("file", "barrier", "found_in"),
    [
        ("score.cuh", "__syncwarp();  // other lanes of the warp go on to read what this one has stored", "score.cuh"),
        ("select.cuh", "cluster_sync();  // every CTA has read the histograms", "select.cuh"),
    ],
)
def test_a_barrier_that_lacks_is_missed(
    file: str, barrier: str, found_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the lanes of a warp, and between the CTAs of a cluster."""
    kernels = tmp_path / "kernels"
    shutil.copytree(build_tools.source_dir("cuda"), kernels)
    source = (kernels / file).read_text()
    assert source.count(barrier) == 1
    (kernels / file).write_text(source.replace(barrier, ";"))
    library = build("decode.cpp", 64, tmp_path, 8, races=True, kernels=kernels)
    policy, group = KINDS[-1]
    races = races_of(library, monkeypatch, 8, 64, group, policy)
    assert any(found_in in race for race in races), races
