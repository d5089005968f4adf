from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from nformer_edge.core.errors import DataError, UsageError
from nformer_edge.core.features import Features
from nformer_edge.core.values import from_json, to_json
from nformer_edge.metrics.composition import SIZES, Composition, composition, thin
from nformer_edge.metrics.ranking import evaluate

PEOPLE, CAMERAS, SHOTS, DISTRACTORS, JUNK = 12, 3, 3, 7, 2


@pytest.fixture(scope="module")
def pair() -> tuple[Features, Features]:
    """Each person three times under each of three cameras, of which one image asks; distractors and junk."""
    rng = np.random.default_rng(0)
    people = rng.normal(size=(PEOPLE + 1, 16))
    rows = [(p, c, i) for p in range(1, PEOPLE + 1) for c in range(CAMERAS) for i in range(SHOTS)]
    rows += [(0, 0, 1)] * DISTRACTORS + [(-1, 1, 1)] * JUNK
    pids, camids, shots = np.array(rows).T
    features = people[np.maximum(pids, 0)] + rng.normal(scale=1.5, size=(len(rows), 16))
    features[pids < 1] = rng.normal(size=(DISTRACTORS + JUNK, 16))
    every = Features(features, pids, camids)
    return every.take(shots == 0), every.take(shots > 0)


def of_person(gallery, pid):
    return gallery.take(gallery.pids == pid)


def test_each_person_asks_once_and_the_same_query_for_every_number_of_images(pair):
    query, gallery = pair
    asks = [thin(query, gallery, n, seed=3)[0] for n in SIZES]
    assert query.pids[asks[0]].tolist() == list(range(1, PEOPLE + 1))
    assert all(np.array_equal(a, asks[0]) for a in asks)


def test_a_person_keeps_n_images_and_whoever_has_fewer_keeps_them_all(pair):
    query, gallery = pair
    for n, kept in ((1, 1), (4, 4), (99, 6), (None, 6)):
        left = gallery.take(thin(query, gallery, n)[1])
        assert {len(of_person(left, p)) for p in range(1, PEOPLE + 1)} == {kept}


def test_distractors_and_junk_stay(pair):
    query, gallery = pair
    left = gallery.take(thin(query, gallery, 1)[1])
    assert (left.pids == 0).sum() == DISTRACTORS
    assert (left.pids == -1).sum() == JUNK


@pytest.mark.parametrize("seed", range(5))
def test_the_one_image_that_stays_is_of_another_camera_than_the_query(pair, seed):
    query, gallery = pair
    asks, stays = thin(query, gallery, 1, seed)
    assert evaluate(query.take(asks), gallery.take(stays)).valid.all()


def test_a_smaller_gallery_is_part_of_a_larger_one(pair):
    stays = [set(thin(*pair, n)[1].tolist()) for n in SIZES]
    assert all(few < more for few, more in itertools.pairwise(stays) if len(few) < len(more))
    assert stays[-1] == set(range(len(pair[1])))


def test_another_seed_draws_other_queries_and_images(pair):
    query, gallery = pair
    (first, kept), (second, other) = thin(query, gallery, 1, 0), thin(query, gallery, 1, 1)
    assert not np.array_equal(first, second)
    assert not np.array_equal(kept, other)


def test_a_person_without_a_match_asks_nothing_and_without_any_match_it_is_refused(pair):
    query, gallery = pair
    left = gallery.take((gallery.pids != 5) | (gallery.camids == 1))
    alone = query.take((query.pids != 5) | (query.camids == 1))
    assert 5 not in alone.pids[thin(alone, left, 1)[0]]
    with pytest.raises(DataError, match="none with a match"):
        thin(query, gallery.take(gallery.pids < 1), 1)
    with pytest.raises(UsageError, match="images"):
        thin(query, gallery, 0)


def test_the_gain_is_head_less_backbone_and_a_head_that_changes_nothing_gains_nothing(pair):
    same = composition(*pair, lambda query, gallery, seed: (query, gallery))
    assert [row.images for row in same.rows] == list(SIZES)
    assert all(row.gain.mAP.value == row.gain.rank1.value == row.gain.mAP.upper == 0 for row in same.rows)


def test_a_head_that_harms_small_galleries_alone_shows_where(pair):
    def relate(query, gallery, seed):
        counts = np.array([(gallery.pids == p).sum() for p in gallery.pids])
        harmed = gallery.features[::-1] if counts[gallery.pids > 0].max() < 2 else gallery.features
        return query, gallery.with_features(harmed)

    rows = composition(*pair, relate, draws=2).rows
    assert rows[0].gain.mAP.upper < 0
    assert all(row.gain.mAP.value == 0 for row in rows[1:])


def test_draws_and_landmark_seeds_are_averaged_person_by_person(pair):
    seen = []

    def relate(query, gallery, seed):
        seen.append((len(query), len(gallery), seed))
        return query, gallery

    found = composition(*pair, relate, landmark_seeds=(3, 4), draws=3, measured_on="made people")
    assert len(seen) == 3 * 2 * len(SIZES)
    assert {s[0] for s in seen} == {PEOPLE}
    singles = []
    for draw in range(3):
        asks, stays = thin(*pair, 1, draw)
        singles.append(evaluate(pair[0].take(asks), pair[1].take(stays)).mAP)
    assert found.rows[0].backbone.mAP.value == pytest.approx(np.mean(singles))
    assert found.rows[0].people == PEOPLE
    assert from_json(Composition, json.loads(json.dumps(to_json(found)))) == found


def test_without_a_head_there_is_no_gain(pair):
    assert all(row.head is None and row.gain is None for row in composition(*pair).rows)


def test_a_search_is_judged_by_queries_that_were_alone(pair):
    told = []

    def ask(query, gallery, seed, images):
        told.append(images)
        bad = np.zeros((len(query), len(gallery)), np.float32)
        return bad, 1 - query.features @ gallery.features.T

    found = composition(*pair, lambda query, gallery, seed: (query, gallery), ask)
    assert found.searched
    assert all(row.gain.mAP.value == 0 > row.alone_gain.mAP.value for row in found.rows)
    assert found.expected_gain([1])[0] == found.rows[0].alone_gain.mAP.value
    assert told[:3] == pytest.approx([1, 2, 4])
    assert found.expected_gain([1], told=True)[0] == found.rows[0].told_gain.mAP.value
    assert all(row.told_gain.mAP.value > row.alone_gain.mAP.value for row in found.rows)
    joint = composition(*pair, lambda query, gallery, seed: (query, gallery))
    assert not joint.searched
    assert joint.expected_gain([1])[0] == 0
