"""Which images may calibrate, and that nothing of the test set does."""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from pathlib import Path

import pytest

from nformer_edge.core.errors import DataError, UsageError
from nformer_edge.data.calibration import calibration_images, calibration_set, calibration_sha256
from nformer_edge.data.readers import read_dataset
from nformer_edge.data.records import Dataset, ImageRecord


def many(people: int, cameras: int, shots: int) -> Dataset:
    places = itertools.product(range(1, people + 1), range(cameras), range(shots))
    return Dataset("d", "d", tuple(ImageRecord(f"{p}_{c}_{s}", p, c) for p, c, s in places))


def test_a_calibration_set_takes_everybody_once_before_anybody_twice_and_all_cameras_alike():
    chosen = calibration_set(many(10, 4, 3), 20, seed=0)
    assert set(Counter(r.pid for r in chosen).values()) == {2}
    assert set(Counter(r.camid for r in chosen).values()) == {5}
    assert len({r.path for r in chosen}) == 20


def test_a_calibration_set_follows_its_seed():
    dataset = many(10, 4, 3)
    assert calibration_set(dataset, 15, seed=1) == calibration_set(dataset, 15, seed=1)
    assert calibration_set(dataset, 15, seed=1) != calibration_set(dataset, 15, seed=2)


def test_a_small_dataset_gives_all_it_has():
    dataset = many(3, 2, 1)
    assert set(calibration_set(dataset, 100, seed=0)) == set(dataset.train)


def test_a_dataset_calibrates_with_its_training_images_alone(tiny_market):
    chosen = calibration_images(tiny_market, 10, 0)
    assert len(chosen) == 10
    assert all(Path(p).parent.name == "bounding_box_train" for p in chosen)


@pytest.mark.parametrize("folder", ["query", "bounding_box_test"])
def test_query_and_gallery_images_are_refused_unless_forced(tiny_market, folder):
    with pytest.raises(DataError, match=r"got a (query|gallery) image, expected training images"):
        calibration_images(tiny_market / folder, 4, 0)
    assert len(calibration_images(tiny_market / folder, 4, 0, force=True)) == 4


def test_a_copy_of_a_query_image_among_the_training_images_is_refused(tiny_market, tmp_path):
    root = tmp_path / "market"
    shutil.copytree(tiny_market, root)
    query = sorted((root / "query").iterdir())[0]
    shutil.copy(query, root / "bounding_box_train" / "0001_c1s1_000099_00.jpg")
    with pytest.raises(DataError, match="the content of the query image"):
        calibration_images(read_dataset(root), 100, 0)


def test_a_plain_folder_of_images_is_taken_as_it_is(tiny_market, tmp_path):
    for i, path in enumerate(sorted((tiny_market / "bounding_box_train").iterdir())[:5]):
        shutil.copy(path, tmp_path / f"{i}.jpg")
    assert len(calibration_images(tmp_path, 3, 0)) == 3


def test_a_dataset_without_training_images_is_refused():
    with pytest.raises(DataError, match="train: got no image"):
        calibration_set(Dataset("d", "d"), 4, 0)
    with pytest.raises(UsageError, match="calib_num: got 0"):
        calibration_set(many(2, 1, 1), 0, 0)


def test_the_calibration_hash_knows_images_and_settings(tiny_market):
    paths = calibration_images(tiny_market, 4, 0)
    first = calibration_sha256(paths, {"method": "minmax"})
    assert first == calibration_sha256(paths, {"method": "minmax"})
    assert first != calibration_sha256(paths, {"method": "entropy"})
    assert first != calibration_sha256(paths[:3], {"method": "minmax"})
