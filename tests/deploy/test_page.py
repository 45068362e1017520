"""The page at /quest on a real server in headless Chromium: behind an API key and a root path."""

from __future__ import annotations

import base64
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quest_vllm.config import QuestConfig
from quest_vllm.metadata import classify_rows, measure_traffic
from tests.conftest import DTYPE
from tests.deploy.browser import CHROMIUM, Browser, run_browser
from tests.deploy.conftest import KEY, ROOT_PATH
from tests.e2e.conftest import MODEL_NAME, Server
from tests.e2e.test_server import prompt_ids

pytestmark = pytest.mark.server
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (Debian: apt-get install chromium)")
LAYERS, HEADS = 30, 3
ELEMENT = 4 if DTYPE == "float32" else 2  # bytes


def get(server: Server, path: str, key: str | None = KEY, body: Any = None) -> Any:
    """JSON of a reply; raises HTTPError."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(server.url + path, data, headers), timeout=120) as reply:
        return json.loads(reply.read())


def test_calls_need_the_key_and_the_static_page_does_not(deployed: Server) -> None:
    for path in ("/v1/quest/info", "/v1/quest/trace/5", f"{ROOT_PATH}/v1/quest/info"):
        for key in (None, "wrong"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                get(deployed, path, key)
            assert refused.value.code == 401
        assert get(deployed, path)
    for path in ("/quest", f"{ROOT_PATH}/quest", "/quest/page.js"):
        assert urllib.request.urlopen(deployed.url + path, timeout=20).status == 200


def test_info_is_the_models(deployed: Server) -> None:
    info = get(deployed, "/v1/quest/info")
    assert info == {
        "default_budget": 2048, "min_budget": 48, "max_model_len": 8192, "page_size": 16, "layers": LAYERS,
        "dense_layers": [], "by_layer": False, "kv_heads": HEADS, "select_heads": "KV", "map": True,
        "vector_bytes": 2 * 64 * ELEMENT, "scores_pages": True, "reads_keys": False,
    }  # fmt: skip


def test_trace_holds_every_layer_of_every_step_and_nothing_of_other_requests(deployed: Server) -> None:
    body = {"model": MODEL_NAME, "prompt": prompt_ids(1000), "max_tokens": 6, "ignore_eos": True}
    get(deployed, "/v1/completions", body=body | {"vllm_xargs": {"quest_token_budget": 128, "quest_trace": 77}})
    get(deployed, "/v1/completions", body=body | {"vllm_xargs": {"quest_token_budget": 128}})
    get(deployed, "/v1/completions", body=body | {"vllm_xargs": {"quest_token_budget": 0, "quest_trace": 78}})
    records = get(deployed, "/v1/quest/trace/77")["records"]
    assert [(length, layer) for length, layer, *_ in records] == [
        (1000 + step, layer) for step in range(1, 6) for layer in range(LAYERS)
    ]
    for length, _, pages_per_cell, encoded in records:
        share = np.frombuffer(base64.b64decode(encoded), np.uint8)
        assert pages_per_cell == 1 and share.size == -(-length // 16)
        heads = np.round(share / 255 * HEADS)
        assert heads.sum() == HEADS * 128 // 16
        assert heads[0] == heads[-1] == heads[-2] == HEADS  # the first page and the newest two are forced
    assert get(deployed, "/v1/quest/trace/78")["records"] == []


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with run_browser() as running:
        yield running


def run_page(browser: Browser, budgets: list[Any], lines: int, tokens: int, mode: str) -> None:
    """Fill the form in as a visitor would, and wait for the answers."""
    browser.run(f"document.querySelector('[data-lines=\"{lines}\"]').click()")
    for place, budget in enumerate(budgets):
        browser.run(f"document.querySelectorAll('.budget')[{place}].value = {budget}")
    browser.run(f"document.querySelector('#tokens').value = {tokens}")
    browser.run(f"document.querySelector('input[value={mode}]').click()")
    browser.run("""(() => {  // a refusal may be there before one could look: have the start noted
        const run = document.querySelector('#run');
        window.started = false;
        new MutationObserver(() => { window.started ||= run.disabled }).observe(run, { attributes: true });
        run.click();
      })()""")
    browser.wait_for("window.started", 10)
    browser.wait_for("!document.querySelector('#run').disabled", 200)


def cards(browser: Browser) -> list[dict[str, Any]]:
    """What each answer's card shows; ``filled`` is the share of its map's pixels that are not empty."""
    script = """[...document.querySelectorAll('.card')].map((card) => {
        const text = (name) => card.querySelector(name).textContent, bytes = card.querySelector('.bytes').dataset;
        const canvas = card.querySelector('canvas'), context = canvas.getContext('2d');
        const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
        const none = getComputedStyle(document.documentElement).getPropertyValue('--none').trim();
        const empty = [1, 3, 5].map((place) => parseInt(none.slice(place, place + 2), 16)).join();
        let filled = 0;
        for (let at = 0; at < pixels.length; at += 4) filled += [...pixels.slice(at, at + 3)].join() !== empty;
        return { title: text('h2'), answer: text('.answer'), first: text('.first'), each: text('.each'),
          bytes: Number(bytes.bytes), context: Number(bytes.context), caption: text('figcaption'),
          bad: card.querySelector('.answer').classList.contains('bad'),
          rows: canvas.height, filled: filled / (pixels.length / 4) };
      })"""
    shown: list[dict[str, Any]] = browser.run(script)
    return shown


def model_bytes(context: int, budget: int, policy: str = "auto") -> float:
    """The byte model of quest_vllm.metadata over all layers, for one request and one step."""
    config, one = QuestConfig(policy=policy), np.array([1], dtype=np.int32)
    lengths = np.array([context], dtype=np.int32)
    rows = classify_rows(one, lengths, np.array([False]), np.array([budget], dtype=np.int32), config)
    vectors = measure_traffic(rows, lengths, config.page_size).vectors_read
    return vectors * LAYERS * HEADS * 2 * 64 * ELEMENT


@needs_chromium
def test_a_visitor_gives_the_key_and_compares_three_budgets(browser: Browser, deployed: Server, tmp_path: Path) -> None:
    browser.open(f"{deployed.url}{ROOT_PATH}/quest", 1280, 800)
    browser.wait_for("document.querySelector('#problem').textContent.includes('401')", 20)
    assert browser.run("!document.querySelector('#key-row').hidden")
    assert all("401" in problem for problem in browser.problems)
    browser.problems.clear()
    browser.run(f"document.querySelector('#key').value = '{KEY}'")
    run_page(browser, [0, 256, 64], 100, 12, "turn")
    dense, middle, small = cards(browser)
    assert [card["title"] for card in (dense, middle, small)] == ["Dense", "256 tokens", "64 tokens"]
    for card, budget in ((dense, 0), (middle, 256), (small, 64)):
        assert card["answer"].strip() and not card["bad"] and card["rows"] == LAYERS
        assert card["first"].endswith("s") and card["each"].endswith("s")
        assert card["bytes"] == model_bytes(card["context"], budget)
    assert dense["filled"] == 1 > middle["filled"] > small["filled"] > 0
    assert "every layer reads all" in dense["caption"].lower() and "4 of " in small["caption"]
    browser.run("document.querySelector('#all-steps').click()")
    assert cards(browser)[2]["filled"] >= small["filled"]
    assert browser.problems == []
    keep(browser, tmp_path, "desktop-light")


@needs_chromium
def test_on_a_phone_all_at_once_and_a_refused_budget(browser: Browser, deployed: Server, tmp_path: Path) -> None:
    browser.open(f"{deployed.url}{ROOT_PATH}/quest", 390, 844, dark=True, phone=True)
    browser.run(f"document.querySelector('#key').value = '{KEY}'")
    run_page(browser, [0, 256, 64], 100, 12, "once")
    dense, middle, small = cards(browser)
    assert not dense["bad"] and dense["filled"] == 1 > middle["filled"] > small["filled"]
    assert browser.run("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out sideways"
    keep(browser, tmp_path, "phone-dark")
    run_page(browser, ["''", 10, "''"], 20, 2, "turn")
    (refused,) = cards(browser)
    assert refused["bad"] and "quest_token_budget" in refused["answer"] and "48" in refused["answer"]


@needs_chromium
def test_the_browsers_byte_model_is_pythons(browser: Browser, deployed: Server) -> None:
    browser.open(f"{deployed.url}/quest", 800, 600)
    info = get(deployed, "/v1/quest/info")
    lengths, budgets = (1, 47, 48, 49, 500, 4095, 4096, 8192), (0, 48, 60, 512, 8192)
    cases = [(context, budget) for context in lengths for budget in budgets]
    for policy, own in (("auto", {}), ("window", {"scores_pages": False}), ("two_stage", {"reads_keys": True})):
        told = json.dumps(info | own)
        each = f"{json.dumps(cases)}.map((numbers) => module.stepBytes({told}, ...numbers).read)"
        seen = browser.run(f"import('./quest/bytes.js').then((module) => {each})")
        assert seen == [model_bytes(context, budget, policy) for context, budget in cases]


def keep(browser: Browser, tmp_path: Path, name: str) -> None:
    """Take a picture; QUEST_PICTURES names the folder that keeps it."""
    folder = Path(os.environ.get("QUEST_PICTURES", tmp_path))
    browser.picture(folder / f"quest-page-{name}.png")
    assert 10_000 < (folder / f"quest-page-{name}.png").stat().st_size < 300_000
