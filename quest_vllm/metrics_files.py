"""How a number gets from a worker process to ``/metrics``: one small mmap file per process, summed by the API server.

vLLM has no channel for a plugin's metrics. The files are in prometheus_client's multiprocess format, so that both of
vLLM's modes work with the same writer:

- one API server: files in a directory of our own, which :class:`FilesCollector` (registered by
  :mod:`quest_vllm.stat_logger`) sums;
- several API servers (or ``PROMETHEUS_MULTIPROC_DIR`` set by hand): files in that directory, which
  prometheus_client's own collector sums.

A process that dies leaves its file, so its counts stay. Files live as long as the server: the process that named the
directory removes it. Workers on another host are not seen.

A store into a mapped file on a full disk kills the process (SIGBUS). So every file takes its room at start-up, which
fails with a message where there is none, and none grows: a disk that fills up later changes nothing.
"""

from __future__ import annotations

import atexit
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from prometheus_client.metrics_core import Metric
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector

from quest_vllm.errors import QuestConfigError

ENV_RUN_DIR = "_QUEST_VLLM_RUN_DIR"
"""Set by the first process of a server, inherited by its children; not for users (see ``metrics_dir``)."""
ENV_PROMETHEUS_DIR = "PROMETHEUS_MULTIPROC_DIR"
VALUE_FILE_BYTES = 2**17
"""Twice what the largest recorder writes; a test holds that."""


def ensure_metrics_dir() -> None:
    """Name this server's metrics directory, for this process and those that it starts. Idempotent.

    Must run in the server's first process before it starts others: ``plugin.register()`` calls it. Creates nothing.
    """
    if ENV_RUN_DIR in os.environ:
        return
    run_dir = Path(tempfile.gettempdir()) / f"quest_vllm-{os.getpid()}-{secrets.token_hex(8)}"
    os.environ[ENV_RUN_DIR] = str(run_dir)
    remove_at_exit(run_dir)


def metrics_dir(configured: str | None = None) -> Path:
    """The directory of this server's metrics files, created if need be.

    ``configured`` is the server default ``metrics_dir``, under which each server gets a folder of its own. Raises
    :class:`~quest_vllm.errors.QuestConfigError` if it cannot be created.
    """
    prometheus = os.environ.get(ENV_PROMETHEUS_DIR)
    if prometheus:
        path = Path(prometheus)
    else:
        ensure_metrics_dir()
        run_dir = Path(os.environ[ENV_RUN_DIR])
        path = Path(configured) / run_dir.name if configured else run_dir
    return make_directory(path)


def make_directory(path: Path) -> Path:
    """Make ``path``, for this user alone where it is new. Raises :class:`~quest_vllm.errors.QuestConfigError`."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise QuestConfigError(
            f"metrics_dir: expected a directory that can be written to, got {path}: {error}"
        ) from error
    return path


def is_multiprocess() -> bool:
    """Whether ``/metrics`` is served from prometheus_client's multiprocess files instead of the process's registry."""
    return bool(os.environ.get(ENV_PROMETHEUS_DIR))


def remove_at_exit(path: Path) -> None:
    """Remove ``path`` when this process exits, and not when a fork of it does."""
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:
            shutil.rmtree(path, ignore_errors=True)

    atexit.register(remove)


def set_aside(path: Path, size: int) -> None:
    """Make the file ``path`` of ``size`` zero bytes, with its room on the disk.

    Raises :class:`~quest_vllm.errors.QuestConfigError` where there is no such room, or no right to write.
    """
    try:
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise QuestConfigError(
            f"metrics_dir: expected a directory with room for {size >> 10} KiB, got {path.parent}: {error}"
        ) from error


class ValueFile:
    """Doubles of one process and one metric type (counter, histogram or gauge), in a file that others may read.

    Gauges are summed over processes. Adding is an in-memory sum and a 16-byte store. Raises
    :class:`~quest_vllm.errors.QuestConfigError` if ``directory`` cannot be written to.
    """

    def __init__(self, directory: Path, metric_type: str) -> None:
        # prometheus_client reads from the name how to merge gauges
        prefix = "gauge_sum" if metric_type == "gauge" else metric_type
        final = directory / f"{prefix}_quest-{os.getpid()}-{secrets.token_hex(4)}.db"
        unfinished = final.with_suffix(".tmp")
        set_aside(unfinished, VALUE_FILE_BYTES)
        self._file: Any = MmapedDict(str(unfinished))  # type: ignore[no-untyped-call]
        self._values: dict[str, float] = {}
        self._lock = threading.Lock()
        unfinished.rename(final)

    def add(self, key: str, amount: float) -> None:
        """Add ``amount`` to the value of ``key``, one of :func:`value_key`."""
        with self._lock:
            value = self._values.get(key, 0.0) + amount
            self._values[key] = value
            self._file.write_value(key, value, 0.0)

    def set(self, key: str, value: float) -> None:
        """Make ``value`` the value of ``key``."""
        with self._lock:
            self._values[key] = value
            self._file.write_value(key, value, 0.0)


def value_key(metric: str, sample: str, labels: Mapping[str, str], help_text: str) -> str:
    """The key of one value in a :class:`ValueFile`, in prometheus_client's format."""
    return mmap_key(metric, sample, list(labels), list(labels.values()), help_text)


class FilesCollector:
    """A prometheus_client collector that sums the files of a directory at each scrape.

    It has no ``_name``, so vLLM's ``unregister_vllm_metrics`` leaves it alone.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def describe(self) -> list[Metric]:
        """Nothing: the files may come later than the registration."""
        return []

    def collect(self) -> Iterable[Metric]:
        """Sums over all processes, dead ones included; nothing before the first worker has started."""
        files = [str(path) for path in sorted(self._directory.glob("*.db"))]
        merged: Iterable[Metric] = MultiProcessCollector.merge(files)  # type: ignore[no-untyped-call]
        return merged
