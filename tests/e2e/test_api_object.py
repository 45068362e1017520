"""``sparse_attention`` on a real server behind an API key and a root path, driven by the ``openai`` client."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.e2e.conftest import KEY, MAX_BODY, MODEL_NAME, ORIGIN, ROOT, Server, vllm_command
from tests.e2e.test_server import prompt_ids, text

pytestmark = pytest.mark.server

EXACT = {"ignore_eos": True}
ROOT_FOLDER = Path(__file__).parents[2]


@dataclass
class Api:
    """The server, with its key."""

    server: Server

    @property
    def base_url(self) -> str:
        """As a client behind the proxy would see it."""
        return f"{self.server.url}{ROOT}/v1"

    def client(self) -> OpenAI:
        """A client that does not retry."""
        return OpenAI(base_url=self.base_url, api_key=KEY, max_retries=0, timeout=200)

    def http(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any, Any]:
        """Status, headers and parsed JSON of one request; ``key=""`` leaves the key out."""
        key = headers.pop("key", KEY)
        all_headers = {"Content-Type": "application/json", **headers} | (
            {"Authorization": f"Bearer {key}"} if key else {}
        )
        request = urllib.request.Request(f"{self.server.url}{path}", body, all_headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.headers, json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            return error.code, error.headers, json.loads(error.read())

    def heads(self) -> int:
        """Selecting heads over all sparse layers: what a worker's counters sum over and a reply does not."""
        model = self.http("GET", "/v1/sparse_attention")[2]["model"]
        return int(model["sparse_layers"] * model["selecting_heads"])


@pytest.fixture(scope="module")
def api(server: Server) -> Api:
    return Api(server)


class Counters:
    """Checks that replies and the workers' Prometheus counters agree, exactly."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._before = api.server.metrics()

    def must_equal(self, *usages: dict[str, Any]) -> None:
        """Growth since construction against the sum over ``usages``."""
        now, heads = self._api.server.metrics(), self._api.heads()
        grown = {name: value - self._before.get(name, 0) for name, value in now.items()}
        assert grown["quest_pages_selected_total"] == heads * sum(usage["pages_selected"] for usage in usages)
        assert grown["quest_pages_available_total"] == heads * sum(usage["pages_available"] for usage in usages)
        rows = sum(value for name, value in grown.items() if "decode_rows" in name and "prefill" not in name)
        assert rows == sum(usage["decode_steps"] for usage in usages)


def sparse(budget: Any) -> dict[str, Any]:
    return {"sparse_attention": {"token_budget": budget}}


def test_top_p_reads_less_and_the_reply_says_how_much(api: Api) -> None:
    before, heads = api.server.metrics(), api.heads()
    options = {"sparse_attention": {"token_budget": 1024, "top_p": 0.9}} | EXACT
    answer = api.client().completions.create(
        model=MODEL_NAME, prompt=prompt_ids(3000), max_tokens=9, extra_body=options
    )
    usage, grown = answer.usage.sparse_attention, api.server.metrics()
    assert usage["top_p"] == 0.9 and usage["decode_steps"] == 8
    assert 8 * 3 <= usage["pages_selected"] < 8 * 64 and 48 <= usage["mean_tokens_attended"] < 900
    selected = grown["quest_pages_selected_total"] - before.get("quest_pages_selected_total", 0)
    assert abs(selected / heads - usage["pages_selected"]) <= 0.5
    observed = grown["quest_tokens_reached_count"] - before.get("quest_tokens_reached_count", 0)
    total = grown["quest_tokens_reached_sum"] - before.get("quest_tokens_reached_sum", 0)
    assert observed == 8 * heads
    assert abs(total / observed - usage["mean_tokens_attended"]) < 0.01


@pytest.mark.parametrize("policy", [None, "mass", "max", "mean", "two_stage", "window"])
@pytest.mark.parametrize("ours", [True, False], ids=["object", "xargs"])
def test_a_reply_names_the_policy_in_force(api: Api, policy: str | None, ours: bool) -> None:
    counters = Counters(api)
    named = {} if policy is None else {"policy": policy} if ours else {"quest_policy": policy}
    options = {"sparse_attention": {"token_budget": 128, **named}} if ours else {"vllm_xargs": named}
    answer = api.client().completions.create(
        model=MODEL_NAME, prompt=prompt_ids(2200), max_tokens=5, extra_body=options | EXACT
    )
    usage = answer.usage.sparse_attention
    assert (usage["policy"], usage["top_p"]) == (policy or "mass", 1.0)
    assert usage["pages_selected"] == 4 * (8 if ours else 128)
    counters.must_equal(usage)


def test_completion_reports_what_the_worker_counted(api: Api) -> None:
    counters = Counters(api)
    answer = api.client().completions.create(
        model=MODEL_NAME, prompt=prompt_ids(3000), max_tokens=9, extra_body=sparse(512) | EXACT
    )
    usage = answer.usage.sparse_attention
    assert usage["token_budget"] == 512 and usage["decode_steps"] == 8 and usage["pages_selected"] == 8 * 32
    assert 496 < usage["mean_tokens_attended"] <= 512
    counters.must_equal(usage)


@pytest.mark.parametrize("budget", [0, 64, 700, 8192])
def test_streamed_chat_reports_in_its_last_chunk(api: Api, budget: int) -> None:
    counters = Counters(api)
    chunks = list(
        api.client().chat.completions.create(
            model=MODEL_NAME,
            messages=[{"role": "user", "content": text(700)}],
            max_tokens=20,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=sparse(budget),
        )
    )
    assert [chunk for chunk in chunks[:-1] if chunk.usage] == []
    usage = chunks[-1].usage.sparse_attention
    assert usage["token_budget"] == budget and usage["decode_steps"] == chunks[-1].usage.completion_tokens - 1
    counters.must_equal(usage)


def test_async_client_with_mixed_budgets(api: Api) -> None:
    counters = Counters(api)

    async def all_at_once() -> list[Any]:
        async with AsyncOpenAI(base_url=api.base_url, api_key=KEY, max_retries=0, timeout=200) as client:
            return await asyncio.gather(
                *(
                    client.completions.create(
                        model=MODEL_NAME,
                        prompt=prompt_ids(100 + 90 * number, number),
                        max_tokens=5 + number,
                        extra_body=sparse([0, 64, 128, 512][number % 4]) | EXACT,
                    )
                    for number in range(10)
                )
            )

    answers = asyncio.run(all_at_once())
    assert [answer.usage.completion_tokens for answer in answers] == [5 + number for number in range(10)]
    counters.must_equal(*(answer.usage.sparse_attention for answer in answers))


@pytest.mark.parametrize("stream", [False, True])
def test_responses(api: Api, stream: bool) -> None:
    counters = Counters(api)
    answer = api.client().responses.create(
        model=f"{MODEL_NAME}:fast", input=text(800), max_output_tokens=8, stream=stream, temperature=0, extra_body=EXACT
    )
    if stream:
        events = list(answer)
        assert {event.response.model for event in events if hasattr(event, "response")} == {f"{MODEL_NAME}:fast"}
        answer = events[-1].response
    assert answer.model == f"{MODEL_NAME}:fast" and answer.output_text
    usage = answer.usage.sparse_attention
    assert usage["token_budget"] == 512 and usage["decode_steps"] == answer.usage.output_tokens - 1
    counters.must_equal(usage)


def test_several_answers_are_counted_by_their_token_ids(api: Api) -> None:
    request: dict[str, Any] = {"model": MODEL_NAME, "prompt": prompt_ids(900, 3), "max_tokens": 6, "n": 3}
    assert "sparse_attention" not in api.client().completions.create(**request).usage.model_extra
    counters = Counters(api)
    extra = sparse(128) | EXACT | {"return_token_ids": True}
    answer = api.client().completions.create(**request, extra_body=extra)
    assert answer.usage.sparse_attention["decode_steps"] == 15
    counters.must_equal(answer.usage.sparse_attention)
    request["prompt"] = [prompt_ids(500, 4), prompt_ids(900, 5)]
    counters = Counters(api)
    *_, last = api.client().completions.create(
        **request, stream=True, stream_options={"include_usage": True}, extra_body=extra
    )
    assert last.usage.sparse_attention["decode_steps"] == 30
    counters.must_equal(last.usage.sparse_attention)


def test_aliases(api: Api) -> None:
    client = api.client()
    assert [model.id for model in client.models.list()] == [MODEL_NAME, f"{MODEL_NAME}:fast", f"{MODEL_NAME}:exact"]
    for alias, budget in (("fast", 512), ("exact", 0)):
        model = f"{MODEL_NAME}:{alias}"
        answer = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "Hi"}], max_tokens=3, temperature=0
        )
        assert answer.model == model and answer.usage.sparse_attention["token_budget"] == budget
        chunks = client.completions.create(model=model, prompt="Hi", max_tokens=3, stream=True)
        assert {chunk.model for chunk in chunks} == {model}
    with pytest.raises(openai.BadRequestError, match="smol:fast.*512.*1024"):
        client.completions.create(model=f"{MODEL_NAME}:fast", prompt="Hi", extra_body=sparse(1024))
    with pytest.raises(openai.NotFoundError, match="smol:slow"):
        client.completions.create(model=f"{MODEL_NAME}:slow", prompt="Hi")


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (sparse(32), ["sparse_attention.token_budget", "64", "8192", "min_budget", "32"]),
        ({"vllm_xargs": {"quest_token_budget": 50}}, ["quest_token_budget", "64", "8192", "min_budget", "50"]),
        (sparse(9000), ["sparse_attention.token_budget", "8192", "9000"]),
        (sparse("512"), ["sparse_attention.token_budget", "8192", "'512'"]),
        ({"sparse_attention": {"budget": 512}}, ["'budget'", "did you mean 'token_budget'"]),
        ({"sparse_atention": {"token_budget": 512}}, ["did you mean 'sparse_attention'"]),
        (sparse(512) | {"vllm_xargs": {"quest_token_budget": 1024}}, ["512", "1024", "same budget"]),
        ({"sparse_attention": {"policy": "windw"}}, ["sparse_attention.policy", "'mass', 'max'", "got 'windw'"]),
        ({"vllm_xargs": {"quest_policy": 3}}, ["vllm_xargs.quest_policy", "'mean', 'two_stage', 'window'", "got 3"]),
        (
            {"sparse_attention": {"policy": "window"}, "vllm_xargs": {"quest_policy": "max"}},
            ["vllm_xargs.quest_policy", "same policy as sparse_attention.policy, 'window'", "got 'max'"],
        ),
        (
            {"sparse_attention": {"policy": "window", "top_p": 0.9}},
            ["sparse_attention.top_p", "with policy 'window'", "got 0.9"],
        ),
    ],
)
@pytest.mark.parametrize("path", ["completions", "chat/completions", "responses"])
def test_refusals(api: Api, path: str, request_: dict[str, Any], words: list[str]) -> None:
    content = {
        "completions": {"prompt": "x"},
        "chat/completions": {"messages": [{"role": "user", "content": "x"}]},
        "responses": {"input": "x"},
    }[path]
    status, _, answer = api.http("POST", f"/v1/{path}", json.dumps({**content, **request_}).encode())
    assert status == 400 and set(answer["error"]) == {"message", "type", "param", "code"}
    assert all(word in answer["error"]["message"] for word in words), answer


def test_body_size(api: Api) -> None:
    large = json.dumps({"model": MODEL_NAME, "prompt": "x " * (3 * MAX_BODY // 4)}).encode()
    status, _, answer = api.http("POST", "/v1/completions", large)
    assert status == 413 and f"{MAX_BODY} bytes (max_body_bytes)" in answer["error"]["message"]
    host = api.server.url.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=60)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    pieces = (large[at : at + 10_000] for at in range(0, len(large), 10_000))
    connection.request("POST", "/v1/completions", pieces, headers, encode_chunked=True)
    answered = connection.getresponse()
    assert answered.status == 413 and "max_body_bytes" in answered.read().decode()
    assert api.client().completions.create(model=MODEL_NAME, prompt="Still", max_tokens=2).usage.completion_tokens


@pytest.mark.parametrize("key", ["", "wrong"])
def test_nothing_happens_without_the_key(api: Api, key: str) -> None:
    for prefix in ("", ROOT):
        assert api.http("GET", f"{prefix}/v1/sparse_attention", key=key)[0] == 401
        assert api.http("GET", f"{prefix}/v1/models", key=key)[0] == 401
        for body in (b'{"sparse_attention": 3}', b'{"prompt": "%s"}' % (b"x" * MAX_BODY)):
            status, _, answer = api.http("POST", f"{prefix}/v1/completions", body, key=key)
            assert (status, answer) == (401, {"error": "Unauthorized"})


def test_cors(api: Api) -> None:
    origin = {"Origin": ORIGIN}
    asks = {**origin, "Access-Control-Request-Method": "GET", "Access-Control-Request-Headers": "authorization"}
    request = urllib.request.Request(f"{api.server.url}/v1/sparse_attention", headers=asks, method="OPTIONS")
    with urllib.request.urlopen(request, timeout=20) as preflight:
        assert preflight.status == 200 and preflight.headers["access-control-allow-origin"] == ORIGIN
    for status, method, path, body in (
        (200, "GET", "/v1/sparse_attention", None),
        (400, "POST", "/v1/completions", b'{"sparse_attention": 3}'),
        (413, "POST", "/v1/completions", b"x" * (MAX_BODY + 1)),
    ):
        answered, headers, _ = api.http(method, path, body, **origin)
        assert (answered, headers["access-control-allow-origin"]) == (status, ORIGIN)


def test_the_route_describes_the_server(api: Api) -> None:
    _, _, answer = api.http("GET", f"{ROOT}/v1/sparse_attention")
    assert answer["models"] == [MODEL_NAME] and answer["aliases"] == {"fast": 512, "exact": 0}
    assert answer["token_budget"] == {
        "default": 2048,
        "min": 64,
        "max": 8192,
        "dense_allowed": True,
        "override_allowed": True,
    }
    assert answer["policies"] == ["mass", "max", "mean", "two_stage", "window"]
    assert answer["page_size"] == 16 and answer["policy"]["sink_pages"] == 1
    # what "auto" became there
    assert (answer["policy"]["page_summary"], answer["policy"]["group_reduction"]) == ("key_codes", "mass")
    model = answer["model"]
    assert (model["layers"], model["sparse_layers"], model["kv_heads"], model["selecting_heads"]) == (30, 30, 3, 3)


def test_openapi(api: Api) -> None:
    schema = api.http("GET", f"{ROOT}/openapi.json", key="")[2]
    assert {"url": ROOT} in schema["servers"] and "/v1/sparse_attention" in schema["paths"]
    parts = schema["components"]["schemas"]
    for name in ("ChatCompletionRequest", "CompletionRequest", "ResponsesRequest"):
        assert parts[name]["properties"]["sparse_attention"] == {"$ref": "#/components/schemas/SparseAttention"}
    assert parts["SparseAttention"]["properties"]["token_budget"]["type"] == "integer"
    assert parts["SparseAttention"]["properties"]["policy"]["type"] == "string"
    assert set(parts["SparseUsage"]["properties"]) >= {"token_budget", "policy", "decode_steps", "pages_selected"}


def test_anthropic_messages_take_object_and_alias(api: Api) -> None:
    content = {"max_tokens": 3, "messages": [{"role": "user", "content": text(300)}]}
    before = api.server.metrics()
    for request in ({"model": MODEL_NAME, **sparse(128)}, {"model": f"{MODEL_NAME}:exact"}):
        status, _, answer = api.http("POST", "/v1/messages", json.dumps({**content, **request}).encode())
        assert status == 200 and answer["model"] == request["model"]
    name = 'quest_decode_rows_total{path="sparse",reason="budget"}'
    assert 0 < api.server.metrics()[name] - before.get(name, 0) <= 2


def test_invocations_is_no_way_around(api: Api) -> None:
    content = {"prompt": prompt_ids(300), "max_tokens": 3}
    status, _, answer = api.http("POST", "/invocations", json.dumps({**content, **sparse(64)}).encode())
    assert status == 200 and answer["usage"]["sparse_attention"]["token_budget"] == 64
    status, _, answer = api.http("POST", "/invocations", json.dumps({**content, **sparse(63)}).encode())
    assert status == 400 and "min_budget is 64" in answer["error"]["message"]


def test_streams_side_by_side_keep_their_budgets_apart(api: Api) -> None:
    counters = Counters(api)

    def one(number: int) -> dict[str, Any]:
        budget = [0, 64, 96, 256][number % 4]
        *_, last = api.client().completions.create(
            model=MODEL_NAME,
            prompt=prompt_ids(60 + 15 * number, number),
            max_tokens=4,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=sparse(budget) | EXACT,
        )
        assert last.usage.sparse_attention["token_budget"] == budget
        return last.usage.sparse_attention

    with ThreadPoolExecutor(24) as pool:
        counters.must_equal(*pool.map(one, range(24)))


def documented() -> list[Any]:
    """The examples of docs/api.md: ``(language, code)``."""
    return re.findall(r"^```(bash|python)\n(.*?)^```", (ROOT_FOLDER / "docs/api.md").read_text(), re.S | re.M)


@pytest.mark.parametrize("number", range(len(documented())))
def test_examples_of_the_documentation(api: Api, number: int, capsys: pytest.CaptureFixture[str]) -> None:
    language, code = documented()[number]
    for theirs, ours in (
        ("http://127.0.0.1:8000", api.server.url),
        ("SmolLM2-135M-Instruct", MODEL_NAME),
        ("Bearer -", f"Bearer {KEY}"),
        ('api_key="-"', f'api_key="{KEY}"'),
    ):
        code = code.replace(theirs, ours)
    if language == "bash":
        done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, timeout=100, check=True)
        answer = json.loads(done.stdout)
        assert "error" not in answer and "token_budget" in json.dumps(answer)
    else:
        exec(compile(code, f"docs/api.md, example {number}", "exec"), {})
        assert "512" in (said := capsys.readouterr().out) or "'token_budget': 128" in said


def test_langchain_and_litellm(api: Api) -> None:
    """Runs where QUEST_CLIENTS_PYTHON names an interpreter that has them: they pin much and stay out of ours."""
    interpreter = os.environ.get("QUEST_CLIENTS_PYTHON")
    if not interpreter:
        pytest.skip("QUEST_CLIENTS_PYTHON is not set (a Python with langchain-openai and litellm)")
    script = ROOT_FOLDER / "tests/e2e/third_party_clients.py"
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "PYTHONPATH": ""}
    done = subprocess.run(
        [interpreter, str(script), api.base_url, KEY, MODEL_NAME],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=environment,
    )
    assert done.returncode == 0 and done.stdout.rstrip().endswith("ok"), done.stdout + done.stderr


def test_vllm_bench_serve(api: Api, model_path: Path, tmp_path: Path) -> None:
    """vLLM's own load generator, with a budget in its --extra-body."""
    command = [*vllm_command("bench", "serve"), "--base-url", f"{api.server.url}{ROOT}", "--model", MODEL_NAME]
    command += ["--tokenizer", str(model_path), "--dataset-name", "random", "--random-input-len", "400"]
    command += [
        "--random-output-len",
        "6",
        "--num-prompts",
        "4",
        "--ignore-eos",
        "--extra-body",
        json.dumps(sparse(128)),
    ]
    command += ["--save-result", "--result-dir", str(tmp_path), "--result-filename", "result.json"]
    before = api.server.metrics()
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "OPENAI_API_KEY": KEY, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"], result["total_output_tokens"]) == (4, 0, 24)
    rows = 'quest_decode_rows_total{path="sparse",reason="budget"}'
    assert api.server.metrics()[rows] - before[rows] == 4 * (6 - 1)


LM_EVAL_TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
doc_to_text: "{{{{prompt}}}}"
doc_to_target: {target}
doc_to_choice: choices
target_delimiter: ""
output_type: {kind}
generation_kwargs: {{until: ["."], max_gen_toks: 12, temperature: 0}}
metric_list: [{{metric: {metric}, aggregation: mean, higher_is_better: true}}]
"""


def test_lm_eval(api: Api, model_path: Path, tmp_path: Path) -> None:
    """By an alias, which it takes for a model. Runs where QUEST_CLIENTS_PYTHON, or this Python, has lm-eval."""
    interpreter = os.environ.get("QUEST_CLIENTS_PYTHON") or sys.executable
    if subprocess.run([interpreter, "-c", "import lm_eval"], capture_output=True, check=False).returncode:
        pytest.skip("lm_eval is not installed (pip install lm-eval)")
    data = tmp_path / "data.jsonl"
    for n in (0, 100, 200):
        line = {"prompt": " ".join(map(str, range(n, n + 250))), "choices": [" never", f" {n + 250}"]}
        with data.open("a") as file:
            file.write(json.dumps(line) + "\n")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    choice = LM_EVAL_TASK.format(name="choice", data=data, target=1, kind="multiple_choice", metric="acc")
    (tasks / "choice.yaml").write_text(choice.replace("generation_kwargs", "# generation_kwargs"))
    count = LM_EVAL_TASK.format(
        name="count", data=data, target='"{{choices[1]}}"', kind="generate_until", metric="exact_match"
    )
    (tasks / "count.yaml").write_text(count.replace("doc_to_choice", "# doc_to_choice"))
    model = f"model={MODEL_NAME}:fast,base_url={api.base_url}/completions,tokenizer={model_path},max_length=8192"
    command = [interpreter, "-m", "lm_eval", "--model", "local-completions", "--model_args", model]
    command += ["--tasks", "choice,count", "--include_path", str(tasks), "--output_path", str(tmp_path / "out")]
    offline = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "OPENAI_API_KEY": KEY,
    }
    before = api.server.metrics()
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, **offline}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (result,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(result.read_text())["results"]["choice"]["acc,none"] == 1
    rows = 'quest_decode_rows_total{path="sparse",reason="budget"}'
    assert api.server.metrics()[rows] > before[rows]


def test_hostile_requests(api: Api) -> None:
    """A sample of what benchmarks/fuzz_api.py sends 10,000 of."""
    script = ROOT_FOLDER / "benchmarks/fuzz_api.py"
    command = [sys.executable, str(script), api.server.url, "--key", KEY, "--requests", "400", "--seed", "7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    statuses = json.loads(done.stdout)["statuses"]
    assert sum(counts.get("400", 0) for counts in statuses.values()) > 100
    assert statuses["ours"]["200"] > 0
