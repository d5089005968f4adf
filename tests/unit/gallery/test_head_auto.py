"""`search --head auto`: the model's table by images a person decides, and the answer says so."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from nformer_edge.core.errors import UsageError
from nformer_edge.core.features import Features
from nformer_edge.gallery.held import Held
from nformer_edge.gallery.model import open as open_model
from nformer_edge.gallery.search import ALLOWED_LOSS, LEAST_IMAGES, head_decision, head_use
from nformer_edge.metrics.bootstrap import Interval
from nformer_edge.metrics.composition import SIZES, Composition, CompositionRow, Scores

CROPS = np.random.default_rng(0).integers(0, 256, (5, 64, 32, 3), dtype=np.uint8)


def scores_of(mAP: float, rank1: float) -> Scores:
    return Scores(*(Interval(x, x, x) for x in (mAP, rank1)))


def table(gains: dict[int | None, tuple[float, float]]) -> Composition:
    """With these gains of mAP and Rank-1 for n images a person."""
    rows = (
        CompositionRow(n, 9, 9, scores_of(0.5, 0.5), scores_of(0.5, 0.5), scores_of(*gain), None, None)
        for n, gain in gains.items()
    )
    return Composition("9 people held out of training", 1, tuple(rows))


#: Harm with few images, help with many: the paper's head.
PAPER = table(dict(zip(SIZES, [(-0.2, -0.25), (-0.1, -0.15), (0.0, -0.05), (0.06, 0.01), (0.1, 0.02)], strict=True)))


def model(accuracy: Composition | None, has_head: bool = True) -> SimpleNamespace:
    return SimpleNamespace(accuracy=accuracy, has_head=has_head)


def gallery(*counts: int, **labels: object) -> Features:
    """So many images of person 1, 2 and so on."""
    pids = np.repeat(np.arange(1, len(counts) + 1), counts)
    return Features(np.ones((len(pids), 2)), **({"pids": pids} | labels))


def test_the_paper_s_head_is_used_with_many_images_a_person_and_not_with_few():
    assert head_decision(model(PAPER), gallery(8, 9, 30))[0]
    assert not head_decision(model(PAPER), gallery(1, 1, 2))[0]


def test_without_labels_the_worst_case_counts_unless_the_caller_knows_better():
    unknown = gallery(20, 20, pids=np.full(40, -1))
    use, why = head_decision(model(PAPER), unknown)
    assert not use
    assert "n = 1 image a person (the worst case" in why
    assert "-20.0 points mAP" in why
    assert "9 people held out of training" in why
    use, why = head_decision(model(PAPER), unknown, images_per_person=10)
    assert use
    assert "n = 10 images a person (given)" in why
    with pytest.raises(UsageError, match="images_per_person"):
        head_use(model(PAPER), "auto", unknown, images_per_person=0)


def test_a_gallery_s_ids_tell_the_head_once_an_id_has_two_images():
    def told(*counts: int) -> float | None:
        return Held.of_features(gallery(*counts)).told_images

    assert told(1, 1, 1) is None
    assert told(2, 2, 2) == 2
    assert told(8, 8, 9, 8) == 8
    assert told(1, 16) == 2
    assert told(4, 4, 400) == pytest.approx(4 * 2**0.5)


def test_a_head_that_is_told_is_judged_by_what_it_gains_then():
    rows = tuple(replace(row, told=row.head, told_gain=row.gain and scores_of(0.1, 0.1)) for row in PAPER.rows)
    told = model(replace(PAPER, rows=rows))
    assert not head_decision(told, gallery(*[1] * 9))[0]
    assert head_decision(told, gallery(*[1] * 9), images_per_person=1)[0]
    assert head_decision(told, Held.of_features(gallery(*[2] * 9)))[0]


def test_people_count_one_by_one_and_a_few_rich_ones_do_not_decide():
    assert not head_decision(model(PAPER), gallery(*[1] * 9, 400))[0]
    assert head_decision(model(PAPER), gallery(1, *[9] * 99))[0]


def test_distractors_are_no_person_with_many_images():
    pids = np.array([0] * 50 + [1, 2, 3])
    assert not head_decision(model(PAPER), Features(np.ones((53, 2)), pids))[0]
    named = Features(np.ones((53, 2)), pids, ids=tuple(map(str, pids)))
    assert not head_decision(model(PAPER), named)[0]


def test_ids_are_people_where_the_caller_gave_them():
    names = tuple(f"person {i // 8}" for i in range(40))
    use, why = head_decision(model(PAPER), gallery(40, pids=np.full(40, -1), ids=names))
    assert use
    assert "n = 8 images a person (the gallery's labels)" in why


@pytest.mark.parametrize(("mAP", "rank1", "used"), [(0.0, 0.0, True), (-0.002, -0.004, True), (-0.004, 0.1, False)])
def test_a_loss_within_the_allowance_is_no_harm(mAP, rank1, used):
    assert ALLOWED_LOSS == (0.003, 0.005)
    assert head_decision(model(table(dict.fromkeys(SIZES, (mAP, rank1)))), gallery(*[1, 2] * 5))[0] is used


def test_without_a_measurement_the_head_is_not_used_and_the_answer_says_how_to_get_one():
    use, why = head_decision(model(None), gallery(8))
    assert not use
    assert "nothing was measured" in why
    assert "--data" in why
    assert head_decision(model(None, has_head=False), gallery(8)) == (False, "")


def test_among_very_few_images_the_head_is_not_used():
    good = table(dict.fromkeys(SIZES, (0.1, 0.1)))
    assert head_decision(model(good), gallery(LEAST_IMAGES))[0]
    use, why = head_decision(model(good), gallery(LEAST_IMAGES - 1))
    assert not use
    assert f"{LEAST_IMAGES - 1} images in the gallery" in why


def test_a_search_says_what_it_did(tiny_bundle, monkeypatch):
    with open_model(tiny_bundle, intra_op_threads=1) as opened:
        people = opened.gallery()
        people.add(CROPS[[0, 1, 2, 3, 0, 1, 2, 3]], ids=[*"aabbccdd"])
        found = people.search(CROPS[4])
        assert found.protocol is None
        assert found.decision == str(found).splitlines()[-1] != ""
        monkeypatch.setattr(opened.runner, "accuracy", table(dict.fromkeys(SIZES, (0.01, 0.02))))
        helped = people.search(CROPS[4])
        assert helped.protocol == "per-query"
        assert helped.decision.startswith("head used: +1.0 points mAP, +2.0 Rank-1 at n = 2")
        np.testing.assert_array_equal(helped.scores, people.search(CROPS[4], head=True).scores)
        assert people.search(CROPS[4], head=True).decision == ""
        monkeypatch.setattr(opened.runner, "has_head", False)
        assert people.search(CROPS[4], head=True).decision == "head not used: the model has none"
        for wrong in ({"head": "no"}, {"head": None}, {"head": True, "images_per_person": 0}, {"threshold": "0.6"}):
            with pytest.raises(UsageError, match=[*wrong][-1]):
                people.search(CROPS[4], **wrong)
