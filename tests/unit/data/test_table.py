"""CSV files as spreadsheets, pandas and other projects write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from nformer_edge.core.errors import DataError
from nformer_edge.data.readers import read_dataset
from nformer_edge.data.records import Dataset

HEADER = "path,pid,camid,split"
SPLIT = {1: "train", 2: "train", 3: "train"}
ROWS = [f"im/{p}_{n}.jpg,{p},{n + 1},{SPLIT.get(p, ('query', 'gallery')[n])}" for p in range(1, 7) for n in (0, 1)]
CELLS = [row.split(",") for row in ROWS]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "im").mkdir()
    for row in ROWS:
        (tmp_path / row.split(",")[0]).touch()
    return tmp_path


def write(root: Path, text: str, name: str = "l.csv", encoding: str = "utf-8") -> Path:
    (root / name).write_bytes(text.encode(encoding))
    return root / name


def labels(dataset: Dataset) -> list[list[tuple[int, int]]]:
    return [[(r.pid, r.camid) for r in dataset.split(s)] for s in ("train", "query", "gallery")]


PLAIN = [HEADER, *ROWS]
RIGHT = [[(p, c) for p in (1, 2, 3) for c in (1, 2)], [(p, 1) for p in (4, 5, 6)], [(p, 2) for p in (4, 5, 6)]]


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(PLAIN),
        "\r\n".join(PLAIN),
        "\n".join(PLAIN).replace(",", ";"),
        "sep=;\n" + "\n".join(PLAIN).replace(",", ";"),
        "\n".join(PLAIN).replace(",", "\t"),
        "\n".join(PLAIN).replace(",", ", "),
        "\ufeff" + "\n".join(PLAIN),
        "\n".join(["Path,PID,CamID,Split", *ROWS]),
        "\n".join(["Image, Person_ID ,cam_id,Subset", *ROWS]),
        "\n".join([HEADER, *(",".join([p, f"{pid}.0", f"{cam}.0", s]) for p, pid, cam, s in CELLS)]),
        "\n".join([HEADER, *(",".join([p, pid, f"cam{cam}", s]) for p, pid, cam, s in CELLS)]),
        "\n".join([HEADER, *(",".join(f'"{v}"' for v in r.split(",")) for r in ROWS), "", ",,,"]),
        "\n".join(["," + HEADER, *(f"{i},{r}" for i, r in enumerate(ROWS))]),
        "\n".join(PLAIN).replace("gallery", "test").replace("query", "Probe").replace("train", "Training"),
    ],
    ids=["plain", "crlf", "semicolon", "excel sep", "tab", "spaces", "bom", "capitals", "other names", "pandas floats",
         "named cameras", "quoted, empty rows", "pandas index", "other splits"],
)  # fmt: skip
def test_every_dialect_gives_the_same_labels(root: Path, text: str) -> None:
    assert labels(read_dataset(write(root, text))) == RIGHT


def test_names_are_numbered_and_that_is_said(root: Path) -> None:
    rows = [",".join([p, f"id_{pid}", cam, s]) for p, pid, cam, s in CELLS]
    dataset = read_dataset(write(root, "\n".join([HEADER, *rows])))
    assert labels(dataset) == RIGHT
    assert dataset.notes == ("people are named, not numbered: 6 are numbered from 1 by their names",)


def test_unknown_cameras_may_be_blank_or_nan_and_splits_may_be_missing(root: Path) -> None:
    rows = [f"{r.split(',')[0]},{r.split(',')[1]},{'' if i % 2 else 'NaN'}" for i, r in enumerate(ROWS)]
    dataset = read_dataset(write(root, "\n".join(["path,pid,camid", *rows])))
    assert {r.camid for s in ("train", "query", "gallery") for r in dataset.split(s)} == {-1}
    assert [len(dataset.split(s)) for s in ("train", "query", "gallery")] == [6, 3, 3]
    assert not dataset.explicit


def test_absolute_and_linked_paths_out_of_the_file_s_folder_need_the_folder_named(root: Path) -> None:
    text = "\n".join([HEADER, *(f"{root}/{r}" for r in ROWS)])
    assert labels(read_dataset(write(root, text))) == RIGHT, "absolute, and inside"
    (root / "linked").mkdir()
    absolute = write(root / "linked", text, "absolute.csv")
    (root / "linked" / "im").symlink_to(root / "im")
    linked = write(root / "linked", "\n".join(PLAIN))
    for file, images in ((absolute, root), (linked, root), (linked, root / "linked")):
        with pytest.raises(DataError, match=r"a way out of .*--root DIR"):
            read_dataset(file)
        assert labels(read_dataset(file, images=images)) == RIGHT
    with pytest.raises(DataError, match="a way out"):
        read_dataset(absolute, images=root / "linked")


def test_paths_to_another_folder_or_of_windows_are_told_of_root(root: Path) -> None:
    (root / "lists").mkdir()
    with pytest.raises(DataError, match=r"no such file \(and 11 more\).* relative to .*lists: .*--root DIR"):
        read_dataset(write(root / "lists", "\n".join(PLAIN)))
    with pytest.raises(DataError, match=r"a path of Windows.*--root DIR"):
        read_dataset(write(root, f"{HEADER}\nC:\\im\\1_0.jpg,1,1,train"))


def test_several_files_are_named_unless_they_are_splits(root: Path) -> None:
    for split in ("train", "query", "gallery"):
        rows = [r.rsplit(",", 1)[0] for r in ROWS if r.endswith(split)]
        write(root, "\n".join(["path,pid,camid", *rows]), f"{split}.csv")
    assert labels(read_dataset(root)) == RIGHT
    write(root, "\n".join(PLAIN), "all.csv")
    write(root, "\n".join(PLAIN), "other.csv")
    with pytest.raises(DataError, match=r"5 CSV files \(all\.csv, gallery\.csv, other\.csv, query\.csv, train\.csv\)"):
        read_dataset(root)


def test_a_header_that_lacks_a_column_is_shown(root: Path) -> None:
    with pytest.raises(DataError, match=r"no column path \(the first line is 'where;pid'\)"):
        read_dataset(write(root, "where;pid\nim/1_0.jpg;1"))


def test_line_numbers_count_the_file_s_own_lines(root: Path) -> None:
    with pytest.raises(DataError, match="line 5: got split 'holiday'"):
        read_dataset(write(root, "\n".join(["", HEADER, ROWS[0], "", "im/1_1.jpg,1,1,holiday"])))
