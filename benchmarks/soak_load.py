"""The mixed load of soak.py, and what it checks of every answer.

Each generation carries a code of three words that its prompt repeats until the model goes on repeating it: the answer
must hold that code, and no code of another request. Below SURE_BUDGET the small model itself loses the thread now and
then: an answer without its code is asked for again, alone, once the load is over; a finding is what goes wrong
under load alone with a budget to be sure of. A stream also names its request id, which every chunk must carry.
"""

from __future__ import annotations

import asyncio
import collections
import itertools
import json
import random
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
from fuzz_api import SCHEMAS, Fuzzer, send

WORDS = "river garden engine letter window market stone paper bridge cloud harbor meadow".split()
CODE_WORDS = (
    "amber falcon violin copper tiger lemon silver anchor velvet rocket marble pepper orange castle dragon winter "
    "basket candle feather hammer island jacket kitten ladder mirror needle oyster pirate rabbit saddle temple walnut"
).split()
CODES = list(itertools.permutations(CODE_WORDS, 3))
REPEATED = 16
SURE_BUDGET = 256
"""Tokens. Below, rounding that differs by batch decides whether the model still finds its code."""
ACTIONS = {"stream": 10, "whole": 3, "chat": 2, "several": 1, "abort": 4, "malformed": 4, "look": 1}


@dataclass
class Tally:
    """What came of the load."""

    done: collections.Counter[str] = field(default_factory=collections.Counter)
    statuses: collections.Counter[str] = field(default_factory=collections.Counter)
    tokens: int = 0
    drifted: int = 0
    """Answers that vary their own code somewhere: the model's own doing."""
    suspects: list[dict[str, Any]] = field(default_factory=list)
    """Answers without their code, and their requests."""
    slips: list[dict[str, Any]] = field(default_factory=list)
    """Those that lack it alone, too, or had a budget that nobody can be sure of."""
    findings: list[dict[str, Any]] = field(default_factory=list)

    def find(self, action: str, what: str, **details: Any) -> None:
        """Note something that must not be."""
        self.findings.append({"action": action, "what": what, **details})


Code = tuple[str, str, str]


def code_sentence(code: Code) -> str:
    """One repetition."""
    return f" The code is {' '.join(code)}."


def codes_in(text: str) -> list[set[str]]:
    """The words of every code in ``text``, its own or another's."""
    found = re.findall(r"code is (\w+) (\w+) (\w+)\.", text)
    return [set(words) for words in found if set(words) <= set(CODE_WORDS)]


class Load:
    """Makes requests against one server and checks their answers."""

    def __init__(
        self,
        url: str,
        model: str,
        longest: int,
        seed: int,
        fields: dict[str, list[str]],
        most_tokens: int = 320,
    ) -> None:
        """``longest``: the server's max_model_len in tokens; ``fields``: of each route's schema, for malformed ones.

        ``most_tokens``: of an answer.
        """
        self.url, self.model, self.longest, self.most_tokens = url, model, longest, most_tokens
        self.random = random.Random(seed)
        self.tally = Tally()
        self.client = httpx.AsyncClient(
            base_url=url, timeout=600, limits=httpx.Limits(max_connections=None, keepalive_expiry=5)
        )
        self.fuzzer = Fuzzer(seed, model, fields, {"Authorization": "Bearer -"})
        self.budgets = [0, 48, 64, 128, 256, 512, 1024, longest, None]
        self.shared = [self.filler(words) for words in (longest // 16, longest // 8, longest // 5)]
        self.codes = self.random.sample(CODES, len(CODES))
        self.issued = 0

    def filler(self, words: int) -> str:
        """Random words."""
        return " ".join(self.random.choice(WORDS) for _ in range(words))

    def next_code(self) -> Code:
        """A code that no other request has, until all were used."""
        self.issued += 1
        return self.codes[self.issued % len(self.codes)]

    def body(self, code: Code, tokens: int, budget: int | None) -> dict[str, Any]:
        """A completion that repeats ``code``; often behind a prefix that others share."""
        start = self.random.choice(self.shared) if self.random.random() < 0.4 else ""
        words = min(int(self.random.lognormvariate(6.3, 0.8)), self.longest // 3)
        prompt = f"{start} {self.filler(words)}." + code_sentence(code) * REPEATED
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        if budget is not None:
            body["sparse_attention"] = {"token_budget": budget}
        return body

    async def touch_sizes(self, largest: int) -> None:
        """A prompt of each length from 1 to ``largest`` tokens, one after the other, behind nobody's prefix."""
        for length in self.random.sample(range(1, largest + 1), largest):
            prompt = self.random.choices(range(1000, 40000), k=length)
            await self.post("touch", "/v1/completions", {"model": self.model, "prompt": prompt, "max_tokens": 1})

    async def run(self, until: Callable[[], bool]) -> None:
        """One client: an action after the other."""
        names, weights = list(ACTIONS), list(ACTIONS.values())
        actions: dict[str, Callable[[], Awaitable[None]]] = {name: getattr(self, name) for name in names}
        while not until():
            name = self.random.choices(names, weights)[0]
            try:
                await actions[name]()
            except (httpx.HTTPError, ValueError, LookupError) as error:
                self.tally.find(name, f"lost: {error!r}")
            self.tally.done[name] += 1

    async def stream(self, tokens: int | None = None, begun: Callable[[], None] = lambda: None) -> None:
        """A streamed completion: complete, in its own words, with its own id and budget."""
        code, number = self.next_code(), self.issued
        tokens = tokens or self.random.randint(16, self.most_tokens)
        budget = self.random.choice(self.budgets)
        body = self.body(code, tokens, budget) | {"stream": True, "stream_options": {"include_usage": True}}
        name = f"soak-{number}"
        text, ids, usage, reason, ended = "", set(), None, None, False
        async with self.client.stream("POST", "/v1/completions", json=body, headers={"X-Request-Id": name}) as answer:
            self.tally.statuses[str(answer.status_code)] += 1
            if answer.status_code != 200:
                said = (await answer.aread()).decode(errors="replace")[:300]
                self.tally.find("stream", f"HTTP {answer.status_code}", said=said)
                return
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    ended = True
                elif line.startswith("data: "):
                    chunk = json.loads(line[6:])
                    if "error" in chunk:
                        self.tally.find("stream", "error in the stream", said=str(chunk)[:300])
                        return
                    ids.add(chunk["id"])
                    usage = chunk.get("usage") or usage
                    for choice in chunk["choices"]:
                        begun()
                        text += choice["text"]
                        reason = choice["finish_reason"] or reason
        self.check_text("stream", code, text, body)
        if not ended or reason != "length" or not usage or usage["completion_tokens"] != tokens:
            self.tally.find("stream", "incomplete", ended=ended, reason=reason, usage=usage, tokens=tokens)
        if ids != {f"cmpl-{name}"}:
            self.tally.find("stream", "another request's id", ids=sorted(ids), expected=name)
        self.check_usage("stream", usage, budget)

    async def whole(self) -> None:
        """A completion in one piece."""
        code, tokens, budget = (
            self.next_code(),
            self.random.randint(16, self.most_tokens),
            self.random.choice(self.budgets),
        )
        body = self.body(code, tokens, budget)
        reply = await self.post("whole", "/v1/completions", body)
        if reply:
            self.check_text("whole", code, reply["choices"][0]["text"], body)
            self.check_usage("whole", reply["usage"], budget)

    async def several(self) -> None:
        """Several sampled answers to one prompt: each has the code, whatever else it says."""
        code, budget = self.next_code(), self.random.choice(self.budgets)
        body = self.body(code, 40, budget) | {"n": 3, "temperature": 0.2, "seed": self.issued}
        reply = await self.post("several", "/v1/completions", body)
        if reply:
            if len(reply["choices"]) != 3:
                self.tally.find("several", f"expected 3 choices, got {len(reply['choices'])}")
            for choice in reply["choices"]:
                self.check_text("several", code, choice["text"], body)

    async def chat(self) -> None:
        """A chat, in one piece."""
        budget = self.random.choice(self.budgets)
        messages = [{"role": "user", "content": self.filler(self.random.randint(20, 600)) + " Say hello."}]
        body: dict[str, Any] = {"model": self.model, "messages": messages, "max_tokens": 24}
        if budget is not None:
            body["sparse_attention"] = {"token_budget": budget}
        reply = await self.post("chat", "/v1/chat/completions", body)
        if reply:
            self.check_usage("chat", reply["usage"], budget)

    async def abort(self) -> None:
        """A stream whose client leaves: before the first token, or after a few."""
        body = self.body(self.next_code(), 400, self.random.choice(self.budgets)) | {"stream": True}
        left = self.random.choice([0, 0, 1, 5, 40])
        if not left:
            try:
                await asyncio.wait_for(self.client.post("/v1/completions", json=body), self.random.uniform(0.01, 0.5))
            except TimeoutError:
                return
            return
        async with self.client.stream("POST", "/v1/completions", json=body) as answer:
            self.tally.statuses[str(answer.status_code)] += 1
            async for line in answer.aiter_lines():
                left -= line.startswith("data: ")
                if left <= 0:
                    return

    async def malformed(self) -> None:
        """What fuzz_api.py makes."""
        request = self.fuzzer.make()
        status, said = await asyncio.to_thread(send, self.url.removeprefix("http://"), request)
        self.tally.statuses[str(status)] += 1
        if status == 0 or status >= 500 or "Traceback (most" in said:
            kind, method, path, _, body, _ = request
            shown = body[:400].decode(errors="backslashreplace")
            self.tally.find("malformed", f"HTTP {status}", said=said[:300], request=[kind, method, path, shown])

    async def look(self) -> None:
        """What an operator's tools ask."""
        path = self.random.choice(["/metrics", "/health", "/v1/models", "/v1/sparse_attention"])
        answer = await self.client.get(path)
        self.tally.statuses[str(answer.status_code)] += 1
        if answer.status_code != 200:
            self.tally.find("look", f"HTTP {answer.status_code}", path=path)

    async def post(self, action: str, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """The reply; None, and a finding, where it is no 200."""
        answer = await self.client.post(path, json=body)
        self.tally.statuses[str(answer.status_code)] += 1
        if answer.status_code != 200:
            self.tally.find(action, f"HTTP {answer.status_code}", said=answer.text[:300])
            return None
        reply: dict[str, Any] = answer.json()
        return reply

    def check_text(self, action: str, code: Code, text: str, body: dict[str, Any]) -> None:
        """The answer holds its own code, and none that another request may have."""
        if " ".join(code) not in text:
            self.tally.suspects.append({"action": action, "code": code, "text": text[:300], "body": body})
        others = [words for words in codes_in(text) if words != set(code)]
        if any(len(words - set(code)) > 1 for words in others):
            self.tally.find(action, "another request's code", code=code, text=text[:300])
        self.tally.drifted += bool(others)

    async def ask_suspects_again(self) -> None:
        """Each alone, on a server without load: what only the load brought about is a finding."""
        for suspect in self.tally.suspects:
            body = suspect.pop("body")
            again = {key: value for key, value in body.items() if key not in ("stream", "stream_options")}
            reply = await self.post("alone", "/v1/completions", again)
            texts = [choice["text"][:300] for choice in reply["choices"]] if reply else []
            budget = body.get("sparse_attention", {}).get("token_budget", 0)
            told = {"budget": budget, "prompt_words": len(body["prompt"].split()), "alone": texts}
            sure = not 0 < budget < SURE_BUDGET
            if sure and all(" ".join(suspect["code"]) in text for text in texts):
                self.tally.find(
                    suspect["action"],
                    "its code is missing under load",
                    **{k: v for k, v in suspect.items() if k != "action"},
                    **told,
                )
            else:
                self.tally.slips.append({**suspect, **told})

    def check_usage(self, action: str, usage: dict[str, Any] | None, budget: int | None) -> None:
        """The reply tells the budget that was asked for."""
        told = (usage or {}).get("sparse_attention")
        if not told or (budget is not None and told["token_budget"] != budget):
            self.tally.find(action, "another budget than asked for", budget=budget, usage=usage)
        self.tally.tokens += (usage or {}).get("completion_tokens", 0)


def schema_fields(openapi: dict[str, Any]) -> dict[str, list[str]]:
    """Names of the fields of each route that the fuzzer knows."""
    parts = openapi["components"]["schemas"]
    return {path: sorted(parts[name]["properties"]) for path, (name, _) in SCHEMAS.items()}
