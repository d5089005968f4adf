"""MSMT17, CSV files and one folder per identity: labels from lists and folders, not from a name's grammar."""

from __future__ import annotations

import csv
import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from nformer_edge.core.errors import DataError
from nformer_edge.core.preprocess import SUFFIXES
from nformer_edge.data.flat import image_names
from nformer_edge.data.records import JUNK, SPLITS, UNKNOWN_CAMERA, Dataset, ImageRecord

_MSMT17_FOLDERS = (("train", "test"), ("mask_train_v2", "mask_test_v2"))
_CSV_COLUMNS = ("path", "pid", "camid", "split")
_CAMERA = re.compile(r"(?:^|_)c(\d+)(?=[s_.])", re.IGNORECASE)


class _Inside:
    """Joins relative paths from a list that we did not write to `root`, and keeps them in it.

    What each folder really is, is asked once: MSMT17 lists 126,441 images.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._root = str(root)
        self._real_root = os.path.realpath(root)
        self._stays: dict[str, bool] = {}

    def __call__(self, name: str, where: str) -> str:
        """`name` joined to the root.

        Raises:
            DataError: if it is absolute, climbs with ``..`` or leads out of the root through a symbolic link.
        """
        plain = name.replace("\\", "/")
        leaves = plain.startswith("/") or plain[1:2] == ":" or ".." in plain.split("/")
        path = os.path.join(self._root, plain)
        if leaves or not self._folder_stays(os.path.dirname(path)) or (os.path.islink(path) and not self._real(path)):
            raise DataError(
                where,
                f"{name!r}, a way out of {self.root}",
                "a path inside that folder",
                "Move the image there and write its relative path.",
            )
        return path

    def _folder_stays(self, folder: str) -> bool:
        if folder not in self._stays:
            self._stays[folder] = self._real(folder)
        return self._stays[folder]

    def _real(self, path: str) -> bool:
        real = os.path.realpath(path)
        return real == self._real_root or real.startswith(os.path.join(self._real_root, ""))


def _missing(paths: Iterable[str], where: str) -> None:
    missing = [p for p in paths if not os.path.isfile(p)]
    if missing:
        count = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise DataError(missing[0], f"no such file{count}", f"every image of {where}", "Copy it there.")


def looks_like_msmt17(root: Path) -> bool:
    return (root / "list_train.txt").is_file() and any((root / train).is_dir() for train, _ in _MSMT17_FOLDERS)


def read_msmt17(root: Path) -> Dataset:
    """MSMT17 (Wei et al., CVPR 2018), V1 (train/, test/) or V2 (mask_train_v2/, mask_test_v2/, faces blurred).

    Training images are list_train.txt with list_val.txt: the 32,621 of the paper's table. Identities are numbered
    one up, because MSMT17's 0000 is a person and 0 means a distractor here. The camera is the name's third field.
    """
    folders = next((pair for pair in _MSMT17_FOLDERS if (root / pair[0]).is_dir()), None)
    if folders is None:
        raise DataError(str(root), "neither train/ nor mask_train_v2/", "MSMT17", "Unpack the dataset again.")
    train, test = (root / folder for folder in folders)
    lists = {n: root / f"list_{n}.txt" for n in ("train", "val", "query", "gallery")}
    return Dataset(
        "MSMT17",
        str(root),
        train=_read_msmt17_list(train, lists["train"]) + _read_msmt17_list(train, lists["val"]),
        query=_read_msmt17_list(test, lists["query"]),
        gallery=_read_msmt17_list(test, lists["gallery"]),
    )


def _read_msmt17_list(folder: Path, file: Path) -> tuple[ImageRecord, ...]:
    records = []
    inside = _Inside(folder)
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        name, _, pid = line.strip().rpartition(" ")
        fields = name.rpartition("/")[2].split("_")
        if not pid.isdigit() or len(fields) < 4 or not fields[2].isdigit():
            raise DataError(
                f"{file}, line {number}",
                f"{line.strip()!r}, which does not parse",
                "one like 0000/0000_000_01_0303morning_0008_0.jpg 0",
                "Take the list of the archive.",
            )
        records.append(ImageRecord(inside(name, f"{file}, line {number}"), int(pid) + 1, int(fields[2])))
    if not records:
        raise DataError(str(file), "zero images", "one image a line", "Unpack the dataset again.")
    _missing((r.path for r in records), file.name)
    return tuple(records)


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError as e:
        raise DataError(str(file), "no such file", "a list of images", "Copy it beside the images.") from e
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(str(file), f"an unreadable file ({e})", "UTF-8 text", "Save it as UTF-8.") from e


def _csv_file(root: Path) -> Path | None:
    if root.is_file():
        return root if root.suffix.lower() == ".csv" else None
    files = sorted(p for p in root.iterdir() if p.suffix.lower() == ".csv" and p.is_file()) if root.is_dir() else []
    return files[0] if len(files) == 1 else None


def looks_like_csv(root: Path) -> bool:
    return _csv_file(root) is not None


def read_csv(root: Path) -> Dataset:
    """A CSV file (or the folder of exactly one) with the header ``path,pid,camid,split``.

    Paths are relative to the file's folder and stay in it; `pid` is 1 or more, 0 for a distractor, -1 for junk;
    `camid` may be empty where unknown; `split` is train, query or gallery.
    """
    file = _csv_file(root)
    if file is None:
        raise DataError(str(root), "no single .csv file", ",".join(_CSV_COLUMNS), "Pass the file.")
    rows = csv.DictReader(_lines(file))
    absent = [c for c in _CSV_COLUMNS if c not in (rows.fieldnames or ())]
    if absent:
        raise DataError(
            str(file),
            f"no column {', '.join(absent)}",
            f"the header {','.join(_CSV_COLUMNS)}",
            "Write it as the first line.",
        )
    splits: dict[str, list[ImageRecord]] = {split: [] for split in SPLITS}
    inside = _Inside(file.parent)
    for row in rows:
        split, record = _csv_record(inside, f"{file}, line {rows.line_num}", row)
        splits["junk" if record.pid == JUNK and split == "gallery" else split].append(record)
    dataset = Dataset(file.stem, str(file.parent), **{split: tuple(r) for split, r in splits.items()})
    _missing((r.path for split in SPLITS for r in dataset.split(split)), file.name)
    return dataset


def _csv_record(inside: _Inside, where: str, row: dict[str, str]) -> tuple[str, ImageRecord]:
    values = {column: (row[column] or "").strip() for column in _CSV_COLUMNS}
    if values["split"] not in ("train", "query", "gallery"):
        raise DataError(where, f"split {values['split']!r}", "train, query or gallery", "Correct the row.")
    try:
        pid, camid = int(values["pid"]), int(values["camid"] or UNKNOWN_CAMERA)
    except ValueError as e:
        raise DataError(
            where, f"pid {values['pid']!r}, camid {values['camid']!r}", "whole numbers", "Number the people from 1."
        ) from e
    if pid < JUNK or not values["path"] or (pid == JUNK and values["split"] != "gallery"):
        raise DataError(
            where,
            f"path {values['path']!r} with pid {pid} in {values['split']}",
            "a path, and a pid of 1 or more (in the gallery also 0 or -1)",
            "Correct the row.",
        )
    return values["split"], ImageRecord(inside(values["path"], where), pid, camid)


def _subfolders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")) if folder.is_dir() else []


def looks_like_folders(root: Path) -> bool:
    if any((root / split).is_dir() for split in ("query", "gallery")):
        return any(_subfolders(root / split) for split in ("train", "query", "gallery"))
    return any(any(n.name.lower().endswith(SUFFIXES) for n in os.scandir(p)) for p in _subfolders(root))


def read_folders(root: Path) -> Dataset:
    """One folder per identity: ``train/<identity>/*``, ``query/<identity>/*``, ``gallery/<identity>/*``.

    Folder names become numbers: a whole number of 1 or more keeps its value if all are such; otherwise people are
    numbered from 1 in the order of their sorted names, over all splits. ``0`` and ``-1`` in the gallery are
    distractors and junk. The camera is read from ``c<number>`` in the file's name (``..._c2_...``, ``..._c2s1_...``);
    a name without one has an unknown camera. A split may be absent.

    Without these three folders, `root` holds the identity folders themselves and is split: people in the order of
    the sha256 of their folder's name, the first half (rounded up) for training; of the others, the first image by
    name of each camera is a query and the rest are gallery. The rule needs no seed and is the same everywhere.
    """
    splits = {s: _subfolders(root / s) for s in ("train", "query", "gallery")}
    if not any(splits.values()):
        return _split_folders(root)
    number = _numbers({p.name for folders in splits.values() for p in folders})
    records = {s: [r for f in folders for r in _identity_records(f, number[f.name])] for s, folders in splits.items()}
    gallery = records["gallery"]
    return Dataset(
        root.name,
        str(root),
        train=tuple(records["train"]),
        query=tuple(records["query"]),
        gallery=tuple(r for r in gallery if r.pid != JUNK),
        junk=tuple(r for r in gallery if r.pid == JUNK),
    )


def _numbers(names: set[str]) -> dict[str, int]:
    marks = {name: int(name) for name in names if re.fullmatch(r"-1|0+", name)}
    people = sorted(names - marks.keys())
    if all(re.fullmatch(r"[0-9]+", name) for name in people) and len({int(name) for name in people}) == len(people):
        return marks | {name: int(name) for name in people}
    return marks | {name: i for i, name in enumerate(people, start=1)}


def _identity_records(folder: Path, pid: int) -> list[ImageRecord]:
    cameras = ((name, _CAMERA.search(name)) for name in image_names(folder))
    return [ImageRecord(str(folder / name), pid, int(c[1]) if c else UNKNOWN_CAMERA) for name, c in cameras]


def _split_folders(root: Path) -> Dataset:
    folders = sorted(_subfolders(root), key=lambda p: hashlib.sha256(p.name.encode()).digest())
    if not folders:
        raise DataError(str(root), "no folders", "one folder per identity", "Put each person into one.")
    number = _numbers({p.name for p in folders})
    half = (len(folders) + 1) // 2
    train = [r for p in folders[:half] for r in _identity_records(p, number[p.name])]
    query: list[ImageRecord] = []
    gallery: list[ImageRecord] = []
    for folder in folders[half:]:
        seen: set[int] = set()
        for record in _identity_records(folder, number[folder.name]):
            (gallery if record.camid in seen else query).append(record)
            seen.add(record.camid)
    return Dataset(root.name, str(root), train=tuple(train), query=tuple(query), gallery=tuple(gallery))
