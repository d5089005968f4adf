"""Folders are people only where nothing says otherwise, and without splits every image is searched."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from nformer_edge.core.errors import DataError
from nformer_edge.data.calibration import calibration_images
from nformer_edge.data.labels import judge_labels
from nformer_edge.data.readers import read_dataset
from nformer_edge.data.records import Dataset, cameras, identities
from nformer_edge.data.summary import describe_images

CAMERAS = (1, 2, 3)


def tree(root: Path, files: Iterable[str]) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(file.encode())
    return root


def counts(dataset: Dataset) -> tuple[tuple[int, int], ...]:
    """People and images of train, query and gallery."""
    return tuple((len(identities(dataset.split(s))), len(dataset.split(s))) for s in ("train", "query", "gallery"))


def veri(train: Iterable[int], test: Iterable[int]) -> list[str]:
    files = [f"image_train/{p:04d}_c{c:03d}_{p:08d}_0.jpg" for p in train for c in CAMERAS]
    files += [f"image_query/{p:04d}_c001_{p:08d}_0.jpg" for p in test]
    return files + [f"image_test/{p:04d}_c{c:03d}_{p:08d}_0.jpg" for p in test for c in CAMERAS]


def test_veri_776_is_read(tmp_path: Path) -> None:
    dataset = read_dataset(tree(tmp_path, veri(range(1, 7), range(7, 10))))
    assert dataset.name == "VeRi-776"
    assert counts(dataset) == ((6, 18), (3, 3), (3, 9))


@pytest.mark.parametrize("names", [("Train", "Probe", "Gallery"), ("images_train", "images_query", "images_test")])
def test_flat_images_in_split_folders_take_person_and_camera_from_their_names(tmp_path: Path, names: tuple) -> None:
    files = [f"{split}/{p:04d}_cam{c}_7.jpg" for split, ps in zip(names, ((1, 2), (3, 4), (3, 4)), strict=True)
             for p in ps for c in CAMERAS]  # fmt: skip
    assert counts(read_dataset(tree(tmp_path, files))) == ((2, 6), (2, 6), (2, 6))


def test_split_folders_whose_names_tell_nobody_are_refused_not_taken_for_people(tmp_path: Path) -> None:
    folders = ("image_train", "image_query", "image_test")
    root = tree(tmp_path, [f"{split}/{i:06d}.jpg" for split in folders for i in range(9)])
    with pytest.raises(DataError, match="9 of 9 names that tell no person and camera"):
        read_dataset(root)
    assert counts(read_dataset(root, whole=True)) == ((0, 0), (0, 0), (0, 27))


@pytest.mark.parametrize("held_out", ["val", "valid", "test"])
def test_train_and_val_are_training_and_an_evaluation_that_is_split(tmp_path: Path, held_out: str) -> None:
    files = [f"{'train' if p < 7 else held_out}/{p:04d}/x_c{c}_{n}.jpg" for p in range(1, 11) for c in (1, 2)
             for n in range(2)]  # fmt: skip
    dataset = read_dataset(tree(tmp_path, files))
    assert counts(dataset) == ((6, 24), (4, 8), (4, 8))
    assert "are split" in dataset.notes[0]
    assert counts(read_dataset(tmp_path, whole=True)) == ((6, 24), (0, 0), (4, 16)), "the whole of it is the gallery"


def test_train_alone_is_enough_and_test_wins_over_val_which_is_named(tmp_path: Path) -> None:
    assert counts(read_dataset(tree(tmp_path / "a", ["train/1/x.jpg", "train/2/x.jpg"]))) == ((2, 2), (0, 0), (0, 0))
    splits = [f"{s}/{s}{p}/{n}.jpg" for s in ("train", "val", "test") for p in range(2) for n in range(3)]
    dataset = read_dataset(tree(tmp_path / "b", splits))
    assert counts(dataset) == ((2, 6), (2, 2), (2, 4))
    assert any("not used: val (6 images)" in note for note in dataset.notes)


def test_train_all_stands_for_train_and_what_is_not_read_is_named(tmp_path: Path) -> None:
    folders = ("train", "train_all", "query", "gallery", "multi-query")
    dataset = read_dataset(
        tree(tmp_path, [f"{s}/{p}/x_c{p}.jpg" for s in folders for p in (1, 2)] + ["train_all/3/x.jpg"])
    )
    assert len(dataset.train) == 3
    assert any("multi-query, train" in note for note in dataset.notes)


@pytest.mark.parametrize("name", ["{:03d}_{}.bmp", "person_{:04d}.png", "id{:02d}-{}.jpg"])
def test_folders_named_like_cameras_are_cameras_and_the_gallery_is_not_empty(tmp_path: Path, name: str) -> None:
    root = tree(tmp_path, [f"cam_{c}/{name.format(p, 45)}" for c in "ab" for p in range(8)])
    dataset = read_dataset(root)
    assert counts(dataset) == ((4, 8), (4, 4), (4, 4))
    assert cameras(dataset.query + dataset.gallery) == (1, 2)
    assert judge_labels(dataset).unmatched == 0


def test_people_may_have_folders_below_a_camera_and_cameras_below_a_person(tmp_path: Path) -> None:
    below = read_dataset(
        tree(tmp_path / "a", [f"camera_0{c}/{p}/{n}.jpg" for c in CAMERAS for p in "xyzw" for n in "01"])
    )
    above = read_dataset(
        tree(tmp_path / "b", [f"{p}/camera_0{c}/{n}.jpg" for c in CAMERAS for p in "xyzw" for n in "01"])
    )
    assert counts(below) == counts(above) == ((2, 12), (2, 6), (2, 6))
    assert cameras(below.train) == cameras(above.train) == CAMERAS


def test_frames_in_a_folder_a_camera_are_no_people(tmp_path: Path) -> None:
    root = tree(tmp_path, [f"cam{c}/{i:06d}.jpg" for c in CAMERAS for i in range(9)])
    with pytest.raises(DataError, match=r"names that tell no person.*--layout cameras"):
        read_dataset(root)
    assert counts(read_dataset(root, "cameras"))[1] == (4, 4), "unless the user says so"
    assert counts(read_dataset(root, whole=True))[2] == (0, 27)


@pytest.mark.parametrize(
    "names",
    [
        ["0584158d412e1294", "a616f0207c8c52ea", "IMG-8cd61f", "snap 11aed2c0", "77f0a3"],
        ["12-45-33", "12-46-01", "13-02-59", "13-08-00", "14-00-07"],
        ["2024-03-01_1", "2024-03-01_2", "20240301_3", "20240302-4", "2024-03-02_5"],
    ],
)
@pytest.mark.parametrize("layout", ["auto", "cameras"])
def test_random_names_dates_and_times_in_a_folder_a_camera_are_no_people(
    tmp_path: Path, names: list[str], layout: str
) -> None:
    root = tree(tmp_path, [f"cam{c}/{name}.jpg" for c in CAMERAS for name in names])
    with pytest.raises(DataError, match=r"names that tell no person.*--layout unlabeled"):
        read_dataset(root, layout)
    assert read_dataset(root, whole=True).unlabeled


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ([f"{c}/{i}.jpg" for c in "ab" for i in range(1001)], "1001 images in a"),
        ([f"part{k}/{p:04d}_c{c}s1_1.jpg" for k in range(2) for p in range(5 * k, 5 * k + 5) for c in CAMERAS],
         r"tell other people.*--pattern '\(\?P<pid>\\d\+\)\[_-\]c\(\?P<camid>"),
        ([f"{place}/{p}_{n}.jpg" for place in ("hall", "gate") for p in range(9) for n in "012"], "tell other people"),
        ([f"{day}/{p}/{n}.jpg" for day in ("mon", "tue") for p in ("ann", "bob") for n in "01"], "folders below it"),
        ([f"sets/{p}/{n}.jpg" for p in ("ann", "bob") for n in "01"], "Did you mean .*sets"),
    ],
)  # fmt: skip
def test_folders_that_do_not_look_like_people_are_asked_about_with_a_guess(
    tmp_path: Path, files: list[str], says: str
) -> None:
    root = tree(tmp_path, files)
    with pytest.raises(DataError, match=says):
        read_dataset(root)
    assert len(read_dataset(root, whole=True).gallery) == len(files)


def test_a_folder_a_person_is_taken_where_the_user_says_so(tmp_path: Path) -> None:
    root = tree(tmp_path, [f"{c}/{i}.jpg" for c in "abcd" for i in range(1001)])
    assert len(identities(read_dataset(root, "folders").train)) == 2


def test_advice_never_names_a_split_of_the_folder_given(tmp_path: Path) -> None:
    tree(tmp_path / "up" / "set", ["train/1/a.jpg", "train/2/b.jpg", "val/3/c.jpg"])
    with pytest.raises(DataError, match=r"Did you mean \S+/set\?"):
        read_dataset(tmp_path / "up")


def test_a_person_called_test_is_not_taken_for_a_split_in_silence(tmp_path: Path) -> None:
    root = tree(tmp_path, [f"{p}/{n}.jpg" for p in ("ann", "bob", "test") for n in "01"])
    with pytest.raises(DataError, match="test, named like splits, beside ann, bob"):
        read_dataset(root)


def test_every_person_with_one_image_a_camera_has_a_query_with_a_match(tmp_path: Path) -> None:
    dataset = read_dataset(tree(tmp_path, [f"p{p}/x_c{c}.jpg" for p in range(8) for c in (1, 2)]))
    assert counts(dataset) == ((4, 8), (4, 4), (4, 4))
    assert judge_labels(dataset).unmatched == 0


def test_without_splits_every_image_at_any_depth_is_searched_embedded_and_calibrates(tmp_path: Path) -> None:
    files = [f"person{p:02d}/day{n % 2}/{n}.jpg" for p in range(8) for n in range(3)]
    root = tree(
        tmp_path, [*files, "person01/Thumbs.db", "person01/._1.jpg", "@eaDir/1.jpg", "__MACOSX/person01/._1.jpg"]
    )
    (root / "person99").mkdir()
    with pytest.raises(DataError, match="folders below it"):
        read_dataset(root)
    dataset = read_dataset(root, "folders", whole=True)
    assert counts(dataset) == ((0, 0), (0, 0), (8, 24))
    assert describe_images(dataset).endswith(": 24 images, 8 people; files passed over, no images: 4")
    assert dataset.notes[0] == "passed over, because they hold no image: person99"
    assert len(calibration_images(root, 100, 0)) == 24


def test_a_dataset_with_splits_keeps_them_when_it_is_searched(tmp_path: Path) -> None:
    root = tree(tmp_path, veri(range(1, 7), range(7, 10)))
    assert counts(read_dataset(root, whole=True)) == ((6, 18), (3, 3), (3, 9))


@pytest.mark.parametrize("splits", [("",), ("train/", "query/", "gallery/")])
def test_a_pattern_reads_folders_of_any_naming_and_shows_three_names(tmp_path: Path, splits: tuple[str, ...]) -> None:
    files = [f"{s}any/cam{c}-{p:03d}-{n}.png" for s in splits for p in range(1, 5) for c in CAMERAS for n in "01"]
    dataset = read_dataset(tree(tmp_path, files), pattern=r"cam(?P<camid>\d+)-(?P<pid>\d+)")
    assert identities(dataset.train + dataset.query + dataset.gallery) == (1, 2, 3, 4)
    assert cameras(dataset.query + dataset.gallery) == CAMERAS
    assert dataset.notes[0].count("->") == 3


@pytest.mark.parametrize("root", ["", "train/"])
def test_people_numbered_from_0_are_people_and_that_is_said(tmp_path: Path, root: str) -> None:
    dataset = read_dataset(
        tree(tmp_path, [f"{root}{p}/x_c{c}_{n}.jpg" for p in range(6) for c in (1, 2) for n in "01"])
    )
    assert identities(dataset.train + dataset.query + dataset.gallery) == (1, 2, 3, 4, 5, 6)
    assert any("numbered from 0" in note for note in dataset.notes)
