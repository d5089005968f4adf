from __future__ import annotations

import numpy as np
import pytest
from helpers import numpy_reranking
from hypothesis import given
from hypothesis import strategies as st

from nformer_edge.core.errors import DataError, UsageError
from nformer_edge.metrics.distance import alike, nearest, reciprocal_mask, smallest, unit_rows
from nformer_edge.metrics.rerank import (
    average_query_expansion,
    graph_propagation,
    k_reciprocal_distances,
    mutual_sum,
    reciprocal_mean,
)
from nformer_edge.ops import native


@pytest.fixture(scope="module")
def published(golden):
    return golden("market_protocol_small")


def test_distances_agree_with_the_published_reranking(published):
    distances = k_reciprocal_distances(published["query"], published["gallery"])
    assert distances.dtype == np.float32
    assert np.abs(distances - published["rerank_dist"]).max() <= 1e-5


@pytest.mark.parametrize("change", [{"k1": 19}, {"k2": 5}, {"lambda_": 0.31}])
def test_other_parameters_do_not_agree_with_the_published_reranking(published, change):
    distances = k_reciprocal_distances(published["query"], published["gallery"], **change)
    assert np.abs(distances - published["rerank_dist"]).max() > 1e-3


def test_length_of_features_changes_no_order(published):
    longer = k_reciprocal_distances(published["query"] * 7, published["gallery"] * 0.1)
    assert np.abs(longer - published["rerank_dist"]).max() <= 2e-3  # one step of half precision


def test_a_gallery_smaller_than_k1_is_reranked():
    rng = np.random.default_rng(0)
    distances = k_reciprocal_distances(rng.normal(size=(2, 8)), rng.normal(size=(3, 8)))
    assert distances.shape == (2, 3)
    assert np.isfinite(distances).all()


def people(images: int, spread: float = 0.5, seed: int = 0) -> np.ndarray:
    """Features of people with about ten images each, float64 [N, 32]."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(images // 10 + 1, 32))[rng.integers(images // 10 + 1, size=images)] + spread * rng.normal(
        size=(images, 32)
    )


@pytest.mark.parametrize("parameters", [{}, {"k1": 1, "k2": 1}, {"k1": 7, "k2": 9}, {"k1": 30, "lambda_": 0.0}])
@pytest.mark.parametrize(("queries", "gallery"), [(30, 400), (1, 60), (90, 30), (3, 5)])
def test_distances_agree_with_numpys(queries, gallery, parameters):
    features = people(queries + gallery)
    expected = numpy_reranking.k_reciprocal_distances(features[:queries], features[queries:], **parameters)
    distances = k_reciprocal_distances(features[:queries], features[queries:], **parameters)
    assert np.abs(distances - expected).max() <= 1e-6


@pytest.mark.parametrize("copies", [2, 11, 12, 40])
def test_equal_images_have_equal_distances(copies):
    features = people(120)
    order = np.random.default_rng(1).permutation(100 + copies)
    gallery = np.concatenate([features[20:], np.repeat(features[70:71], copies, axis=0)])[order]
    query = np.concatenate([features[:20], features[70:71] * 3, features[3:4]])
    distances = k_reciprocal_distances(query, gallery)
    equal = np.flatnonzero((order >= 100) | (order == 50))
    assert (distances[:, equal] == distances[:, equal[:1]]).all()
    assert (distances[21] == distances[3]).all()
    assert distances[20, equal[0]] == distances[20].min() < 0.01  # weights in half precision do not add up to 1


def test_a_gallery_of_equal_images_is_reranked_without_nan():
    distances = k_reciprocal_distances(np.ones((2, 4)), np.ones((40, 4)))
    assert np.isfinite(distances).all()
    assert (distances == distances[0, 0]).all()


def test_results_depend_neither_on_threads_nor_on_the_instruction_set(monkeypatch):
    features = people(200)
    expected = k_reciprocal_distances(features[:40], features[40:])
    for isa in native.instruction_sets():
        monkeypatch.setenv(native.ISA_VARIABLE, isa)
        monkeypatch.setattr(native, "default_threads", lambda: 3)
        assert (k_reciprocal_distances(features[:40], features[40:]) == expected).all()


def test_bad_features_and_parameters_are_refused(published):
    with pytest.raises(DataError, match="gallery features"):
        k_reciprocal_distances(published["query"], np.zeros_like(published["gallery"]))
    with pytest.raises(UsageError, match="k1"):
        k_reciprocal_distances(published["query"], published["gallery"], k1=0)
    with pytest.raises(UsageError, match="lambda"):
        k_reciprocal_distances(published["query"], published["gallery"], lambda_=1.5)


def test_smallest_breaks_ties_by_lower_column():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 6, size=(50, 200)).astype(np.float32)
    for k in (1, 7, 60, 199, 200, 300):
        assert (smallest(values, k) == np.argsort(values, axis=1, kind="stable")[:, :k]).all()


def test_an_image_leads_its_own_list_though_another_equals_it():
    assert nearest(unit_rows(np.ones((5, 3))), 2)[0].tolist() == [[0, 1], [1, 0], [2, 0], [3, 0], [4, 0]]


def test_reciprocal_mask_is_the_topk_mask_times_its_transpose():
    rng = np.random.default_rng(1)
    lists, _ = nearest(unit_rows(rng.normal(size=(90, 5))), 8)
    mask = np.zeros((90, 90), dtype=bool)
    np.put_along_axis(mask, lists, True, axis=1)
    assert (reciprocal_mask(lists) == np.take_along_axis(mask & mask.T, lists, axis=1)).all()


def test_reciprocal_mean_averages_those_who_chose_each_other():
    rng = np.random.default_rng(2)
    query, gallery = rng.normal(size=(10, 6)), rng.normal(size=(50, 6))
    unit = unit_rows(np.concatenate([query, gallery])).astype(np.float64)
    order = np.argsort(-(unit @ unit.T), axis=1, kind="stable")[:, :9]
    mask = np.zeros((60, 60))
    np.put_along_axis(mask, order, 1, axis=1)
    mask *= mask.T
    expected = mask @ unit / mask.sum(axis=1, keepdims=True)
    got = np.concatenate(reciprocal_mean(query, gallery, k=9))
    assert np.abs(got - expected).max() <= 1e-6


def test_reciprocal_means_of_more_equal_images_than_k_are_that_image():
    query, gallery = np.tile([3.0, 4.0], (3, 1)), np.tile([6.0, 8.0], (9, 1))
    assert np.abs(np.concatenate(reciprocal_mean(query, gallery, 4)) - [0.6, 0.8]).max() <= 1e-6


def test_mutual_sums_add_those_who_chose_each_other():
    features = people(60)
    unit = unit_rows(features).astype(np.float64)
    order = np.argsort(-(unit @ unit.T), axis=1, kind="stable")[:, :4]
    mask = np.zeros((60, 60))
    np.put_along_axis(mask, order, 1, axis=1)
    got = np.concatenate(mutual_sum(features[:10], features[10:], k=3))
    assert np.abs(got - (mask * mask.T) @ unit).max() <= 1e-6


def test_graph_propagation_is_a_power_of_the_sparse_affinity():
    features = people(60)
    unit = unit_rows(features).astype(np.float64)
    cosines = unit @ unit.T
    mask = np.zeros((60, 60))
    np.put_along_axis(mask, np.argsort(-cosines, axis=1, kind="stable")[:, :5], 1, axis=1)
    expected = unit
    for _ in range(2):
        expected = (mask * cosines.clip(0) ** 2) @ expected
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    got = np.concatenate(graph_propagation(features[:10], features[10:], k=5))
    assert np.abs(got - expected).max() <= 1e-6


@pytest.mark.parametrize("k", [1, 5, 80])
def test_query_expansion_is_the_mean_with_the_nearest_of_a_sorted_matrix(k):
    features = people(90)
    unit = unit_rows(features).astype(np.float64)
    order = np.argsort(-(unit[:30] @ unit[30:].T), axis=1, kind="stable")[:, :k]
    expected = unit[:30] + unit[30:][order].sum(axis=1)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert np.abs(average_query_expansion(features[:30], features[30:], k) - expected).max() <= 1e-6


def test_query_expansion_moves_a_query_to_its_nearest_gallery_images():
    query, gallery = np.array([[1.0, 0.0]]), np.array([[0.8, 0.6], [-1.0, 0.0], [0.8, 0.6]])
    expanded = average_query_expansion(query, gallery, k=2)
    expected = np.array([2.6, 1.2]) / np.hypot(2.6, 1.2)
    assert np.abs(expanded[0] - expected).max() <= 1e-6


@given(st.lists(st.integers(-38, 37), min_size=1, max_size=6), st.integers(0, 99))
def test_unit_rows_do_not_depend_on_how_large_or_small_rows_are(powers, seed):
    rows = np.random.default_rng(seed).uniform(0.5, 1, size=(len(powers), 16)) * [[1], [-1]][seed % 2]
    scaled = (rows * 10.0 ** np.array(powers)[:, None]).astype(np.float32)
    np.testing.assert_allclose(unit_rows(scaled), unit_rows(rows), rtol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(unit_rows(scaled), axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**-60, 2.0**60, 2.0**120])
def test_a_scaled_row_keeps_its_bits_and_its_rank(scale):
    rows = np.random.default_rng(0).normal(size=(30, 64)).astype(np.float32)
    scaled = rows * np.where(np.arange(30) % 2, np.float32(scale), np.float32(1))[:, None]
    assert (unit_rows(scaled) == unit_rows(rows)).all()


def test_features_that_are_nearly_all_alike_are_noted_and_sound_ones_are_not():
    rng = np.random.default_rng(0)
    sound, white = rng.normal(size=(600, 32)), np.ones((600, 32)) + rng.normal(scale=0.01, size=(600, 32))
    assert alike(sound, "gallery") == alike(white[:7], "gallery") == alike(np.zeros((9, 4)), "gallery") == ()
    (note,) = alike(white, "gallery")
    assert note.startswith("gallery: nearly all features are alike (mean cosine 0.9999)")
    white[::2] = np.nan
    assert alike(white, "gallery")
