"""How sure a mean over films is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap


@dataclass(frozen=True)
class Figure:
    """A mean over films with its 95 % bootstrap interval; `films` are those that have a value."""

    mean: float
    low: float
    high: float
    films: int


def summarize(values: Sequence[float | None]) -> Figure:
    """Mean of one value per film, NaN left out, with the percentile bootstrap over films (2000 resamples, seed 0)."""
    found = np.array([value for value in values if value is not None and np.isfinite(value)], dtype=float)
    if len(found) < 2:
        mean = float(found.mean()) if len(found) else float("nan")
        return Figure(mean, mean, mean, len(found))
    interval = bootstrap((found,), np.mean, n_resamples=2000, method="percentile", rng=0).confidence_interval
    return Figure(float(found.mean()), float(interval.low), float(interval.high), len(found))
