from __future__ import annotations

import numpy as np
import pytest

from nformer_edge.report.benchmark import (
    Latency,
    allowed_overlatency,
    early_stopping_estimate,
    min_samples,
    overlatency_odds,
    summarize,
)


@pytest.mark.parametrize(("percentile", "samples"), [(0.9, 64), (0.95, 130), (0.99, 662), (0.999, 6636)])
def test_fewest_samples_are_those_of_loadgen(percentile, samples):
    assert min_samples(percentile) == samples
    assert allowed_overlatency(samples, percentile) == 1
    assert allowed_overlatency(samples - 1, percentile) == 0


@pytest.mark.parametrize(("percentile", "samples"), [(0.9, 24576), (0.99, 24576), (0.9, 500), (0.97, 3000)])
def test_allowed_overlatency_is_the_last_with_odds_under_one_percent(percentile, samples):
    allowed = allowed_overlatency(samples, percentile)
    assert overlatency_odds(allowed, samples, percentile) < 0.01
    assert overlatency_odds(allowed + 1, samples, percentile) >= 0.01


def test_odds_are_the_binomial_distributions():
    assert overlatency_odds(1, 3, 0.5) == pytest.approx(0.5)
    assert overlatency_odds(3, 3, 0.9) == pytest.approx(1.0)


def test_the_estimate_is_the_largest_sample_at_64_and_none_below():
    samples = np.random.default_rng(0).permutation(64).astype(float)
    assert early_stopping_estimate(samples, 0.9) == 63.0
    assert early_stopping_estimate(samples[:63], 0.9) is None


def test_the_estimate_discards_outliers_as_the_count_grows_and_nears_the_percentile():
    for count in (200, 2000, 20000):
        estimate = early_stopping_estimate(np.arange(count), 0.9)
        assert 0.9 * count <= estimate < count - 1
    assert early_stopping_estimate(np.arange(20000), 0.9) / 20000 == pytest.approx(0.905, abs=0.001)


def test_the_estimate_exceeds_the_true_percentile_in_99_of_100_runs():
    rng = np.random.default_rng(1)
    short = sum(early_stopping_estimate(rng.uniform(size=150), 0.9) < 0.9 for _ in range(2000))
    assert short <= 35  # 1 % of 2000 is 20


def test_percentiles_are_null_where_the_count_does_not_allow_them():
    figures = summarize(np.arange(100.0))
    assert (figures.p50_ms, figures.p90_ms) == (50.0, 90.0)
    assert figures.p95_ms is None
    assert figures.p99_9_ms is None
    assert summarize([3.0]) == Latency(1, 3.0, 3.0, 3.0, 3.0, None, None, None, None)
    assert figures.percentiles == {"p50": 50.0, "p90": 90.0, "p95": None, "p99": None, "p99.9": None}
