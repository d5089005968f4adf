"""Images to features to ranked galleries, through the public functions behind the commands."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from nformer_edge.backends.onnxruntime.run import OnnxRuntimeRunner
from nformer_edge.backends.open import open_model
from nformer_edge.core.errors import DataError, UsageError
from nformer_edge.core.features import Features, load_features, save_features
from nformer_edge.core.spec import ModelSpec
from nformer_edge.data.readers import read_dataset
from nformer_edge.gallery.embed import embed_dataset, embed_files, embed_records
from nformer_edge.gallery.held import Held
from nformer_edge.gallery.model import open as open_gallery_model
from nformer_edge.gallery.model import search
from nformer_edge.gallery.protocols import relate_each, relate_sets
from nformer_edge.gallery.search import Matches, top_matches
from nformer_edge.ops.contract import draw_landmarks


@pytest.fixture(scope="module")
def runner(tiny_bundle):
    with open_model(tiny_bundle, intra_op_threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def sets(runner, tiny_market):
    return embed_dataset(runner, read_dataset(tiny_market), ("query", "gallery"))


def of(features, model=""):
    return Features(np.asarray(features, np.float32), paths=tuple(map(str, range(len(features)))), model=model)


def test_features_come_in_the_order_of_the_records_with_their_labels(runner, tiny_market, sets):
    records = read_dataset(tiny_market).gallery
    assert sets["gallery"].paths == tuple(r.path for r in records)
    assert sets["gallery"].pids.tolist() == [r.pid for r in records]
    assert sets["gallery"].model == runner.sha256
    backwards = embed_records(runner, records[::-1], batch=5)
    np.testing.assert_allclose(backwards.features[::-1], sets["gallery"].features, rtol=1e-4, atol=1e-5)


def test_no_record_makes_an_empty_set(runner):
    assert embed_records(runner, ()).features.shape == (0, 32)


@pytest.fixture
def embedding(monkeypatch):
    """A function that lets every model embed so many batches and then be interrupted; it returns the calls counted."""
    whole = OnnxRuntimeRunner.embed

    def limit(batches):
        calls = []

        def embed(self, images):
            if len(calls) == batches:
                raise KeyboardInterrupt
            calls.append(len(images))
            return whole(self, images)

        monkeypatch.setattr(OnnxRuntimeRunner, "embed", embed)
        return calls

    return limit


@pytest.mark.parametrize("left", [lambda data: data, lambda data: data[:-7], lambda data: data[:-7] + bytes(7)])
def test_an_interrupted_run_goes_on_where_it_stopped(embedding, tiny_bundle, tiny_market, tmp_path, left):
    store, journal = tmp_path / "s.npz", tmp_path / "s.npz.journal"
    embedding(3)
    with pytest.raises(KeyboardInterrupt):
        embed_files(tiny_bundle, tiny_market, store, batch=7)
    assert [p.name for p in tmp_path.iterdir()] == [journal.name]
    kept = journal.read_bytes()
    journal.write_bytes(left(kept))
    calls = embedding(None)
    embed_files(tiny_bundle, tiny_market, store, batch=7)
    assert sum(calls) == 54 - 7 * (3 if left(kept) == kept else 2)
    embed_files(tiny_bundle, tiny_market, tmp_path / "whole.npz", batch=7)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.npz", "whole.npz"]
    found, expected = load_features(store), load_features(tmp_path / "whole.npz")
    for split in expected:
        np.testing.assert_array_equal(found[split].features, expected[split].features)


def test_what_another_model_or_batch_left_is_not_taken(embedding, tiny_bundle, tiny_checkpoint, tiny_market, tmp_path):
    embedding(2)
    with pytest.raises(KeyboardInterrupt):
        embed_files(tiny_bundle, tiny_market, tmp_path / "s.npz", batch=7)
    left = (tmp_path / "s.npz.journal").read_bytes()
    calls = embedding(None)
    embed_files(tiny_bundle, tiny_market, tmp_path / "s.npz", batch=6)
    assert sum(calls) == 54
    (tmp_path / "s.npz.journal").write_bytes(left)
    embed_files(tiny_checkpoint, tiny_market, tmp_path / "s.npz", batch=7)
    assert len({s.model for s in load_features(tmp_path / "s.npz").values()}) == 1


def test_a_model_that_overflows_is_refused_with_the_image(runner, tiny_market, monkeypatch):
    records = read_dataset(tiny_market).query
    monkeypatch.setattr(runner, "embed", lambda images: np.full((len(images), 32), np.nan, np.float32))
    with pytest.raises(DataError, match=r"a feature with NaN or infinity \(6 such images\)") as caught:
        embed_records(runner, records)
    assert str(caught.value).startswith(records[0].path)


def test_query_and_gallery_are_related_together(runner, sets):
    query, gallery = relate_sets(runner, sets["query"], sets["gallery"], seed=3)
    rows = np.concatenate([sets["query"].features, sets["gallery"].features])
    expected = runner.relate(rows, draw_landmarks(len(rows), 2, 3, 3))
    np.testing.assert_array_equal(np.concatenate([query.features, gallery.features]), expected)
    assert query.paths == sets["query"].paths
    own, _ = relate_sets(runner, sets["query"], sets["gallery"])
    seven, _ = relate_sets(runner, sets["query"], sets["gallery"], seed=7)
    np.testing.assert_array_equal(own.features, seven.features)


def test_relating_without_a_head_is_refused(runner, sets, monkeypatch):
    monkeypatch.setattr(runner, "spec", ModelSpec(runner.spec.backbone, None, runner.spec.preprocess))
    with pytest.raises(UsageError, match="a backbone alone"):
        relate_sets(runner, sets["query"], sets["gallery"])


def test_top_matches_are_sorted_by_cosine_with_ties_by_index():
    query = of([[1, 0], [0, 2]])
    gallery = Held.of_features(of([[0, 1], [3, 0], [1, 1], [5, 0]]))
    indices, scores = top_matches(query, gallery, 3)
    assert indices.tolist() == [[1, 3, 2], [0, 2, 1]]
    np.testing.assert_allclose(scores, [[1, 1, 0.5**0.5], [1, 0.5**0.5, 0]], atol=1e-6)
    assert top_matches(query, gallery, 99)[0].shape == (2, 4)
    assert top_matches(query.take(np.array([], int)), gallery)[0].shape == (0, 4)


def test_top_matches_refuse_features_of_another_size():
    with pytest.raises(DataError, match="gallery features: got 3 numbers a row"):
        top_matches(of([[1, 0]]), Held.of_features(of([[1, 0, 0]])))


def test_a_search_finds_the_query_itself_in_its_own_folder(tiny_bundle, tiny_market):
    image = sorted((tiny_market / "query").iterdir())[0]
    result = search(tiny_bundle, [image], tiny_market / "query", top=3, head=False)
    (matches,) = result
    assert [m.rank for m in matches] == [1, 2, 3]
    assert matches[0].path == str(image)
    assert matches[0].score == pytest.approx(1)
    assert str(image) in str(result)
    assert "6 gallery images searched by the backbone" in str(result)
    back = Matches.from_json(json.loads(json.dumps(result.to_json())))
    assert (str(back), back.to_json()) == (str(result), result.to_json())


def test_a_name_of_several_lines_is_shown_in_one(tiny_bundle):
    images = np.zeros((2, 64, 32, 3), np.uint8)
    with open_gallery_model(tiny_bundle, intra_op_threads=1) as opened, opened.gallery() as people:
        people.add(images, ids=["ann\n   2  0.9999  bob", "Zo\u00eb"])
        shown = str(people.search(images[:1], head=False))
    assert r"'ann\n   2  0.9999  bob'" in shown
    assert "Zo\u00eb" in shown
    assert "\n   2  0.9999  bob" not in shown


def test_a_search_takes_a_dataset_or_a_store_and_the_head_where_there_is_one(tiny_bundle, tiny_market, tmp_path):
    queries = sorted((tiny_market / "query").iterdir())[:2]
    summary = embed_files(tiny_bundle, tiny_market, tmp_path / "store.npz")
    assert summary.images == {"train": 36, "query": 6, "gallery": 12}
    from_store = search(tiny_bundle, queries, tmp_path / "store.npz", top=4, head=True)
    from_images = search(tiny_bundle, queries, tiny_market, top=4, head=True)
    assert from_store.protocol == "per-query"
    assert from_store.searched == 12
    assert from_store.paths == from_images.paths


def test_what_is_found_for_a_query_does_not_depend_on_the_others(tiny_bundle, tiny_market):
    one, *others = sorted((tiny_market / "query").iterdir())
    alone = search(tiny_bundle, [one], tiny_market, top=4, head=True)
    among = search(tiny_bundle, [others[0], one, others[1]], tiny_market, top=4, head=True)
    assert among.protocol == "per-query"
    assert among[1] == alone[0]
    together = search(tiny_bundle, [others[0], one, others[1]], tiny_market, top=4, head=True, together=True)
    assert together.protocol == "joint"
    assert together[1] != alone[0]


def test_each_query_alone_is_a_whole_pass_over_gallery_and_query(runner, sets):
    query, gallery, head = sets["query"], sets["gallery"], runner.spec.head
    landmarks = draw_landmarks(len(gallery), head.layers, head.landmarks, runner.landmark_seed)
    for row, (ours, theirs) in enumerate(relate_each(runner, query, gallery)):
        want = runner.relate(np.concatenate([gallery.features, query.features[row : row + 1]]), landmarks)
        np.testing.assert_array_equal(np.concatenate([theirs.features, ours.features]), want)
        assert ours.paths == query.paths[row : row + 1]
    assert row == len(query) - 1


def test_a_store_of_another_model_is_refused(tiny_bundle, tiny_market, sets, tmp_path):
    save_features(tmp_path / "other.npz", {"gallery": replace(sets["gallery"], model="0" * 64, checkpoint="")})
    with pytest.raises(DataError, match="features of another model"):
        search(tiny_bundle, [tiny_market / "query"], tmp_path / "other.npz")


def test_a_folder_of_images_is_embedded_as_a_gallery(tiny_bundle, tiny_market, tmp_path):
    summary = embed_files(tiny_bundle, tiny_market / "query", tmp_path / "f.npz")
    assert summary.images == {"gallery": 6}
    assert set(load_features(tmp_path / "f.npz")["gallery"].pids) == {-1}


def test_a_search_without_images_is_refused(tiny_bundle, tmp_path, tiny_market):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="zero images"):
        search(tiny_bundle, [tmp_path / "empty"], tiny_market)
    with pytest.raises(DataError, match="no such file"):
        search(tiny_bundle, [tmp_path / "none.jpg"], tiny_market)
