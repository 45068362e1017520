"""Next-token distributions kept by :mod:`.forcing`, and how far two of them are apart. Nats throughout.

A record is an ``.npy`` file of natural-log probabilities, float32 ``[steps, vocab_size]``. Step 0 comes from the dense
prefill and is left out of every number here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np


def new_record(path: Path, steps: int, vocab_size: int) -> Path:
    """An empty record: NaN until written, so that a step that was never written cannot pass for a result."""
    record = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(steps, vocab_size))
    record[:] = np.nan
    record.flush()
    return path


def mean_nll(path: Path, tokens: Sequence[int]) -> float:
    """The mean over steps 1.. of -log p(``tokens[step]``)."""
    record = np.load(path, mmap_mode="r")
    steps = np.arange(1, len(tokens))
    return _finite(-float(record[steps, np.asarray(tokens)[1:]].mean(dtype=np.float64)))


def compare(dense: Path, sparse: Path) -> dict[str, float]:
    """``kl``: the mean of KL(dense || sparse) over steps 1..; ``top1_agreement``: how often both have one argmax."""
    reference, other = np.load(dense, mmap_mode="r"), np.load(sparse, mmap_mode="r")
    same = reference[1:].argmax(axis=1) == other[1:].argmax(axis=1)
    return {"kl": kl_by_record(dense, sparse), "top1_agreement": float(same.mean())}


def kl_by_record(dense: Path, sparse: Path) -> float:
    """The mean of KL(dense || sparse) over steps 1.. ."""
    reference, other = np.load(dense, mmap_mode="r"), np.load(sparse, mmap_mode="r")
    divergences = []
    for step in range(1, len(reference)):
        p, q = reference[step].astype(np.float64), other[step].astype(np.float64)
        possible = ~np.isneginf(p)  # a padded vocabulary
        divergences.append(float(np.exp(p[possible]) @ (p[possible] - q[possible])))
    return _finite(float(np.mean(divergences)))


def _finite(value: float) -> float:
    if not np.isfinite(value):
        raise ValueError(f"expected a finite mean over recorded steps, got {value}: a step was not recorded")
    return value
