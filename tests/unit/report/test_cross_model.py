from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from nformer_edge.cli import main
from nformer_edge.core.errors import DataError, UsageError
from nformer_edge.core.features import Features, save_features
from nformer_edge.core.values import dumps
from nformer_edge.metrics.ranking import evaluate
from nformer_edge.metrics.verification import fit_threshold
from nformer_edge.report.cross_model import CrossModel, cross_model, other_images
from nformer_edge.report.html.page import write_report


def people(rows, camera, seed, names):
    """Eight people of the same directions, seen with noise; one image in nine is junk."""
    rng = np.random.default_rng(seed)
    pids = np.arange(rows) % 9 - 1
    centers = np.random.default_rng(99).normal(size=(9, 16))
    features = (centers[pids] + rng.normal(size=(rows, 16))).astype(np.float32)
    return Features(features, pids, np.where(np.arange(rows) % 5, camera, 3), tuple(f"{names}{i}" for i in range(rows)))


@pytest.fixture(scope="module")
def query():
    return people(60, 1, 0, "q")


@pytest.fixture(scope="module")
def gallery():
    return people(200, 2, 1, "g")


def brute(query, gallery):
    """Genuine and impostor distances, pair by pair."""
    found = {True: [], False: []}
    for f, p, c in zip(query.features.astype(float), query.pids, query.camids, strict=True):
        for x, y, d in zip(gallery.features.astype(float), gallery.pids, gallery.camids, strict=True):
            if p != -1 and y != -1 and c != d:
                found[bool(p == y)].append(1 - f @ x / np.linalg.norm(f) / np.linalg.norm(x))
    return np.array(found[True]), np.array(found[False])


@pytest.mark.parametrize("rate", [0.001, 0.01, 0.3, 0.999])
@pytest.mark.parametrize("block", [7, 256])
def test_the_threshold_accepts_the_wanted_share_of_different_people(query, gallery, rate, block):
    genuine, impostor = brute(query, gallery)
    found = fit_threshold(query, gallery, rate, also_at=0.5, block=block)
    assert (found.genuine, found.impostor) == (len(genuine), len(impostor))
    accepted = int(rate * len(impostor))
    assert (1 - impostor >= found.threshold).sum() == accepted
    assert found.rates.false_match == accepted / len(impostor)
    assert found.rates.true_match == (1 - genuine >= found.threshold).mean()
    assert found.elsewhere.false_match == (impostor <= 0.5).mean()
    assert found.elsewhere.true_match == (genuine <= 0.5).mean()


def test_pairs_that_tie_at_the_threshold_are_refused_together(query, gallery):
    alike = gallery.with_features(np.ones_like(gallery.features))
    found = fit_threshold(query.with_features(np.ones_like(query.features)), alike, 0.1)
    assert found.rates.false_match == 0
    assert found.rates.true_match == 0


def test_a_rate_below_one_pair_and_one_that_is_no_share_are_refused(query, gallery):
    with pytest.raises(UsageError, match="at least one pair"):
        fit_threshold(query, gallery, 1e-9)
    for rate in (0, 1, float("nan")):
        with pytest.raises(UsageError, match="below 1"):
            fit_threshold(query, gallery, rate)


def test_one_person_alone_has_no_impostors(query, gallery):
    with pytest.raises(DataError, match="0 of two"):
        fit_threshold(query.take(query.pids == 3), gallery.take(gallery.pids == 3), 0.1)


@pytest.fixture
def stores(query, gallery, tmp_path):
    """A store, and one of a device whose features are shifted, so that cosines grow."""
    save_features(tmp_path / "fp32.npz", {"query": query, "gallery": gallery})
    shifted = {n: s.with_features(s.features + np.float32(1)) for n, s in (("query", query), ("gallery", gallery))}
    save_features(tmp_path / "int8.npz", shifted)
    return tmp_path / "fp32.npz", tmp_path / "int8.npz"


def test_every_pairing_is_ranked_and_held_against_the_first(stores, query, gallery):
    result = cross_model(stores, false_match_rate=0.01, draws=300)
    assert CrossModel.from_json(json.loads(dumps(result.to_json()))) == result
    named = {(p.query, p.gallery): p for p in result.pairings}
    assert list(named) == [("fp32", "fp32"), ("fp32", "int8"), ("int8", "fp32"), ("int8", "int8")]
    own = named["fp32", "fp32"]
    assert (own.mAP_kept.value, own.mAP_kept.lower, own.mAP_kept.upper) == (1, 1, 1)
    mixed = named["int8", "fp32"]
    ranked = evaluate(query.with_features(query.features + np.float32(1)), gallery)
    assert mixed.mAP == ranked.mAP
    assert mixed.mAP_kept.value == pytest.approx(ranked.mAP / own.mAP)
    assert mixed.mAP_kept.lower < mixed.mAP_kept.value < mixed.mAP_kept.upper
    shifted = named["int8", "int8"]
    assert shifted.threshold > own.threshold
    assert shifted.rates.false_match <= 0.01 < shifted.shared_rates.false_match
    assert own.shared_rates == own.rates


def test_models_are_run_and_labels_that_clash_are_told_apart(dataset, grid_runner):
    models = [grid_runner(), grid_runner(distort=lambda x: x + np.float32(0.1))]
    result = cross_model(models, dataset, false_match_rate=0.05, draws=50)
    assert [m.label for m in result.models] == ["grid numpy fp32 (1)", "grid numpy fp32 (2)"]
    assert result.data.source == "images"


def test_a_ratio_that_nothing_is_known_of_is_undecided(stores):
    pairing = cross_model(stores, false_match_rate=0.01, draws=50).pairings[0]
    nan = float("nan")
    for bounds, told in (((0.5, nan, nan), "50.00 [undecided]"), ((nan, nan, nan), "undecided")):
        ratio = dataclasses.replace(pairing.mAP_kept, **dict(zip(("value", "lower", "upper"), bounds, strict=True)))
        assert dataclasses.replace(pairing, mAP_kept=ratio).cells()[4] == told


def testother_images_other_sizes_and_too_few_models_are_refused(stores, query, gallery, tmp_path):
    other = tmp_path / "other.npz"
    save_features(other, {"query": query.take(np.arange(30)), "gallery": gallery})
    with pytest.raises(DataError, match="other: query"):
        cross_model([stores[0], other])
    sets = {"query": query, "gallery": gallery}
    save_features(other, {n: dataclasses.replace(s, features=s.features[:, :8]) for n, s in sets.items()})
    with pytest.raises(DataError, match="8 numbers a row"):
        cross_model([stores[0], other])
    with pytest.raises(UsageError, match="at least two"):
        cross_model(stores[:1])
    with pytest.raises(UsageError, match="--data"):
        cross_model([stores[0], "engine"])


def test_the_command_prints_a_table_and_the_report_has_the_section(stores, tmp_path, capsys):
    kept = tmp_path / "mixed.json"
    assert main(["fleet", *map(str, stores), "--false-match-rate", "0.01", "-o", str(kept)]) == 0
    printed = capsys.readouterr().out
    assert "int8   fp32" in printed
    assert "0.01 of" in printed
    page = write_report([kept], tmp_path / "r.html").read_text()
    assert "Cross-model evaluation" in page
    assert page.count("<tr>") == 5


def test_a_model_that_prepares_images_otherwise_is_named_with_what_differs():
    ours = json.dumps({"preprocess": {"interpolation": "bilinear", "channels": "RGB"}})
    theirs = json.dumps({"preprocess": {"interpolation": "bicubic", "channels": "RGB"}})
    (note,) = other_images(["a", "b", "c", "d"], [ours, theirs, ours, ""])
    assert note == "b prepares images otherwise than a: interpolation bicubic, not bilinear"
