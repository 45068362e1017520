"""The README's tables: the default policy, a column a GPU, the newest measurement of each."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def render(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, with a root of the test's own."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("render_results")
    monkeypatch.setattr(script, "ROOT", tmp_path)
    return script


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Stands for benchmarks/results."""
    return tmp_path / "benchmarks/results"


def put(results: Path, name: str, document: dict[str, Any]) -> None:
    path = results / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))


def engine(gpu: str, speedup: float, summary: str = "key_codes") -> dict[str, Any]:
    case = {"context": 32768, "batch": 8, "budget": 2048, "speedup": speedup}
    stock = {"context": 32768, "batch": 8, "budget": 2048}
    return {"gpu": gpu, "policy": {"page_summary": summary}, "implementation": "cuda", "cases": [stock, case]}


def test_whole_models_have_a_column_a_gpu_and_the_newest_of_each(render: Any, results: Path) -> None:
    put(results, "h100/2000-01-01-a-engine.json", engine("NVIDIA H100 80GB HBM3", 1.5))
    put(results, "h100/2000-01-02-b-engine.json", engine("NVIDIA H100 80GB HBM3", 1.9))
    put(results, "h100/2000-01-03-c-engine.json", engine("NVIDIA H100 80GB HBM3", 2.2, "min_max"))
    put(results, "h200/2000-01-01-d-engine.json", engine("NVIDIA H200", 1.75))
    shape = {"output_throughput": 1.2, "median_tpot_ms": 1.3}
    put(
        results,
        "h200/2000-01-01-d-serve.json",
        {"gpu": "NVIDIA H200", "quest_over_stock": {"16x32768x256": shape}},
    )
    head, _, tokens, served, _, _ = render.summary_of_models()
    assert head == "| whole model, against FLASH_ATTN | H100 | H200 |"
    assert tokens == (
        "| 8B shape, 32K x8, budget 2K: time per output token | "
        "[1.90x](benchmarks/results/h100/2000-01-02-b-engine.json) | "
        "[1.75x](benchmarks/results/h200/2000-01-01-d-engine.json) |"
    )
    assert served.startswith("| 8B shape served, 16 requests of 32K in, 256 out: output tokens a second |  | [1.20x](")
    assert len(render.engine_lines()) == 3  # docs/results.md has every policy and GPU


def test_a_layer_has_a_column_a_page_summary_and_kind_of_gpu(render: Any, results: Path) -> None:
    case = {"context": 2**20, "batch": 1, "budget": 8192, "fa3": {"in_graph": 8.0}}
    times = {"cuda": {"in_graph": 1.0}, "cuda_key_codes": {"in_graph": 2.0}}
    put(results, "h200/2000-01-01-a-chain.json", {"gpu": "NVIDIA H200", "cases": [case | {"cuda": {"in_graph": 4.0}}]})
    put(results, "h100/2000-01-03-a-chain.json", {"gpu": "NVIDIA H100 80GB", "cases": [case | times]})
    put(results, "h100/2000-01-02-b-chain.json", {"gpu": "NVIDIA H100 80GB", "cases": [case]})
    title, _, line, _ = render.summary_of_layers()
    columns = [column.strip() for column in title.split("|")[1:-1]]
    newest = "benchmarks/results/h100/2000-01-03-a-chain.json"
    assert columns[1:3] == [f"[H100]({newest}), key codes (default)", f"[H100]({newest}), min/max"]
    assert columns[0] == "one layer's attention, against FlashAttention 3" and "H200" in columns[3]
    assert line == "| 1M x1, budget 8K | 4.0x | 8.0x | 2.0x |"
    assert render.newest("h*/*-chain.json")[1] == newest
