"""Attributes on vLLM's request spans, with the real SDK and an exporter in memory."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from quest_vllm.budget import set_budget_limits
from quest_vllm.config import QuestConfig
from quest_vllm.server import facts, spans

sdk = pytest.importorskip("opentelemetry.sdk.trace")

TRACED = SimpleNamespace(observability_config=SimpleNamespace(otlp_traces_endpoint="http://127.0.0.1:9"))


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A tracer provider as vLLM leaves it, with our processor behind an exporter in memory: ``provider.exporter``."""
    from opentelemetry import trace
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    made = sdk.TracerProvider()
    made.exporter = InMemorySpanExporter()
    made.add_span_processor(SimpleSpanProcessor(made.exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: made)
    monkeypatch.setattr(spans, "_noted", None)
    monkeypatch.setattr(facts, "_vllm_config", None)
    set_budget_limits(QuestConfig().resolved(), 8192)
    yield made
    made.shutdown()


def finish(provider: Any, name: str, request_id: str, prompt: int, completion: int) -> dict[str, Any]:
    """A span as vLLM makes it; returns its attributes as exported."""
    span = provider.get_tracer("vllm").start_span(name, start_time=1)
    span.set_attributes(
        {
            spans.REQUEST_ID: request_id,
            spans.LENGTHS[0]: prompt,
            spans.LENGTHS[1]: completion,
        }
    )
    span.end()
    return dict(provider.exporter.get_finished_spans()[-1].attributes)


def scope(path: str = "/v1/completions", **headers: str) -> dict[str, Any]:
    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http", "path": path, "headers": pairs}


def test_a_span_tells_budget_policy_and_pages(provider: Any) -> None:
    spans.install(TRACED)
    spans.note("abc", spans.Noted(512, policy="window"))
    told = finish(provider, spans.SPAN, "cmpl-abc-0", 4000, 9)
    ours = {key: value for key, value in told.items() if key.startswith("quest.")}
    assert ours.pop("quest.settings").startswith(
        "page_summary=key_codes, group_reduction=mass, bound_radius=0.5, sink_pages=1"
    )
    available = sum(-(-(4000 + step) // 16) for step in range(1, 9))
    assert ours.pop("quest.mean_tokens_attended") == pytest.approx(512 - 7.5, abs=8)
    assert ours == {
        "quest.token_budget": 512,
        "quest.top_p": 1.0,
        "quest.policy": "window",
        "quest.pages_selected": 8 * 32,
        "quest.pages_available": available,
        "quest.decode_steps": 8,
    }
    assert told[spans.LENGTHS[0]] == 4000  # vLLM's own are all there


def test_spans_of_others_stay_as_they_are(provider: Any) -> None:
    spans.install(TRACED)
    spans.note("abc", spans.Noted(512))
    for name, request_id in (("loading", "cmpl-abc-0"), (spans.SPAN, "cmpl-unknown-0")):
        assert not [key for key in finish(provider, name, request_id, 100, 5) if key.startswith("quest.")]


def test_nothing_without_tracing(provider: Any) -> None:
    spans.install(SimpleNamespace(observability_config=SimpleNamespace(otlp_traces_endpoint=None)))
    assert not spans.is_on()
    spans.note("abc", spans.Noted(512))
    assert "quest.token_budget" not in finish(provider, spans.SPAN, "cmpl-abc-0", 100, 5)


def test_installing_twice_adds_once(provider: Any) -> None:
    spans.install(TRACED)
    spans.install(TRACED)
    assert len(provider._active_span_processor._span_processors) == 2


def test_under_speculation_only_what_was_asked_is_told(provider: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spans.install(TRACED)
    spans.note("abc", spans.Noted(0, 0.9, "max"))
    monkeypatch.setattr(facts, "_vllm_config", SimpleNamespace(speculative_config=object()))
    told = finish(provider, spans.SPAN, "chatcmpl-abc", 100, 5)
    assert "quest.settings" in told
    assert {key: value for key, value in told.items() if key.startswith("quest.") and key != "quest.settings"} == {
        "quest.token_budget": 0,
        "quest.top_p": 0.9,
        "quest.policy": "max",
    }


@pytest.mark.parametrize(
    ("noted", "external"),
    [
        ("abc", "cmpl-abc-0"),
        ("abc", "cmpl-abc-12"),
        ("abc", "chatcmpl-abc"),
        ("resp_abc", "resp_abc_0"),
        ("soak-5", "cmpl-soak-5-0"),
        ("soak-5", "chatcmpl-soak-5"),
        ("7", "cmpl-7-1"),
    ],
)
def test_ids_are_found_behind_what_routes_add(noted: str, external: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "_noted", OrderedDict())
    spans.note(noted, spans.Noted(64))
    assert spans.noted(external) == spans.Noted(64)
    assert spans.noted("cmpl-other-0") is None


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "_noted", OrderedDict())
    monkeypatch.setattr(spans, "NOTED_AT_MOST", 3)
    for number in range(10):
        spans.note(f"r{number}", spans.Noted(number))
    kept = [spans.noted(f"cmpl-r{number}-0") for number in (6, 7, 8, 9)]
    assert kept == [None, *map(spans.Noted, (7, 8, 9))]


def test_names_in_the_order_of_vllm() -> None:
    body = b'{"model": "m"}'
    assert spans.name_request(scope(x_request_id="h"), body, "b") == (body, "h")
    assert spans.name_request(scope(), body, "b") == (body, "b")
    renamed, name = spans.name_request(scope(), b" \n" + body, None)
    assert json.loads(renamed) == {"model": "m", "request_id": name}
    renamed, name = spans.name_request(scope("/v1/responses"), body, None)
    assert name is not None and name.startswith("resp_") and json.loads(renamed)["request_id"] == name


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages", b'{"model": "m"}'),
        ("/v1/completions", b"{}"),
        ("/v1/completions", b"[1]"),
        ("/v1/completions", '{"model": "m"}'.encode("utf-16")),
    ],
)
def test_a_body_that_cannot_take_a_name_passes_untouched(path: str, body: bytes) -> None:
    assert spans.name_request(scope(path), body, None) == (body, None)
