"""Writes the README's tables of results from the newest raw JSON of each kind. usage: render_results.py"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def newest(pattern: str) -> tuple[dict[str, Any], str] | None:
    """The newest file of a kind and its path; names begin with the date."""
    found = in_order(pattern)
    return (json.loads(found[-1].read_text()), str(found[-1].relative_to(ROOT))) if found else None


def in_order(pattern: str) -> list[Path]:
    """The files of a kind, the newest last, whichever folder they are in."""
    return sorted((ROOT / "benchmarks/results").glob(pattern), key=lambda path: path.name)


def newest_by_card(pattern: str) -> dict[str, tuple[dict[str, Any], str]]:
    """The same for each kind of GPU, by its name."""
    found = {}
    for path in in_order(pattern):
        document = json.loads(path.read_text())
        found[card(document)] = document, str(path.relative_to(ROOT))
    return dict(sorted(found.items()))


def size(tokens: int) -> str:
    """4096 -> 4K."""
    if tokens % 2**20 == 0 and tokens:
        return f"{tokens // 2**20}M"
    return f"{tokens // 1024}K" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)


def policy_name(document: dict[str, Any]) -> str:
    """How pages were scored; benchmarks from before there was a choice do not say."""
    summary = document.get("policy", {}).get("page_summary", "min_max")
    return {"min_max": "min/max", "key_codes": "key codes"}[summary]


def model_lines(
    pattern: str,
    keys: tuple[str, ...],
    line: Callable[[dict[str, Any], dict[str, Any]], str],
) -> list[str]:
    """Whole-model lines from all files of a kind, in the order of ``keys``: of a case, policy and GPU the newest.

    ``line``: what a document and a case of it come to, but for the link to the file.
    """
    lines = {}
    for path in in_order(pattern):
        document = json.loads(path.read_text())
        for c in document["cases"]:
            if "speedup" in c:
                case = (*(c[key] for key in keys), policy_name(document), document["gpu"])
                lines[case] = f"{line(document, c)} | [json]({path.relative_to(ROOT)}) |"
    return [lines[case] for case in sorted(lines)]


def engine_lines() -> list[str]:
    """Whole-model lines on a GPU."""

    def line(document: dict[str, Any], c: dict[str, Any]) -> str:
        return (
            f"| Llama-3.1-8B shape, {size(c['context'])} x{c['batch']}, budget {size(c['budget'])} | time per output "
            f"token, {policy_name(document)}, {document['implementation']} kernels | FLASH_ATTN, {document['gpu']} | "
            f"{c['speedup']:.2f}x"
        )

    return model_lines("h*/*-engine.json", ("context", "batch", "budget"), line)


def tp_lines() -> list[str]:
    """Whole-model lines by bench_gpu_tp.py."""

    def line(document: dict[str, Any], c: dict[str, Any]) -> str:
        return (
            f"| {document['model']}, {c['layers']} of {document['shape_layers']} layers, {size(c['context'])} "
            f"x{c['batch']}, budget {size(c['budget'])} | time per output token, {c['gpus']} "
            f"GPU{'s' * (c['gpus'] > 1)}, {policy_name(document)}, {document['implementation']} kernels | "
            f"FLASH_ATTN, {document['gpu']} | {c['speedup']:.2f}x (first token {c['time_to_first_token_ratio']:.2f}x)"
        )

    return model_lines("h*/*-tp.json", ("gpus", "context", "batch", "budget"), line)


def chain_ratios(case: dict[str, Any], way: str) -> str:
    """FlashAttention's time over ours, by min/max and, where there is a choice, by key codes, and in two stages."""
    ratios = f"{case['speedup'][way]:.2f}x"
    for name, ours in (("key codes", "cuda_key_codes"), ("two stages", "cuda_two_stage")):
        if ours in case:
            ratios += f", {name} {case['fa3'][way] / case[ours][way]:.2f}x"
    return ratios


def chain_lines(rows: str = "cases") -> list[str]:
    """Attention of one layer on a GPU; ``rows`` "dense_rows": of requests whose budget covers their context."""
    return [
        f"| one layer, {size(c['context'])} x{c['batch']}, "
        f"budget {size(c['budget']) if 'budget' in c else 'covers it'} | fused CUDA launch, among other layers | "
        f"FlashAttention 3, {document['gpu']} | {chain_ratios(c, 'in_graph')} ({chain_ratios(c, 'alone')} alone) | "
        f"[json]({path}) |"
        for document, path in newest_by_card("h*/*-chain.json").values()
        for c in document[rows]
    ]


def serve_lines() -> list[str]:
    """Throughput under ``vllm bench serve``."""
    loaded = newest("h*/*-serve.json")
    if loaded is None:
        return []
    document, path = loaded
    lines = []
    for shape, found in document["quest_over_stock"].items():
        requests, tokens_in, tokens_out = map(int, shape.split("x"))
        lines.append(
            f"| Llama-3.1-8B shape served, {requests} requests of {size(tokens_in)} in and {tokens_out} out, budget "
            f"{size(document['budget'])} | output tokens a second | FLASH_ATTN, {document['gpu']} | "
            f"{found['output_throughput']:.2f}x (median time per output token {found['median_tpot_ms']:.2f}x, first "
            f"token {found['median_ttft_ms']:.2f}x) | [json]({path}) |"
        )
    return lines


RIVALS = {"amass": "amass-kv", "locks": "locks-kv", "flashinfer": "FlashInfer, dense"}


def rival_lines() -> list[str]:
    """Attention of one layer against other packages': the fastest variant of each."""
    loaded = newest("h*/*-rivals.json")
    if loaded is None:
        return []
    document, path = loaded
    lines = []
    for c in document["cases"]:
        for prefix, name in RIVALS.items():
            times = [f["in_graph"] for key, f in c["rivals"].items() if key.startswith(prefix) and "in_graph" in f]
            if times:
                ratios = [min(times) / c[ours]["in_graph"] for ours in ("quest", "quest_key_codes")]
                lines.append(
                    f"| one layer, {size(c['context'])} x{c['batch']}, budget {size(c['budget'])} | fused CUDA launch, "
                    f"among other layers | {name}, {document['gpu']} | {ratios[0]:.2f}x, key codes {ratios[1]:.2f}x | "
                    f"[json]({path}) |"
                )
    return lines


def cpu_lines() -> list[str]:
    """Attention of one layer, and a served model, on a CPU."""
    lines = []
    if loaded := newest("cpu/*-ops.json"):
        document, path = loaded
        lines += [
            f"| one layer, {size(c['context'])} x4, budget 1K | score + select + attend | "
            f"vLLM-CPU dense, {document['environment']['threads']} thread | {c['speedup']:.1f}x | "
            f"[json]({path}) |"
            for c in document["decode"]
            if c["context"] >= 4096
        ]
    if loaded := newest("cpu/*-served.json"):  # by a script that `quest-vllm bench --against stock` has replaced
        document, path = loaded
        settings = document["settings"]
        lines.append(
            f"| SmolLM2-135M served, {settings['context']} x{settings['requests']}, budget {settings['budget']} | "
            f"time per output token | stock vLLM-CPU | {document['speedup']:.2f}x | [json]({path}) |"
        )
    if loaded := newest("cpu/*-bench/results.json"):
        document, path = loaded
        lines += [
            f"| {Path(document['settings']['model']).name} served, {size(c['context'])} x{c['batch']}, budget "
            f"{size(c['budget'])} | inter-token latency, whole batch decoding | stock vLLM-CPU | "
            f"{c['speedup']['itl']:.2f}x | [json]({path}) |"
            for c in document["cells"]
            if c.get("speedup") and c["budget"] > 0
        ]
    return lines


def card(document: dict[str, Any]) -> str:
    """ "NVIDIA H100 80GB HBM3" -> "H100"."""
    return str(document["gpu"]).split()[1]


def grid(title: str, columns: list[str], cells: dict[tuple[str, str], str]) -> list[str]:
    """A table: a line for every first key of ``cells``, in their order, and a column for each of ``columns``."""
    rows = dict.fromkeys(row for row, _ in cells)
    lines = [f"| {row} | " + " | ".join(cells.get((row, column), "") for column in columns) + " |" for row in rows]
    return [f"| {title} | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|", *lines, ""]


def summary_of_models() -> list[str]:
    """The default policy in a whole model, a column for each kind of GPU: the newest measurement of each."""
    cells, cards = dict[tuple[str, str], str](), set[str]()
    for kind in ("engine", "serve", "tp"):
        for path in in_order(f"h*/*-{kind}.json"):
            document = json.loads(path.read_text())
            if kind != "serve" and policy_name(document) != "key codes":
                continue
            for row, ratio in {"engine": engine_cells, "serve": serve_cells, "tp": tp_cells}[kind](document):
                cells[row, card(document)] = f"[{ratio:.2f}x]({path.relative_to(ROOT)})"
                cards.add(card(document))
    return grid("whole model, against FLASH_ATTN", sorted(cards), cells)


def engine_cells(document: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Time per output token by bench_gpu_engine.py."""
    for c in document["cases"]:
        if "speedup" in c:
            row = f"8B shape, {size(c['context'])} x{c['batch']}, budget {size(c['budget'])}: time per output token"
            yield row, c["speedup"]


def serve_cells(document: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Throughput by bench_gpu_serve.py."""
    for shape, found in document["quest_over_stock"].items():
        requests, tokens_in, tokens_out = map(int, shape.split("x"))
        row = f"8B shape served, {requests} requests of {size(tokens_in)} in, {tokens_out} out"
        yield f"{row}: output tokens a second", found["output_throughput"]
        yield f"{row}: median time per output token", found["median_tpot_ms"]


def tp_cells(document: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Time per output token on several GPUs, by bench_gpu_tp.py, with the smallest budget."""
    least = min(c["budget"] for c in document["cases"] if c["budget"])
    for c in document["cases"]:
        if "speedup" in c and c["gpus"] > 1 and c["budget"] == least:
            row = f"70B shape, {c['layers']} of {document['shape_layers']} layers on {c['gpus']} GPUs"
            yield (
                f"{row}, {size(c['context'])} x{c['batch']}, budget {size(least)}: time per output token",
                c["speedup"],
            )


def summary_of_layers() -> list[str]:
    """Attention of one layer among other layers, by either page summary, on each kind of GPU."""
    cells = {}
    for name, (document, path) in newest_by_card("h*/*-chain.json").items():
        for c in document["cases"]:
            row = f"{size(c['context'])} x{c['batch']}, budget {size(c['budget'])}"
            for column, ours in (
                ("key codes (default)", "cuda_key_codes"),
                ("`two_stage`", "cuda_two_stage"),
                ("min/max", "cuda"),
            ):
                if ours in c:
                    ratio = f"{c['fa3']['in_graph'] / c[ours]['in_graph']:.1f}x"
                    cells[row, f"[{name}]({path}), {column}"] = ratio
    columns = list(dict.fromkeys(column for _, column in cells))
    return grid("one layer's attention, against FlashAttention 3", columns, cells)


def summary_of_cpu() -> list[str]:
    """Attention of one layer over its contexts in one line, and a served model, on a CPU."""
    cells = {}
    if loaded := newest("cpu/*-ops.json"):
        document, path = loaded
        found = [c for c in document["decode"] if c["context"] >= 4096]
        row = f"one layer, {', '.join(size(c['context']) for c in found)} x4, budget 1K"
        cells[row, "ratio"] = ", ".join(f"{c['speedup']:.1f}x" for c in found) + f" ([json]({path}))"
    if loaded := newest("cpu/*-served.json"):
        document, path = loaded
        settings = document["settings"]
        row = f"SmolLM2-135M served, {settings['context']} x{settings['requests']}, budget {settings['budget']}"
        cells[f"{row}: time per output token", "ratio"] = f"{document['speedup']:.2f}x ([json]({path}))"
    return grid("on a CPU, `min_max`, against vLLM-CPU's dense attention", ["ratio"], cells)


def main() -> None:
    """Replace what stands between the markers."""
    table = ["", *summary_of_models(), *summary_of_layers(), *summary_of_cpu()]
    readme = ROOT / "README.md"
    head, rest = readme.read_text().split(BEGIN)
    _, tail = rest.split(END)
    readme.write_text("\n".join([head + BEGIN, *table, END + tail]))


if __name__ == "__main__":
    main()
