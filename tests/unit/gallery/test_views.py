"""Feature stores with several views of each training image: what stage two trains from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from nformer_edge.backends.open import open_model
from nformer_edge.cli import main
from nformer_edge.core.errors import DataError, UsageError
from nformer_edge.core.features import load_features
from nformer_edge.data.readers import read_dataset
from nformer_edge.gallery.embed import embed_files, embed_records


@pytest.fixture(scope="module")
def runner(tiny_bundle):
    with open_model(tiny_bundle, intra_op_threads=1) as opened:
        yield opened


def test_a_store_holds_views_of_the_training_images_and_hashes_of_all(tiny_bundle, tiny_market, tmp_path):
    result = embed_files(tiny_bundle, tiny_market, tmp_path / "s.npz", views=3, augment={"pad": 4}, seed=5)
    sets = load_features(tmp_path / "s.npz")
    assert {split: s.views for split, s in sets.items()} == result.views == {"train": 3, "query": 1, "gallery": 1}
    assert sets["query"].hashes[0] == hashlib.sha256(Path(sets["query"].paths[0]).read_bytes()).hexdigest()
    assert {s.model for s in sets.values()} == {result.sha256}
    assert json.loads(sets["train"].augmentation)["pad"] == 4
    plain, first, second = (sets["train"].view(v).features for v in range(3))
    assert not np.allclose(plain, first)
    assert not np.allclose(first, second)
    assert "train 36 x 3 views, query 6, gallery 12" in str(result)


def test_a_view_depends_on_seed_and_image_and_on_nothing_beside_it(runner, tiny_market):
    records = read_dataset(tiny_market).train[:7]
    whole = embed_records(runner, records, views=2, seed=1)
    alone = embed_records(runner, records[3:5], batch=1, views=2, seed=1)
    np.testing.assert_allclose(alone.view(1).features, whole.view(1).features[3:5], rtol=1e-4, atol=1e-5)
    other = embed_records(runner, records, views=2, seed=2)
    assert not np.allclose(other.view(1).features, whole.view(1).features)
    np.testing.assert_array_equal(other.features, whole.features)


def test_views_without_augmentation_are_the_plain_one(runner, tiny_market):
    records = read_dataset(tiny_market).query
    still = embed_records(runner, records, views=2, augment={"flip": 0, "pad": 0, "erase": 0})
    np.testing.assert_allclose(still.view(1).features, still.features, rtol=1e-4, atol=1e-5)


def test_only_the_splits_asked_for_are_embedded(tiny_bundle, tiny_market, tmp_path):
    result = embed_files(tiny_bundle, tiny_market, tmp_path / "s.npz", splits=("gallery", "query"))
    assert list(result.images) == ["gallery", "query"]
    with pytest.raises(DataError, match="junk: got no image"):
        embed_files(tiny_bundle, tiny_market, tmp_path / "s.npz", splits=("junk",))
    with pytest.raises(UsageError, match="Did you mean 'query'"):
        embed_files(tiny_bundle, tiny_market, tmp_path / "s.npz", splits=("querry",))


def test_views_that_nobody_can_train_on_are_refused(tiny_bundle, tiny_market, tmp_path):
    with pytest.raises(UsageError, match="views: got 2 without a split train"):
        embed_files(tiny_bundle, tiny_market, tmp_path / "s.npz", splits=("query",), views=2)
    with pytest.raises(UsageError, match="Did you mean 'erase'"):
        embed_files(tiny_bundle, tiny_market, tmp_path / "s.npz", views=2, augment={"erasee": 1})


def test_the_command_takes_splits_views_and_their_augmentation(tiny_bundle, tiny_market, tmp_path, capsys):
    command = ["embed", str(tiny_bundle), "--data", str(tiny_market), "-o", str(tmp_path / "s.npz")]
    assert main([*command, "--splits", "train", "--views", "2", "--augment", "pad=4", "erase=0.25", "--seed", "3"]) == 0
    assert "train 36 x 2 views" in capsys.readouterr().out
    recipe = json.loads(load_features(tmp_path / "s.npz")["train"].augmentation)
    assert (recipe["seed"], recipe["pad"], recipe["erase"], recipe["flip"]) == (3, 4, 0.25, 0.5)
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--augment", "pad"])
    assert "augment: got pad, expected name=number" in capsys.readouterr().err
