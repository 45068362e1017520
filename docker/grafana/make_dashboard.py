"""Writes dashboards/quest.json, the Grafana dashboard. A test holds the file to this script's output.

usage: make_dashboard.py
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OUTPUT = Path(__file__).parent / "dashboards" / "quest.json"
DATASOURCE = {"type": "prometheus", "uid": "prometheus"}
ON = 'instance=~"$instance"'
COLUMNS, HEIGHT = 24, 8


@dataclass(frozen=True)
class Panel:
    """One panel. ``queries`` maps a legend to its PromQL; ``width`` is in 24ths of the screen."""

    title: str
    about: str
    queries: dict[str, str]
    unit: str
    kind: str = "timeseries"
    width: int = 8
    stacked: bool = False
    most: float | None = None


def rate(metric: str, by: str = "", labels: str = "") -> str:
    """PromQL of a counter's rate, summed over all labels but ``by``."""
    selector = ", ".join(filter(None, (ON, labels)))
    grouped = f" by ({by})" if by else ""
    return f"sum{grouped} (rate({metric}{{{selector}}}[$__rate_interval]))"


def quantile(q: float, histogram: str) -> str:
    """PromQL of a latency quantile by budget class."""
    return f"histogram_quantile({q}, {rate(histogram + '_bucket', 'le, budget_class')})"


def total(gauge: str, by: str = "", labels: str = "") -> str:
    """PromQL of a gauge, summed over all labels but ``by``."""
    selector = ", ".join(filter(None, (ON, labels)))
    grouped = f" by ({by})" if by else ""
    return f"sum{grouped} ({gauge}{{{selector}}})"


def latency(title: str, about: str, histogram: str) -> Panel:
    """Median and 95th percentile of one of the latency histograms."""
    queries = {f"{{{{budget_class}}}} p{round(100 * q)}": quantile(q, histogram) for q in (0.5, 0.95)}
    return Panel(title, about, queries, "s")


READ, DENSE = rate("quest_kv_bytes_read_total"), rate("quest_kv_bytes_dense_total")
SPARSE_ROWS = rate("quest_decode_rows_total", labels='path="sparse"')
DECODE_ROWS = rate("quest_decode_rows_total", labels='reason!="prefill"')
SECTIONS: dict[str, tuple[Panel, ...]] = {
    "At a glance": (
        Panel(
            "KV bytes saved",
            "Share of the KV bytes that dense attention would have read in the layers that may be sparse.",
            {"saved": f"1 - {READ} / {DENSE}"},
            "percentunit",
            "stat",
            4,
            most=1,
        ),
        Panel(
            "Tokens attended",
            "Per sparse row, in one head of one layer: what the budgets came to.",
            {"tokens": f"{rate('quest_tokens_attended_total')} / {SPARSE_ROWS}"},
            "short",
            "stat",
            4,
        ),
        Panel(
            "Decode rows on the sparse path",
            "Of all rows but prefill.",
            {"sparse": f"{SPARSE_ROWS} / {DECODE_ROWS}"},
            "percentunit",
            "stat",
            4,
            most=1,
        ),
        Panel(
            "Output tokens", "Over all requests.", {"tokens": rate("vllm:generation_tokens_total")}, "cps", "stat", 4
        ),
        Panel(
            "Requests waiting",
            "vLLM's queue.",
            {"waiting": total("vllm:num_requests_waiting")},
            "short",
            "stat",
            4,
        ),
        Panel(
            "Wrong page summaries",
            "Found by the audit (--quest-audit), since the server started. 0 is the only good value.",
            {"wrong": total("quest_audit_pages_total", labels='result="wrong"')},
            "short",
            "stat",
            4,
        ),
    ),
    "Latency by budget class": (
        latency(
            "Time to first token",
            "Request in, to the first chunk of output out. Prefill is dense, so budgets should not matter here.",
            "quest_time_to_first_token_seconds",
        ),
        latency(
            "Inter-token latency",
            "Between chunks of a stream. This is what budgets are for.",
            "quest_inter_token_latency_seconds",
        ),
        latency("End to end", "Request in, to the last byte out.", "quest_e2e_latency_seconds"),
    ),
    "What attention did": (
        Panel(
            "KV bytes",
            "Read by decode rows in the layers that may be sparse, against the same rows dense (byte model).",
            {"read": READ, "dense would have read": DENSE},
            "Bps",
        ),
        Panel(
            "Rows by path and reason",
            "Every dense row has a reason. prefill is always dense; unsupported costs you speed.",
            {"{{path}}: {{reason}}": rate("quest_decode_rows_total", "path, reason")},
            "cps",
            stacked=True,
        ),
        Panel(
            "Tokens attended and available",
            "Mean over sparse rows, in one head of one layer.",
            {
                name: f"{rate(f'quest_tokens_{kind}_total')} / {SPARSE_ROWS}"
                for name, kind in (("attended", "attended"), ("context", "available"))
            },
            "short",
        ),
        Panel(
            "Budgets in use",
            "Token budgets of sparse rows.",
            {
                f"p{round(100 * q)}": f"histogram_quantile({q}, {rate('quest_token_budget_bucket', 'le')})"
                for q in (0.1, 0.5, 0.9)
            },
            "short",
        ),
        Panel(
            "Time in each stage",
            "Host seconds a second, over workers. CPU backend only: a GPU would have to wait to be timed.",
            {"{{stage}}": rate("quest_stage_seconds_total", "stage")},
            "percentunit",
            stacked=True,
        ),
        Panel(
            "Page summaries audited",
            "Pages compared with their keys a second; nothing without --quest-audit.",
            {"{{result}}": rate("quest_audit_pages_total", "result")},
            "cps",
        ),
    ),
    "Memory and queue": (
        Panel(
            "KV and summary memory",
            "Set aside at start-up. Summaries are 1 / page_size of the KV cache.",
            {"{{part}}": total("quest_kv_cache_bytes", "part")},
            "bytes",
            stacked=True,
        ),
        Panel(
            "KV cache in use",
            "vLLM's blocks. Budgets do not lower it: pages that a step skips may be selected in the next.",
            {"{{instance}}": f"max by (instance) (vllm:kv_cache_usage_perc{{{ON}}})"},
            "percentunit",
            most=1,
        ),
        Panel(
            "Requests",
            "In vLLM's scheduler.",
            {
                "running": total("vllm:num_requests_running"),
                "waiting": total("vllm:num_requests_waiting"),
            },
            "short",
        ),
        Panel(
            "Time in the queue",
            "From arrival to the first time a request is scheduled.",
            {
                f"p{round(100 * q)}": f"histogram_quantile({q}, {rate('vllm:request_queue_time_seconds_bucket', 'le')})"
                for q in (0.5, 0.95)
            },
            "s",
        ),
        Panel(
            "Prefix cache hits",
            "Share of prompt tokens found in the cache; their page summaries come with them.",
            {"hits": f"{rate('vllm:prefix_cache_hits_total')} / {rate('vllm:prefix_cache_queries_total')}"},
            "percentunit",
            most=1,
        ),
        Panel(
            "Preemptions",
            "Requests put back into the queue for lack of KV cache.",
            {"preemptions": rate("vllm:num_preemptions_total")},
            "cps",
        ),
    ),
}


def panel_json(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    """Grafana's JSON of one panel."""
    height = HEIGHT if panel.kind == "timeseries" else HEIGHT // 2
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    if panel.most is not None:
        defaults["max"] = panel.most
    if panel.kind == "timeseries":
        defaults["custom"] = {
            "fillOpacity": 40 if panel.stacked else 8,
            "lineWidth": 1 if panel.stacked else 2,
            "showPoints": "never",
            "stacking": {"mode": "normal" if panel.stacked else "none"},
        }
        options: dict[str, Any] = {"legend": {"displayMode": "list"}, "tooltip": {"mode": "multi", "sort": "desc"}}
    else:
        options = {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "none", "graphMode": "area"}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": height},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": [
            {"refId": chr(65 + position), "datasource": DATASOURCE, "expr": expr, "legendFormat": legend}
            for position, (legend, expr) in enumerate(panel.queries.items())
        ],
    }


def panels() -> list[dict[str, Any]]:
    """Every row and panel, placed from left to right and top to bottom."""
    placed: list[dict[str, Any]] = []
    y = 0
    for section, members in SECTIONS.items():
        grid = {"x": 0, "y": y, "w": COLUMNS, "h": 1}
        placed.append({"id": len(placed) + 1, "type": "row", "title": section, "gridPos": grid, "collapsed": False})
        x, y, tallest = 0, y + 1, 0
        for panel in members:
            if x + panel.width > COLUMNS:
                x, y = 0, y + tallest
            placed.append(panel_json(panel, len(placed) + 1, x, y))
            tallest = placed[-1]["gridPos"]["h"]
            x += panel.width
        y += tallest
    return placed


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana's JSON model."""
    instance = {
        "name": "instance",
        "label": "Server",
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": "label_values(quest_decode_rows_total, instance)", "refId": "instance"},
        "definition": "label_values(quest_decode_rows_total, instance)",
        "refresh": 2,
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "current": {"text": ["All"], "value": ["$__all"]},
    }
    return {
        "uid": "quest-vllm",
        "title": "quest_vllm",
        "description": "Sparse attention at decode: latency by budget, bytes saved, dense rows and why.",
        "tags": ["vllm", "quest"],
        "schemaVersion": 39,
        "version": 1,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": []},
        "templating": {"list": [instance]},
        "panels": panels(),
    }


def main() -> None:
    """Write the file."""
    OUTPUT.write_text(json.dumps(dashboard(), indent=2) + "\n")


if __name__ == "__main__":
    main()
