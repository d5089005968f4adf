from __future__ import annotations

import numpy as np
import pytest

from nformer_edge.core.errors import DataError, UsageError
from nformer_edge.core.features import Features
from nformer_edge.metrics.distance import cosine_distances, unit_rows
from nformer_edge.metrics.ranking import evaluate, rank, valid


def feature_set(features, pids, camids) -> Features:
    features = np.asarray(features, dtype=np.float32)
    return Features(features, np.asarray(pids), np.asarray(camids), tuple(f"{i}.jpg" for i in range(len(features))))


def on_circle(degrees, pids, camids) -> Features:
    radians = np.deg2rad(np.asarray(degrees, dtype=np.float64))
    return feature_set(np.stack([np.cos(radians), np.sin(radians)], axis=1), pids, camids)


@pytest.fixture(scope="module")
def published(golden):
    return golden("market_protocol_small")


@pytest.fixture(scope="module")
def golden_sets(published):
    return (
        feature_set(published["query"], published["q_pid"], published["q_cam"]),
        feature_set(published["gallery"], published["g_pid"], published["g_cam"]),
    )


def plain_protocol(query: Features, gallery: Features, distances: np.ndarray) -> tuple[list[float], list[float]]:
    """AP and INP of each valid query, the slow and obvious way."""
    aps, inps = [], []
    for q in range(len(query)):
        order = sorted(range(len(gallery)), key=lambda g: (distances[q, g], g))
        hits = [
            gallery.pids[g] == query.pids[q]
            for g in order
            if gallery.pids[g] != -1 and not (gallery.pids[g] == query.pids[q] and gallery.camids[g] == query.camids[q])
        ]
        ranks = [i + 1 for i, hit in enumerate(hits) if hit]
        if ranks and query.pids[q] != -1:
            aps.append(float(np.mean([(n + 1) / r for n, r in enumerate(ranks)])))
            inps.append(len(ranks) / ranks[-1])
    return aps, inps


def test_market_protocol_agrees_with_the_published_evaluation(published, golden_sets):
    result = evaluate(*golden_sets)
    assert abs(result.mAP - float(published["mAP"])) <= 1e-12
    assert np.abs(result.cmc - published["cmc"]).max() <= 1e-7


def test_reranked_distances_score_as_published(published, golden_sets):
    result = evaluate(*golden_sets, distances=published["rerank_dist"])
    assert abs(result.mAP - float(published["rerank_mAP"])) <= 1e-12
    assert np.abs(result.cmc - published["rerank_cmc"]).max() <= 1e-7


def test_swapped_gallery_rows_do_not_agree_with_the_published_evaluation(published, golden_sets):
    query, gallery = golden_sets
    shifted = gallery.with_features(np.roll(gallery.features, 1, axis=0))
    assert abs(evaluate(query, shifted).mAP - float(published["mAP"])) > 0.1


@pytest.mark.parametrize("seed", range(5))
def test_figures_agree_with_the_obvious_loop_when_distances_tie_often(seed):
    rng = np.random.default_rng(seed)
    query = feature_set(rng.normal(size=(30, 3)), rng.integers(-1, 6, 30), rng.integers(0, 3, 30))
    gallery = feature_set(rng.normal(size=(80, 3)), rng.integers(-1, 6, 80), rng.integers(0, 3, 80))
    distances = rng.integers(0, 5, size=(30, 80)).astype(np.float32)
    result = evaluate(query, gallery, distances=distances, block=7)
    aps, inps = plain_protocol(query, gallery, distances)
    assert np.allclose(result.ap[result.valid], aps, rtol=0, atol=1e-12)
    assert abs(result.mINP - np.mean(inps)) <= 1e-12


def test_equal_gallery_images_rank_by_lower_row_wherever_they_stand():
    rng = np.random.default_rng(3)
    gallery = feature_set(np.tile(rng.normal(size=(1, 64)), (9001, 1)), np.arange(9001), np.zeros(9001))
    query = feature_set(rng.normal(size=(3, 64)), [5, 6, 7], [1, 1, 1])
    assert (rank(query, gallery, top=10).indices == np.arange(10)).all()
    assert evaluate(query, gallery).first_hit.tolist() == [6, 7, 8]


def test_images_of_the_same_person_and_camera_are_left_out():
    query = on_circle([0], [1], [1])
    gallery = on_circle([1, 2, 3], [1, 2, 1], [1, 2, 2])
    assert rank(query, gallery, top=3).indices.tolist() == [[1, 2, -1]]
    assert rank(query, gallery, top=3, protocol=False).indices.tolist() == [[0, 1, 2]]
    assert evaluate(query, gallery).ap.tolist() == [0.5]


def test_two_unknown_cameras_do_not_count_as_the_same():
    query, gallery = on_circle([0], [1], [-1]), on_circle([1, 2], [2, 1], [-1, -1])
    assert evaluate(query, gallery).ap.tolist() == [0.5]


def test_junk_is_never_ranked_and_distractors_are():
    query = on_circle([0], [1], [1])
    gallery = on_circle([1, 2, 3], [-1, 0, 1], [2, 2, 2])
    assert rank(query, gallery, top=3).indices.tolist() == [[1, 2, -1]]
    assert evaluate(query, gallery).first_hit.tolist() == [2]


def test_minp_is_matches_over_the_rank_of_the_hardest():
    query = on_circle([0], [1], [1])
    gallery = on_circle([1, 2, 3, 4], [1, 2, 3, 1], [2, 2, 2, 3])
    assert evaluate(query, gallery).mINP == 2 / 4


def test_queries_without_a_match_are_left_out_and_counted():
    query = on_circle([0, 10, 20], [1, 9, -1], [1, 1, 1])
    gallery = on_circle([1, 2], [1, -1], [2, 2])
    result = evaluate(query, gallery)
    assert result.valid.tolist() == [True, False, False]
    assert (result.left_out, result.mAP, result.rank(1)) == (2, 1.0, 1.0)
    assert np.isnan(result.ap[1])


def test_a_data_error_says_so_when_no_query_has_a_match():
    with pytest.raises(DataError, match="none with a match"):
        evaluate(on_circle([0], [1], [1]), on_circle([1], [2], [2]))


def test_cmc_is_as_long_as_asked_for_however_small_the_gallery():
    result = evaluate(on_circle([0], [1], [1]), on_circle([2, 1], [1, 2], [2, 2]), max_rank=50)
    assert result.cmc.shape == (50,)
    assert result.cmc[0] == 0
    assert (result.cmc[1:] == 1).all()


def test_figures_do_not_depend_on_the_block(golden_sets):
    whole, pieces = evaluate(*golden_sets), evaluate(*golden_sets, block=1)
    assert (whole.ap == pieces.ap).all()
    assert (rank(*golden_sets).indices == rank(*golden_sets, block=3).indices).all()


def test_length_of_features_changes_nothing(golden_sets):
    query, gallery = golden_sets
    long = gallery.with_features(gallery.features * np.linspace(0.01, 1000, len(gallery), dtype=np.float32)[:, None])
    assert evaluate(query, long).mAP == evaluate(query, gallery).mAP


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_bad_features_are_refused_by_row(golden_sets, bad):
    query, gallery = golden_sets
    features = gallery.features.copy()
    features[17] = bad
    with pytest.raises(DataError, match="row 17"):
        evaluate(query, gallery.with_features(features))


def test_nan_distances_and_wrong_shapes_are_refused(published, golden_sets):
    distances = published["rerank_dist"].copy()
    with pytest.raises(DataError, match="shape"):
        evaluate(*golden_sets, distances=distances[:, 1:])
    distances[3, 3] = np.nan
    with pytest.raises(DataError, match="NaN"):
        evaluate(*golden_sets, distances=distances)


def test_features_of_two_sizes_are_refused(golden_sets):
    query, gallery = golden_sets
    with pytest.raises(DataError, match="same model"):
        evaluate(query.with_features(query.features[:, :31]), gallery)


@pytest.mark.parametrize(
    ("scoring", "ap"), [("market1501", 1.0), ("open-reid", 1 / 40), ("person-reid-baseline", 1 / 80)]
)
def test_forty_images_at_one_distance_score_as_each_project_scores_them(scoring, ap):
    query, gallery = on_circle([0], [1], [1]), on_circle([30] * 40, [1] + [2] * 39, [2] * 40)
    assert evaluate(query, gallery, scoring=scoring).mAP == pytest.approx(ap)


@pytest.mark.parametrize(
    ("scoring", "ap", "cmc"),
    [
        ("market1501", (1 / 2 + 2 / 4 + 3 / 5) / 3, [0, 1, 1, 1]),
        ("open-reid", (1 / 2 + 2 / 4 + 3 / 5) / 3, [0, 1 / 3, 1, 1]),
        ("person-reid-baseline", (0 + 1 / 2 + 1 / 3 + 2 / 4 + 2 / 4 + 3 / 5) / 6, [0, 1, 1, 1]),
    ],
)
def test_matches_at_ranks_two_four_and_five_score_as_each_project_scores_them(scoring, ap, cmc):
    query, gallery = on_circle([0], [1], [1]), on_circle([10, 20, 30, 40, 50], [2, 1, 2, 1, 1], [2] * 5)
    found = evaluate(query, gallery, scoring=scoring, max_rank=4)
    assert found.mAP == pytest.approx(ap)
    assert found.cmc == pytest.approx(cmc)
    assert found.hits(2) == pytest.approx([cmc[1]])


def test_a_query_without_a_match_is_left_out_or_counts_as_zero():
    query, gallery = on_circle([0, 0], [1, 3], [1, 1]), on_circle([10, 20], [1, 2], [2, 2])
    for scoring, mAP in (("market1501", 1.0), ("open-reid", 1.0), ("person-reid-baseline", 0.5)):
        found = evaluate(query, gallery, scoring=scoring)
        assert (found.mAP, found.rank(1)) == (pytest.approx(mAP), pytest.approx(mAP))


def test_an_unknown_scoring_is_refused_by_name():
    with pytest.raises(UsageError, match="open-reid"):
        evaluate(on_circle([0], [1], [1]), on_circle([9], [1], [2]), scoring="openreid")


@pytest.mark.optional
def test_open_reids_precision_is_scikit_learns(golden_sets):
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is missing")
    query, gallery = golden_sets
    coarse = np.round(cosine_distances(unit_rows(query.features, "q"), unit_rows(gallery.features, "g")), 1)  # ties
    found = evaluate(query, gallery, distances=coarse, scoring="open-reid")
    for i in np.flatnonzero(found.valid):
        ranked = valid(query, gallery, slice(i, i + 1))[0]
        match = gallery.pids[ranked] == query.pids[i]
        assert found.ap[i] == pytest.approx(metrics.average_precision_score(match, -coarse[i][ranked]))
