"""From which cosine a match counts: rates a query, in the unit that `search` prints."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest

from nformer_edge.cli import main
from nformer_edge.core.errors import DataError, UsageError
from nformer_edge.core.features import Features
from nformer_edge.core.values import dumps
from nformer_edge.data.records import Dataset
from nformer_edge.gallery.search import search
from nformer_edge.metrics.distance import cosine_distances, unit_rows
from nformer_edge.metrics.verification import CUTS, measure_acceptance
from nformer_edge.report.threshold import Threshold, threshold


def people(rows, seed):
    rng = np.random.default_rng(seed)
    pids = np.arange(rows) % 6 - 1
    centers = np.random.default_rng(9).normal(size=(6, 8))
    features = centers[pids] + rng.normal(size=(rows, 8))
    return Features(features, pids, np.arange(rows) // 6 % 3)


@pytest.fixture(scope="module")
def query():
    return people(24, 0)


@pytest.fixture(scope="module")
def gallery():
    return people(48, 1)


def cosines(query, gallery):
    return 1 - cosine_distances(unit_rows(query.features), unit_rows(gallery.features))


def measured(query, gallery, size, **more):
    return measure_acceptance(query, gallery, [(slice(0, len(query)), cosines(query, gallery))], size, **more)


@pytest.mark.parametrize("cut", [0.0, 0.3, 0.6])
def test_a_query_is_wrong_if_any_stranger_of_the_gallery_is_accepted(query, gallery, cut):
    asked, seen = query.take(query.pids > 0), gallery.take(gallery.pids > 0)
    scores, same = cosines(asked, seen), asked.pids[:, None] == seen.pids[None]
    strangers = int((~same).sum(axis=1)[0])
    found, at = measured(asked, seen, strangers), int(np.flatnonzero(cut == CUTS)[0])
    assert found.wrong[at] == ((scores >= cut) & ~same).any(axis=1).mean()
    assert found.false_match[at] == (scores[~same] >= cut).mean()
    assert found.found[at] == ((scores >= cut) & same).any(axis=1).mean()
    across = same & (asked.camids[:, None] != seen.camids[None])
    assert found.found_across[at] == ((scores >= cut) & across)[across.any(axis=1)].any(axis=1).mean()


def test_a_smaller_gallery_is_drawn_without_replacement(query, gallery):
    asked, seen = query.take(np.flatnonzero(query.pids == 2)[:1]), gallery.take(np.flatnonzero(gallery.pids > 2)[:8])
    scores, at = cosines(asked, seen)[0], 2000
    drawn = [bool((scores[list(three)] >= CUTS[at]).any()) for three in itertools.combinations(range(8), 3)]
    assert measured(asked, seen, 3).wrong[at] == pytest.approx(np.mean(drawn))
    share = (scores >= CUTS[at]).mean()
    assert measured(asked, seen, 20).wrong[at] == pytest.approx(1 - (1 - share) ** 20)


def test_junk_asks_for_nobody_and_is_nobody(query, gallery):
    kept = query.take(query.pids != -1), gallery.take(gallery.pids != -1)
    whole, without = measured(query, gallery, 10), measured(*kept, 10)
    assert (whole.queries, whole.strangers) == (without.queries, without.strangers)
    np.testing.assert_allclose(whole.wrong, without.wrong)


def test_without_labels_the_nearest_images_are_a_crops_own(query):
    crops = dataclasses.replace(query, pids=np.full(len(query), -1))
    scores = cosines(crops, crops)
    np.fill_diagonal(scores, np.nan)
    found = measure_acceptance(crops, crops, [(slice(0, len(crops)), scores)], 20, nearest_left_out=3)
    fourth = np.sort(np.nan_to_num(scores, nan=-2), axis=1)[:, -4]
    assert found.strangers == len(crops) * (len(crops) - 1 - 3)
    np.testing.assert_array_equal(found.wrong > 0, (fourth[:, None] >= CUTS).any(axis=0))
    assert np.isnan(found.found).all()


def test_one_person_alone_has_no_strangers(query):
    alone = query.take(query.pids == 2)
    with pytest.raises(DataError, match="different people"):
        measured(alone, alone, 5)


def test_search_accepts_strangers_at_the_rate_that_the_threshold_was_chosen_for(dataset, grid_runner):
    runner = grid_runner()
    result = threshold(runner, dataset, rate=0.1)
    assert [curve.protocol for curve in result.curves] == [None, "per-query"]
    by_path = {r.path: r.pid for r in dataset.query + dataset.gallery}
    for curve in result.curves:
        assert curve.chosen.wrong_queries <= 0.1
        queries, cut = [r.path for r in dataset.query], curve.chosen.threshold
        found = search(runner, queries, dataset, len(dataset.gallery), head=bool(curve.protocol), threshold=cut)
        pairs = zip(found.queries, found.accepted, found.paths, strict=True)
        wrong = [
            any(by_path[path] != by_path[q] for path, ok in zip(paths, row, strict=True) if ok)
            for q, row, paths in pairs
        ]
        sizes = {
            sum(by_path[p] != by_path[q] for p in paths) for q, paths in zip(found.queries, found.paths, strict=True)
        }
        assert min(sizes) == result.gallery_size
        assert np.mean(wrong) <= 0.1 or len(sizes) > 1
        assert len({point.rate for point in curve.points}) == len(curve.points)
    assert Threshold.from_json(json.loads(dumps(result.to_json()))) == result


def test_crops_that_nobody_labeled_give_a_weaker_threshold_that_says_so(dataset, grid_runner):
    images = tuple(dataclasses.replace(r, pid=-1) for r in dataset.query + dataset.gallery)
    crops = Dataset("crops", "crops", gallery=images, explicit=False)
    result = threshold(grid_runner(), crops, rate=0.1, images_per_person=4)
    assert [curve.protocol for curve in result.curves] == [None, "joint"]
    assert result.images_per_person == 4
    assert "weaker, because nobody labeled the images" in str(result)
    assert all(np.isnan(curve.chosen.found) for curve in result.curves)
    assert Threshold.from_json(json.loads(dumps(result.to_json()))).curves[0].chosen.threshold > 0


def test_a_rate_under_one_query_and_a_gallery_beyond_the_data_are_told(dataset, grid_runner):
    runner = grid_runner(head=False)
    with pytest.raises(UsageError, match="at least one query"):
        threshold(runner, dataset, rate=1e-6)
    with pytest.raises(UsageError, match="below 1"):
        threshold(runner, dataset, rate=1.0)
    assert "extrapolated" in str(threshold(runner, dataset, rate=0.1, gallery_size=10**6))


def test_the_command_prints_the_flag_for_search(dataset, tiny_bundle, capsys):
    assert main(["threshold", str(tiny_bundle), "--data", dataset.root, "--rate", "0.2", "--limit", "8"]) == 0
    told = capsys.readouterr().out
    assert "search: --threshold" in told or "no cosine is high enough" in told
