"""Latency statistics by MLPerf LoadGen's conventions, early stopping included.

Early stopping (mlcommons/inference, `loadgen/early_stopping.cc` and `results.cc`): with n samples, the p-th
percentile is below the t-th largest sample with confidence c if at most t of n samples would exceed the true
percentile with a chance below 1 - c, that is if the binomial distribution's P(X <= t; n, 1 - p) < 1 - c. The
estimate is the t-th largest sample for the largest such t; with t = 1 not yet allowed the run is too short.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

CONFIDENCE = 0.99


@dataclass(frozen=True)
class Latency:
    """Milliseconds of a run. A percentile that the count does not allow is null; the median is always given.

    Args:
        count: samples.
        mean_ms: their mean.
        min_ms: the smallest.
        max_ms: the largest.
        p50_ms: the median, as LoadGen reads a percentile p of n samples: sorted[floor(n p)].
        p90_ms: from 64 samples on.
        p95_ms: from 130 samples on.
        p99_ms: from 662 samples on.
        p99_9_ms: from 6,636 samples on.
    """

    count: int
    mean_ms: float
    min_ms: float
    max_ms: float
    p50_ms: float
    p90_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    p99_9_ms: float | None

    @property
    def percentiles(self) -> dict[str, float | None]:
        """By their names in tables."""
        return dict(zip(PERCENTILES, (self.p50_ms, self.p90_ms, self.p95_ms, self.p99_ms, self.p99_9_ms), strict=True))


#: Percentiles by their names in tables.
PERCENTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99.9": 0.999}


def _log_binomial(successes: int, trials: int, chance: float) -> float:
    ways = math.lgamma(trials + 1) - math.lgamma(successes + 1) - math.lgamma(trials - successes + 1)
    return ways + successes * math.log(chance) + (trials - successes) * math.log1p(-chance)


def overlatency_odds(overlatency: int, samples: int, percentile: float) -> float:
    """Chance that at most `overlatency` of `samples` exceed the true `percentile`."""
    return math.fsum(math.exp(_log_binomial(x, samples, 1 - percentile)) for x in range(overlatency + 1))


def allowed_overlatency(samples: int, percentile: float, confidence: float = CONFIDENCE) -> int:
    """The largest t with P(X <= t; samples, 1 - percentile) < 1 - confidence; 0 if not even t = 1 is allowed."""
    total, t = 0.0, -1
    while t < samples:
        total += math.exp(_log_binomial(t + 1, samples, 1 - percentile))
        if not total < 1 - confidence:
            break
        t += 1
    return max(t, 0)


@cache
def min_samples(percentile: float, confidence: float = CONFIDENCE) -> int:
    """Fewest samples that give an early-stopping estimate: 64 for p90, 130 for p95, 662 for p99, 6,636 for p99.9."""
    return next(n for n in itertools.count(1) if overlatency_odds(1, n, percentile) < 1 - confidence)


def early_stopping_estimate(samples: Sequence[float] | np.ndarray, percentile: float) -> float | None:
    """A value that the true percentile does not exceed, with 99 % confidence; None if the run is too short."""
    allowed = allowed_overlatency(len(samples), percentile)
    return float(np.sort(np.asarray(samples))[len(samples) - allowed]) if allowed else None


def summarize(latency_ms: Sequence[float] | np.ndarray) -> Latency:
    """The statistics of a run's samples, in milliseconds."""
    ordered = np.sort(np.asarray(latency_ms, dtype=np.float64))
    count = len(ordered)

    def at(percentile: float) -> float | None:
        return float(ordered[int(count * percentile)]) if count >= min_samples(percentile) else None

    ends = float(ordered[0]), float(ordered[-1]), float(ordered[count // 2])
    return Latency(count, float(ordered.mean()), *ends, *(at(p) for p in list(PERCENTILES.values())[1:]))
