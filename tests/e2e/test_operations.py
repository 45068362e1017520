"""What operators do to a real server, on one server: traces, a sweep, mixed load, budgets side by side."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quest_vllm.cli import main
from quest_vllm.config import QuestConfig
from quest_vllm.layer_budgets import layer_budgets
from tests.conftest import ROOT
from tests.e2e.collector import Collector, collector
from tests.e2e.conftest import MODEL_NAME, Server, run_server

sys.path.insert(0, str(ROOT / "benchmarks"))
import bleed
import soak

pytestmark = pytest.mark.server
pytest.importorskip("opentelemetry.proto")
FLAGS = (
    f"--served-model-name {MODEL_NAME} --host 127.0.0.1 --enforce-eager --dtype float32 --max-model-len 1024 "
    "--max-num-seqs 12 --max-num-batched-tokens 512 --num-gpu-blocks-override 36 --enable-request-id-headers "
    "--quest-audit 5 --quest-alias fast=128 --worker-extension-cls soak_worker.Auditor"
)

LAYERS, KV_HEADS = 30, 3
SHARES = {layer: 0.5 + layer % 4 for layer in range(LAYERS)}


@pytest.fixture(scope="module")
def traces() -> Iterator[Collector]:
    with collector() as found:
        yield found


@pytest.fixture(scope="module")
def server(model_path: Path, traces: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """In float32, with traces, budgets spread over the layers, and a KV cache so small that load preempts."""
    command = [sys.executable, "-m", "quest_vllm.cli", "serve", str(model_path), *FLAGS.split()]
    command += ["--otlp-traces-endpoint", traces.url]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "benchmarks"), *sys.path]))
        patch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")
        patch.setenv("QUEST_LAYER_SHARES", ",".join(f"{layer}={share}" for layer, share in SHARES.items()))
        with run_server(command, tmp_path_factory.mktemp("operations") / "log") as running:
            yield running
            assert running.stop() == 0, "SIGTERM ends it cleanly"


def spans_of(traces: Collector, request_id: str, count: int = 1) -> list[dict[str, Any]]:
    """A request's spans, which leave the server in batches."""
    deadline = time.monotonic() + 20
    while len(found := traces.of_request(request_id)) < count and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def test_the_span_of_a_request_says_what_its_reply_says(server: Server, traces: Collector) -> None:
    answer = server.client().completions.create(
        model=MODEL_NAME,
        prompt="river stone letter market " * 200,
        max_tokens=9,
        extra_body={"sparse_attention": {"token_budget": 128}, "ignore_eos": True},
    )
    (span,) = spans_of(traces, answer.id)
    said = answer.usage.sparse_attention
    assert said["pages_selected"] == 8 * 8
    assert {key: span[f"quest.{key}"] for key in said} == said
    assert "sink_pages=1" in span["quest.settings"]
    assert span["gen_ai.usage.completion_tokens"] == 9


@pytest.mark.parametrize("policy", ["mass", "two_stage"])
def test_replies_and_metrics_say_what_the_layers_read(server: Server, policy: str) -> None:
    before = server.metrics()
    answer = server.client().completions.create(
        model=MODEL_NAME,
        prompt=list(range(1000, 1300)),
        max_tokens=6,
        extra_body={"sparse_attention": {"token_budget": 256, "policy": policy}, "ignore_eos": True},
    )
    budgets = layer_budgets(QuestConfig(layer_shares=tuple(SHARES.items())))
    assert budgets is not None
    steps = np.arange(301, 306, dtype=np.int32)
    available = -(-steps // 16)
    pages = budgets.rows(np.full(5, 16, np.int32), available)
    assert pages.min() < 16 < pages.max() == 20  # some layers read less than the budget, some the whole context
    after, missing = server.metrics(), LAYERS * (available * 16 - steps).sum()
    counted, read = (after[name] - before[name] for name in ("quest_pages_selected_total", "quest_kv_bytes_read_total"))
    assert counted == KV_HEADS * pages.sum()
    ranks = np.minimum(pages + (pages + 1) // 2, available) - np.maximum(pages // 2, 3)
    is_open = (pages > 3) & (pages < available)  # neither forced pages alone nor all
    keys = 16 * ranks[is_open].sum() if policy == "two_stage" else 0
    vectors = pages.sum() * 16 - missing + LAYERS * available.sum() + keys / 2  # attended, summaries, shortlists
    assert read == KV_HEADS * vectors * 2 * 64 * 4
    reason = f'quest_decode_rows_total{{path="sparse",reason="{"budget" if policy == "mass" else policy}"}}'
    assert after[reason] - before[reason] == 5
    assert answer.usage.sparse_attention["pages_selected"] == round(pages.sum() / LAYERS)


@pytest.mark.parametrize("route", ["chat", "responses", "alias", "header", "several"])
def test_every_route_has_its_budget_in_the_span(server: Server, traces: Collector, route: str) -> None:
    client, text = server.client(), "river stone letter market " * 100
    budget = {"sparse_attention": {"token_budget": 64}}
    if route == "chat":
        messages = [{"role": "user", "content": text}]
        name = client.chat.completions.create(model=MODEL_NAME, messages=messages, max_tokens=3, extra_body=budget).id
    elif route == "responses":
        name = client.responses.create(model=MODEL_NAME, input=text, max_output_tokens=3, extra_body=budget).id
    elif route == "alias":
        name = client.completions.create(model=f"{MODEL_NAME}:fast", prompt=text, max_tokens=3).id
    elif route == "header":
        headers = {"X-Request-Id": "asked-for-7"}
        client.completions.create(model=MODEL_NAME, prompt=text, max_tokens=3, extra_body=budget, extra_headers=headers)
        name = "asked-for-7"
    else:
        name = client.completions.create(model=MODEL_NAME, prompt=[text, text], max_tokens=3, extra_body=budget).id
    spans = spans_of(traces, name, 2 if route == "several" else 1)
    assert [span["quest.token_budget"] for span in spans] == [128 if route == "alias" else 64] * len(spans)
    assert len(spans) == (2 if route == "several" else 1)


def test_the_page_is_off_unless_asked_for(server: Server) -> None:
    for path in ("/quest", "/quest/page.js", "/v1/quest/info", "/v1/quest/trace/5"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(server.url + path, timeout=20)
        assert refused.value.code == 404


def test_a_sweep_over_it(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--context 64,700 --batch 2 --budgets dense,128 --tokens 12".split()
    assert main(["bench", server.url, *arguments, "--output", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "results.json").read_text())
    cells = {(cell["context"], cell["budget"]): cell for cell in document["cells"]}
    assert len(cells) == 4 and all(cell["itl_ms"]["n"] > 0 and cell["rounds"] == 1 for cell in cells.values())
    assert all(record["prompt_tokens"] == [record["context"]] * 2 for record in document["rounds"])
    assert 100 < cells[700, 128]["mean_tokens_attended"] <= 128
    assert cells[700, 0]["mean_tokens_attended"] > 700 and cells[64, 128]["mean_tokens_attended"] > 64
    assert document["servers"]["quest"]["sparse_attention"]["token_budget"]["max"] == 1024
    assert document["servers"]["quest"]["vllm"] in str(document["environment"]["versions"])
    assert "vs dense" in capsys.readouterr().out


def test_a_sweep_refuses_a_budget_out_of_range(server: Server, tmp_path: Path, capsys: Any) -> None:
    assert main(["bench", server.url, "--context", "64", "--budgets", "32", "--output", str(tmp_path)]) == 2
    assert "--budgets: expected dense, or 48 to 1024 on this server" in capsys.readouterr().err


def test_unlike_budgets_in_shared_batches_answer_as_alone(server: Server) -> None:
    async def compare() -> dict[str, Any]:
        asker = bleed.Asker(server.url, MODEL_NAME, tokens=4, seed=0)
        arguments = bleed.parse("m --pairs 12 --prompts 3 --words 250 --at-once 3".split())
        try:
            return await bleed.compare(asker, arguments)
        finally:
            await asker.client.aclose()

    found = asyncio.run(compare())
    assert not found["differences"]
    assert found["telling_pairs"] >= 6


def test_mixed_load(server: Server) -> None:
    arguments = argparse.Namespace(minutes=0.08, clients=8, seed=1, warm_up=0.0, touch=0, most_tokens=48)
    report = asyncio.run(soak.drive(server.url, server.process.pid, arguments))
    # five seconds do not tell whether memory stays
    assert [problem for problem in soak.verdict({**report, "memory": {}}) if "preemption" not in problem] == []
    assert report["actions"].get("stream", 0) > 0
