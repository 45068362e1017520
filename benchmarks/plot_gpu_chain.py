"""Draws where the fused decode launch spends its time, from the newest raw JSON. usage: plot_gpu_chain.py

Writes docs/img/gpu-chain.svg: one bar a shape, by key codes, the stages as shares of the clocks of the launch's CTAs.
"""

from __future__ import annotations

from typing import Any

import render_results

WIDTH, LEFT, RIGHT, BAR, GAP, TOP = 860, 190, 160, 22, 12, 54
COLOURS = {"inputs": "#90a4ae", "score": "#1e88e5", "select": "#fb8c00", "attend": "#43a047", "merge": "#8e24aa"}
STYLE = "text{font:13px sans-serif;fill:#37474f}.on{fill:#fff;font-size:11px;text-anchor:middle}"


def bar(case: dict[str, Any], top: int) -> list[str]:
    """One shape: its label, its stages, its time beside FlashAttention's."""
    label = f"{render_results.size(case['context'])} x{case['batch']}, budget {render_results.size(case['budget'])}"
    parts = [f'<text x="{LEFT - 10}" y="{top + 16}" text-anchor="end">{label}</text>']
    left, room = float(LEFT), WIDTH - LEFT - RIGHT
    for stage, share in case["key_codes_stages"].items():
        wide = share * room
        parts.append(
            f'<rect x="{left:.1f}" y="{top}" width="{wide:.1f}" height="{BAR}" fill="{COLOURS[stage]}">'
            f"<title>{stage}: {share:.0%}</title></rect>"
        )
        if wide > 30:
            parts.append(f'<text class="on" x="{left + wide / 2:.1f}" y="{top + 15}">{share:.0%}</text>')
        left += wide
    times = f"{case['cuda_key_codes']['in_graph']:.0f} us, FA3 {case['fa3']['in_graph']:.0f} us"
    return [*parts, f'<text x="{WIDTH - RIGHT + 10}" y="{top + 16}">{times}</text>']


def legend() -> list[str]:
    """The stages' colours, on one line."""
    parts = []
    for number, (stage, colour) in enumerate(COLOURS.items()):
        left = LEFT + number * 95
        parts.append(f'<rect x="{left}" y="18" width="14" height="14" fill="{colour}"/>')
        parts.append(f'<text x="{left + 20}" y="30">{stage}</text>')
    return parts


def main() -> None:
    """Draw the newest measurement on an H100, whose numbers the page tells."""
    loaded = render_results.newest("h100/*-chain.json")
    if loaded is None:
        raise SystemExit("no chain results under benchmarks/results: run benchmarks/bench_gpu_ops.py")
    cases = loaded[0]["cases"]
    height = TOP + len(cases) * (BAR + GAP) + 6
    body = legend()
    for number, case in enumerate(cases):
        body += bar(case, TOP + number * (BAR + GAP))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">'
    page = [head, f"<style>{STYLE}</style>", f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>', *body, "</svg>"]
    (render_results.ROOT / "docs/img/gpu-chain.svg").write_text("\n".join(page) + "\n")


if __name__ == "__main__":
    main()
