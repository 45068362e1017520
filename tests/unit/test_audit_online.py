"""The running audit: right summaries pass, one wrong channel is found, and work is bounded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from quest_vllm import audit_online, metrics
from quest_vllm.audit_online import OnlineAudit, compare_full_pages
from quest_vllm.config import QuestConfig
from quest_vllm.metadata import classify_rows
from quest_vllm.metrics_files import ENV_PROMETHEUS_DIR, ENV_RUN_DIR
from quest_vllm.ops.key_codes import code_bytes
from quest_vllm.ops.reference import update_page_summaries
from quest_vllm.page_layout import split_chunks, summary_bytes_per_token
from quest_vllm.token_rows import step_rows

BLOCK, HEADS, DIM, PAGE, BLOCKS = 32, 2, 64, 16, 12
NAME = "model.layers.2.self_attn.attn"


def make_layer(page_summary: str = "min_max") -> Any:
    """A layer whose cache holds random keys and their summaries."""
    config = QuestConfig(page_size=PAGE, page_summary=page_summary)
    content = 2 * DIM + summary_bytes_per_token(DIM, 4, PAGE) // 4
    torch.manual_seed(0)
    layer = SimpleNamespace(
        kv_cache=torch.randn(BLOCKS, HEADS, BLOCK, content),
        impl=SimpleNamespace(config=config, head_size=DIM, sliding_window=None),
    )
    views = split_chunks(layer.kv_cache, DIM, PAGE)
    update_page_summaries(
        views.keys, views.summaries, torch.arange(BLOCKS * BLOCK), page_size=PAGE, page_summary=page_summary
    )
    return layer


def summaries(layer: Any) -> torch.Tensor:
    return split_chunks(layer.kv_cache, DIM, PAGE).summaries


def test_one_wrong_channel_is_found_where_it_is() -> None:
    layer, blocks = make_layer(), torch.tensor([7, 2, 9, 4], dtype=torch.int32)
    assert compare_full_pages(layer, blocks, 0, 8) == ([], 8 * HEADS)
    summaries(layer)[2, 1, 1, 0, 5] += 1e-3  # block 2 is the request's second: pages 2 and 3
    assert compare_full_pages(layer, blocks, 0, 8) == ([(1, 3)], 8 * HEADS)
    assert compare_full_pages(layer, blocks, 3, 6) == ([(1, 3)], 3 * HEADS)
    assert compare_full_pages(layer, blocks, 4, 8) == ([], 4 * HEADS)


def test_one_wrong_code_is_found_where_it_is() -> None:
    layer, blocks = make_layer("key_codes"), torch.tensor([7, 2, 9, 4], dtype=torch.int32)
    assert compare_full_pages(layer, blocks, 0, 8) == ([], 8 * HEADS)
    code_bytes(summaries(layer))[2, 1, 1, 3 * DIM + 5] ^= 4
    assert compare_full_pages(layer, blocks, 0, 8) == ([(1, 3)], 8 * HEADS)


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What the audits of a test counted, by result."""
    monkeypatch.delenv(ENV_PROMETHEUS_DIR, raising=False)
    monkeypatch.setenv(ENV_RUN_DIR, str(tmp_path))
    metrics._worker_metrics.cache_clear()
    counts = dict.fromkeys(metrics.AUDIT_RESULTS, 0)

    def audited(_: Any, result: str, pages: int) -> None:
        counts[result] += pages

    monkeypatch.setattr(metrics.WorkerMetrics, "audited", audited)
    return counts


def steps(audit: OnlineAudit, number: int, lengths: list[int], width: int = 1) -> None:
    lens = np.array(lengths, dtype=np.int32)
    step = step_rows(np.arange(len(lens) + 1, dtype=np.int32) * width, lens, np.zeros(len(lens), dtype=bool))
    rows = classify_rows(
        step.query_lens, step.seq_lens, np.zeros_like(step.lags, bool), step.lags * 0 + 48, QuestConfig()
    )
    table = torch.arange(BLOCKS, dtype=torch.int32).repeat(len(lens), 1)
    for _ in range(number):
        audit.step(rows, step, table)


def test_every_third_step_checks_the_full_pages_of_one_request(counted: dict[str, int]) -> None:
    audit = OnlineAudit({NAME: make_layer()}, 3)
    steps(audit, 8, [100])  # 99 tokens are in the cache: 6 full pages
    assert counted == {"right": 2 * 6 * HEADS, "wrong": 0}


def test_tokens_that_a_verify_step_writes_are_not_stored_yet(counted: dict[str, int]) -> None:
    layer = make_layer()
    summaries(layer)[3, :, 0] += 1.0  # page 6: the step's four tokens end in it, 96 are stored
    steps(OnlineAudit({NAME: layer}, 1), 4, [100], width=4)
    assert counted == {"right": 4 * 6 * HEADS, "wrong": 0}


def test_no_interval_or_no_sparse_row_is_no_work(counted: dict[str, int]) -> None:
    steps(OnlineAudit({NAME: make_layer()}, 0), 5, [100])
    steps(OnlineAudit({NAME: make_layer()}, 1), 5, [40])  # the budget covers it
    assert counted == {"right": 0, "wrong": 0}


def test_a_wrong_page_is_counted_and_logged(counted: dict[str, int], caplog: pytest.LogCaptureFixture) -> None:
    layer = make_layer()
    summaries(layer)[1, 0, 0, 1, 0] = 99.0
    with caplog.at_level("ERROR", logger="vllm.quest_vllm"):
        caplog.handler.setLevel("ERROR")
        audit_online.logger.addHandler(caplog.handler)
        try:
            steps(OnlineAudit({NAME: layer}, 1), 1, [200])
        finally:
            audit_online.logger.removeHandler(caplog.handler)
    assert counted == {"right": 12 * HEADS - 1, "wrong": 1}
    assert "KV head 0, page 2" in caplog.text and NAME in caplog.text


def test_one_audit_reads_a_bounded_number_of_pages(counted: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_online, "MAX_PAGES", 4)
    steps(OnlineAudit({NAME: make_layer()}, 1), 3, [300])
    assert counted == {"right": 3 * 4 * HEADS, "wrong": 0}
