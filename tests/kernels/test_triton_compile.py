"""Every Triton kernel compiles for sm_80 and sm_90 without a GPU, in the dtypes and shapes that differ in code."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
ARCHITECTURES = (80, 90)
PACKAGE = "quest_vllm.ops.triton"
INDEX_POINTERS = {
    "block_table_ptr",
    "seq_lens_ptr",
    "budget_ptr",
    "policy_ptr",
    "selected_ptr",
    "listed_ptr",
    "taken_ptr",
}
FLOAT_POINTERS = {"score_ptr", "partial_ptr", "lse_ptr", "logit_ptr", "log_sum_ptr", "top_p_ptr"}
PAGES = {"PAGE_SIZE": 16, "HEAD_DIM": 80, "PADDED_DIM": 128}
WIDE = {"PAGE_SIZE": 64, "HEAD_DIM": 256, "PADDED_DIM": 256}
LISTED = {"PAGES_PER_BLOCK": 2, "TILE": 64, "SINK_PAGES": 1, "RECENT_PAGES": 2}
KERNELS: dict[str, tuple[str, list[dict[str, Any]]]] = {  # kernel: module, variants of its constants
    "update_page_summaries_kernel": (
        "update_page_summaries",
        [PAGES | {"BLOCK_SIZE": 64, "WINDOW": 32}, WIDE | {"BLOCK_SIZE": 64, "WINDOW": 128}],
    ),
    "score_pages_kernel": (
        "score_pages",
        [
            PAGES | {"PAGES_PER_BLOCK": 4, "GROUP": 3, "PADDED_GROUP": 16, "TILE": 64} | variant
            for variant in (
                {"REDUCTION": 0, "FULL_RADIUS": True, "FILL_TAIL": False},
                {"REDUCTION": 1, "FULL_RADIUS": True, "FILL_TAIL": True},
                {"REDUCTION": 2, "FULL_RADIUS": False, "FILL_TAIL": True},
                {"REDUCTION": 3, "FULL_RADIUS": False, "FILL_TAIL": False},
            )
        ],
    ),
    "encode_pages_kernel": (
        "key_codes",
        [{"BLOCK_SIZE": 64} | dim for dim in ({"HEAD_DIM": 64, "CHUNK": 32}, {"HEAD_DIM": 256, "CHUNK": 64})],
    ),
    "score_codes_kernel": (
        "key_codes",
        [
            {"PAGES_PER_BLOCK": 4, "GROUP": 3, "PADDED_GROUP": 8, "TILE": 32, "TOKENS": 2} | variant
            for variant in (
                {"HEAD_DIM": 64, "CHUNK": 32, "PARTS": 2, "REDUCTION": 0, "FILL_TAIL": False},
                {"HEAD_DIM": 128, "CHUNK": 64, "PARTS": 1, "REDUCTION": 1, "FILL_TAIL": True},
                {"HEAD_DIM": 128, "CHUNK": 64, "PARTS": 1, "REDUCTION": 2, "FILL_TAIL": True},
                {"HEAD_DIM": 256, "CHUNK": 64, "PARTS": 3, "REDUCTION": 3, "FILL_TAIL": False},
            )
        ],
    ),
    "combine_mass_kernel": (
        "score_pages",
        [
            {"PAGE_SIZE": 16, "GROUP": 3, "PADDED_GROUP": 4, "TILE": 64, "COMBINE_TILE": 256, "LSE_TILE": 128} | tail
            for tail in (
                {"FILL_TAIL": False, "HAS_POLICIES": True, "HAS_LOG_SUMS": True},
                {"FILL_TAIL": True, "HAS_POLICIES": False, "HAS_LOG_SUMS": False},
            )
        ],
    ),
    "select_pages_kernel": (
        "select_pages",
        [
            {"PAGE_SIZE": 16, "SINK_PAGES": 1, "RECENT_PAGES": 2, "TILE": 1024, "FILL_TAIL": True}
            | {"HAS_TOP_P": False, "HAS_TAKEN": True, "HAS_POLICIES": False},
            {"PAGE_SIZE": 16, "SINK_PAGES": 0, "RECENT_PAGES": 1, "TILE": 128, "FILL_TAIL": False}
            | {"HAS_TOP_P": True, "HAS_TAKEN": False, "HAS_POLICIES": True},
        ],
    ),
    "shortlist_pages_kernel": (
        "shortlist_pages",
        [
            {"PAGE_SIZE": 16, "SINK_PAGES": 1, "RECENT_PAGES": 2, "TILE": 1024, "FILL_TAIL": False},
            {"PAGE_SIZE": 16, "SINK_PAGES": 0, "RECENT_PAGES": 0, "TILE": 128, "FILL_TAIL": True},
        ],
    ),
    "rerank_pages_kernel": (
        "rerank_pages",
        [
            shape | LISTED | {"HAS_SOFTCAP": softcap, "HAS_BUDGETS": budgets}
            for shape, softcap, budgets in (
                (PAGES | {"GROUP": 3, "PADDED_GROUP": 8}, True, True),
                (PAGES | {"HEAD_DIM": 128, "GROUP": 16, "PADDED_GROUP": 16}, False, True),
                (WIDE | {"GROUP": 8, "PADDED_GROUP": 8}, False, False),
            )
        ],
    ),
    "attend_splits_kernel": (
        "sparse_paged_attention",
        [
            shape | {"HEADS_PER_KV": 4, "PADDED_ROWS": 16, "PAGES_PER_BLOCK": 2, "TILE": 64} | variant
            for shape, variant in itertools.product(
                (PAGES | {"PAGES_PER_SPLIT": 16}, WIDE | {"PAGES_PER_SPLIT": 4}),
                (
                    {"ROWS": 4, "HAS_SOFTCAP": False, "HAS_BUDGETS": True},
                    {"ROWS": 1, "HAS_SOFTCAP": True, "HAS_BUDGETS": False},
                ),
            )
        ],
    ),
    "merge_splits_kernel": (
        "sparse_paged_attention",
        [PAGES | {"PAGES_PER_SPLIT": 16, "TILE": 16, "HAS_BUDGETS": budgets} for budgets in (True, False)],
    ),
}

OPTIONS: dict[str, dict[str, Any]] = {  # other than four warps; as the launches say
    "encode_pages_kernel": {"enable_fp_fusion": False},
    "score_codes_kernel": {"num_stages": 1},
}
UNTYPED = {
    "select_pages_kernel",
    "combine_mass_kernel",
    "shortlist_pages_kernel",
}  # the cache's dtype is none of theirs
EXACT = {"encode_pages_kernel"}  # single operations, each correctly rounded


def signature_of(kernel: Any, constants: dict[str, Any], dtype: str) -> dict[str, str]:
    """Type of every argument, told from its name."""

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in INDEX_POINTERS:
            return "*i32"
        if name in FLOAT_POINTERS:
            return "*fp32"
        if name in {"slot_ptr", "coded_ptr"}:
            return "*i64" if name == "slot_ptr" else "*u8"
        if name.endswith("_ptr"):
            return f"*{dtype}"
        return (
            "fp32"
            if name in {"scale", "softcap", "near", "far", "mass_scale"}
            else "i64"
            if name.endswith("block_stride")
            else "i32"
        )

    return {name: kind(name) for name in kernel.arg_names}


def compile_kernel(name: str) -> int:
    """Compile every variant of one kernel for every architecture; return how many there were."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, variants = KERNELS[name]
    kernel = getattr(importlib.import_module(f"{PACKAGE}.{module}"), name)
    dtypes = ["bf16"] if name in UNTYPED else ["bf16", "fp16", "fp32"]
    count = 0
    for constants, arch in itertools.product(variants, ARCHITECTURES):
        for dtype in dtypes if constants is variants[0] else dtypes[:1]:
            source = ASTSource(kernel, signature_of(kernel, constants, dtype), constexprs=constants)
            options = {"num_warps": 4} | OPTIONS.get(name, {})
            compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
            assert compiled.asm["cubin"]
            if name in EXACT:
                inexact = set(re.findall(r"fma\S*|div\.(?:full|approx)\S*|rcp\S*|\S*\.ftz\S*", compiled.asm["ptx"]))
                assert not inexact, (
                    f"{name}, sm_{arch}, {dtype}: its bytes could differ from the reference's: {inexact}"
                )
            count += 1
    return count


@pytest.fixture(scope="module")
def problems() -> dict[str, str]:
    """What is wrong with each kernel; in a process of its own, as the interpreter's switch is for a whole process."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.test_triton_compile"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.mark.timeout(1000)  # the first one compiles them all
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_compiles_for_ampere_and_hopper(problems: dict[str, str], name: str) -> None:
    assert not problems[name]


def test_every_kernel_is_listed() -> None:
    """A new kernel must be added to the table above."""
    sources = (ROOT / PACKAGE.replace(".", "/")).glob("*.py")
    found = {
        line.removeprefix("def ").split("(")[0]
        for source in sources
        for line in source.read_text().splitlines()
        if line.startswith("def ") and line.split("(")[0].endswith("_kernel")
    }
    assert found == set(KERNELS)


def problem_of(name: str) -> str:
    """The traceback of compiling one kernel; empty if every variant compiles."""
    try:
        assert compile_kernel(name)
    except Exception:
        return traceback.format_exc()[-3000:]
    return ""


if __name__ == "__main__":
    print(json.dumps({name: problem_of(name) for name in KERNELS}))
