"""Malformed and hostile requests against a running server: no 5xx, no traceback in a reply, healthy after.

    python benchmarks/fuzz_api.py http://127.0.0.1:8000 --requests 10000 --pid PID --output FILE

Values come from the served OpenAPI schema's field names, from our own fields, and from raw bytes and framing. The same
seed sends the same requests. ``--pid`` names the API server's process, whose resident memory is then reported. Exit
code 1 if anything was found.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import http.client
import importlib.metadata
import json
import random
import re
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from provenance import commit, save

SCHEMAS = {
    "/v1/completions": ("CompletionRequest", {"prompt": "x", "max_tokens": 1}),
    "/v1/chat/completions": (
        "ChatCompletionRequest",
        {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
    ),
    "/v1/responses": ("ResponsesRequest", {"input": "x", "max_output_tokens": 1}),
    "/v1/messages": (
        "AnthropicMessagesRequest",
        {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
    ),
}
SCALARS: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        47,
        48,
        512,
        10**9,
        2**63,
        10**40,
        -0.0,
        1.5,
        1e308,
        "",
        "512",
        "x",
        "window",
        "two_stage",
        "\x00",
        "\ud800",
    ),
    *("é中😀", "sparse_attention", "../../etc/passwd", "${jndi:x}", "<script>", "A" * 3000, float("inf"), float("nan")),
]
OURS = ("token_budget", "top_p", "policy")
LENGTHS = re.compile(r"max_.*tokens|^n$|min_tokens|best_of|beam|logprobs|top_k|length|truncate")


class Fuzzer:
    """Makes requests: ``(method, path, headers, body)``. Knows nothing of what answers them."""

    def __init__(self, seed: int, model: str, fields: dict[str, list[str]], headers: dict[str, str]) -> None:
        self.random, self.model, self.fields, self.headers = random.Random(seed), model, fields, headers

    def value(self, depth: int = 0) -> Any:
        """Any JSON value."""
        kind = self.random.random()
        if depth > 3 or kind < 0.6:
            return self.random.choice(SCALARS)
        size = self.random.randint(0, 3)
        if kind < 0.8:
            return [self.value(depth + 1) for _ in range(size)]
        names = ["token_budget", "quest_token_budget", "type", "role", "content", "function", "x" * 50, ""]
        return {self.random.choice(names): self.value(depth + 1) for _ in range(size)}

    def base(self) -> tuple[str, dict[str, Any]]:
        """A good request's path and body."""
        path = self.random.choice(list(SCHEMAS))
        return path, {"model": self.model, **json.loads(json.dumps(SCHEMAS[path][1]))}

    def ours(self) -> tuple[str, str, bytes]:
        """Our object, our xargs, and model names around the aliases."""
        path, request = self.base()
        for _ in range(self.random.randint(1, 2)):
            kind = self.random.randrange(5)
            if kind == 0:
                request["sparse_attention"] = self.value()
            elif kind == 1:
                request["sparse_attention"] = {self.random.choice(OURS): self.value() for _ in range(2)}
            elif kind == 2:
                request["vllm_xargs"] = {f"quest_{self.random.choice(OURS)}": self.value() for _ in range(2)}
            elif kind == 3:
                request["model"] = self.random.choice(
                    [f"{self.model}:fast", f"{self.model}:", ":fast", "a:fast", "fast"]
                )
            else:
                request[self.random.choice(["sparse_atention", "sparseAttention", "vllm_xargs"])] = self.value()
        return "POST", path, dump(request)

    def schema(self) -> tuple[str, str, bytes]:
        """Any values in any of the fields that the schema knows."""
        path, request = self.base()
        for _ in range(self.random.randint(1, 3)):
            field = self.random.choice(self.fields[path])
            value = self.value()
            # long answers are not what is looked for here
            long = value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 2)
            request[field] = 2 if long and LENGTHS.search(field) else value
        return "POST", path, dump(request)

    def raw(self) -> tuple[str, str, bytes]:
        """Bodies that are no JSON, or barely."""
        path, request = self.base()
        body = dump({**request, "sparse_attention": {"token_budget": 512}})
        cut = self.random.randint(0, len(body))
        depth = self.random.choice([100, 2000, 100_000])
        opened = self.random.choice([b"[", b'{"a":'])
        bodies = [
            body[:cut],
            body[:cut] + self.random.randbytes(3) + body[cut:],
            self.random.randbytes(self.random.randint(0, 200)),
            b'{"sparse_attention": ' + opened * depth,
            b'{"sparse_attention": {"token_budget": ' + b"[" * depth + b"]" * depth + b"}}",
            b'{"sparse_attention": {"token_budget": ' + b"9" * 5000 + b"}}",
            body[:-1] + b', "sparse_attention": {"token_budget": 64}}',
            body.decode().encode(self.random.choice(["utf-16", "utf-32", "utf-8-sig"])),
            b'{"prompt": [' + b"1," * 1000 + b'1], "sparse_attention": {}}',
        ]
        return "POST", path, self.random.choice(bodies)

    def routes(self) -> tuple[str, str, bytes]:
        """Other methods and paths around ours."""
        method = self.random.choice(["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"])
        paths = ["/v1/sparse_attention", "/v1/sparse_attention/", "/v1/models", "/v1/completions", "//v1/completions"]
        path = self.random.choice([*paths, "/v1/sparse_attention?x=%00", "/v1/%73parse_attention", "/v1/../v1/models"])
        return method, path, b"" if method in ("GET", "HEAD", "OPTIONS") else dump(self.value())

    def make(self) -> tuple[str, str, str, dict[str, str], bytes, bool]:
        """``(kind, method, path, headers, body, chunked)`` of the next request."""
        kind: str = self.random.choices(["ours", "schema", "raw", "routes"], [5, 3, 2, 1])[0]
        makers: dict[str, Callable[[], tuple[str, str, bytes]]] = {
            name: getattr(self, name) for name in ("ours", "schema", "raw", "routes")
        }
        method, path, body = makers[kind]()
        types = ["application/json"] * 9 + [self.random.choice(["text/plain", "", "application/json; charset=utf-16"])]
        headers = {"Content-Type": self.random.choice(types), **self.headers}
        return kind, method, path, headers, body, self.random.random() < 0.2


def dump(value: Any) -> bytes:
    """JSON as a careless client writes it: NaN, infinities and lone surrogates included."""
    return json.dumps(value).encode()


def send(address: str, request: tuple[str, str, str, dict[str, str], bytes, bool]) -> tuple[int, str]:
    """Status and body of the answer; status 0 with the reason where there was none."""
    _, method, path, headers, body, chunked = request
    connection = http.client.HTTPConnection(address, timeout=120)
    try:
        if chunked and body:
            pieces = (body[at : at + 4000] for at in range(0, len(body), 4000))
            connection.request(method, path, pieces, headers, encode_chunked=True)
        else:
            connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read(2**20).decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        return 0, repr(error)
    finally:
        connection.close()


def fetch(url: str, headers: dict[str, str]) -> Any:
    """A JSON document."""
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as answer:
        return json.loads(answer.read())


def resident_mb(pid: int | None) -> float | None:
    """Resident memory of a process, in MiB."""
    if pid is None:
        return None
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return round(int(found[1]) / 1024, 1) if found else None


def main() -> int:
    """Run; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--pid", type=int)
    parser.add_argument("--key", default="-")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    address = arguments.url.removeprefix("http://")
    key = {"Authorization": f"Bearer {arguments.key}"}
    models = fetch(f"{arguments.url}/v1/models", key)
    parts = fetch(f"{arguments.url}/openapi.json", key)["components"]["schemas"]
    fields = {path: sorted(parts[name]["properties"]) for path, (name, _) in SCHEMAS.items()}
    fuzzer = Fuzzer(arguments.seed, models["data"][0]["id"], fields, key)
    requests = [fuzzer.make() for _ in range(arguments.requests)]
    statuses: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    findings: list[dict[str, Any]] = []
    memory = [resident_mb(arguments.pid)]
    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(arguments.threads) as pool:
        for number, (status, text) in enumerate(pool.map(lambda request: send(address, request), requests)):
            kind, method, path, headers, body, _ = requests[number]
            statuses[kind][str(status)] += 1
            if status == 0 or status >= 500 or "Traceback (most" in text or '.py", line' in text:
                shown = body[:600].decode(errors="backslashreplace")
                headers.pop("Authorization")
                names = ("number", "status", "reply", "kind", "method", "path", "headers", "body")
                values = (number, status, text[:400], kind, method, path, headers, shown)
                findings.append(dict(zip(names, values, strict=True)))
            if (number + 1) % (arguments.requests // 4 or 1) == 0:
                memory.append(resident_mb(arguments.pid))
    healthy = urllib.request.urlopen(f"{arguments.url}/health", timeout=20).status == 200
    report = {
        "benchmark": "fuzz_api",
        "command": " ".join(sys.argv),
        "commit": commit(),
        "versions": {name: importlib.metadata.version(name) for name in ("quest-vllm", "vllm")},
        "requests": arguments.requests,
        "seed": arguments.seed,
        "seconds": round(time.perf_counter() - start, 1),
        "statuses": {kind: dict(sorted(counts.items())) for kind, counts in sorted(statuses.items())},
        "findings": findings,
        "healthy_after": healthy,
        "resident_mib_each_quarter": memory,
    }
    print(json.dumps(report, indent=1)[:6000])
    save(report, arguments.output)
    return int(bool(findings) or not healthy)


if __name__ == "__main__":
    raise SystemExit(main())
