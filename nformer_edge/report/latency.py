"""Latency statistics by MLPerf LoadGen's conventions, early stopping included.

Early stopping (mlcommons/inference, `loadgen/early_stopping.cc` and `results.cc`): with n samples, the p-th
percentile is below the t-th largest sample with confidence c if at most t of n samples would exceed the true
percentile with a chance below 1 - c, that is if the binomial distribution's P(X <= t; n, 1 - p) < 1 - c. The
estimate is the t-th largest sample for the largest such t; with t = 1 not yet allowed the run is too short.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

CONFIDENCE = 0.99
PERCENTILES = (0.5, 0.9, 0.95, 0.99, 0.999)


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
    low, high = 1, 2
    while not overlatency_odds(1, high, percentile) < 1 - confidence:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if overlatency_odds(1, middle, percentile) < 1 - confidence else (middle, high)
    return high


def early_stopping_estimate(samples: Sequence[float] | np.ndarray, percentile: float) -> float | None:
    """A value that the true percentile does not exceed, with 99 % confidence; None if the run is too short."""
    allowed = allowed_overlatency(len(samples), percentile)
    return float(np.sort(np.asarray(samples))[len(samples) - allowed]) if allowed else None


def percentile_name(percentile: float) -> str:
    """0.9 to ``p90``, 0.999 to ``p99.9``."""
    return f"p{100 * percentile:.6g}"


def summarize(latency_ms: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """Percentiles as LoadGen reads them (sorted[floor(n p)]), each only where the count allows it, else null.

    The median is given for any count. All in milliseconds.
    """
    ordered = np.sort(np.asarray(latency_ms, dtype=np.float64))
    count = len(ordered)
    figures: dict[str, Any] = {
        "count": count,
        "mean_ms": float(ordered.mean()),
        "min_ms": float(ordered[0]),
        "max_ms": float(ordered[-1]),
    }
    for p in PERCENTILES:
        enough = p == 0.5 or count >= min_samples(p)
        figures[f"{percentile_name(p)}_ms"] = float(ordered[int(count * p)]) if enough else None
    return figures
