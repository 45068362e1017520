"""The dashboard, the alerts and the compose file: checked as files, and against a real Prometheus and server."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from quest_vllm.metrics import METRICS
from tests.conftest import ROOT
from tests.e2e.conftest import MODEL_NAME, Server
from tests.e2e.test_server import prompt_ids, xargs

DOCKER = ROOT / "docker"
DASHBOARD = json.loads((DOCKER / "grafana/dashboards/quest.json").read_text())
RULES = yaml.safe_load((DOCKER / "prometheus/rules.yml").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
SCRAPE_SECONDS = 1
# what Grafana puts in for its variables: four scrapes are enough for a rate
VARIABLES = {"$__rate_interval": "30s", "$instance": ".*"}
needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="prometheus and promtool are not installed (Debian: apt-get install prometheus)",
)


def panel_queries() -> list[tuple[str, str]]:
    return [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]


def alert_queries() -> list[tuple[str, str]]:
    return [(rule["alert"], rule["expr"]) for group in RULES["groups"] for rule in group["rules"]]


@pytest.mark.parametrize("file", ["grafana/dashboards/quest.json"])
def test_dashboard_is_what_its_script_writes(file: str) -> None:
    before = (DOCKER / file).read_bytes()
    try:
        subprocess.run([sys.executable, str(DOCKER / "grafana/make_dashboard.py")], check=True, timeout=60)
        assert (DOCKER / file).read_bytes() == before
    finally:
        (DOCKER / file).write_bytes(before)


def test_panels_do_not_overlap_and_have_what_grafana_needs() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        grid = panel["gridPos"]
        cells = {
            (x, y) for x in range(grid["x"], grid["x"] + grid["w"]) for y in range(grid["y"], grid["y"] + grid["h"])
        }
        assert not cells & taken and grid["x"] + grid["w"] <= 24, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    for panel in PANELS:
        assert panel["title"] and panel["description"] and panel["datasource"]["uid"] == "prometheus"


def test_every_quest_metric_in_a_query_is_in_the_table() -> None:
    names = {name for _, query in panel_queries() + alert_queries() for name in re.findall(r"\bquest_\w+", query)}
    assert len(names) > 10
    known = {f"{name}{suffix}" for name, spec in METRICS.items() for suffix in spec.suffixes}
    assert names <= known


def test_compose_mounts_what_exists_and_points_at_its_own_services() -> None:
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    services = compose["services"]
    for service in services.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (DOCKER / source).exists() if source.startswith(".") else source in compose["volumes"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        pinned = r":v?\d+\.\d+\.\d+(@sha256:[0-9a-f]{64})?$"
        assert "image" not in service or re.search(pinned, service["image"]), "images are pinned"
    assert all(service["restart"] == "unless-stopped" for service in services.values()), "a dead engine ends its server"
    scrape = yaml.safe_load((DOCKER / "prometheus/prometheus.yml").read_text())["scrape_configs"][0]
    assert scrape["static_configs"][0]["targets"] == ["quest:8000"]
    source = yaml.safe_load((DOCKER / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"][0]
    assert (source["uid"], source["url"]) == ("prometheus", "http://prometheus:9090")
    provider = yaml.safe_load((DOCKER / "grafana/provisioning/dashboards/quest.yaml").read_text())["providers"][0]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in services["grafana"]["volumes"]


@needs_prometheus
@pytest.mark.parametrize(
    "command",
    [
        ["check", "config", "prometheus.yml"],
        ["check", "rules", "--lint=all", "--lint-fatal", "rules.yml"],
        ["test", "rules", "rules_test.yml"],
    ],
)
def test_promtool(command: list[str]) -> None:
    done = subprocess.run(
        ["promtool", *command], cwd=DOCKER / "prometheus", capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_case() -> None:
    cases = (DOCKER / "prometheus/rules_test.yml").read_text()
    assert not [name for name, _ in alert_queries() if name not in cases]


@dataclass
class Prometheus:
    """A running Prometheus."""

    url: str

    def get(self, path: str, **parameters: str) -> Any:
        """``data`` of an API reply; raises RuntimeError with Prometheus's own message."""
        try:
            reply = urllib.request.urlopen(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}", timeout=20)
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode()) from error
        return json.loads(reply.read())["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Samples of an instant query."""
        result: list[dict[str, Any]] = self.get("query", query=expression)["result"]
        return result


@contextlib.contextmanager
def run_prometheus(target: str, folder: Path) -> Iterator[Prometheus]:
    """Scrape ``target`` ("host:port") with the shipped configuration and rules until the block ends."""
    config = yaml.safe_load((DOCKER / "prometheus/prometheus.yml").read_text())
    config["global"] = {"scrape_interval": f"{SCRAPE_SECONDS}s", "evaluation_interval": "1s"}
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    shutil.copy(DOCKER / "prometheus/rules.yml", folder)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log)
    try:
        wait_for(lambda: urllib.request.urlopen(f"http://{address}/-/ready", timeout=2), 30)
        yield Prometheus(f"http://{address}")
    finally:
        process.terminate()
        process.wait(20)


def wait_for(condition: Any, seconds: float) -> None:
    """Until ``condition()`` is true and raises no OSError."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if condition():
                return
        time.sleep(0.2)
    raise AssertionError("condition not met in time")


def stream(server: Server, number: int, budget: int, tokens: int) -> None:
    """One streamed completion; every other one repeats a prompt, for prefix hits."""
    chunks = server.client().completions.create(
        model=MODEL_NAME,
        prompt=prompt_ids(tokens, number // 2),
        max_tokens=12,
        stream=True,
        extra_body=xargs(budget) | {"ignore_eos": True},
    )
    for _ in chunks:
        pass


@pytest.fixture(scope="module")
def loaded(deployed: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus that scraped the server before, during and after a short load of every budget class."""
    target = deployed.url.removeprefix("http://")
    with run_prometheus(target, tmp_path_factory.mktemp("prometheus")) as prometheus:
        wait_for(lambda: prometheus.query("count(quest_e2e_latency_seconds_count)"), 20)
        time.sleep(2 * SCRAPE_SECONDS)
        jobs = [
            (number, budget, 1100 if budget == 1024 else 600)
            for number, budget in enumerate((0, 0, 64, 64, 512, 512, 1024, 1024, 2048, 4096))
        ]
        jobs += [(20, 2048, 2100), (22, 4096, 300), (24, 8192, 300)]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda job: stream(deployed, *job), jobs))
        time.sleep(3 * SCRAPE_SECONDS)
        yield prometheus


@needs_prometheus
@pytest.mark.server
def test_every_panel_returns_data(loaded: Prometheus) -> None:
    empty = []
    for title, query in panel_queries():
        for name, value in VARIABLES.items():
            query = query.replace(name, value)
        assert "$" not in query
        values = [float(sample["value"][1]) for sample in loaded.query(query)]
        if not values or all(value != value for value in values):
            empty.append(f"{title}: {query}")
        # summaries are read as well: where a budget just misses its context, that is more than dense attention reads
        least = -1 / 16 if title == "KV bytes saved" else 0
        assert all(value >= least for value in values if value == value), title
    assert not empty, "\n".join(empty)


@needs_prometheus
@pytest.mark.server
def test_numbers_are_right(loaded: Prometheus, deployed: Server) -> None:
    shown = deployed.metrics()
    kv, summaries = (shown[f'quest_kv_cache_bytes{{part="{part}"}}'] for part in ("kv", "summaries"))
    assert kv / summaries == 16  # pages of 16 tokens
    assert 0.9 * 2**30 < kv + summaries <= 2**30  # VLLM_CPU_KVCACHE_SPACE=1
    assert shown['quest_audit_pages_total{result="right"}'] > 0
    assert shown['quest_audit_pages_total{result="wrong"}'] == 0
    attended = shown["quest_tokens_attended_total"] / shown['quest_decode_rows_total{path="sparse",reason="budget"}']
    budgets = shown["quest_token_budget_sum"] / shown["quest_token_budget_count"]
    assert budgets - 16 < attended <= budgets  # the newest page may be partial
    by_class = loaded.query("sum by (budget_class) (quest_inter_token_latency_seconds_count)")
    assert {sample["metric"]["budget_class"] for sample in by_class if float(sample["value"][1]) > 0} == {
        "dense", "<=512", "<=1024", "<=2048", "<=4096", ">4096",
    }  # fmt: skip


@needs_prometheus
@pytest.mark.server
def test_every_alert_evaluates_and_none_fires_on_a_healthy_server(loaded: Prometheus) -> None:
    rules = [rule for group in loaded.get("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in rules} == {name for name, _ in alert_queries()}
    assert {rule["name"]: rule["health"] for rule in rules if rule["health"] != "ok"} == {}
    assert {rule["name"]: rule["state"] for rule in rules if rule["state"] != "inactive"} == {}
    # the counters that each alert watches exist, so that silence means health and not a misspelt name
    for _, query in alert_queries():
        for metric in set(re.findall(r"\b((?:quest_|vllm:)\w+)", query)):
            assert loaded.query(f"count({metric})"), metric


def test_dashboard_has_what_the_operator_asked_for() -> None:
    titles = {panel["title"] for panel in PANELS}
    assert titles >= {
        "Time to first token", "Inter-token latency", "KV bytes saved", "Tokens attended", "Rows by path and reason",
        "KV and summary memory", "Time in the queue",
    }  # fmt: skip
