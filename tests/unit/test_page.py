"""The page's trace ring and routes, without a server."""

from __future__ import annotations

import base64
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quest_vllm import runtime
from quest_vllm.config import QuestConfig, load_config
from quest_vllm.errors import QuestConfigError
from quest_vllm.page import trace
from quest_vllm.page.trace import (
    CAPACITY,
    MAX_CELLS,
    MAX_TRACE,
    MAX_TRACED_ROWS,
    TraceReader,
    TraceWriter,
    cell_shares,
    trace_number,
    traced_rows,
)


def shares(record: list[Any]) -> list[int]:
    return list(base64.b64decode(record[3]))


@pytest.fixture
def page_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_active", QuestConfig(page=True))


@given(st.integers(1, 4000), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_cells_hold_every_selected_page_once(num_pages: int, heads: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    budget = int(rng.integers(1, num_pages + 1))
    selected = np.stack([rng.permutation(num_pages)[:budget] for _ in range(heads)])
    padded = np.concatenate([selected, np.full((heads, 3), -1)], axis=1)
    per_cell, share = cell_shares(padded, num_pages)
    assert share.size <= MAX_CELLS and (share.size - 1) * per_cell < num_pages <= share.size * per_cell
    sizes = np.minimum(per_cell, num_pages - per_cell * np.arange(share.size)) * heads
    counts = np.bincount(selected.ravel() // per_cell, minlength=share.size)
    assert ((share == 0) == (counts == 0)).all()
    assert ((share == 255) >= (counts == sizes)).all()
    assert (np.abs(share / 255 - counts / sizes) <= 1 / 255).all()


def test_reader_gets_what_the_writer_wrote_in_order_and_only_its_own(tmp_path: Path) -> None:
    writer, reader = TraceWriter(tmp_path), TraceReader(tmp_path)
    rows = traced_rows(np.array([0, 7, 0, 9], dtype=np.int32))
    assert rows is not None and rows.rows.tolist() == [1, 3]
    selected = np.array([[[0, 1]], [[0, 3]], [[0, 1]], [[2, -1]]])
    lengths = np.array([64, 70, 64, 48], dtype=np.int32)
    for layer in (2, 3):
        writer.record(layer, rows, lengths, selected, 16)
    reply = reader.read(7, 0)
    assert [record[:3] for record in reply["records"]] == [[70, 2, 1], [70, 3, 1]]
    assert shares(reply["records"][0]) == [255, 0, 0, 255, 0]
    assert shares(reader.read(9, 0)["records"][1]) == [0, 0, 255]
    assert reader.read(7, reply["next"]) == {"next": reply["next"], "records": []}
    assert reader.read(8, 0) == {"next": 0, "records": []}


def test_ring_is_bounded_and_keeps_the_newest(tmp_path: Path) -> None:
    writer, rows = TraceWriter(tmp_path), traced_rows(np.array([5], dtype=np.int32))
    assert rows is not None
    for step in range(CAPACITY + 10):
        writer.record(step, rows, np.array([16], dtype=np.int32), np.array([[[0]]]), 16)
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size == CAPACITY * trace.RECORD.itemsize < 5 * 2**20
    reader, cursor, layers = TraceReader(tmp_path), 0, []
    while (reply := reader.read(5, cursor))["records"]:
        cursor = reply["next"]
        layers += [record[1] for record in reply["records"]]
    assert layers == list(range(10, CAPACITY + 10))


def test_record_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    writer, rows = TraceWriter(tmp_path), traced_rows(np.array([5], dtype=np.int32))
    assert rows is not None
    writer.record(2, rows, np.array([16], dtype=np.int32), np.array([[[0]]]), 16)
    writer._ring["written"][0] = 0
    assert TraceReader(tmp_path).read(5, 0)["records"] == []


def test_rows_traced_at_once_are_bounded() -> None:
    rows = traced_rows(np.arange(1, 100, dtype=np.int32))
    assert rows is not None and rows.traces.size == MAX_TRACED_ROWS
    assert traced_rows(np.zeros(4, dtype=np.int32)) is None


@pytest.mark.parametrize("value", [None, 0, -1, True, "7", 1.5, [3], MAX_TRACE + 1, 10**30])
def test_nonsense_asks_for_no_trace(page_on: None, value: Any) -> None:
    assert trace_number({"quest_trace": value}) == 0


def test_trace_number_counts_only_where_the_page_is_on(page_on: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert trace_number({"quest_trace": MAX_TRACE}) == MAX_TRACE and trace_number(None) == 0
    monkeypatch.setattr(runtime, "_active", QuestConfig())
    assert trace_number({"quest_trace": 5}) == 0


def test_page_key_is_a_bool_in_every_source() -> None:
    assert load_config(None, {"QUEST_PAGE": "true"}).page and not load_config(None, {"QUEST_PAGE": "0"}).page
    for bad in ("yes", "2"):
        with pytest.raises(QuestConfigError, match=r"(?i)page: expected true or false"):
            load_config(None, {"QUEST_PAGE": bad})
    with pytest.raises(QuestConfigError, match="page: expected true or false"):
        load_config({"quest": {"page": 1}}, {})


def make_client() -> Any:
    starlette = pytest.importorskip("starlette.applications")
    testclient = pytest.importorskip("starlette.testclient")
    from quest_vllm.page.routes import QuestPage

    app = starlette.Starlette()
    app.add_middleware(QuestPage)
    return testclient.TestClient(app)


def test_static_files_load_and_nothing_else_does(tmp_path: Path) -> None:
    with make_client() as client:
        page = client.get("/quest")
        assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
        assert "default-src 'self'" in page.headers["content-security-policy"]
        for name in ("page.css", "page.js", "map.js", "bytes.js"):
            assert client.get(f"/quest/{name}").status_code == 200
        for name in ("index.html", "routes.py", "..%2froutes.py", "%2e%2e%2fconfig.py"):
            assert client.get(f"/quest/{name}").status_code == 404


@pytest.mark.parametrize("path", ["0", "4294967296", "5?after=-1", "5?after=x", "5?after=1e3", "5?after=" + "9" * 30])
def test_bad_trace_request_is_refused_with_what_was_expected(path: str) -> None:
    with make_client() as client:
        reply = client.get(f"/v1/quest/trace/{path}")
    assert reply.status_code == 400
    assert "expected 1 to 2147483647" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("policy", "scores_pages", "reads_keys"),
    [("auto", True, False), ("window", False, False), ("two_stage", True, True)],
)
def test_the_page_knows_what_choosing_pages_reads(policy: str, scores_pages: bool, reads_keys: bool) -> None:
    pytest.importorskip("vllm")
    from quest_vllm.page.routes import describe

    model = SimpleNamespace(
        max_model_len=8192,
        get_total_num_hidden_layers=lambda: 30,
        get_total_num_kv_heads=lambda: 3,
        get_head_size=lambda: 64,
        dtype=SimpleNamespace(itemsize=2),
    )
    told = describe(SimpleNamespace(model_config=model), QuestConfig(policy=policy).resolved())
    assert (told["scores_pages"], told["reads_keys"]) == (scores_pages, reads_keys)


def test_page_loads_nothing_from_elsewhere() -> None:
    from quest_vllm.page.routes import FILES, STATIC

    assert {path.name for path in STATIC.iterdir()} == {*FILES, "index.html"}
    for path in STATIC.iterdir():
        assert "://" not in path.read_text().replace("http://www.w3.org", ""), path


def test_the_tap_moves_traces_with_their_requests(page_on: None) -> None:
    pytest.importorskip("vllm")
    from quest_vllm.budget_tap import QuestBudgetTap
    from quest_vllm.page.trace import get_trace_table

    tap = object.__new__(QuestBudgetTap)
    tap._config, tap._table, tap._traces = QuestConfig(page=True).resolved(), trace.BudgetTable(), get_trace_table()

    def asks(number: int) -> Any:
        return SimpleNamespace(extra_args={"quest_token_budget": 64, "quest_trace": number})

    tap.add_request(0, asks(11))
    tap.add_request(1, asks(12))
    assert get_trace_table().rows(3).tolist() == [11, 12, 0]
    tap.update_state(SimpleNamespace(removed=[0], added=[(2, asks(13), None, None)], moved=[]))  # type: ignore[arg-type]
    assert get_trace_table().rows(3).tolist() == [0, 12, 13]
    tap.add_request(1, SimpleNamespace(extra_args=None))
    assert get_trace_table().rows(3).tolist() == [0, 0, 13]
