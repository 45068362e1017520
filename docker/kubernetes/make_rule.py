"""Writes prometheusrule.yaml from docker/prometheus/rules.yml. A test holds the file to this script's output.

usage: make_rule.py
"""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).resolve().parent
RULES = HERE.parent / "prometheus/rules.yml"
OUTPUT = HERE / "prometheusrule.yaml"
HEAD = """\
# Written by make_rule.py from docker/prometheus/rules.yml.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: quest
  labels:
    app.kubernetes.io/instance: quest
    app.kubernetes.io/component: serving-engine
    app.kubernetes.io/part-of: vllm-stack
spec:
"""


def rule() -> str:
    """The resource: the alerts' groups, two spaces in."""
    lines = RULES.read_text().split("groups:\n", 1)[1].splitlines()
    return HEAD + "  groups:\n" + "".join(f"  {line}\n" if line else "\n" for line in lines)


if __name__ == "__main__":
    OUTPUT.write_text(rule())
