"""What the CUDA kernels compute, run on the CPU from the very header that nvcc compiles, against float64."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import pytest
import torch
from helpers.gated import FACTOR, gated_case, gated_formula
from helpers.row_logic import (
    assert_top_k_within_rounding,
    attention_case,
    draw,
    exact_scores,
    reference_attention,
    reference_top_k,
    sums_in_float32,
)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("factors", [1, 2, 3, 4, 5, 6, 8, 9, 16, 17, 64, 300])
def test_row_top_k_agrees_with_float64_at_every_factor_length(row_logic, factors, dtype) -> None:
    a, b = draw(factors, 2, 19, factors, dtype=dtype), draw(factors + 1, 2, 333, factors, dtype=dtype)
    assert_top_k_within_rounding(row_logic.row_top_k(a, b, 20), a, b, 20)


@pytest.mark.parametrize("factors", [5, 16, 40])
@pytest.mark.parametrize("k", [1, 2, 31, 32, 33, 64, 65, 127, 128])
def test_row_top_k_agrees_with_float64_at_every_list_length(row_logic, k, factors) -> None:
    a, b = draw(k, 1, 9, factors), draw(k + 1, 1, 700, factors)
    assert_top_k_within_rounding(row_logic.row_top_k(a, b, k), a, b, k)


@pytest.mark.parametrize("columns", [0, 1, 7, 31, 32, 33, 127, 128, 129, 511, 512, 513, 1025])
@pytest.mark.parametrize("factors", [5, 20])
def test_row_top_k_agrees_with_float64_about_every_tile_border(row_logic, columns, factors) -> None:
    a, b = draw(columns, 1, 11, factors), draw(columns + 1, 1, columns, factors)
    got = row_logic.row_top_k(a, b, 40)
    if columns == 0:
        assert (got == -1).all()
    else:
        assert_top_k_within_rounding(got, a, b, 40)


@pytest.mark.parametrize("k", [1, 20, 32, 100, 128])
@pytest.mark.parametrize("levels", [1, 2, 30, 1000])
def test_row_top_k_is_exact_with_ties_when_columns_are_sampled_first(row_logic, k, levels) -> None:
    # Small integers make every sum exact; more than 8,192 columns take the way through the sampled threshold.
    rng = np.random.default_rng(levels)
    a = rng.integers(-3, 4, (1, 3, 5)).astype(np.float32)
    b = rng.integers(0, levels, (1, 8900, 5)).astype(np.float32)
    assert np.array_equal(row_logic.row_top_k(a, b, k), reference_top_k(exact_scores(a, b), k))


@pytest.mark.parametrize("order", ["rising", "falling", "blocks"])
@pytest.mark.parametrize("k", [20, 128])
def test_row_top_k_is_exact_when_columns_are_sorted(row_logic, order, k) -> None:
    column = np.arange(9000, dtype=np.float32)
    column = {"rising": column, "falling": -column, "blocks": column % 512}[order]
    a, b = np.ones((1, 2, 1), np.float32), column[None, :, None]
    assert np.array_equal(row_logic.row_top_k(a, b, k), reference_top_k(exact_scores(a, b), k))


@pytest.mark.parametrize("factors", [1, 5, 16, 24])
def test_row_top_k_breaks_ties_by_lower_index(row_logic, factors) -> None:
    a = np.ones((2, 5, factors), np.float32)
    assert np.array_equal(row_logic.row_top_k(a, np.ones((2, 300, factors), np.float32), 20)[1, 4], np.arange(20))
    zeros = np.zeros((2, 300, factors), np.float32)
    zeros[:, ::2] = -0.0  # minus zero ties with zero
    assert np.array_equal(row_logic.row_top_k(a, zeros, 40)[0, 0], np.arange(40))


@pytest.mark.parametrize("factors", [1, 5, 24])
@pytest.mark.parametrize("columns", [40, 9000])
def test_row_top_k_never_chooses_a_score_that_is_not_finite(row_logic, columns, factors) -> None:
    a, b = draw(1, 1, 4, factors), draw(2, 1, columns, factors)
    a[0, :, 0] = 1.0
    b[0, 0::3, 0], b[0, 1::7, 0], b[0, 2::11, 0] = np.inf, -np.inf, np.nan
    scores = np.where(np.isfinite(b[0, :, 0])[None, None], exact_scores(a, np.nan_to_num(b)), np.nan)
    got = row_logic.row_top_k(a, b, 64)
    sure = reference_top_k(scores, 64)
    assert (np.isfinite(b[0, got[got >= 0], 0])).all()
    assert np.array_equal(got < 0, sure < 0)


def test_row_top_k_leaves_a_row_of_nan_empty_and_the_others_alone(row_logic) -> None:
    a, b = draw(3, 1, 9, 5), draw(4, 1, 100, 5)
    clean = row_logic.row_top_k(a, b, 8)
    a[0, 4] = np.nan
    got = row_logic.row_top_k(a, b, 8)
    assert (got[0, 4] == -1).all()
    assert np.array_equal(np.delete(got, 4, 1), np.delete(clean, 4, 1))


def test_row_top_k_takes_the_lowest_finite_score_and_refuses_what_overflows(row_logic) -> None:
    most = np.finfo(np.float32).max
    a = np.array([[[1.0], [2.0], [1e-45]]], np.float32)
    b = np.array([[[most], [-most], [1.0], [1e-45]]], np.float32)
    expected = reference_top_k(sums_in_float32(a, b), 5)
    assert np.array_equal(row_logic.row_top_k(a, b, 5), expected)
    assert expected[0, 0].tolist() == [0, 2, 3, 1, -1]
    assert expected[0, 1].tolist() == [2, 3, -1, -1, -1]


@pytest.mark.parametrize("seed", range(25))
def test_row_top_k_is_exact_on_small_integers_of_any_shape(row_logic, seed) -> None:
    rng = np.random.default_rng(100 + seed)
    heads, rows, columns = int(rng.integers(1, 4)), int(rng.integers(0, 40)), int(rng.integers(0, 700))
    factors, k = int(rng.integers(1, 40)), int(rng.integers(1, 129))
    a = rng.integers(-4, 5, (heads, rows, factors)).astype(np.float16)
    b = rng.integers(-4, 5, (heads, columns, factors)).astype(np.float16)
    expected = reference_top_k(exact_scores(a, b), k)
    assert np.array_equal(row_logic.row_top_k(a, b, k), expected)
    assert np.array_equal(row_logic.row_top_k(a.astype(np.float32), b.astype(np.float32), k), expected)


def test_the_comparison_notices_a_wrong_neighbor() -> None:
    a, b = draw(5, 1, 3, 5), draw(6, 1, 50, 5)
    right = reference_top_k(exact_scores(a, b), 10)
    assert_top_k_within_rounding(right, a, b, 10)
    for wrong in (right[:, :, ::-1], np.where(right == right[0, 0, 0], right[0, 0, 1], right)):
        with pytest.raises(AssertionError):
            assert_top_k_within_rounding(wrong, a, b, 10)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(
    ("factors", "size", "k"), [(5, 128, 20), (1, 4, 1), (16, 132, 33), (300, 64, 128), (5, 260, 64)]
)
def test_attention_agrees_with_float64(row_logic, factors, size, k, dtype, wide) -> None:
    case = attention_case(k, 2, 90, factors, size, k, dtype)
    scale = 1 / math.sqrt(size)
    expected = reference_attention(*case, scale)
    got = row_logic.attention(*case, scale, wide)
    tolerance = 1e-3 if dtype == np.float16 else 1e-5
    assert (np.abs(got - expected) <= tolerance * (1 + np.abs(expected))).all()


@pytest.mark.parametrize("size", [1, 3, 31, 33, 127, 130])
def test_attention_takes_any_value_size(row_logic, size) -> None:
    case = attention_case(size, 1, 40, 5, size, 10)
    assert (np.abs(row_logic.attention(*case, 0.5) - reference_attention(*case, 0.5)) <= 1e-5).all()


def test_attention_takes_one_list_for_all_heads(row_logic) -> None:
    a, b, v, neighbors = attention_case(8, 3, 50, 5, 32, 12)
    shared = neighbors[:1]
    expected = row_logic.attention(a, b, v, np.repeat(shared, 3, axis=0), 0.3)
    assert np.array_equal(row_logic.attention(a, b, v, shared, 0.3), expected)


def test_attention_of_a_row_that_nobody_chose_is_exactly_zero(row_logic) -> None:
    a, b, v, _ = attention_case(9, 1, 6, 5, 8, 2)
    neighbors = np.array([[[1, 2], [0, -1], [3, -1], [4, -1], [3, -1], [-1, -1]]], np.int32)
    got = row_logic.attention(a, b, v, neighbors, 1.0)
    assert np.array_equal(got[0, 0], v[0, 1])
    assert np.array_equal(got[0, [2, 5]], np.zeros((2, 8), np.float32))
    assert np.array_equal(got[0, 3], v[0, 4])


def test_attention_counts_a_neighbor_whose_score_is_zero(row_logic) -> None:
    a, b, v, neighbors = attention_case(10, 1, 5, 5, 4, 5)
    a[:] = 0
    expected = np.broadcast_to(v.astype(np.float64).mean(axis=1, keepdims=True), v.shape)
    assert (np.abs(row_logic.attention(a, b, v, neighbors, 1.0) - expected) <= 1e-6).all()


@pytest.mark.parametrize("scale", [-2.0, 0.0, 1e30, -1e30, 1e-30])
def test_attention_is_sound_at_any_scale(row_logic, scale) -> None:
    a, b, v, neighbors = attention_case(11, 1, 30, 5, 8, 9)
    got = row_logic.attention(a, b, v, neighbors, scale)
    assert (np.abs(got - reference_attention(a, b, v, neighbors, scale)) <= 1e-5).all()


def test_attention_is_sound_where_scores_span_the_float_range(row_logic) -> None:
    a = np.full((1, 3, 1), 1e19, np.float32)
    b = np.array([[[3e19], [-3e19], [3e19]]], np.float32)
    v = draw(12, 1, 3, 4)
    neighbors = np.array([[[0, 1, 2]] * 3], np.int32)
    expected = np.broadcast_to((v[:, 0] + v[:, 2]) / 2, v.shape)
    assert (np.abs(row_logic.attention(a, b, v, neighbors, 1.0) - expected) <= 1e-6).all()


def test_attention_passes_over_scores_that_are_not_finite_and_places_out_of_range(row_logic) -> None:
    a, b, v, neighbors = attention_case(13, 1, 30, 5, 8, 6)
    b[0, 3], b[0, 7, 0], a[0, 11] = np.nan, np.inf, np.nan
    neighbors[0, 5, 2], neighbors[0, 6, 1] = 30, 2**31 - 1
    got = row_logic.attention(a, b, v, neighbors, 0.7)
    assert (np.abs(got - reference_attention(a, b, v, neighbors, 0.7)) <= 1e-5).all()
    assert (got[0, 11] == 0).all()


@pytest.mark.parametrize("cameras", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("heads", "lists", "thresholds", "k"), [(1, 1, 1, 20), (2, 1, 2, 33), (2, 2, 1, 128)])
def test_the_gated_attention_agrees_with_float64(row_logic, heads, lists, thresholds, k, dtype, cameras) -> None:
    case = gated_case(heads, 90, 5, 36, k, lists=lists, thresholds=thresholds, cameras=cameras)
    a, b, v = (x.numpy().astype(dtype) for x in case[:3])
    neighbors, scale, t, known = case[3:]
    wide = [torch.from_numpy(x).double() for x in (a, b, v)]
    expected = gated_formula(*wide, neighbors, scale, t.double(), known).numpy()
    arrays = [None if x is None else x.numpy() for x in (t, known)]
    got = row_logic.attention(a, b, v, neighbors.numpy(), scale, True, *arrays, FACTOR)
    tolerance = 2e-3 if dtype == np.float16 else 1e-5
    assert (np.abs(got - expected) <= tolerance * (1 + np.abs(expected))).all()


def test_the_gated_attention_passes_over_what_is_not_finite_and_places_out_of_range(row_logic) -> None:
    case = gated_case(1, 30, 5, 8, 30, lists=1, thresholds=1, cameras=False)
    a, b, v, neighbors, scale, t = (x.numpy().copy() if isinstance(x, torch.Tensor) else x for x in case[:6])
    bad = [3, 4, 5, 6, 7]
    without = np.where(np.isin(neighbors, bad), -1, neighbors)
    without[0, bad] = -1
    expected = row_logic.attention(a, b, v, without, scale, t=t)
    t[0, 3:6], b[0, 6:8], a[0, 6:8] = (np.nan, np.inf, -np.inf), np.nan, np.inf
    assert np.array_equal(row_logic.attention(a, b, v, neighbors, scale, t=t), expected)
    neighbors[neighbors == -1] = 30
    neighbors[0, 9, neighbors[0, 9] == 30] = 2**31 - 1
    assert np.array_equal(row_logic.attention(a, b, v, neighbors, scale, t=t), expected)


def test_the_test_warp_reads_and_writes_halves_as_numpy_does(row_logic) -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    number = every[~np.isnan(every.view(np.float16))]
    back = np.empty_like(number)
    pointers = (ctypes.c_void_p(number.ctypes.data), ctypes.c_void_p(back.ctypes.data))
    row_logic.lib.host_half_round_trip(*pointers, ctypes.c_int64(number.size))
    assert np.array_equal(number, back)
    wide = np.concatenate([draw(14, 20000) * s for s in (1e-8, 1e-5, 1, 1e5)]).astype(np.float32)
    got = np.empty(wide.size, np.uint16)
    row_logic.lib.host_to_half(
        ctypes.c_void_p(wide.ctypes.data), ctypes.c_void_p(got.ctypes.data), ctypes.c_int64(wide.size)
    )
    with np.errstate(over="ignore"):
        assert np.array_equal(got, wide.astype(np.float16).view(np.uint16))
