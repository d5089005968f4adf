from __future__ import annotations

import math

import numpy as np
import pytest

from nformer_edge.core.errors import DataError
from nformer_edge.core.features import Features
from nformer_edge.metrics.agreement import (
    COSINE_EDGES,
    cosine_histogram,
    cosines,
    rank_agreement,
    reciprocal_jaccard,
    row_errors,
    tensor_error,
)
from nformer_edge.metrics.bootstrap import TWO_SIDED, Ratio, mean_interval, paired_difference, paired_ratio
from nformer_edge.metrics.gates import (
    GATES,
    TITLES,
    judge,
    judge_first_match,
    judge_ratio,
    judge_tensor,
    rule,
    verdict,
    worst,
)


@pytest.fixture(scope="module")
def sets() -> tuple[Features, Features]:
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(25, 16))
    q_pids, g_pids = np.repeat(np.arange(25), 2), np.repeat(np.arange(25), 8)

    def make(pids, cameras):
        features = (centers[pids] + rng.normal(size=(len(pids), 16))).astype(np.float32)
        return Features(features, pids, cameras, ("",) * len(pids))

    return make(q_pids, np.zeros(50, int)), make(g_pids, np.ones(200, int))


def noisy(features: np.ndarray, scale: float) -> np.ndarray:
    return features + np.random.default_rng(9).normal(scale=scale, size=features.shape).astype(np.float32)


def test_every_precision_has_every_gate_once():
    for rules in GATES.values():
        assert [r.gate for r in rules] == list(TITLES)


def own(x: np.ndarray, error: float) -> np.ndarray:
    """As if the float32 reference itself were off by `error` in every row."""
    return np.full(len(x), error)


def test_a_row_may_be_off_by_four_times_the_references_own_error(sets):
    x = sets[0].features
    for factor, status in ((3.9, "passed"), (4.1, "failed")):
        moved = x.astype(np.float64) * (1 + factor * 1e-5)
        assert judge_tensor("fp32", tensor_error(moved, x, own(x, 1e-5))).status == status


def test_a_row_may_be_off_by_rounding_however_exact_the_reference_is(sets):
    x = sets[0].features
    for error, status in ((0.9e-5, "passed"), (1.1e-5, "failed")):
        moved = x.astype(np.float64)
        moved[7] *= 1 + error  # one row of all
        assert judge_tensor("fp32", tensor_error(moved, x, own(x, 0.0))).status == status


def test_an_error_is_measured_on_the_scale_of_its_own_reference_row(sets):
    x = sets[0].features
    scales = np.geomspace(1e-3, 512, len(x)).astype(np.float32)[:, None]
    found = row_errors(noisy(x, 1e-3) * scales, x * scales)
    np.testing.assert_allclose(found, row_errors(noisy(x, 1e-3), x), rtol=1e-4)


def test_without_a_float64_run_more_than_rounding_is_undecided_and_more_than_fp16_may_have_fails(sets):
    x = sets[0].features
    for error, status in ((0.9e-5, "passed"), (1e-4, "undecided"), (2.1e-3, "failed")):
        result = judge_tensor("fp32", tensor_error(x.astype(np.float64) * (1 + error), x))
        assert result.status == status
    assert "own error is not known" in judge_tensor("fp32", tensor_error(x * np.float32(1.0001), x)).note


def test_fp16_is_judged_by_the_mean_over_rows(sets):
    x = sets[0].features
    one = x.astype(np.float64)
    one[3] *= 1.05
    assert judge_tensor("fp16", tensor_error(one, x, own(x, 1e-6))).status == "passed"
    assert judge_tensor("fp16", tensor_error(x * 1.0021, x, own(x, 1e-6))).status == "failed"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("known", [True, False])
def test_one_bad_number_fails_the_tensor_and_cosine_gates(sets, bad, known):
    x = sets[0].features.copy()
    x[4, 2] = bad
    error = tensor_error(x, sets[0].features, own(x, 1e-3) if known else None)
    assert error.non_finite == 1
    for precision in ("fp32", "fp16"):
        assert judge_tensor(precision, error).status == "failed"
    assert judge(rule("fp32", "cosine_min"), float(cosines(x, sets[0].features).min())).status == "failed"


def test_a_reference_that_is_not_finite_fails_the_tensor_gate(sets):
    x = sets[0].features
    broken = x.copy()
    broken[0, 0] = np.nan
    assert judge_tensor("fp32", tensor_error(x, broken, own(x, np.nan))).status == "failed"


def test_swapped_rows_fail_the_cosine_gate(sets):
    reference = sets[0].features
    assert judge(rule("fp16", "cosine_min"), float(cosines(reference, reference).min())).status == "passed"
    assert judge(rule("fp16", "cosine_min"), float(cosines(reference[::-1], reference).min())).status == "failed"


def test_rank_agreement_is_whole_for_equal_features_and_falls_with_noise(sets):
    query, gallery = sets
    equal = rank_agreement((query, gallery), (query, gallery.with_features(gallery.features)))
    assert (equal.first, equal.overlap, len(equal.moved)) == (1.0, 1.0, 0)
    noise = rank_agreement(sets, tuple(s.with_features(noisy(s.features, 0.9)) for s in sets))
    assert noise.first < 0.9
    assert noise.overlap < 0.9
    assert judge_first_match("int8", noise).status == "failed"


def people(pids, rows):
    """Images with given features, from a camera of their own."""
    features = np.array(rows, np.float32)
    return Features(features, np.array(pids), np.full(len(pids), len(pids)), ("",) * len(pids))


def swapped(gallery, i, j):
    """The gallery's features as an engine would have them that takes each of two images for the other."""
    rows = gallery.features.copy()
    rows[[i, j]] = rows[[j, i]]
    return rows


@pytest.mark.parametrize(
    ("pids", "agrees"),
    [((1, 1), True), ((1, 2), False), ((0, 0), False)],
    ids=["one person", "two people", "two distractors, who are nobody"],
)
def test_two_images_that_change_places_at_the_top_agree_where_they_are_one_person(pids, agrees):
    query, gallery = people([1], [[1, 0, 0]]), people([*pids, 3], [[1, 0.1, 0], [1, 0.3, 0], [0, 0, 1]])
    found = rank_agreement((query, gallery), (query, gallery.with_features(swapped(gallery, 0, 1))))
    assert (found.by_person, found.compared, found.first) == (True, 1, float(agrees))
    assert found.moved.tolist() == [[0, 0, 1]]
    assert judge_first_match("fp32", found).status == ("passed" if agrees else "failed")


def test_without_labels_a_first_match_counts_where_the_reference_is_decided():
    unknown = (-1,) * 3
    far = people(unknown, [[1, 0.1, 0], [0, 1, 0], [0, 0, 1]])
    query = people((-1,), [[1, 0, 0]])
    found = rank_agreement((query, far), (query, far.with_features(far.features + np.float32(0.01))))
    assert (found.by_person, found.compared, found.undecided, found.first) == (False, 1, 0, 1.0)
    near = people(unknown, [[1, 0.1, 0], [1, 0.11, 0], [0, 0, 1]])
    found = rank_agreement((query, near), (query, near.with_features(swapped(near, 0, 1) + np.float32([[0, 0, 0.1]]))))
    assert (found.compared, found.undecided) == (0, 1)
    result = judge_first_match("fp32", found)
    assert result.status == "undecided"
    assert "undecided for 1 more" in result.note


def test_without_labels_another_image_fails_where_the_reference_is_decided():
    query, gallery = people((-1,) * 60, np.eye(60)), people((-1,) * 60, np.eye(60) + 0.01)
    moved = gallery.features.copy()
    moved[:6] = moved[5::-1]
    found = rank_agreement((query, gallery), (query, gallery.with_features(moved)))
    assert not found.by_person
    assert (found.compared, found.undecided, found.first) == (60, 0, 0.9)
    assert judge_first_match("int8", found).status == "failed"


def test_an_engine_may_choose_either_of_two_gallery_images_that_tie(sets):
    query, gallery = sets
    rows = np.repeat(np.arange(len(gallery)), 2)
    doubled = gallery.take(rows)
    nudged = doubled.features.copy()
    nudged[::2] += np.float32(1e-7) * np.random.default_rng(1).normal(size=nudged[::2].shape).astype(np.float32)
    found = rank_agreement((query, doubled), (query, doubled.with_features(nudged)), top=9)
    assert (found.first, found.overlap) == (1.0, 1.0)


def test_jaccard_is_one_for_equal_features_and_falls_with_noise(sets):
    x = sets[1].features
    assert reciprocal_jaccard(x, x) == 1.0
    assert reciprocal_jaccard(x[::-1], x) < 0.5
    assert reciprocal_jaccard(noisy(x, 0.3), x) < 0.99


def test_jaccard_agrees_with_sets_counted_one_by_one(sets):
    x, y = sets[1].features, noisy(sets[1].features, 0.3)

    def neighbors(features):
        unit = features / np.linalg.norm(features, axis=1, keepdims=True)
        order = np.argsort(-(unit @ unit.T), axis=1, kind="stable")[:, :20]
        return [{j for j in order[i] if i in order[j] and j != i} for i in range(len(order))]

    pairs = zip(neighbors(x), neighbors(y), strict=True)
    expected = np.mean([len(a & b) / len(a | b) if a | b else 1.0 for a, b in pairs])
    assert abs(reciprocal_jaccard(y, x) - expected) <= 1e-9


def test_shapes_that_differ_are_refused(sets):
    with pytest.raises(DataError, match="shapes"):
        tensor_error(sets[0].features[1:], sets[0].features)


def test_identical_scores_pass_whatever_the_bound_below_one():
    ap = np.random.default_rng(0).uniform(size=40)
    result = judge_ratio(rule("fp32", "mAP_kept"), paired_ratio(ap, ap))
    assert (result.status, result.measured, result.lower, result.upper) == ("passed", 1.0, 1.0, 1.0)


@pytest.mark.parametrize(("queries", "status"), [(20, "undecided"), (298, "undecided"), (300, "passed")])
def test_a_few_queries_without_a_loss_do_not_show_that_int8_has_none(queries, status):
    hits = np.ones(queries)
    result = judge_ratio(rule("int8", "rank1_kept"), paired_ratio(hits, hits))
    assert result.status == status
    assert "none of them scores worse" in result.note
    assert result.lower == pytest.approx(0.05 ** (1 / queries))


def test_an_engine_that_loses_two_queries_in_a_hundred_seldom_passes_int8_whatever_their_number():
    rng = np.random.default_rng(5)
    for queries in (5, 20, 80, 320):
        passed = 0
        for _ in range(100):
            kept = (rng.uniform(size=queries) > 0.02).astype(float)
            ratio = paired_ratio(kept, np.ones(queries), draws=400)
            passed += judge_ratio(rule("int8", "rank1_kept"), ratio).status == "passed"
        assert passed <= 10, queries  # 5 of 100 if the bounds were exact


def test_a_query_that_gains_does_not_decide_for_those_that_were_not_asked():
    gained = paired_ratio(np.array([1.0, 1, 1, 1, 1]), np.array([1.0, 1, 1, 1, 0.5]), draws=200)
    assert judge_ratio(rule("int8", "mAP_kept"), gained).status == "undecided"


def test_a_clear_loss_fails_and_a_loss_near_the_bound_is_undecided():
    rng = np.random.default_rng(1)
    reference = rng.uniform(0.2, 1.0, size=60)
    assert judge_ratio(rule("int8", "mAP_kept"), paired_ratio(reference * 0.9, reference)).status == "failed"
    near = reference * (0.99 + rng.normal(scale=0.05, size=60))
    assert judge_ratio(rule("int8", "mAP_kept"), paired_ratio(near, reference)).status == "undecided"


def test_more_queries_decide_what_few_leave_undecided():
    rng = np.random.default_rng(2)
    reference = rng.uniform(0.2, 1.0, size=4000)
    engine = reference * (0.997 + rng.normal(scale=0.05, size=4000))
    few = paired_ratio(engine[:20], reference[:20], draws=2000)
    many = paired_ratio(engine, reference, draws=2000)
    assert judge_ratio(rule("int8", "mAP_kept"), few).status == "undecided"
    assert judge_ratio(rule("int8", "mAP_kept"), many).status == "passed"


def test_a_reference_that_scores_nothing_leaves_the_gate_undecided():
    nothing = paired_ratio(np.zeros(5), np.zeros(5))
    assert judge_ratio(rule("fp32", "rank1_kept"), nothing).status == "undecided"
    rare = paired_ratio(np.eye(5)[0] * 0.9, np.eye(5)[0])
    assert judge_ratio(rule("fp32", "rank1_kept"), rare).status == "undecided"


def test_the_bootstrap_is_seeded_and_pairs_the_queries():
    rng = np.random.default_rng(3)
    reference = rng.uniform(size=200)
    engine = reference * 0.98
    assert paired_ratio(engine, reference, seed=5) == paired_ratio(engine, reference, seed=5)
    ratio = paired_ratio(engine, reference)
    assert ratio.upper - ratio.lower <= 1e-12  # each draw takes the same queries of both: no spread is left
    unpaired = paired_ratio(rng.permutation(engine), reference)
    assert unpaired.upper - unpaired.lower > 0.05


def test_bootstrap_bounds_cover_the_true_ratio_about_as_often_as_they_say():
    rng = np.random.default_rng(4)
    above = 0
    for trial in range(200):
        reference = rng.uniform(0.5, 1.0, size=100)
        engine = reference * 0.95 + rng.normal(scale=0.1, size=100)
        above += paired_ratio(engine, reference, draws=400, seed=trial).lower > 0.95
    assert 2 <= above <= 25  # 5 % of 200 is 10


def test_nan_scores_are_refused():
    with pytest.raises(DataError, match="NaN"):
        paired_ratio(np.array([1.0, np.nan]), np.array([1.0, 1.0]))


def test_int8_tensor_error_is_reported_and_its_cosine_only_alarms():
    assert judge(rule("int8", "tensor"), 500.0).status == "reported"
    assert judge(rule("int8", "cosine_min"), 0.5).status == "alarm"
    assert judge(rule("int8", "cosine_min"), 0.99).status == "quiet"
    assert verdict([judge(rule("int8", "cosine_min"), math.nan)]) == "passed"


def test_a_failed_gate_outweighs_an_undecided_one():
    undecided = judge_ratio(rule("fp32", "mAP_kept"), Ratio(1.0, 0.99, 1.01, 10, 100))
    failed = judge(rule("fp32", "first_match"), 0.5)
    passed = judge(rule("fp32", "first_match"), 1.0)
    assert verdict([passed]) == "passed"
    assert verdict([passed, undecided]) == "undecided"
    assert verdict([undecided, failed, passed]) == "failed"


def test_margin_is_negative_beyond_the_bound_on_either_side():
    assert judge(rule("fp32", "tensor"), 1.5).margin == -0.5
    assert judge(rule("fp16", "first_match"), 0.99).margin < 0


def test_the_difference_is_paired_and_in_the_scores_own_units():
    rng = np.random.default_rng(6)
    reference = rng.uniform(0.2, 0.9, size=300)
    found = paired_difference(reference - 0.03, reference)
    assert [found.value, found.lower, found.upper] == pytest.approx([-0.03] * 3)
    noisy_loss = paired_difference(reference - 0.03 + rng.normal(scale=0.05, size=300), reference)
    assert noisy_loss.lower < noisy_loss.value < noisy_loss.upper < 0
    same = paired_difference(reference, reference)
    assert (same.value, same.lower, same.upper) == (0, 0, 0)


def test_intervals_of_a_mean_cover_the_true_one_about_as_often_as_they_say():
    rng = np.random.default_rng(7)
    inside = 0
    for trial in range(200):
        found = mean_interval(rng.uniform(0, 1, size=80), draws=400, seed=trial, quantiles=TWO_SIDED)
        inside += found.lower <= 0.5 <= found.upper
    assert 175 <= inside <= 199  # 95 % of 200 is 190


def test_cosines_are_counted_finer_towards_one():
    counts, not_finite = cosine_histogram(np.array([1.0, 1 + 1e-9, 0.995, 0.9949, -0.3, np.nan]))
    assert (counts.sum(), not_finite) == (5, 1)
    assert (counts[0], counts[-1]) == (1, 2)
    widths = np.diff(COSINE_EDGES)
    assert (widths > 0).all()
    assert (np.diff(widths[:-1]) < 0).all()


def test_the_worst_of_several_results_is_the_worst_status_then_the_least_margin():
    held = rule("fp32", "first_match")
    assert worst([judge(held, 1.0), judge(held, 0.9), judge(held, 0.5)]) == 2
    assert worst([judge(held, 1.0), judge(held, math.nan), judge(held, 0.5)]) == 1
    reported = rule("int8", "tensor")
    assert worst([judge(reported, 3.0), judge(reported, 9.0)]) == 1
    assert worst([judge(rule("int8", "reciprocal_jaccard"), v) for v in (0.9, 0.7, 0.8)]) == 1
