"""What needs no GPU of the benchmarks and audits for several of them."""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quest_vllm import audit_ranks
from quest_vllm.audit_ranks import RankSelections, by_head, disagreements
from quest_vllm.errors import QuestError
from quest_vllm.ops.api import Ops, load_ops
from tests.kernels.paged import places

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))


def rank(number: int, stage: int = 0, heads: str = "", rows: str = "r", stored: str = "k") -> RankSelections:
    name = f"layer {stage}"
    return RankSelections(number, stage, 8, 16, {name: [heads or f"h{number}"]}, {name: rows}, {name: [stored]})


def test_ranks_that_agree() -> None:
    ranks = [rank(0, stored="a"), rank(1, stored="b")]
    assert disagreements(ranks, num_kv_heads=2) == []
    assert by_head(ranks[::-1]) == {"layer 0": ["h0", "h1"]}
    stages = [rank(1, 1), rank(0, 1), rank(0), rank(1)]
    assert disagreements(stages, 2) == [] and by_head(stages) == {"layer 0": ["h0", "h1"], "layer 1": ["h0", "h1"]}


def test_each_disagreement_is_named() -> None:
    assert "budgets" in disagreements([rank(0), rank(1, rows="other")], 2)[0]
    assert "budgets" in disagreements([rank(0), rank(0, stage=1, rows="other")], 2)[0]
    # with layer_shares, layers may differ, ranks may not
    own = [rank(number) for number in range(2)]
    for one in own:
        one.rows["another layer"] = "other"
    assert "all ranks and layers, got 2" in disagreements(own, 2)[0]
    assert disagreements(own, 2, alike=False) == []
    own[1].rows["another layer"] = "a third"
    assert "all ranks of a layer, got 3" in disagreements(own, 2, alike=False)[0]
    shared = disagreements([rank(0, stored="a"), rank(1, stored="b")], num_kv_heads=1)
    assert shared == ["layer 0: ranks 0 to 1 store different keys of one KV head"]
    four = [rank(number, stored="ab"[number // 2]) for number in range(4)]
    assert disagreements(four, num_kv_heads=2) == [] and len(disagreements(four, num_kv_heads=1)) == 1
    idle = rank(1)
    idle.heads, idle.rows = {}, {}
    assert disagreements([rank(0), idle], 2) == ["layer 0: ranks [1] selected nothing"]


def decode_tensors(page_size: int, lengths: list[int], budgets: list[int]) -> tuple[list[torch.Tensor], dict[str, Any]]:
    torch.manual_seed(0)
    rows, blocks, heads, dim = len(lengths), 8, 2, 32
    keys = torch.randn(rows * blocks, heads, page_size, dim)
    summaries = torch.stack((keys.amin(2), keys.amax(2)), dim=2).unsqueeze(2)
    table = torch.arange(rows * blocks, dtype=torch.int32).reshape(rows, blocks)
    query = torch.randn(rows, 4, dim)
    numbers = [torch.tensor(values, dtype=torch.int32) for values in (lengths, budgets)]
    options = {
        "page_size": page_size,
        "scale": 0.2,
        "softcap": 0.0,
        "group_reduction": "max",
        "bound_radius": 1.0,
        "sink_pages": 1,
        "recent_pages": 2,
        "page_summary": "min_max",
    }
    return [query, keys, torch.randn_like(keys), summaries, table, *numbers], options


def test_recorded_decode_is_what_the_stages_select() -> None:
    """Both ways of the CUDA backend: the stages again, and the flags of a fused launch (here, a stand-in's)."""
    ops = load_ops("torch", "cpu")
    tensors, options = decode_tensors(16, [128, 100, 90], [4, 5, 2**31 - 1])  # the last row is dense
    table, lengths, budgets = tensors[4:]
    scores = ops.score_pages(
        tensors[0], tensors[3], table, lengths, page_size=16, group_reduction="max", bound_radius=1.0
    )
    chosen = ops.select_pages(scores, lengths, budgets, page_size=16, sink_pages=1, recent_pages=2, max_page_budget=8)

    def fused(*arguments: torch.Tensor, chosen: torch.Tensor, **named: Any) -> torch.Tensor:
        for row, pages in enumerate(expected[:2]):
            for head, own in enumerate(pages):
                chosen[row, head, own] = 1
        return ops.quest_decode(*arguments, **named)

    expected = [[[p for p in head if p >= 0] for head in row] for row in chosen.tolist()]
    assert [len(head) for row in expected[:2] for head in row] == [4, 4, 5, 5]
    plain = ops.quest_decode(*tensors, **options)
    stand_in = Ops("cuda", *(getattr(ops, name) for name in STAGES), fused)
    hashes = []
    for implementation in (ops, stand_in):
        recorder = audit_ranks._Recorder()
        out = audit_ranks._recording_decode(implementation, recorder)(*tensors, **options)
        assert torch.equal(out, plain)
        assert recorder.num_pages == 2 * (4 + 5)
        hashes.append([head.hexdigest() for head in recorder.heads])
    by_hand = audit_ranks._Recorder()
    by_hand.add([128, 100], [4, 5], expected[:2])
    assert hashes == [[head.hexdigest() for head in by_hand.heads]] * 2 and len({*hashes[0]}) == 2


@pytest.mark.parametrize("policy", ["two_stage", "window", "mean", "mass"])
@pytest.mark.parametrize("top_p", [None, 0.6])
def test_what_is_selected_again_is_what_was_attended_to(policy: str, top_p: float | None) -> None:
    ops = load_ops("torch", "cpu")
    tensors, options = decode_tensors(16, [128, 100, 90], [4, 5, 5])
    query, keys, values, _, table, lengths, _ = tensors
    options |= {"group_reduction": "mass", "policies": places([policy, "max", policy])}
    if top_p is not None:
        options["top_p"] = torch.tensor([top_p, 1.0, 1.0])
    pages = audit_ranks._select_again(ops, tensors, options)
    selected = torch.full((3, 2, 8), -1, dtype=torch.int32)
    for row, heads in enumerate(pages):
        for head, chosen in enumerate(heads):
            selected[row, head, : len(chosen)] = torch.tensor(chosen)
    scale = {"page_size": 16, "scale": options["scale"]}
    attended = ops.sparse_paged_attention(query, keys, values, table, lengths, selected, **scale)
    assert torch.equal(attended, ops.quest_decode(*tensors, **options))


STAGES = ("update_page_summaries", "score_pages", "select_pages", "sparse_paged_attention")


def test_graphs_would_pass_by_the_recorder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    mode = SimpleNamespace(name="FULL_DECODE_ONLY")
    worker = SimpleNamespace(vllm_config=SimpleNamespace(compilation_config=SimpleNamespace(cudagraph_mode=mode)))
    with pytest.raises(QuestError, match="enforce_eager: expected True.*FULL_DECODE_ONLY"):
        audit_ranks.record_selections(worker)


def case(backend: str, gpus: int, batch: int, budget: int | None, seconds: float) -> dict[str, Any]:
    return {
        "backend": backend,
        "gpus": gpus,
        "layers": 8,
        "context": 131072,
        "batch": batch,
        "budget": budget,
        "time_per_output_token": seconds,
        "time_to_first_token": seconds * 100,
    }


def test_a_result_gives_rows_and_scaling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, render = importlib.import_module("bench_gpu_tp"), importlib.import_module("render_results")
    output = tmp_path / "benchmarks/results/h100/2000-01-01-abc-tp.json"
    results = bench.Results(output, {"model": "Llama-3.1-70B shape", "shape_layers": 80, "gpus": 2})
    engine: dict[str, Any] = {"backend": "FLASH_ATTN"}
    results.engines.append(engine)
    results.take(engine, {"ranks": [{"gpu": "Some GPU", "implementation": "cuda"}]})
    for gpus, stock, ours in ((2, 0.010, 0.004), (1, 0.018, 0.008)):
        results.take(engine, case("FLASH_ATTN", gpus, 4, None, stock))
        results.take(engine, case("CUSTOM", gpus, 4, 2048, ours))
    document = json.loads(output.read_text())  # saved along the way
    gains = {entry["backend"]: entry for entry in document["scaling"]}
    assert gains["FLASH_ATTN"]["gain"] == pytest.approx(1.8) and gains["CUSTOM"]["gain"] == pytest.approx(2.0)
    assert gains["CUSTOM"]["gain_over_stock"] == pytest.approx(2.0 / 1.8)
    monkeypatch.setattr(render, "ROOT", tmp_path)
    one, two = render.tp_lines()
    shape = "| Llama-3.1-70B shape, 8 of 80 layers, 128K x4, budget 2K | time per output token, "
    assert one.startswith(shape + "1 GPU, min/max, cuda kernels | FLASH_ATTN, Some GPU | 2.25x (first token 2.25x) |")
    assert two.startswith(shape + "2 GPUs, min/max, cuda kernels | FLASH_ATTN, Some GPU | 2.50x (first token 2.50x) |")
    assert two.endswith("[json](benchmarks/results/h100/2000-01-01-abc-tp.json) |")


def test_parts_of_one_machine_are_joined(tmp_path: Path) -> None:
    bench = importlib.import_module("bench_gpu_tp")
    files = []
    for number, gpus in enumerate((2, 1)):
        files.append(tmp_path / f"{number}.json")
        results = bench.Results(files[-1], {"gpu": "Some GPU", "commit": "abc", "command": f"run {gpus}"})
        for backend, budget in (("FLASH_ATTN", None), ("CUSTOM", 2048)):
            results.take({}, case(backend, gpus, 4, budget, 0.01 / gpus))
        results.checks = {f"check {number}": {"ok": True}}
        results.write()
    bench.merge(files, tmp_path / "all.json")
    document = json.loads((tmp_path / "all.json").read_text())
    assert len(document["cases"]) == 4 and {*document["checks"]} == {"check 0", "check 1"}
    assert [entry["gain"] for entry in document["scaling"]] == [2.0, 2.0] and document["command"] == "run 2; run 1"
    files[1].write_text(files[1].read_text().replace("abc", "abd"))
    with pytest.raises(SystemExit, match="expected one commit in all files, got abc, abd"):
        bench.merge(files, None)


def test_a_group_leaves_nothing_behind(tmp_path: Path) -> None:
    group = importlib.import_module("process_group")
    mark = tmp_path / "alive"
    worker = f"import time, pathlib\nwhile True: pathlib.Path({str(mark)!r}).touch(); time.sleep(0.05)"
    command = [
        sys.executable,
        "-c",
        f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {worker!r}]).wait()",
    ]
    seen: list[int] = []
    assert group.run_group(command, {}, tmp_path / "log", 3, lambda: seen.append(1)) == 124
    assert mark.exists() and seen
    mark.unlink()
    time.sleep(0.4)
    assert not mark.exists()  # its worker is gone, too
    assert group.run_group([sys.executable, "-c", "print('x'); raise SystemExit(3)"], {}, tmp_path / "log", 60) == 3
    assert group.last_lines(tmp_path / "log") == "x"


def test_partings() -> None:
    check = importlib.import_module("check_tp")
    one = {"tokens": [[1, 2], [3, 4]], "logprobs": [[{}, {}], [{}, {"4": -0.5, "5": -0.7}]]}
    other = {"tokens": [[1, 2], [3, 5]], "logprobs": [[{}, {}], [{}, {"5": -0.6, "4": -0.65}]]}
    found = check.part(other, one)
    assert found["agreed_tokens"] == [2, 1] and found["widest_gap"] == pytest.approx(0.2)
