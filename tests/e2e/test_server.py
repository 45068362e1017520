"""The OpenAI API of a real server with a real model, driven by the ``openai`` client."""

from __future__ import annotations

import contextlib
import json
import random
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.e2e.conftest import KEY, MIN_BUDGET, MODEL_NAME, Server

pytestmark = pytest.mark.server

PAGE, LAYERS, KV_HEADS = 16, 30, 3
WORDS = "river garden engine letter window market stone paper bridge cloud".split()


def prompt_ids(tokens: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randint(1000, 40000) for _ in range(tokens)]


def text(words: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(words)) + "."


def xargs(budget: Any) -> dict[str, Any]:
    return {"vllm_xargs": {"quest_token_budget": budget}}


def grown(server: Server, before: dict[str, float], name: str) -> float:
    return server.metrics().get(name, 0.0) - before.get(name, 0.0)


def test_budget_of_512_reads_512_tokens_a_head_and_step(server: Server) -> None:
    before = server.metrics()
    answer = server.client().completions.create(
        model=MODEL_NAME,
        prompt=prompt_ids(4000),
        max_tokens=9,
        temperature=0,
        extra_body=xargs(512) | {"ignore_eos": True},
    )
    assert answer.usage.completion_tokens == 9
    steps = 8  # the first token comes out of prefill
    heads = LAYERS * KV_HEADS
    assert grown(server, before, "quest_pages_selected_total") == steps * heads * 512 // PAGE
    available = sum(-(-(4000 + step) // PAGE) for step in range(1, steps + 1)) * heads
    assert grown(server, before, "quest_pages_available_total") == available
    assert grown(server, before, 'quest_decode_rows_total{path="sparse",reason="budget"}') == steps
    read, dense = (grown(server, before, f"quest_kv_bytes_{kind}_total") for kind in ("read", "dense"))
    assert 0 < read < dense / 4


def test_zero_is_dense(server: Server) -> None:
    before = server.metrics()
    server.client().completions.create(
        model=MODEL_NAME, prompt=prompt_ids(3000), max_tokens=5, extra_body=xargs(0) | {"ignore_eos": True}
    )
    assert grown(server, before, "quest_pages_selected_total") == 0
    assert grown(server, before, 'quest_decode_rows_total{path="dense",reason="no_budget"}') == 4


def test_default_budget_applies_to_long_requests_only(server: Server) -> None:
    before = server.metrics()
    client = server.client()
    client.completions.create(
        model=MODEL_NAME, prompt=prompt_ids(2100, 2), max_tokens=3, extra_body={"ignore_eos": True}
    )
    client.completions.create(
        model=MODEL_NAME, prompt=prompt_ids(300, 2), max_tokens=3, extra_body={"ignore_eos": True}
    )
    assert grown(server, before, 'quest_decode_rows_total{path="sparse",reason="budget"}') == 2
    assert grown(server, before, 'quest_decode_rows_total{path="dense",reason="budget_covers_context"}') == 2


@pytest.mark.parametrize("stream", [False, True])
def test_chat(server: Server, stream: bool) -> None:
    messages = [{"role": "user", "content": text(400) + " Say something about rivers."}]
    answer = server.client().chat.completions.create(
        model=MODEL_NAME, messages=messages, max_tokens=12, stream=stream, extra_body=xargs(256)
    )
    if stream:
        said = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
    else:
        said = answer.choices[0].message.content
    assert said.strip()


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize("value", [-1, 1, "abc", "512", 1.5, [1], 10**12, None, True, False, 8193])
def test_bad_budget_is_refused_by_name(server: Server, path: str, value: Any) -> None:
    body: dict[str, Any] = {"model": MODEL_NAME, "max_tokens": 2, **xargs(value)}
    body |= {"prompt": "hi"} if path == "completions" else {"messages": [{"role": "user", "content": "hi"}]}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    request = urllib.request.Request(f"{server.url}/v1/{path}", json.dumps(body).encode(), headers)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)
    assert refused.value.code == 400
    message = json.loads(refused.value.read())["error"]["message"]
    assert "quest_token_budget" in message
    assert str(MIN_BUDGET) in message and "8192" in message
    assert json.dumps(value).strip('"') in message or repr(value) in message


def test_64_clients_with_mixed_budgets(server: Server) -> None:
    before = server.metrics()

    def one(number: int) -> int:
        budget = [0, 64, 128, 512, 4096][number % 5]
        answer = server.client().completions.create(
            model=MODEL_NAME,
            prompt=text(600 if number % 20 == 13 else 30 + 3 * number, number),  # some exceed the budget of 512
            max_tokens=8,
            extra_body=xargs(budget) | {"ignore_eos": True},
        )
        return answer.usage.completion_tokens

    with ThreadPoolExecutor(64) as pool:
        assert list(pool.map(one, range(64))) == [8] * 64
    rows = {name: value - before.get(name, 0) for name, value in server.metrics().items() if "decode_rows" in name}
    assert rows['quest_decode_rows_total{path="sparse",reason="budget"}'] > 0
    # a row of the decode path each token but the first, of each request; prefill rows are counted apart
    assert sum(value for name, value in rows.items() if "prefill" not in name) == 64 * 7


def test_client_that_disconnects_leaves_the_server_well(server: Server) -> None:
    for seed in range(3):
        stream = server.client().completions.create(
            model=MODEL_NAME, prompt=prompt_ids(1500, seed), max_tokens=500, stream=True, extra_body=xargs(128)
        )
        next(iter(stream))
        with contextlib.suppress(Exception):
            stream.response.close()
    answer = server.client().completions.create(model=MODEL_NAME, prompt="Still", max_tokens=3)
    assert answer.usage.completion_tokens >= 1


def test_latency_histograms_by_budget_class(server: Server) -> None:
    list(
        server.client().completions.create(
            model=MODEL_NAME, prompt=text(900), max_tokens=4, stream=True, extra_body=xargs(512) | {"ignore_eos": True}
        )
    )
    names = " ".join(server.metrics())
    for histogram in ("time_to_first_token", "inter_token_latency", "e2e_latency"):
        assert f"quest_{histogram}_seconds_bucket" in names
    assert "quest_token_budget_bucket" in names
