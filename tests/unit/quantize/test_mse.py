"""The range that errs least in 8 bits, against plain search over the values themselves."""

from __future__ import annotations

import numpy as np
import pytest

from nformer_edge.quantize.calibrate import mse_range, quantized


def histogram(values, times=1, bins=2048):
    """Of values that were seen so often each; what is seen once goes on top."""
    top = np.abs(values).max()
    counts, edges = np.histogram(values, bins, range=(-top, top))
    return counts * times, edges, values.min(), values.max()


def error(values, low, high, weights=None):
    return float(np.average((quantized(values, low, high) - values) ** 2, weights=weights))


def test_an_outlier_is_clipped_at_the_threshold_that_plain_search_over_the_values_finds():
    values = np.append(np.abs(np.random.default_rng(0).normal(0, 1, 100_000)), 40.0)
    weights = np.append(np.full(100_000, 100.0), 1.0)
    counts, edges, low, high = histogram(values, times=100)
    counts[-1] = 1
    found = mse_range(counts, edges, low, high)
    plain = min(np.linspace(0.05, 1, 400) * 40, key=lambda c: error(values, 0.0, c, weights))
    assert found[0] == 0
    assert found[1] == pytest.approx(plain, rel=0.2)
    assert error(values, *found, weights) <= 1.05 * error(values, 0.0, plain, weights)
    assert error(values, *found, weights) <= 0.5 * error(values, 0.0, 40.0, weights)


def test_both_ends_are_drawn_in_each_as_far_as_it_should():
    values = np.concatenate([[-60.0], np.random.default_rng(1).normal(0, 1, 100_000), [20.0]])
    weights = np.concatenate([[1.0], np.full(100_000, 1000.0), [1.0]])
    counts, edges, low, high = histogram(values, times=1000)
    counts[0] = counts[np.searchsorted(edges, 20.0) - 1] = 1
    found = mse_range(counts, edges, low, high)
    assert -12 <= found[0] <= -3
    assert 3 <= found[1] <= 12
    assert error(values, *found, weights) <= 0.1 * error(values, -60.0, 20.0, weights)


def test_values_that_fill_their_range_keep_it():
    values = np.random.default_rng(2).uniform(0, 5, 100_000)
    low, high = mse_range(*histogram(values))
    assert low == 0
    assert high == pytest.approx(5, rel=0.01)


def test_a_relus_zeros_cost_nothing_whatever_the_step():
    values = np.concatenate([np.zeros(1_000_000), np.random.default_rng(3).uniform(0, 8, 10_000)])
    assert mse_range(*histogram(values))[1] == pytest.approx(8, rel=0.01)


def test_a_tensor_of_zeros_has_an_empty_range():
    counts, edges = np.histogram(np.zeros(10), 16, range=(-1e-9, 1e-9))
    assert mse_range(counts, edges, 0.0, 0.0) == (0.0, 0.0)


def test_8_bits_represent_0_exactly_and_nothing_outside_the_range():
    values = np.array([-9.0, 0.0, 0.4, 9.0])
    found = quantized(values, -1.0, 3.0)
    assert found[1] == 0
    assert found[0] == pytest.approx(-1, abs=0.01)
    assert found[3] == pytest.approx(3, abs=0.01)
    assert abs(found[2] - 0.4) <= 2 / 255
