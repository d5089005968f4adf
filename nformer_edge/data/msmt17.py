"""MSMT17: labels from the archive's lists."""

from __future__ import annotations

from pathlib import Path

from nformer_edge.core.errors import DataError
from nformer_edge.data.files import Inside, read_lines, require_files
from nformer_edge.data.names import is_number
from nformer_edge.data.records import Dataset, ImageRecord

_FOLDERS = (("train", "test"), ("mask_train_v2", "mask_test_v2"))


def looks_like_msmt17(root: Path) -> bool:
    return (root / "list_train.txt").is_file() and any((root / train).is_dir() for train, _ in _FOLDERS)


def read_msmt17(root: Path) -> Dataset:
    """MSMT17 (Wei et al., CVPR 2018), V1 (train/, test/) or V2 (mask_train_v2/, mask_test_v2/, faces blurred).

    Training images are list_train.txt with list_val.txt: the 32,621 of the paper's table. Identities are numbered
    one up, because MSMT17's 0000 is a person and 0 means a distractor here. The camera is the name's third field.
    """
    folders = next((pair for pair in _FOLDERS if (root / pair[0]).is_dir()), None)
    if folders is None:
        raise DataError(str(root), "neither train/ nor mask_train_v2/", "MSMT17", "Unpack the dataset again.")
    train, test = (root / folder for folder in folders)
    lists = {n: root / f"list_{n}.txt" for n in ("train", "val", "query", "gallery")}
    return Dataset(
        "MSMT17",
        str(root),
        train=_read_list(train, lists["train"]) + _read_list(train, lists["val"]),
        query=_read_list(test, lists["query"]),
        gallery=_read_list(test, lists["gallery"]),
        apart=True,
    )


def _read_list(folder: Path, file: Path) -> tuple[ImageRecord, ...]:
    records = []
    inside = Inside(folder)
    for number, line in enumerate(read_lines(file), start=1):
        if not line.strip():
            continue
        name, _, pid = line.strip().rpartition(" ")
        fields = name.rpartition("/")[2].split("_")
        if not is_number(pid) or len(fields) < 4 or not is_number(fields[2]):
            where, got = f"{file}, line {number}", f"{line.strip()!r}, which does not parse"
            expected = "one like 0000/0000_000_01_0303morning_0008_0.jpg 0"
            raise DataError(where, got, expected, "Take the list of the archive.")
        records.append(ImageRecord(inside(name, f"{file}, line {number}"), int(pid) + 1, int(fields[2])))
    if not records:
        raise DataError(str(file), "zero images", "one image a line", "Unpack the dataset again.")
    require_files([r.path for r in records], file.name)
    return tuple(records)
