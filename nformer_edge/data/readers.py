"""`read_dataset`: which layout a folder has, and its records."""

from __future__ import annotations

import os
from pathlib import Path

from nformer_edge.core.errors import DataError
from nformer_edge.core.spec import check_choice
from nformer_edge.data import flat, listed
from nformer_edge.data.records import DISTRACTOR, Dataset, identities

#: Layout name -> (does this folder look like it?, reader, what was looked for). Order is the order of detection.
_LAYOUTS = {
    "market1501": (
        flat.looks_like_market1501,
        flat.read_market1501,
        "bounding_box_train/ with names like 0002_c1s1_000451_03.jpg",
    ),
    "dukemtmc": (
        flat.looks_like_dukemtmc,
        flat.read_dukemtmc,
        "bounding_box_train/ with names like 0001_c2_f0046182.jpg",
    ),
    "cuhk03-np": (
        flat.looks_like_cuhk03_np,
        flat.read_cuhk03_np,
        "detected/ or labeled/ with bounding_box_train/ and names like 0001_c1_2.png",
    ),
    "msmt17": (listed.looks_like_msmt17, listed.read_msmt17, "list_train.txt beside train/ or mask_train_v2/"),
    "csv": (listed.looks_like_csv, listed.read_csv, "a .csv file with the columns path,pid,camid,split"),
    "folders": (
        listed.looks_like_folders,
        listed.read_folders,
        "train/, query/ and gallery/ with one folder per identity, or identity folders alone",
    ),
}

LAYOUTS = ("auto", *_LAYOUTS)


def read_dataset(root: str | os.PathLike[str], layout: str = "auto") -> Dataset:
    """Reads a dataset's labels; no image is opened.

    Args:
        root: the dataset's folder, or a `.csv` file.
        layout: one of LAYOUTS; ``auto`` takes the first whose marks are there.

    Raises:
        UsageError: for a layout that does not exist.
        DataError: if the folder is missing or empty, no layout fits, a name does not parse, or the training split
            holds fewer than two people.
    """
    check_choice("layout", layout, LAYOUTS)
    path = Path(root)
    if not path.exists():
        raise DataError(str(path), "no such folder", "a dataset", "Check the path.")
    if path.is_dir() and not any(path.iterdir()):
        raise DataError(str(path), "an empty folder", "a dataset", "Unpack the dataset into it, or check the path.")
    _, read, _ = _LAYOUTS[_detect(path) if layout == "auto" else layout]
    dataset = read(path)
    _check(dataset)
    return dataset


def _detect(root: Path) -> str:
    for name, (looks_like, _, _) in _LAYOUTS.items():
        if looks_like(root):
            return name
    looked_for = "; ".join(f"{name}: {marks}" for name, (_, _, marks) in _LAYOUTS.items())
    inside = sorted(p for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
    hit = next((p for p in inside for looks_like, _, _ in _LAYOUTS.values() if looks_like(p)), None)
    hint = f"Did you mean {hit}?" if hit else "Check the path, or name the layout."
    raise DataError(str(root), "no known dataset layout", f"one of these ({looked_for})", hint)


def _check(dataset: Dataset) -> None:
    if not (dataset.train or dataset.query or dataset.gallery):
        raise DataError(dataset.root, "zero images", "a dataset", "Check that it was unpacked whole.")
    if dataset.train:
        people = identities(dataset.train)
        bad = next((r for r in dataset.train if r.pid <= DISTRACTOR), None)
        if bad is not None:
            raise DataError(
                bad.path,
                f"identity {bad.pid} in the training split",
                "1 or more (0 marks a distractor, -1 junk)",
                "Number the people from 1.",
            )
        if len(people) < 2:
            raise DataError(
                dataset.root,
                f"one identity only ({people[0]}) in the training split",
                "at least two",
                "Add images of other people: telling them apart is what is learned.",
            )
