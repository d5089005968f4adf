"""A gallery in memory, through the model that callers open."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nformer_edge.core.errors import DataError, UsageError
from nformer_edge.core.features import Features
from nformer_edge.gallery import model as face
from nformer_edge.gallery.held import seconds_of
from nformer_edge.gallery.model import search
from nformer_edge.gallery.results import GalleryStats
from nformer_edge.gallery.search import Matches
from nformer_edge.targets.build import build

CROPS = np.random.default_rng(0).integers(0, 256, (5, 64, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model(tiny_bundle):
    with face.open(tiny_bundle, intra_op_threads=1) as opened:
        yield opened


@pytest.fixture
def gallery(model):
    made = model.gallery()
    assert made.add(CROPS[:3], ids=["alice", "bob", "alice"], cameras=[1, 2, 2], times=[0, 60, 120]).total == 3
    return made


def test_images_added_are_found_under_their_ids(model, gallery):
    assert gallery.add([*CROPS[3:]], ids=[7, 8]).total == len(gallery) == 5
    found = gallery.search(CROPS, top=2, head=False)
    assert [matches[0].index for matches in found] == [0, 1, 2, 3, 4]
    assert [matches[0].id for matches in found] == ["alice", "bob", "alice", "7", "8"]
    assert found[1][0].camera == 2
    assert found.cameras[3, 0] == -1
    np.testing.assert_allclose(found.scores[:, 0], 1, atol=1e-5)
    assert "   1  1.0000  bob" in str(found)
    assert "5 queries, 5 gallery images searched by the backbone, onnxruntime" in str(found)
    back = Matches.from_json(found.to_json())
    assert list(back) == list(found)


def test_a_search_gives_what_a_search_over_features_gives(model, gallery):
    features = model.embed(CROPS[:3])
    for settings in ({}, {"head": True}, {"head": False}, {"head": True, "together": True}):
        by_gallery = gallery.search(CROPS[3:], top=3, **settings)
        by_features = search(model, model.embed(CROPS[3:]), features, top=3, **settings)
        np.testing.assert_array_equal(by_gallery.indices, by_features.indices)
        np.testing.assert_allclose(by_gallery.scores, by_features.scores, atol=1e-6)
        assert by_gallery.protocol == by_features.protocol


def test_matches_under_the_threshold_do_not_count_and_are_not_printed(gallery):
    found = gallery.search(CROPS[3:], top=3, head=False)
    between = float(np.sort(found.scores.ravel())[-2:].mean())
    cut = gallery.search(CROPS[3:], top=3, head=False, threshold=between)
    assert cut.accepted.sum() == 1
    assert found.accepted.all()
    assert str(cut).count("no match: the best cosine is") == 1
    assert Matches.from_json(cut.to_json()).threshold == between
    with pytest.raises(UsageError, match="1 - cosine is a distance"):
        gallery.search(CROPS[3:], threshold=1.5)


def test_filters_that_leave_nobody_are_named_as_the_reason(gallery):
    none = gallery.search(CROPS[3], cameras=99, head=False)
    assert (len(none[0]), none.searched) == (0, 0)
    assert "no match: no gallery image passes the filters" in str(none)


def test_the_head_sees_each_query_alone(gallery):
    together, among = (gallery.search(CROPS[3:], head=True, together=t) for t in (True, False))
    alone = gallery.search(CROPS[4], head=True)
    assert (among.protocol, together.protocol) == ("per-query", "joint")
    np.testing.assert_allclose(among.scores[1], alone.scores[0], atol=1e-6)


def test_the_live_head_follows_a_gallery_that_changes(model, gallery):
    first = gallery.search(CROPS[3:], head=True)
    live = gallery._head._live
    assert len(live) == 3
    gallery.add(CROPS[3:], ids=["eve", "joe"])
    found = gallery.search(CROPS[3:], head=True, top=5)
    assert [row[0] for row in found.ids] == ["eve", "joe"]
    assert found.searched == len(gallery._head._live) == 5
    for way in ({"exact": False}, {"shortlist": 3}):
        quick = gallery.search(CROPS[3:], head=True, top=5, **way)
        assert quick.protocol == "quick"
        assert [row[0] for row in quick.ids] == ["eve", "joe"]
        assert quick.indices.shape == (2, 3 if "shortlist" in way else 5)
    filtered = gallery.search(CROPS[3:], head=True, top=5, shortlist=2, exclude_camera=2)
    assert (filtered.cameras.shape, 2 in filtered.cameras) == ((2, 2), False)
    gallery.remove(["eve", "joe"])
    again = gallery.search(CROPS[3:], head=True)
    assert again.ids == first.ids
    assert gallery._head._live is live
    np.testing.assert_allclose(again.scores, first.scores, atol=1e-5)


def test_equal_images_are_ordered_by_id_and_then_as_they_were_added(model):
    gallery = model.gallery()
    for number, name in enumerate("cabac"):
        gallery.add(CROPS[0], ids=name, cameras=number)
    found = gallery.search(CROPS[0], head=False)
    assert found.ids == (("a", "a", "b", "c", "c"),)
    assert found.cameras.tolist() == [[1, 3, 2, 0, 4]]
    assert gallery.search(CROPS[0], top=3, head=False).cameras.tolist() == [[1, 3, 2]]


def test_an_id_is_removed_with_all_its_images(gallery):
    assert gallery.remove("alice").images == 2
    assert gallery.features.ids == ("bob",)
    assert gallery.search(CROPS[0], head=False).ids == (("bob",),)
    with pytest.raises(DataError, match=r"ids: got 'bop'.*Nothing was removed. The most similar id is 'bob'"):
        gallery.remove(["bob", "bop"])
    assert len(gallery) == 1
    assert gallery.remove("bob").images == 1
    with pytest.raises(DataError, match="gallery: got zero images"):
        gallery.search(CROPS[0])


def test_images_without_ids_are_called_by_person_path_or_number(model, tiny_market):
    gallery = model.gallery()
    first = sorted((tiny_market / "query").iterdir())[0]
    gallery.add(first)
    gallery.add(CROPS[:2])
    gallery.add(Features(model.embed(CROPS[2]).features, np.array([9])))
    assert gallery.features.ids == (str(first), "1", "2", "9")
    gallery.add(CROPS[3:], ids="carol")
    assert gallery.features.ids[4:] == ("carol", "carol")


def test_people_in_a_frame_are_added_and_searched_by_their_boxes(model):
    frame, boxes = np.concatenate([*CROPS], axis=1), [[32 * i, 0, 32 * i + 32, 64] for i in range(5)]
    gallery = model.gallery()
    gallery.add(frame, ids=list("abcde"), boxes=boxes)
    np.testing.assert_array_equal(model.embed(frame, boxes).features, model.embed(CROPS).features)
    found = gallery.search(frame, top=1, boxes=boxes[::-1], head=False)
    assert found.ids == (("e",), ("d",), ("c",), ("b",), ("a",))
    for settings in ({"head": True}, {"head": False}):
        assert len(gallery.search(frame, boxes=[], **settings)) == 0


def test_what_does_not_fit_is_refused_and_nothing_is_added(model, gallery):
    with pytest.raises(DataError, match=r"ids: got 1 for 2 images"):
        gallery.add(CROPS[:2], ids=["a"])
    with pytest.raises(DataError, match=r"cameras: got 3 for 2 images"):
        gallery.add(CROPS[:2], cameras=[1, 2, 3])
    with pytest.raises(DataError, match="images: got features of another model"):
        gallery.add(Features(np.ones((1, 32), np.float32), model="0" * 64))
    with pytest.raises(DataError, match="images: got all zeros in row 0"):
        gallery.add(Features(np.zeros((1, 32), np.float32)))
    with pytest.raises(DataError, match=r"shape \(1, 31\)"):
        gallery.add(Features(np.ones((1, 31), np.float32)))
    assert len(gallery) == 3


def test_a_gallery_says_what_it_holds(model, gallery):
    assert str(gallery) == (
        "3 images of 2 ids, 2 cameras, seen 1970-01-01T00:00:00Z to 1970-01-01T00:02:00Z: "
        "32 numbers as fp32, 136 bytes an image, 0.0 MiB, model osnet_x0_25_64x32"
    )
    assert GalleryStats.from_json(gallery.to_json()) == gallery.stats()
    assert str(model.gallery()).startswith("0 images of 0 ids: 32 numbers as fp32")


def test_a_gallery_s_features_are_kept_in_a_file_and_added_again(model, gallery, tmp_path):
    gallery.features.save(tmp_path / "g.npz")
    again = model.gallery()
    again.add(Features.load(tmp_path / "g.npz"), times=[0, 60, 120])
    assert again.stats() == gallery.stats()
    found, before = again.search(CROPS[:2]), gallery.search(CROPS[:2])
    assert (found.ids, found.times.tolist()) == (before.ids, before.times.tolist())
    np.testing.assert_array_equal(found.scores, before.scores)
    assert search(model, CROPS[:2], tmp_path / "g.npz").ids == gallery.search(CROPS[:2]).ids


def test_features_of_bundle_and_checkpoint_are_taken_by_each_other(model, tiny_checkpoint, tiny_bundle):
    with face.open(tiny_checkpoint, intra_op_threads=1) as checkpoint:
        theirs, ours = checkpoint.embed(CROPS), model.embed(CROPS)
        assert ours.model != theirs.model
        assert ours.checkpoint == theirs.checkpoint == theirs.model
        expected = [(0,), (1,), (2,), (3,), (4,)]
        assert [tuple(r) for r in search(model, CROPS, theirs, top=1, head=False).indices] == expected
        assert [tuple(r) for r in search(checkpoint, CROPS, ours, top=1, head=False).indices] == expected


def test_features_of_an_int8_engine_are_refused_beside_the_fp32_bundle(model, tiny_bundle, tiny_market, tmp_path):
    images = tiny_market / "bounding_box_train"
    build(tiny_bundle, tmp_path / "int8", precision="int8", backend="onnxruntime", calib_data=images)
    with face.open(tmp_path / "int8", intra_op_threads=1) as engine:
        engine.embed(CROPS).save(tmp_path / "int8.npz")
        assert len(search(engine, CROPS[:1], tmp_path / "int8.npz")) == 1
        with pytest.raises(DataError, match=r"queries: got features computed in fp32, expected int8, as here"):
            search(engine, model.embed(CROPS), tmp_path / "int8.npz")
    with pytest.raises(DataError, match=r"gallery: got features computed in int8, .*`nformer-edge fleet` measures"):
        search(model, CROPS[:1], tmp_path / "int8.npz")
    with pytest.raises(DataError, match=r"images: got features computed in int8, expected fp32"):
        model.gallery().add(Features.load(tmp_path / "int8.npz"))
    old = replace(Features.load(tmp_path / "int8.npz"), precision="")
    assert len(search(model, CROPS[:1], old, head=False)) == 1, "an older store does not say"


def test_a_path_may_stand_for_the_model(model, tiny_bundle):
    features = face.embed(tiny_bundle, CROPS)
    np.testing.assert_allclose(features.features, face.embed(model, CROPS).features, rtol=1e-4, atol=1e-5)
    found = search(tiny_bundle, CROPS[0], features, top=2)
    assert found.indices.tolist() == search(model, CROPS[0], features, top=2).indices.tolist()


@pytest.mark.parametrize(
    "wrong", [{"a": 1}.keys(), (n for n in "ab"), {"a", "b"}, [None, "a"], [7.0, 8.0], [b"a", b"b"], ""]
)
def test_ids_of_another_kind_are_refused_and_nothing_is_added(model, gallery, wrong):
    held = len(gallery)
    with pytest.raises(DataError, match="ids"):
        gallery.add(CROPS[:2], ids=wrong)
    assert len(gallery) == held


def test_a_gallery_is_not_merged_with_itself_and_nothing_is_removed_without_being_named(gallery):
    with pytest.raises(UsageError, match="itself"):
        gallery.merge(gallery)
    with pytest.raises(UsageError, match="no id"):
        gallery.remove()


@pytest.mark.parametrize("wrong", ["3", [3], 3.5, True])
def test_a_camera_to_leave_out_is_one_whole_number(gallery, wrong):
    with pytest.raises(UsageError, match="exclude_camera"):
        gallery.search(CROPS[:1], exclude_camera=wrong)


@pytest.mark.parametrize("name", ["one_person", "exact", "together"])
def test_a_flag_that_is_no_boolean_is_refused(gallery, name):
    with pytest.raises(UsageError, match=f"{name}: got 'no', expected True or False"):
        gallery.search(CROPS[:1], **{name: "no"})
    gallery.search(CROPS[:1], **{name: np.bool_(False)})


def test_a_new_id_has_512_bytes_at_most(gallery):
    gallery.add(CROPS[:1], "é" * 256)
    with pytest.raises(DataError, match=r"514 bytes, .*expected at most 512 bytes in UTF-8"):
        gallery.add(CROPS[:1], "é" * 257)
    with pytest.raises(DataError, match="an id of the gallery"):
        gallery.remove("é" * 257)  # an older gallery may hold one


@pytest.mark.parametrize(("text", "day"), [("2026", "2026-01-01"), ("2026-11", "2026-11-01")])
def test_a_time_without_a_day_is_refused_with_one(text, day):
    with pytest.raises(UsageError, match=f"Name the day, too: {day}"):
        seconds_of("since", text)


def test_times_are_seconds_in_any_spelling_and_milliseconds_are_refused():
    assert seconds_of("time", "1795907863") == seconds_of("time", 1795907863) == 1795907863
    assert seconds_of("time", "20261128") == seconds_of("time", "2026-11-28")
    with pytest.raises(UsageError, match="seconds"):
        seconds_of("time", 1795907863829)
