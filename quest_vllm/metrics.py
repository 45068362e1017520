"""Every metric of quest_vllm in one table, and the two recorders that fill it.

:class:`WorkerMetrics` counts what attention did, in the worker, from numbers that are on the host already (never a
device sync). :class:`LatencyMetrics` times requests as the HTTP client sees them, in the API server
(:mod:`quest_vllm.metrics_http`). How values reach ``/metrics``: :mod:`quest_vllm.metrics_files`.
"""

from __future__ import annotations

import bisect
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from quest_vllm.config import TWO_STAGE, WINDOW
from quest_vllm.metrics_files import ValueFile, metrics_dir, value_key
from quest_vllm.runtime import active_config

ROW_KINDS = (
    ("sparse", "budget"),
    ("sparse", WINDOW),
    ("sparse", TWO_STAGE),
    ("dense", "no_budget"),
    ("dense", "budget_covers_context"),
    ("dense", "prefill"),
    ("dense", "unsupported"),
)
STAGES = ("update", "score", "select", "attend")
MEMORY_PARTS = ("kv", "summaries")
AUDIT_RESULTS = ("right", "wrong")
BUDGET_CLASS_BOUNDS = (512, 1024, 2048, 4096)
BUDGET_CLASSES = ("dense", *(f"<={bound}" for bound in BUDGET_CLASS_BOUNDS), f">{BUDGET_CLASS_BOUNDS[-1]}")
_BUDGET_BUCKETS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
_FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_NEXT_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
_REQUEST_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)


@dataclass(frozen=True)
class MetricSpec:
    """One metric: a counter, a histogram if it has ``buckets`` (upper bounds, ascending, without +Inf), or a gauge.

    A gauge is the sum of what the processes say.
    """

    name: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    gauge: bool = False

    @property
    def type(self) -> str:
        """ "counter", "histogram" or "gauge"."""
        if self.gauge:
            return "gauge"
        return "histogram" if self.buckets else "counter"

    @property
    def suffixes(self) -> tuple[str, ...]:
        """What ``/metrics`` puts behind the name."""
        return ("_bucket", "_sum", "_count") if self.buckets else ("",)


METRICS = {
    spec.name: spec
    for spec in (
        MetricSpec(
            "quest_decode_rows_total",
            "Rows (a decode token, a draft to verify, or a prefill chunk) by attention path and the reason for it.",
            ("path", "reason"),
        ),
        MetricSpec("quest_pages_selected_total", "Pages that sparse rows attended to, over layers and heads."),
        MetricSpec("quest_pages_available_total", "Pages that sparse rows could have attended to."),
        MetricSpec("quest_tokens_attended_total", "Tokens that sparse rows attended to, in one head of one layer."),
        MetricSpec("quest_tokens_available_total", "Tokens of context that the same rows had."),
        MetricSpec(
            "quest_kv_bytes_read_total",
            "Bytes that decode rows, dense ones too, read in sparse layers: K, V, summaries, keys to choose by.",
        ),
        MetricSpec(
            "quest_kv_bytes_dense_total",
            "Bytes that the same rows would have read in the same layers with dense attention.",
        ),
        MetricSpec(
            "quest_kv_cache_bytes",
            "Memory set aside for the KV cache, over layers and workers: keys and values, and page summaries.",
            ("part",),
            gauge=True,
        ),
        MetricSpec(
            "quest_audit_pages_total",
            "Pages whose summaries were compared with their keys by the running audit (audit_steps), over KV heads.",
            ("result",),
        ),
        MetricSpec("quest_token_budget", "Token budget of each decode row on the sparse path.", (), _BUDGET_BUCKETS),
        MetricSpec(
            "quest_tokens_reached",
            "Tokens that rows with a top_p below 1 attended to: one observation a row, selecting head and layer.",
            (),
            _BUDGET_BUCKETS,
        ),
        MetricSpec(
            "quest_stage_seconds_total",
            "Host seconds in each stage of sparse attention, over layers and workers; CPU backend only.",
            ("stage",),
        ),
        MetricSpec(
            "quest_time_to_first_token_seconds",
            "Streamed (chat) completions: arrival to the first chunk of output sent, by token budget asked for.",
            ("budget_class",),
            _FIRST_TOKEN_BUCKETS,
        ),
        MetricSpec(
            "quest_inter_token_latency_seconds",
            "Streamed (chat) completions: time between chunks of output sent, by token budget asked for.",
            ("budget_class",),
            _NEXT_TOKEN_BUCKETS,
        ),
        MetricSpec(
            "quest_e2e_latency_seconds",
            "HTTP requests answered in full: arrival to the last byte sent, by token budget asked for.",
            ("budget_class",),
            _REQUEST_BUCKETS,
        ),
    )
}


def budget_class(token_budget: int) -> str:
    """The label of ``token_budget`` in latency metrics, one of :data:`BUDGET_CLASSES`; 0 is "dense"."""
    if token_budget <= 0:
        return BUDGET_CLASSES[0]
    return BUDGET_CLASSES[1 + bisect.bisect_left(BUDGET_CLASS_BOUNDS, token_budget)]


class Recorder:
    """Writes this process's share of the metrics in :data:`METRICS`; labels are given by value, in table order."""

    def __init__(self, directory: Path) -> None:
        self._files = {kind: ValueFile(directory, kind) for kind in ("counter", "histogram", "gauge")}

    def add(self, name: str, amount: float, labels: tuple[str, ...] = ()) -> None:
        """Add ``amount`` to a counter."""
        self._files["counter"].add(_counter_key(name, labels), amount)

    def set(self, name: str, value: float, labels: tuple[str, ...] = ()) -> None:
        """Set this process's share of a gauge."""
        self._files["gauge"].set(_gauge_key(name, labels), value)

    def observe(self, name: str, value: float, labels: tuple[str, ...] = (), count: int = 1) -> None:
        """Add ``count`` observations of ``value`` to a histogram."""
        bucket_keys, sum_key = _histogram_keys(name, labels)
        histogram = self._files["histogram"]
        histogram.add(bucket_keys[bisect.bisect_left(METRICS[name].buckets, value)], count)
        histogram.add(sum_key, value * count)

    def show(self, name: str, labels: tuple[str, ...] = ()) -> None:
        """Make a metric appear before its first value, as zero."""
        if METRICS[name].type != "histogram":
            (self.set if METRICS[name].gauge else self.add)(name, 0.0, labels)
            return
        bucket_keys, sum_key = _histogram_keys(name, labels)
        for key in (*bucket_keys, sum_key):
            self._files["histogram"].add(key, 0.0)


class WorkerMetrics:
    """What one worker process has done. Each call is a few host instructions; call once a step (stages: a layer)."""

    def __init__(self, directory: Path) -> None:
        self._recorder = Recorder(directory)
        for kind in ROW_KINDS:
            self._recorder.show("quest_decode_rows_total", kind)
        for stage in STAGES:
            self._recorder.show("quest_stage_seconds_total", (stage,))
        for part in MEMORY_PARTS:
            self._recorder.show("quest_kv_cache_bytes", (part,))
        for result in AUDIT_RESULTS:
            self._recorder.show("quest_audit_pages_total", (result,))
        for name in (
            "quest_pages_selected_total",
            "quest_pages_available_total",
            "quest_tokens_attended_total",
            "quest_tokens_available_total",
            "quest_kv_bytes_read_total",
            "quest_kv_bytes_dense_total",
            "quest_token_budget",
            "quest_tokens_reached",
        ):
            self._recorder.show(name)

    def rows(self, path: str, reason: str, count: int) -> None:
        """``count`` rows took ``path`` because of ``reason``, a pair of :data:`ROW_KINDS`."""
        self._recorder.add("quest_decode_rows_total", count, (path, reason))

    def pages(self, selected: int, available: int) -> None:
        """Sparse rows attended to ``selected`` of ``available`` pages."""
        self._recorder.add("quest_pages_selected_total", selected)
        self._recorder.add("quest_pages_available_total", available)

    def tokens(self, attended: float, available: float) -> None:
        """Sparse rows attended to ``attended`` of ``available`` tokens, in one head of one layer."""
        self._recorder.add("quest_tokens_attended_total", attended)
        self._recorder.add("quest_tokens_available_total", available)

    def kv_memory(self, kv: int, summaries: int) -> None:
        """This worker's KV cache holds ``kv`` bytes of keys and values and ``summaries`` bytes of page summaries."""
        self._recorder.set("quest_kv_cache_bytes", kv, ("kv",))
        self._recorder.set("quest_kv_cache_bytes", summaries, ("summaries",))

    def audited(self, result: str, pages: int) -> None:
        """An audit found ``pages`` pages (times KV heads) to be ``result``, one of :data:`AUDIT_RESULTS`."""
        self._recorder.add("quest_audit_pages_total", pages, (result,))

    def kv_bytes(self, read: int, dense: int) -> None:
        """Decode rows read ``read`` bytes in sparse layers where dense attention would have read ``dense``."""
        self._recorder.add("quest_kv_bytes_read_total", read)
        self._recorder.add("quest_kv_bytes_dense_total", dense)

    def budget(self, tokens: int, count: int) -> None:
        """``count`` sparse rows had a budget of ``tokens``."""
        self._recorder.observe("quest_token_budget", tokens, count=count)

    def reached(self, tokens: npt.NDArray[np.int64]) -> None:
        """Heads of adaptive rows attended to ``tokens``, any shape: an observation an entry."""
        values = tokens.ravel()
        buckets = np.searchsorted(METRICS["quest_tokens_reached"].buckets, values)
        counts, sums = np.bincount(buckets), np.bincount(buckets, weights=values)
        for bucket in np.flatnonzero(counts):  # its mean lies in the bucket, and stands for all that do
            count = int(counts[bucket])
            self._recorder.observe("quest_tokens_reached", float(sums[bucket]) / count, count=count)

    def stage_seconds(self, stage: str, seconds: float) -> None:
        """``seconds`` went into ``stage``, one of :data:`STAGES`."""
        self._recorder.add("quest_stage_seconds_total", seconds, (stage,))


class LatencyMetrics:
    """Request latencies of one API server, by the class of the budget asked for (:func:`budget_class`)."""

    def __init__(self, directory: Path) -> None:
        self._recorder = Recorder(directory)
        for label in BUDGET_CLASSES:
            for name, spec in METRICS.items():
                if spec.labels == ("budget_class",):
                    self._recorder.show(name, (label,))

    def first_token(self, label: str, seconds: float) -> None:
        """A stream's first chunk went out ``seconds`` after the request came in."""
        self._recorder.observe("quest_time_to_first_token_seconds", seconds, (label,))

    def next_token(self, label: str, seconds: float) -> None:
        """A stream's next chunk went out ``seconds`` after the one before."""
        self._recorder.observe("quest_inter_token_latency_seconds", seconds, (label,))

    def end_to_end(self, label: str, seconds: float) -> None:
        """A request was answered in full after ``seconds``."""
        self._recorder.observe("quest_e2e_latency_seconds", seconds, (label,))


def get_worker_metrics() -> WorkerMetrics:
    """This process's :class:`WorkerMetrics`; a fork gets one of its own."""
    return _worker_metrics(os.getpid())


def get_latency_metrics() -> LatencyMetrics:
    """This process's :class:`LatencyMetrics`."""
    return _latency_metrics(os.getpid())


@functools.lru_cache(maxsize=1)
def _worker_metrics(_pid: int) -> WorkerMetrics:
    return WorkerMetrics(metrics_dir(active_config().metrics_dir))


@functools.lru_cache(maxsize=1)
def _latency_metrics(_pid: int) -> LatencyMetrics:
    return LatencyMetrics(metrics_dir(active_config().metrics_dir))


@functools.cache
def _counter_key(name: str, labels: tuple[str, ...]) -> str:
    spec = METRICS[name]
    return value_key(name.removesuffix("_total"), name, _labels(spec, labels), spec.help)


@functools.cache
def _gauge_key(name: str, labels: tuple[str, ...]) -> str:
    spec = METRICS[name]
    return value_key(name, name, _labels(spec, labels), spec.help)


@functools.cache
def _histogram_keys(name: str, labels: tuple[str, ...]) -> tuple[Sequence[str], str]:
    """Keys of the buckets, +Inf last, and of the sum. Counts follow from the buckets."""
    spec = METRICS[name]
    named = _labels(spec, labels)
    bounds = [*map(float, spec.buckets), float("inf")]
    buckets = [
        value_key(name, f"{name}_bucket", {**named, "le": "+Inf" if bound == float("inf") else str(bound)}, spec.help)
        for bound in bounds
    ]
    return buckets, value_key(name, f"{name}_sum", named, spec.help)


def _labels(spec: MetricSpec, values: tuple[str, ...]) -> dict[str, str]:
    return dict(zip(spec.labels, values, strict=True))
