from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from nformer_edge.core.errors import DataError, UsageError
from nformer_edge.data.readers import LAYOUTS, read_dataset
from nformer_edge.data.records import cameras, identities
from nformer_edge.data.summary import Summary, summarize

MARKET = {
    "bounding_box_train": ("0002_c1s1_000451_03.jpg", "0007_c3s2_010203_01.jpg", "Thumbs.db"),
    "query": ("0001_c1s1_001051_00.jpg", "1488_c2s3_065527_00.jpg.jpg"),
    "bounding_box_test": (
        "-1_c1s1_000401_03.jpg", "0000_c4s6_022316_04.jpg.jpg", "0001_c2s1_000301_00.jpg", "1488_c6s3_094992_02.jpg",
    ),
}  # fmt: skip
DUKE = {
    "bounding_box_train": ("0001_c2_f0046182.jpg", "0005_c8_f0000001.jpg"),
    "query": ("0005_c2_f0046985.jpg",),
    "bounding_box_test": ("0005_c1_f0051341.jpg", "7139_c6_f0000042.jpg"),
}
CUHK = {
    "bounding_box_train": ("0003_c1_21.png", "0004_c2_22.png"),
    "query": ("0001_c1_1.png",),
    "bounding_box_test": ("0001_c2_6.png",),
}


def _tree(root: Path, files: dict[str, tuple[str, ...]]) -> Path:
    for folder, names in files.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name in names:
            (root / folder / name).write_bytes(b"not opened by readers")
    return root


def _msmt17(root: Path, train: str = "train", test: str = "test") -> Path:
    _tree(root, {
        f"{train}/0000": ("0000_000_01_0303morning_0008_0.jpg",),
        f"{train}/0001": ("0001_000_05_0303noon_0021_1.jpg", "0001_001_12_0303noon_0022_1.jpg"),
        f"{test}/0000": ("0000_000_03_0303morning_0001_0.jpg", "0000_001_14_0303morning_0002_0.jpg"),
    })  # fmt: skip
    lists = {
        "train": "0000/0000_000_01_0303morning_0008_0.jpg 0\n0001/0001_000_05_0303noon_0021_1.jpg 1\n",
        "val": "0001/0001_001_12_0303noon_0022_1.jpg 1\n",
        "query": "0000/0000_000_03_0303morning_0001_0.jpg 0\n",
        "gallery": "0000/0000_001_14_0303morning_0002_0.jpg 0\n",
    }
    for name, text in lists.items():
        (root / f"list_{name}.txt").write_text(text)
    return root


def _labels(records: tuple) -> list[tuple[int, int]]:
    return [(r.pid, r.camid) for r in records]


def test_market1501_parts_junk_from_the_gallery_and_keeps_distractors(tmp_path: Path) -> None:
    dataset = read_dataset(_tree(tmp_path, MARKET))
    assert dataset.name == "Market-1501"
    assert _labels(dataset.train) == [(2, 1), (7, 3)]
    assert _labels(dataset.query) == [(1, 1), (1488, 2)]
    assert _labels(dataset.gallery) == [(0, 4), (1, 2), (1488, 6)]
    assert _labels(dataset.junk) == [(-1, 1)]
    assert all(os.path.isfile(r.path) for r in dataset.train + dataset.query + dataset.gallery + dataset.junk)


def test_dukemtmc_is_told_from_market_by_its_names(tmp_path: Path) -> None:
    dataset = read_dataset(_tree(tmp_path, DUKE))
    assert dataset.name == "DukeMTMC-reID"
    assert _labels(dataset.gallery) == [(5, 1), (7139, 6)]


def test_cuhk03_np_reads_detected_of_the_parent_and_labeled_when_named(tmp_path: Path) -> None:
    for kind in ("detected", "labeled"):
        _tree(tmp_path / kind, CUHK)
    assert read_dataset(tmp_path).name == "CUHK03-NP (detected)"
    labeled = read_dataset(tmp_path / "labeled")
    assert labeled.name == "CUHK03-NP (labeled)"
    assert _labels(labeled.train) == [(3, 1), (4, 2)]


@pytest.mark.parametrize("folders", [("train", "test"), ("mask_train_v2", "mask_test_v2")])
def test_msmt17_trains_on_its_train_and_val_lists_with_people_numbered_from_1(
    tmp_path: Path, folders: tuple[str, str]
) -> None:
    dataset = read_dataset(_msmt17(tmp_path, *folders))
    assert dataset.name == "MSMT17"
    assert _labels(dataset.train) == [(1, 1), (2, 5), (2, 12)]
    assert _labels(dataset.query) == [(1, 3)]
    assert _labels(dataset.gallery) == [(1, 14)]
    assert all(os.path.isfile(r.path) for r in dataset.train + dataset.query + dataset.gallery)


def test_folders_take_numbers_from_folder_names_and_cameras_from_file_names(tmp_path: Path) -> None:
    _tree(tmp_path, {
        "train/0010": ("a_c2.jpg", "b.jpg"), "train/12": ("0012_c3s1_7.png",), "query/3": ("c1_0.jpg",),
        "gallery/3": ("x_c4_1.jpg",), "gallery/0": ("y_c1.jpg",), "gallery/-1": ("z_c1.jpg",),
    })  # fmt: skip
    dataset = read_dataset(tmp_path)
    assert _labels(dataset.train) == [(10, 2), (10, -1), (12, 3)]
    assert _labels(dataset.query) == [(3, 1)]
    assert _labels(dataset.gallery) == [(0, 1), (3, 4)]
    assert _labels(dataset.junk) == [(-1, 1)]


def test_folders_with_names_number_people_over_all_splits(tmp_path: Path) -> None:
    _tree(
        tmp_path, {"train/bob": ("1.jpg",), "train/ann": ("1.jpg",), "query/eve": ("1.jpg",), "gallery/eve": ("2.jpg",)}
    )
    dataset = read_dataset(tmp_path)
    assert [r.pid for r in dataset.train + dataset.query + dataset.gallery] == [1, 2, 3, 3]


def test_identity_folders_alone_are_split_by_the_sha256_of_their_names(tmp_path: Path) -> None:
    _tree(tmp_path, {f"p{i}": ("a_c1.jpg", "b_c1.jpg", "c_c2.jpg") for i in range(5)})
    dataset = read_dataset(tmp_path)
    assert dataset == read_dataset(tmp_path)
    assert {Path(r.path).parent.name for r in dataset.train} == {"p0", "p2", "p3"}
    assert [Path(r.path).name for r in dataset.query] == ["a_c1.jpg"] * 2
    assert [Path(r.path).name for r in dataset.gallery] == ["b_c1.jpg", "c_c2.jpg"] * 2
    assert not dataset.explicit


def _csv(root: Path, *rows: str, header: str = "path,pid,camid,split") -> Path:
    _tree(root, {"images": ("a.jpg", "b.jpg", "c.jpg", "d.jpg")})
    (root / "labels.csv").write_text("\n".join((header, *rows)) + "\n")
    return root


GOOD = ("images/a.jpg,1,1,train", "images/b.jpg,2,2,train", "images/c.jpg,3,,query", "images/d.jpg,-1,2,gallery")


def test_csv_is_read_from_the_file_or_its_folder(tmp_path: Path) -> None:
    dataset = read_dataset(_csv(tmp_path, *GOOD))
    assert dataset == read_dataset(tmp_path / "labels.csv")
    assert _labels(dataset.train) == [(1, 1), (2, 2)]
    assert _labels(dataset.query) == [(3, -1)]
    assert dataset.gallery == ()
    assert _labels(dataset.junk) == [(-1, 2)]


def test_csv_takes_quotes_other_column_orders_and_a_byte_order_mark(tmp_path: Path) -> None:
    rows = ('"images/a.jpg", 1 ,1,train,x', "images/b.jpg,2,2,train,y")
    root = _csv(tmp_path, *rows, header="\ufeffpath,pid,camid,split,note")
    assert _labels(read_dataset(root).train) == [(1, 1), (2, 2)]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("../secret.jpg,4,1,query", "a way out"),
        ("images/../../secret.jpg,4,1,query", "a way out"),
        ("/etc/passwd,4,1,query", "a way out"),
        ("C:\\secret.jpg,4,1,query", "a path of Windows"),
        ("images/link.jpg,4,1,query", "a way out"),
        ("elsewhere/secret.jpg,4,1,query", "a way out"),
        ("images/none.jpg,4,1,query", "no such file"),
        ("images/a.jpg,four,1,query", "'four'"),
        ("images/a.jpg,4,1,holiday", "split 'holiday'"),
        ("images/a.jpg,-1,1,query", "pid -1 in query"),
        ("images/a.jpg,-1,1,train", "pid -1 in train"),
        ("images/a.jpg,4", "split ''"),
        (",4,1,query", "path ''"),
    ],
)
def test_a_csv_row_that_cannot_be_used_is_named(tmp_path: Path, row: str, says: str) -> None:
    (tmp_path / "secret.jpg").write_bytes(b"outside")
    root = _csv(tmp_path / "data", *GOOD, row)
    (root / "images" / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "elsewhere").symlink_to(tmp_path)
    with pytest.raises(DataError, match=says) as error:
        read_dataset(root)
    assert "\n" not in str(error.value)


def test_a_csv_without_its_columns_says_which(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no column pid \(the first line is 'path,who'\)"):
        read_dataset(_csv(tmp_path, "images/a.jpg,1", header="path,who"))


def test_a_csv_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(DataError, match="UTF-8"):
        read_dataset(tmp_path)


def test_a_missing_folder_and_an_empty_one_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        read_dataset(tmp_path / "nowhere")
    with pytest.raises(DataError, match="an empty folder"):
        read_dataset(tmp_path)


def test_an_unknown_folder_lists_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(DataError, match="no known dataset layout") as error:
        read_dataset(tmp_path)
    assert all(layout in str(error.value) for layout in LAYOUTS if layout != "auto")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("person.jpg", b"\xff\xd8\xff\xe0", "an image, one file"),
        ("result.json", b'{"kind": "parity"}', "a JSON text, one file"),
        ("notes.txt", b"hello", "got one file"),
    ],
)
def test_a_file_in_the_place_of_a_folder_is_called_what_it_is(
    tmp_path: Path, name: str, content: bytes, says: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{says}, expected a folder of images, or a CSV file"):
        read_dataset(tmp_path / name)


def test_the_folder_above_a_dataset_gets_a_hint(tmp_path: Path) -> None:
    _tree(tmp_path / "sets" / "Market-1501", MARKET)
    with pytest.raises(DataError, match=r"Did you mean .*Market-1501"):
        read_dataset(tmp_path / "sets")


def test_images_that_lie_flat_get_a_pattern_that_fits_their_names(tmp_path: Path) -> None:
    _tree(tmp_path, {".": tuple(f"x{p}_cam{c}_{n}.jpg" for p in (1, 2, 3, 4) for c in (1, 2) for n in (0, 1))})
    with pytest.raises(DataError, match=r"Images lie flat here: try --pattern '(.+)', or list") as told:
        read_dataset(tmp_path)
    pattern = str(told.value).partition("--pattern '")[2].partition("'")[0]
    assert len(read_dataset(tmp_path, pattern=pattern, whole=True).gallery) == 16


def test_a_layout_that_does_not_exist_gets_the_nearest_spelling(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'market1501'"):
        read_dataset(_tree(tmp_path, MARKET), "market-1501")


@pytest.mark.parametrize("folder", ["bounding_box_train", "query", "bounding_box_test"])
def test_a_name_that_does_not_parse_is_named_with_the_count(tmp_path: Path, folder: str) -> None:
    _tree(tmp_path, MARKET)
    _tree(tmp_path, {folder: ("IMG_0001.jpg", "IMG_0002.jpg")})
    with pytest.raises(DataError, match=r"IMG_0001\.jpg: got a name that does not parse \(and 1 more\)"):
        read_dataset(tmp_path)


@pytest.mark.parametrize("folder", ["query", "bounding_box_test"])
def test_a_split_that_is_missing_or_without_images_is_named(tmp_path: Path, folder: str) -> None:
    _tree(tmp_path, MARKET)
    for file in (tmp_path / folder).iterdir():
        file.unlink()
    with pytest.raises(DataError, match=f"{folder}: got zero images"):
        read_dataset(tmp_path)
    (tmp_path / folder).rmdir()
    with pytest.raises(DataError, match=f"{folder}: got no such folder"):
        read_dataset(tmp_path)


def test_one_identity_only_in_training_is_refused(tmp_path: Path) -> None:
    _tree(tmp_path, MARKET | {"bounding_box_train": ("0002_c1s1_000451_03.jpg", "0002_c2s1_000451_03.jpg")})
    with pytest.raises(DataError, match=r"one identity only \(2\)"):
        read_dataset(tmp_path)


@pytest.mark.parametrize("pid", ["0000", "-1"])
def test_distractors_and_junk_do_not_train(tmp_path: Path, pid: str) -> None:
    _tree(tmp_path, MARKET)
    _tree(tmp_path, {"bounding_box_train": (f"{pid}_c1s1_000001_00.jpg",)})
    with pytest.raises(DataError, match="in the training split"):
        read_dataset(tmp_path)


@pytest.mark.parametrize(
    ("line", "says"), [("0001/x.jpg 1", "does not parse"), ("../0001_000_05_a_0_1.jpg 1", "a way out"),
                       ("0001/0001_009_05_0303noon_0021_1.jpg 1", "no such file")]
)  # fmt: skip
def test_an_msmt17_list_with_a_bad_line_is_refused(tmp_path: Path, line: str, says: str) -> None:
    root = _msmt17(tmp_path)
    with (root / "list_query.txt").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=says):
        read_dataset(root)


def test_an_msmt17_without_a_list_is_refused(tmp_path: Path) -> None:
    root = _msmt17(tmp_path)
    (root / "list_gallery.txt").unlink()
    with pytest.raises(DataError, match=r"list_gallery\.txt: got no such file"):
        read_dataset(root)


def test_the_summary_counts_people_images_and_cameras(tmp_path: Path) -> None:
    dataset = read_dataset(_tree(tmp_path, MARKET))
    rows = {r.split: (r.identities, r.images, r.cameras) for r in summarize(dataset).rows}
    assert rows == {
        "train": (2, 2, 2), "query": (2, 2, 2), "gallery": (2, 3, 3), "of these distractors": (None, 1, 1),
        "junk": (None, 1, 1),
    }  # fmt: skip
    assert Summary.from_json(json.loads(json.dumps(summarize(dataset).to_json()))) == summarize(dataset)
    lines = str(summarize(dataset)).splitlines()[1:7]
    assert len({len(line) for line in lines}) == 1, "columns are aligned"


def test_identities_and_cameras_leave_out_the_marks(tmp_path: Path) -> None:
    dataset = read_dataset(_csv(tmp_path, *GOOD))
    every = dataset.train + dataset.query + dataset.junk
    assert identities(every) == (1, 2, 3)
    assert cameras(every) == (1, 2)
