"""The middleware around a small FastAPI app, stacked as vLLM stacks it: our middleware outside of authentication."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import pytest
from fastapi import Body, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.types import ASGIApp, Receive, Scope, Send

from quest_vllm import metrics
from quest_vllm.budget import POLICY_XARG, XARG, set_budget_limits
from quest_vllm.config import QuestConfig
from quest_vllm.metadata import classify_rows, measure_traffic
from quest_vllm.metrics_files import ENV_RUN_DIR
from quest_vllm.server import facts
from quest_vllm.server.middleware import QuestMiddleware
from quest_vllm.server.usage import Sequences, count_usage

AnyJson = Annotated[Any, Body()]
LIMIT = 20_000
CONFIG = QuestConfig(aliases=(("fast", 512), ("exact", 0)), max_body_bytes=LIMIT).resolved()
KEY = {"Authorization": "Bearer k"}
BIG = {"model": "smol", "prompt": "x" * LIMIT}


class Guard:
    """Refuses what has no key, as vLLM's own does, without reading the body."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope.get("headers", ()))
        if scope["type"] == "http" and scope["method"] != "OPTIONS" and headers.get(b"authorization") != b"Bearer k":
            await JSONResponse({"error": "Unauthorized"}, 401)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def sse(*chunks: dict[str, Any]) -> Iterator[str]:
    for chunk in chunks:
        yield f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n"
    yield "data: [DONE]\n\n"


def build_app() -> FastAPI:
    app = FastAPI()
    app.state.seen = []
    app.state.openai_serving_models = SimpleNamespace(base_model_paths=[SimpleNamespace(name="smol")], lora_requests={})

    @app.post("/v1/completions")
    async def completions(raw: Request, request: AnyJson) -> Any:
        app.state.seen.append(await raw.body())
        if not isinstance(request, dict):
            return JSONResponse({"error": {"message": "not an object"}}, 400)
        base = {"id": "c", "object": "text_completion", "model": "smol"}
        n = request.get("n") if isinstance(request.get("n"), int) else 1
        usage = {"prompt_tokens": 1000, "completion_tokens": 9 * n}
        if request.get("stream"):
            text = {**base, "choices": [{"index": 0, "text": '"model":"smol" "usage":{'}]}
            return StreamingResponse(
                sse(text, text, {**base, "choices": [], "usage": usage}), media_type="text/event-stream"
            )
        ids = list(range(9)) if request.get("return_token_ids") else None
        choices = [{"index": index, "text": "né", "token_ids": ids} for index in range(n)]
        return JSONResponse({**base, "choices": choices, "usage": usage})

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [{"id": "smol", "max_model_len": 8192, "parent": None}]}

    app.add_middleware(CORSMiddleware, allow_origins=["https://page"], allow_headers=["*"])
    app.add_middleware(Guard)
    app.add_middleware(QuestMiddleware)  # type: ignore[arg-type]
    return app


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FastAPI:
    monkeypatch.setenv(ENV_RUN_DIR, str(tmp_path))
    monkeypatch.setattr(facts, "_vllm_config", None)
    monkeypatch.setattr("quest_vllm.budget._limits", None)
    metrics._latency_metrics.cache_clear()
    set_budget_limits(CONFIG, 8192)
    return build_app()


@pytest.fixture
def client(app: FastAPI) -> TestClient:
    return TestClient(app, headers=KEY)


def post(client: TestClient, **request: Any) -> Any:
    return client.post("/v1/completions", json={"model": "smol", "prompt": "x", **request})


def test_authentication_comes_first(app: FastAPI) -> None:
    stranger = TestClient(app)
    for request in ({"sparse_attention": 3}, {"sparse_attention": {"token_budget": 512}}, BIG):
        assert stranger.post("/v1/completions", json=request).status_code == 401
    assert stranger.get("/v1/sparse_attention").status_code == 401
    assert stranger.get("/v1/models").json() == {"error": "Unauthorized"}


def test_a_refusal_keeps_the_apps_headers(client: TestClient) -> None:
    answer = client.post("/v1/completions", json={"sparse_attention": 3}, headers={"Origin": "https://page"})
    assert answer.status_code == 400
    assert answer.headers["access-control-allow-origin"] == "https://page"
    assert answer.json()["error"]["param"] == "sparse_attention"
    preflight = {"Origin": "https://page", "Access-Control-Request-Method": "GET"}
    assert client.options("/v1/sparse_attention", headers=preflight).status_code == 200


@pytest.mark.parametrize("prefix", ["", "/llm"])
def test_root_path(app: FastAPI, prefix: str) -> None:
    app.root_path = "/llm"
    client = TestClient(app, headers=KEY)
    assert client.get(f"{prefix}/v1/sparse_attention").json()["token_budget"]["default"] == 2048
    answer = client.post(f"{prefix}/v1/completions", json={"model": "smol:fast"})
    assert answer.json()["usage"]["sparse_attention"]["token_budget"] == 512
    assert len(client.get(f"{prefix}/v1/models").json()["data"]) == 3


def test_request_is_rewritten_and_the_reply_says_what_happened(app: FastAPI, client: TestClient) -> None:
    answer = post(client, sparse_attention={"token_budget": 512})
    assert json.loads(app.state.seen[0]) == {"model": "smol", "prompt": "x", "vllm_xargs": {XARG: 512}}
    assert answer.json()["model"] == "smol" and answer.json()["choices"][0]["text"] == "né"
    assert answer.json()["usage"]["sparse_attention"] == {
        "token_budget": 512,
        "top_p": 1.0,
        "policy": "mass",
        # 32 pages, of which the newest holds 9 to 16 tokens at lengths 1001 to 1008
        "mean_tokens_attended": 31 * 16 + sum(range(9, 17)) / 8,
        "pages_selected": 8 * 32,
        "pages_available": 8 * 63,
        "decode_steps": 8,
    }


def test_a_policy_goes_in_and_the_reply_and_the_route_name_it(app: FastAPI, client: TestClient) -> None:
    options = {"sparse_attention": {"token_budget": 512, "policy": "window"}}
    usage = post(client, **options).json()["usage"]["sparse_attention"]
    assert json.loads(app.state.seen[0])["vllm_xargs"] == {XARG: 512, POLICY_XARG: "window"}
    assert usage["policy"] == "window" and usage["pages_selected"] == 8 * 32
    last = post(client, stream=True, vllm_xargs={POLICY_XARG: "max"}).text.split("\n\n")[2]
    assert json.loads(last.removeprefix("data: "))["usage"]["sparse_attention"]["policy"] == "max"
    assert client.get("/v1/sparse_attention").json()["policies"] == ["mass", "max", "mean", "two_stage", "window"]
    options["sparse_attention"]["top_p"] = 0.5
    answer = post(client, **options)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "sparse_attention.top_p"


@pytest.mark.parametrize("body", [b'{"model":  "smol", "prompt": "x"}', b"[1]", b'{"a": \xff}', b"", b"{", b"null"])
def test_other_bodies_reach_the_app_as_they_are(app: FastAPI, client: TestClient, body: bytes) -> None:
    answer = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code < 500
    assert app.state.seen in ([], [body])


def test_default_budget_is_reported_too(client: TestClient) -> None:
    usage = post(client).json()["usage"]["sparse_attention"]
    assert usage["token_budget"] == 2048 and usage["pages_selected"] == 0 and usage["decode_steps"] == 8
    assert usage["mean_tokens_attended"] == 1000 + 4.5


def test_several_answers_are_counted_by_their_token_ids_or_not_at_all(client: TestClient) -> None:
    one = post(client, sparse_attention={"token_budget": 512}).json()["usage"]["sparse_attention"]
    assert "sparse_attention" not in post(client, n=3).json()["usage"]
    three = post(client, n=3, return_token_ids=True, sparse_attention={"token_budget": 512}).json()["usage"]
    assert three["sparse_attention"]["decode_steps"] == 3 * one["decode_steps"]
    assert three["sparse_attention"]["pages_selected"] == 3 * one["pages_selected"]
    assert three["sparse_attention"]["mean_tokens_attended"] == one["mean_tokens_attended"]


def test_no_object_where_a_step_may_bring_several_tokens(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "_vllm_config", SimpleNamespace(speculative_config=object()))
    assert "sparse_attention" not in post(client).json()["usage"]


def test_no_object_where_another_backend_serves(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = SimpleNamespace(backend=SimpleNamespace(name="FLASH_ATTN"), backend_per_kind={})
    monkeypatch.setattr(facts, "_vllm_config", SimpleNamespace(speculative_config=None, attention_config=chosen))
    assert "sparse_attention" not in post(client).json()["usage"]
    chosen.backend_per_kind["full_attention"] = SimpleNamespace(name="CUSTOM")
    assert "sparse_attention" in post(client).json()["usage"]


def test_stream_carries_usage_and_alias_and_nothing_else_changes(client: TestClient) -> None:
    plain = [line for line in post(client, stream=True).text.split("\n\n") if line]
    aliased = [line for line in post(client, stream=True, model="smol:fast").text.split("\n\n") if line]
    assert len(plain) == len(aliased) == 4 and aliased[3] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in aliased[:3]]
    assert [chunk["model"] for chunk in chunks] == ["smol:fast"] * 3
    assert chunks[0]["choices"][0]["text"] == '"model":"smol" "usage":{'
    assert chunks[2]["usage"]["sparse_attention"]["pages_selected"] == 8 * 32
    assert json.loads(plain[0].removeprefix("data: "))["model"] == "smol"
    assert json.loads(plain[2].removeprefix("data: "))["usage"]["sparse_attention"]["token_budget"] == 2048


def test_stream_of_several_answers_with_token_ids(app: FastAPI) -> None:
    base = {"id": "c", "object": "chat.completion.chunk", "model": "smol"}
    chunks = [{**base, "choices": [{"index": i, "token_ids": ids}]} for i, ids in ((0, [1]), (1, [2, 3]), (0, [4]))]
    last = {**base, "choices": [], "usage": {"prompt_tokens": 1000, "completion_tokens": 4}}

    @app.post("/v1/chat/completions")
    async def chat(request: AnyJson) -> Any:
        return StreamingResponse(sse(*chunks, last), media_type="text/event-stream")

    answer = TestClient(app, headers=KEY).post("/v1/chat/completions", json={"n": 2, "stream": True})
    events = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n")[:4]]
    assert events[:3] == chunks
    assert events[3]["usage"]["sparse_attention"]["decode_steps"] == 2


def test_models_lists_aliases(client: TestClient) -> None:
    cards = client.get("/v1/models").json()["data"]
    assert [card["id"] for card in cards] == ["smol", "smol:fast", "smol:exact"]
    assert cards[1] == {"id": "smol:fast", "max_model_len": 8192, "parent": "smol"}


def test_openapi_has_object_and_route(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()
    assert "/v1/sparse_attention" in schema["paths"]
    asked, told = (schema["components"]["schemas"][name] for name in ("SparseAttention", "SparseUsage"))
    assert {key: value["type"] for key, value in asked["properties"].items()} == {
        "token_budget": "integer",
        "top_p": "number",
        "policy": "string",
    }
    assert asked["additionalProperties"] is False and "required" not in asked
    assert told["properties"]["policy"]["type"] == "string"


def test_large_body_is_refused(client: TestClient) -> None:
    answer = client.post("/v1/completions", json=BIG)
    assert answer.status_code == 413
    assert f"{LIMIT} bytes (max_body_bytes)" in answer.json()["error"]["message"]


def test_much_too_large_a_body_is_not_waited_for(app: FastAPI) -> None:
    asked, sent = run([b"x"] * 10, [(b"content-length", b"40001")], app)
    assert asked == 0 and sent[0]["status"] == 413


def run(chunks: list[bytes], headers: list[tuple[bytes, bytes]], app: FastAPI) -> tuple[int, list[Any]]:
    """Send a body in ``chunks``; returns how many were asked for and the messages sent."""
    asked, sent = 0, []

    async def receive() -> Any:
        nonlocal asked
        if asked == len(chunks):
            return {"type": "http.disconnect"}
        asked += 1
        return {"type": "http.request", "body": chunks[asked - 1], "more_body": asked < len(chunks)}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "raw_path": b"/v1/completions",
        "query_string": b"",
        "headers": [(b"authorization", b"Bearer k"), (b"content-type", b"application/json"), *headers],
    }
    asyncio.run(app(scope, receive, send))
    return asked, sent


def test_endless_body_is_read_to_twice_the_limit(app: FastAPI) -> None:
    asked, sent = run([b"x" * 5000] * 1000, [], app)
    assert asked == 9 and [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert (
        sent[0]["status"] == 413 and "20000 bytes (max_body_bytes)" in json.loads(sent[1]["body"])["error"]["message"]
    )


@pytest.mark.parametrize("declared", [b"9" * 5000, b"40001", b"-1", b"1e9", "²".encode(), b""])
def test_odd_content_lengths(app: FastAPI, declared: bytes) -> None:
    _, sent = run([b'{"model": "smol"}'], [(b"content-length", declared)], app)
    assert sent[0]["status"] == (413 if declared[:1] in (b"9", b"4") else 200)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(
    st.binary(max_size=200)
    | st.dictionaries(
        st.sampled_from(["model", "prompt", "sparse_attention", "vllm_xargs", "stream", "n", "tools", "messages"]),
        st.recursive(
            st.sampled_from([None, True, 0, 512, -1, 1e99, "smol:fast", "smol", "\ud800", 10**40])
            | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["token_budget", XARG, "type"]) | st.text(max_size=5), inner, max_size=3
                )
            ),
            max_leaves=6,
        ),
    ).map(lambda value: json.dumps(value).encode()),
    st.lists(st.integers(0, 200), max_size=4),
)
def test_no_body_brings_the_server_down(app: FastAPI, body: bytes, cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(body)]
    app.state.seen.clear()
    _, sent = run([body[start:end] for start, end in itertools.pairwise(edges)], [], app)
    assert sent[0]["type"] == "http.response.start" and sent[0]["status"] in (200, 400, 422)
    if b"sparse_attention" not in body and XARG.encode() not in body and b"smol:fast" not in body:
        assert app.state.seen in ([], [body])


def test_disconnect_while_the_body_comes(app: FastAPI) -> None:
    from starlette.requests import ClientDisconnect

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pass

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": []}
    scope["headers"] = [(b"authorization", b"Bearer k"), (b"content-type", b"application/json")]
    try:
        asyncio.run(app(scope, receive, send))
    except ClientDisconnect:
        pytest.fail("a client that leaves is no error of the server")


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9000), st.integers(0, 40)), max_size=4),
    st.sampled_from([0, 48, 100, 512, 2048, 8192]),
)
def test_usage_is_the_workers_own_count_of_every_step(sequences: list[tuple[int, int]], budget: int) -> None:
    usage = count_usage(sequences, budget, QuestConfig())
    selected = available = steps = 0
    for prompt, completion in sequences:
        for length in range(prompt + 1, prompt + max(completion, 1)):
            one = np.ones(1, np.int32)
            rows = classify_rows(one, one * length, np.zeros(1, np.bool_), one * budget, QuestConfig())
            traffic = measure_traffic(rows, one * length, 16)
            selected, available = selected + traffic.pages_selected, available + traffic.pages_available
            steps += 1
    assert (usage.pages_selected, usage.pages_available, usage.decode_steps) == (selected, available, steps)
    assert (usage.mean_tokens_attended is None) == (steps == 0)


def test_sequences_that_do_not_add_up_are_not_counted() -> None:
    sequences = Sequences()
    sequences.add({"choices": [{"index": 0, "token_ids": [1, 2]}, {"index": 1, "token_ids": None}]})
    assert sequences.lengths(10, 5) is None
    sequences.add({"choices": [{"index": 1, "token_ids": [3, 4, 5], "prompt_token_ids": [1]}]})
    assert sequences.lengths(10, 5) is None  # one prompt of two is known
    sequences.add({"choices": [{"index": 0, "prompt_token_ids": [1, 2]}]})
    assert sequences.lengths(10, 5) == [(2, 2), (1, 3)]


class FakeEngine:
    """Of vLLM's ``AsyncLLM`` what tells whether it lives."""

    def __init__(self) -> None:
        self.output_handler = asyncio.create_task(asyncio.sleep(0))
        self.shutdowns = 0

    def shutdown(self, timeout: float | None = None) -> None:
        self.shutdowns += 1


@pytest.mark.parametrize("stopped", [True, False])
def test_a_servers_end_tells_a_dead_engine_from_a_stopped_one(
    app: FastAPI, monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    """Its output task has ended either way, as after a drain."""
    monkeypatch.setattr(facts, "_engine_died", False)

    async def live() -> FakeEngine:
        engine = app.state.engine_client = FakeEngine()
        messages = asyncio.Queue[dict[str, Any]]()

        async def send(message: Any) -> None:
            if message["type"] == "lifespan.startup.complete":
                if stopped:
                    engine.shutdown(timeout=1)
                await engine.output_handler
                del app.state  # as vLLM does
                await messages.put({"type": "lifespan.shutdown"})

        await messages.put({"type": "lifespan.startup"})
        await app({"type": "lifespan", "state": {}}, messages.get, send)
        return engine

    engine = asyncio.run(live())
    assert facts.engine_died() is not stopped
    assert engine.shutdowns == stopped and "shutdown" not in vars(engine)
