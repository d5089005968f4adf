"""`read_dataset`: which layout a folder has, and its records."""

from __future__ import annotations

import os
from pathlib import Path

from nformer_edge.core.errors import DataError, UsageError
from nformer_edge.core.filekind import file_kind
from nformer_edge.core.spec import check_choice
from nformer_edge.data import flat, folders, msmt17, table
from nformer_edge.data.files import has_images, holds_images, walk_images
from nformer_edge.data.names import NamePattern, propose_pattern, role
from nformer_edge.data.people import Sighting, make_dataset
from nformer_edge.data.records import DISTRACTOR, Dataset, identities

#: Published layout -> (does this folder look like it?, reader, what was looked for). Order is the order of detection.
_PUBLISHED = {
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
    "veri-776": (flat.looks_like_veri776, flat.read_veri776, "image_train/ with names like 0002_c002_00030600_0.jpg"),
    "msmt17": (msmt17.looks_like_msmt17, msmt17.read_msmt17, "list_train.txt beside train/ or mask_train_v2/"),
}
_OWN = {
    "csv": "a .csv file with the columns path,pid,camid,split",
    "folders": "train/ val/ test/ query/ gallery/, as far as there are any, with one folder per identity, or identity "
    "folders alone",
    "cameras": "one folder per camera with one folder per identity in it, or names that begin with the identity",
    "unlabeled": "images at any depth, nobody said who they show",
}

LAYOUTS = ("auto", *_PUBLISHED, *_OWN)


def read_dataset(
    root: str | os.PathLike[str],
    layout: str = "auto",
    *,
    pattern: str | None = None,
    images: str | os.PathLike[str] | None = None,
    whole: bool = False,
    labels: bool = True,
) -> Dataset:
    """Reads a dataset's labels; no image is opened.

    Args:
        root: the dataset's folder, or a `.csv` file.
        layout: one of LAYOUTS; ``auto`` takes the first whose marks are there.
        pattern: reads person and camera from file names of any kind (`names.NamePattern`).
        images: for a CSV file, the folder that its paths lie in.
        whole: for searching, embedding and calibrating. Where the dataset has no splits of its own, every image under
            `root` is its gallery, whether or not its name or folder says who it shows.
        labels: False where images do without: those whose names and folders say nobody are then the gallery.

    Raises:
        UsageError: for a layout that does not exist, or a pattern that cannot be used.
        DataError: if the folder is missing or empty, no layout fits, a name does not parse, or the training split
            holds fewer than two people.
    """
    check_choice("layout", layout, LAYOUTS)
    path = Path(root)
    if not path.exists():
        raise DataError(str(path), "no such folder", "a folder of images or a dataset", "Check the path.")
    if path.is_dir() and not any(path.iterdir()):
        raise DataError(str(path), "an empty folder", "a dataset", "Unpack the dataset into it, or check the path.")
    named = None if pattern is None else NamePattern(pattern)
    chosen = _detect(path, whole, labels) if layout == "auto" and named is None else layout
    try:
        dataset = _read(path, chosen, named, None if images is None else Path(images), whole)
        _check(dataset)
    except DataError as e:
        needed = labels and not whole
        if needed or not (path.is_dir() and layout == "auto" and named is None and chosen in ("csv", "people")):
            raise
        dataset = _unlabeled(path, str(e.got))
    return dataset


def _read(path: Path, layout: str, pattern: NamePattern | None, images: Path | None, whole: bool) -> Dataset:
    if pattern is not None:
        if not path.is_dir() or layout not in ("auto", "folders"):
            raise UsageError("pattern", f"{path} as {layout}", "a folder of images", "Leave --layout or --pattern out.")
        return folders.read_folders(path, whole=whole, pattern=pattern)
    if layout in _PUBLISHED:
        return _PUBLISHED[layout][1](path)
    if layout == "csv":
        return table.read_csv(path, images, whole)
    if layout in ("", "unlabeled"):
        return _unlabeled(path, "")
    return folders.read_folders(path, whole=whole, sure=layout == "folders", cameras=layout == "cameras")


def _detect(root: Path, whole: bool, labels: bool = True) -> str:
    """A layout's name; "" for a plain folder of images; "people" for folders that may be people."""
    for name, (looks_like, _, _) in _PUBLISHED.items():
        if looks_like(root):
            return name
    if table.looks_like_csv(root) and not (whole and root.is_dir() and holds_images(root)):
        return "csv"
    if _split_folders(root) or (folders.looks_like_folders(root) and not holds_images(root)):
        return "people"
    if (whole or not labels) and root.is_dir():
        return ""
    if root.is_file():
        kind = file_kind(root)
        known = "" if kind.name.startswith("a file of an unknown") else f"{kind.name}, "
        hint = "Pass the folder that holds the images, or a .csv file that lists them."
        raise DataError(str(root), f"{known}one file", "a folder of images, or a CSV file", hint)
    looked_for = "; ".join(f"{name}: {marks}" for name, marks in _marks().items())
    hint = "Check the path, or name the layout."
    if root.is_dir() and holds_images(root):
        guess = propose_pattern([os.path.basename(path) for path in walk_images(root).images])
        say = f"try --pattern '{guess}'" if guess else "say how names tell the person (--pattern '(?P<pid>...)')"
        hint = f"Images lie flat here: {say}, or list them in a CSV. "
        hint += "Without labels, parity, benchmark, threshold, embed, search and --calib-data take them as they are."
    raise DataError(str(root), "no known dataset layout", f"one of these ({looked_for})", hint)


def _marks() -> dict[str, str]:
    return {name: marks for name, (_, _, marks) in _PUBLISHED.items()} | _OWN


def _split_folders(root: Path) -> bool:
    return root.is_dir() and any(role(p.name) and has_images(p) for p in root.iterdir() if p.is_dir())


def has_splits(root: Path) -> bool:
    """Whether `root` is a dataset with splits of its own, as far as names of files and folders tell at a glance."""
    published = any(looks_like(root) for looks_like, _, _ in _PUBLISHED.values())
    return published or table.looks_like_csv(root) or _split_folders(root)


def _unlabeled(root: Path, why: str) -> Dataset:
    found = walk_images(root)
    if not found.images:
        raise DataError(str(root), "zero images", "a folder of images", "Check the path.")
    name, notes = root.absolute().name, (f"labels are not read: {why}",) if why else ()
    cameras = [folders.camera_below(root, path) for path in found.images]
    told = cameras if all(cameras) else [""] * len(cameras)  # a few that look like one are chance
    sightings = [Sighting(path, camera=camera) for path, camera in zip(found.images, told, strict=True)]
    return make_dataset(name, str(root), sightings, whole=True, notes=notes, passed_over=found.passed_over)


def _check(dataset: Dataset) -> None:
    if not (dataset.train or dataset.query or dataset.gallery):
        raise DataError(dataset.root, "zero images", "a dataset", "Check that it was unpacked whole.")
    if dataset.train:
        people = identities(dataset.train)
        bad = next((r for r in dataset.train if r.pid <= DISTRACTOR), None)
        if bad is not None:
            got, expected = f"identity {bad.pid} in the training split", "1 or more (0 marks a distractor, -1 junk)"
            raise DataError(
                bad.path, got, expected, "Take it out of the training split: training has to know who is who."
            )
        if len(people) < 2:
            got = f"one identity only ({people[0]}) in the training split"
            hint = "Add images of other people: telling them apart is what is learned."
            raise DataError(dataset.root, got, "at least two", hint)
