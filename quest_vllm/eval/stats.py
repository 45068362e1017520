"""Means and paired bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

RESAMPLES = 5000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` items and its 95% interval."""

    mean: float
    low: float
    high: float
    n: int

    def as_json(self) -> dict[str, float]:
        """The fields, rounded to what they can bear."""
        return {key: round(value, 6) for key, value in asdict(self).items()}


def bootstrap_mean(groups: Sequence[Sequence[float]], seed: int = 0, span: float | None = None) -> Estimate:
    """The mean of group means and its percentile bootstrap interval; items are resampled within their group.

    One group is a plain mean. For a paired comparison hand in differences of the same items. ``span`` is the largest
    change that one item can show: where no two items of a group differ, resampling sees no spread at all, and the
    interval is widened to what the rule of three allows (3/n of ``span``, over the items of all such groups).
    """
    arrays = [np.asarray(group, dtype=np.float64) for group in groups if len(group)]
    if not arrays:
        raise ValueError("expected at least one group with an item, got none")
    rng = np.random.default_rng(seed)
    resampled = np.mean([_resampled_means(rng, array) for array in arrays], axis=0)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(resampled, [tail, 100 - tail])
    mean = float(np.mean([array.mean() for array in arrays]))
    count = sum(len(array) for array in arrays)
    if span is not None and all(np.ptp(array) == 0 for array in arrays):
        unseen = min(1.0, 3 / count) * span
        low, high = max(-span, mean - unseen), min(span, mean + unseen)
    return Estimate(mean, float(low), float(high), count)


def _resampled_means(rng: np.random.Generator, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """``[RESAMPLES]`` means of as many draws with replacement."""
    return values[rng.integers(0, len(values), (RESAMPLES, len(values)))].mean(axis=1)
