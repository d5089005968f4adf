"""Bootstrap over queries (Efron 1979): how sure is a score, and "this much of the reference's mAP is kept"."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from nformer_edge.core.errors import DataError
from nformer_edge.metrics.distance import row_blocks

DRAWS = 10_000
ONE_SIDED = (0.05, 0.95)  # each bound holds with 95 %
TWO_SIDED = (0.025, 0.975)  # both together hold with 95 %
_DRAWN_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Interval:
    """A mean over queries, or a difference of two, with two-sided 95 % bounds if nothing else was asked for.

    Args:
        value: of these queries.
        lower: bound.
        upper: bound.
    """

    value: float
    lower: float
    upper: float


@dataclass(frozen=True)
class Ratio(Interval):
    """Engine's mean over reference's mean, with one-sided 95 % bounds if nothing else was asked for.

    Args:
        value: null where the reference's mean is zero.
        lower: 5th percentile of the draws; null where the reference's mean is zero in any draw.
        upper: 95th percentile; null likewise.
        queries: that were scored.
        draws: of the bootstrap.
        unseen: how large a share of all queries may score worse with the engine although none of these does, with 95 %
            confidence: 1 - 0.05 ** (1 / queries). No draw shows that. 0 where one of these scores worse.
    """

    queries: int
    draws: int
    unseen: float = 0.0


def paired_ratio(
    engine: np.ndarray,
    reference: np.ndarray,
    draws: int = DRAWS,
    seed: int = 0,
    quantiles: tuple[float, float] = ONE_SIDED,
) -> Ratio:
    """Ratio of means of two scores [Q] of the same queries, such as AP, or 1 and 0 for a rank-1 hit and miss.

    Each of the draws takes the same Q queries, with replacement, of both; `quantiles` of them are the bounds.

    Raises:
        DataError: if the lengths differ, there is no query, or a score is not finite.
    """
    pairs = _checked(engine, reference)
    queries = len(engine)
    if not pairs[1].sum() > 0:
        return Ratio(math.nan, math.nan, math.nan, queries, draws)
    unseen = 0.0 if (pairs[0] < pairs[1]).any() else 1 - 0.05 ** (1 / queries)
    if (pairs[0] == pairs[1]).all():
        return Ratio(1.0, 1.0, 1.0, queries, draws, unseen)  # also where a draw would leave the reference without a hit
    value = float(pairs[0].sum() / pairs[1].sum())
    sums = _drawn_sums(pairs, draws, seed)
    if not (sums[1] > 0).all():
        return Ratio(value, math.nan, math.nan, queries, draws)
    lower, upper = np.quantile(sums[0] / sums[1], quantiles)
    return Ratio(value, float(lower), float(upper), queries, draws, unseen)


def paired_difference(
    engine: np.ndarray,
    reference: np.ndarray,
    draws: int = DRAWS,
    seed: int = 0,
    quantiles: tuple[float, float] = TWO_SIDED,
) -> Interval:
    """Engine's mean minus reference's, as `paired_ratio`; 0 with no spread where every query scores the same."""
    pairs = _checked(engine, reference)
    lower, upper = np.quantile(_drawn_sums(pairs[:1] - pairs[1:], draws, seed)[0], quantiles) / len(engine)
    return Interval(float(pairs[0].mean() - pairs[1].mean()), float(lower), float(upper))


def mean_interval(
    scores: np.ndarray, draws: int = DRAWS, seed: int = 0, quantiles: tuple[float, float] = TWO_SIDED
) -> Interval:
    """Mean of per-query scores [Q], and how far it would move with other queries of the same kind.

    Raises:
        DataError: if there is no query, or a score is not finite.
    """
    scored = _checked(scores, scores)[:1]
    lower, upper = np.quantile(_drawn_sums(scored, draws, seed)[0], quantiles) / len(scores)
    return Interval(float(scored.mean()), float(lower), float(upper))


def _checked(engine: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Both scores as float64 [2, Q]."""
    if engine.shape != reference.shape or engine.ndim != 1 or not len(engine):
        got, hint = f"shapes {engine.shape} and {reference.shape}", "Score the same queries with both models."
        raise DataError("scores", got, "the same [Q] with Q >= 1", hint)
    if not (np.isfinite(engine).all() and np.isfinite(reference).all()):
        raise DataError("scores", "NaN or infinity", "finite numbers", "Leave such queries out.")
    return np.stack([engine, reference]).astype(np.float64)


def _drawn_sums(rows: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """Sums over Q queries drawn with replacement, the same ones for every row: [R, Q] to [R, draws]."""
    queries = rows.shape[1]
    generator = np.random.default_rng(seed)
    sums = np.empty((len(rows), draws))
    for block in row_blocks(draws, max(1, _DRAWN_AT_ONCE // queries)):
        drawn = generator.integers(queries, size=(block.stop - block.start, queries))
        sums[:, block] = rows[:, drawn].sum(axis=2)
    return sums
