"""Writes what the documentation takes from the code: references, the byte model's table, measured results.

usage: generate.py [--check]      --check writes nothing and ends with 1 if something is not current
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

import render_results  # noqa: E402

from quest_vllm import cli, completion, exit_codes, metrics  # noqa: E402
from quest_vllm import config as configuration  # noqa: E402
from quest_vllm.server import flags  # noqa: E402

DOCS = ROOT / "docs"
# a wide table: the table of contents makes room for it
NOTE = "---\nhide: [toc]\n---\n<!-- written by docs/generate.py: change the code, then run `make docs-generate` -->\n"
LABEL_VALUES: dict[tuple[str, ...], tuple[Any, ...]] = {
    ("path", "reason"): metrics.ROW_KINDS,
    ("stage",): metrics.STAGES,
    ("part",): metrics.MEMORY_PARTS,
    ("result",): metrics.AUDIT_RESULTS,
    ("budget_class",): metrics.BUDGET_CLASSES,
}


def cell(text: str) -> str:
    """Text that fits in a table's cell."""
    return " ".join(text.split()).replace("|", "\\|")


def label_values(labels: tuple[str, ...]) -> str:
    """The values that a metric's labels take, as Markdown."""
    if not labels:
        return ""
    known = LABEL_VALUES.get(labels)
    if known is None:
        return f"`{', '.join(labels)}`"
    shown = ("`" + (": ".join(value) if isinstance(value, tuple) else value) + "`" for value in known)
    return f"`{', '.join(labels)}`: {', '.join(shown)}"


def metrics_page() -> str:
    """docs/reference/metrics.md"""
    rows = [
        f"| `{name}` | {spec.type} | {cell(label_values(spec.labels))} | {cell(spec.help)} |"
        for name, spec in metrics.METRICS.items()
    ]
    rules = yaml.safe_load((ROOT / "docker/prometheus/rules.yml").read_text())["groups"]
    alerts = [
        f"| {rule['alert']} | {rule['labels']['severity']} | {rule.get('for', 'at once')} | "
        f"{cell(rule['annotations']['description'])} |"
        for group in rules
        for rule in group["rules"]
    ]
    return "\n".join(
        [
            NOTE,
            "# Metrics and alerts",
            "",
            "`/metrics` holds these beside vLLM's own. A metric shows as zero before its first value. Latencies need",
            "`quest-vllm serve`, or `--middleware quest_vllm.server.middleware.QuestMiddleware`. Workers on another",
            "host are not seen. Budget classes are those of the budget that a request asked for, `dense` being 0.",
            "",
            "| metric | type | labels | meaning |",
            "|---|---|---|---|",
            *rows,
            "",
            "## Alerts",
            "",
            "From `docker/prometheus/rules.yml`; `rules_test.yml` beside it shows when each fires and when not.",
            "",
            "| alert | severity | after | what it means, what to do |",
            "|---|---|---|---|",
            *alerts,
            "",
        ]
    )


def yaml_comments() -> dict[str, str]:
    """The comment above each key of configs/default.yaml."""
    found: dict[str, str] = {}
    comment: list[str] = []
    for line in (ROOT / "configs/default.yaml").read_text().splitlines():
        if line.startswith("#"):
            comment.append(line.lstrip("# "))
            continue
        if key := re.match(r"(\w+):", line):
            found[key[1]] = " ".join(comment)
        comment = []
    return found


def legal_values(key: str) -> str:
    """What the check of ``key`` says that it expects."""
    try:
        configuration._CHECKS[key](key, object())
    except configuration.QuestConfigError as error:
        return str(error).split("expected ", 1)[1].rsplit(", got ", 1)[0]
    raise AssertionError(f"{key}: the check takes anything")


def flag_rows() -> list[str]:
    """One line a flag of ours."""
    actions = [action for action in flags.parser()._actions if action.help]
    named = [(" ".join(filter(None, (action.option_strings[0], action.metavar))), action) for action in actions]
    return [f"| `{flag}` | `{action.dest}` | {cell(str(action.help))} |" for flag, action in named]


def configuration_page() -> str:
    """docs/reference/configuration.md"""
    comments = yaml_comments()
    defaults = yaml.safe_load((ROOT / "configs/default.yaml").read_text())
    rows = []
    for field in fields(configuration.QuestConfig):
        key = field.name
        default = (
            "null" if defaults[key] is None else str(defaults[key]).replace("False", "false").replace("True", "true")
        )
        variable = configuration.ENV_PREFIX + key.upper()
        rows.append(f"| `{key}` | `{default}` | {cell(legal_values(key))} | `{variable}` | {cell(comments[key])} |")
    return "\n".join(
        [
            NOTE,
            "# Configuration",
            "",
            "Server defaults, weakest source first:",
            "",
            "1. `configs/default.yaml`, or the YAML file that `QUEST_CONFIG` names;",
            '2. `--additional-config \'{"quest": {"token_budget": 1024}}\'`;',
            "3. the environment, one variable a key.",
            "",
            "An unknown key stops the server and names the nearest one; so does a value of the wrong type or out of",
            "range, and an environment variable that is a near miss of one below.",
            "",
            "| key | default | legal | variable | meaning |",
            "|---|---|---|---|---|",
            *rows,
            "",
            "## Flags of `quest-vllm serve`",
            "",
            "Each stands for a key above. Every other flag goes to `vllm serve` as it is.",
            "",
            "| flag | key | meaning |",
            "|---|---|---|",
            *flag_rows(),
            "",
        ]
    )


def command_section(name: str, parser: argparse.ArgumentParser) -> list[str]:
    """Flags and exit codes of one command."""
    rows = []
    for action in parser._actions:
        shown = " ".join(filter(None, (", ".join(action.option_strings), str(action.metavar or "")))).strip()
        text = str(action.help or "") % {**vars(action), "prog": parser.prog}
        if action.dest != "help" and text:
            rows.append(f"| `{shown or action.dest}` | {cell(text)} |")
    codes = [f"| {code} | {cell(meaning)} |" for code, meaning in exit_codes.MEANINGS[name].items()]
    flag_table = [] if name == "serve" else ["| word or flag | meaning |", "|---|---|", *rows, ""]
    if name == "serve":
        flag_table = ["Any flag of `vllm serve`; ours are in [Configuration](configuration.md).", ""]
    return [
        f"## {name}",
        "",
        f"`quest-vllm {name}`: {cli.COMMANDS[name]}.",
        "",
        *flag_table,
        "| exit code | when |",
        "|---|---|",
        *codes,
        "",
    ]


def commands_page() -> str:
    """docs/reference/commands.md"""
    sections = [line for name, build in completion.command_parsers().items() for line in command_section(name, build())]
    return "\n".join(
        [
            NOTE,
            "# Commands",
            "",
            "`--help` of each command teaches more than this page: examples, what is measured, what is written.",
            "",
            "## Completion",
            "",
            "    pip install shtab",
            '    eval "$(quest-vllm completion bash)"                        # zsh and fish: see its --help',
            "",
            *sections,
        ]
    )


def byte_table() -> str:
    """Share of dense attention's bytes that a budget reads, at the default page size."""
    page, budgets = configuration.QuestConfig().page_size, (512, 1024, 2048, 4096)
    lines = [
        "| context | " + " | ".join(f"budget {budget}" for budget in budgets) + " |",
        "|---|" + "---|" * len(budgets),
    ]
    for context in (4096, 8192, 16384, 32768, 65536, 131072):
        shares = (f"{100 * (1 / page + budget / context):.0f}%" if budget < context else "dense" for budget in budgets)
        lines.append(f"| {context // 1024}K | " + " | ".join(shares) + " |")
    return "\n".join(lines)


def results_page() -> str:
    """docs/results.md: every line from a raw JSON file under benchmarks/results."""
    chains = [line for rows in ("cases", "dense_rows") for line in render_results.chain_lines(rows)]
    models = [*render_results.engine_lines(), *render_results.serve_lines(), *render_results.tp_lines()]
    lines = [*models, *chains, *render_results.rival_lines(), *render_results.cpu_lines()]
    rows, commands = [], {}
    for line in lines:
        match = re.search(r"\[json\]\((.+?)\)", line)
        assert match, line
        path = match[1]
        rows.append(line.replace(match[0], f"`{Path(path).parent.name}/{Path(path).name}`"))
        document = json.loads((ROOT / path).read_text())
        environment = document.get("environment", document)
        command = document.get("command") or environment.get("command") or "see the file"
        commands[path] = " ".join(command) if isinstance(command, list) else command
    return "\n".join(
        [
            NOTE,
            "# Measured",
            "",
            "A ratio compares two runs in one process or on one warm machine; above 1 we are faster. Raw files with",
            "versions and commit lie under `benchmarks/results`.",
            "",
            "| what | measured | against | ratio | raw |",
            "|---|---|---|---|---|",
            *rows,
            "",
            "## The command behind each file",
            "",
            "| file | command |",
            "|---|---|",
            *(f"| `{path}` | `{cell(str(command))}` |" for path, command in commands.items()),
            "",
        ]
    )


def with_block(text: str, name: str, content: str) -> str:
    """``text`` with what lies between the markers of block ``name`` replaced."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    assert begin in text and end in text, f"no block {name}"
    return text.split(begin)[0] + f"{begin}\n\n{content}\n\n{end}" + text.split(end)[1]


def pages() -> dict[Path, str]:
    """Every generated file and its content."""
    tune = DOCS / "tune.md"
    return {
        DOCS / "reference/metrics.md": metrics_page(),
        DOCS / "reference/configuration.md": configuration_page(),
        DOCS / "reference/commands.md": commands_page(),
        DOCS / "results.md": results_page(),
        tune: with_block(tune.read_text(), "bytes", byte_table()),
    }


def main() -> int:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = {path: text for path, text in pages().items() if not path.exists() or path.read_text() != text}
    for path, text in stale.items():
        print(f"{'not current' if check else 'written'}: {path.relative_to(ROOT)}")
        if not check:
            path.write_text(text)
    return 1 if check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
