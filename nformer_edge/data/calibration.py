"""Which images calibrate an INT8 build: training images, spread over people and cameras. Needs numpy alone."""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from nformer_edge.core.artifact import sha256_file
from nformer_edge.core.errors import DataError
from nformer_edge.core.spec import check_at_least
from nformer_edge.core.values import JSON
from nformer_edge.data.readers import has_splits, read_dataset
from nformer_edge.data.records import Dataset, ImageRecord
from nformer_edge.data.spread import over_people
from nformer_edge.data.summary import dataset_of

#: How far above a folder of images to look for the dataset that it belongs to.
_LEVELS = 3


def calibration_set(dataset: Dataset, num: int, seed: int) -> tuple[ImageRecord, ...]:
    """`num` training images: every person once before any twice, and of each the camera that has had fewest so far.

    Fewer if the dataset has fewer. The same seed gives the same images.

    Raises:
        DataError: if there is no training image.
    """
    check_at_least("calib_num", num, 1)
    if not dataset.train:
        hint = "Give the dataset that the model was trained on, or a folder of your own crops: they need no labels."
        raise DataError(f"{dataset.root}: train", "no image", "training images to calibrate with", hint)
    return over_people(dataset.train, num, seed)


def calibration_images(
    source: Dataset | str | os.PathLike[str], num: int, seed: int, *, force: bool = False
) -> tuple[str, ...]:
    """Paths of the images to calibrate with.

    Args:
        source: a dataset, whose training images are taken, or a folder; without splits of its own, any image in it.
        num: how many at most.
        seed: of the choice.
        force: accept images that queries or the gallery hold too.

    Raises:
        DataError: if there are none, or one of them is a query or gallery image (by its path or its content).
    """
    dataset = dataset_of(source, whole=True)
    paths = tuple(r.path for r in calibration_set(dataset.as_training(), num, seed))
    tested = dataset if dataset.explicit else _dataset_around(Path(dataset.root))
    if tested is not None and not force:
        refuse_test_images(paths, tested)
    return paths


def _dataset_around(folder: Path) -> Dataset | None:
    """The dataset with splits that `folder` lies in, if it lies in one."""
    for above in list(folder.resolve().parents)[:_LEVELS]:
        if has_splits(above):
            try:
                return read_dataset(above)
            except DataError:
                continue
    return None


def refuse_test_images(paths: Sequence[str], dataset: Dataset) -> None:
    """Raises DataError if one of `paths` is, or has the content of, a query or gallery image of `dataset`.

    Accuracy measured on images that set the ranges would flatter the engine. Contents are hashed only where the
    sizes agree.
    """
    test = [(split, r.path) for split in ("query", "gallery") for r in dataset.split(split)]
    places = {os.path.realpath(path): split for split, path in test}
    ours: dict[int, dict[str, str]] = defaultdict(dict)
    for path in paths:
        _require_apart(path, places.get(os.path.realpath(path)), path)
        ours[os.path.getsize(path)][sha256_file(path)] = path
    for split, path in test:
        same_size = ours.get(os.path.getsize(path)) if os.path.exists(path) else None
        if same_size:
            _require_apart(same_size.get(sha256_file(path)), split, path)


def _require_apart(path: str | None, split: str | None, test_path: str) -> None:
    if path is not None and split is not None:
        got = f"a {split} image" if path == test_path else f"the content of the {split} image {test_path}"
        hint = "Calibrate with the training split, or force it (--force-calib) and do not report the accuracy."
        raise DataError(path, got, "training images alone to calibrate with", hint)


def calibration_sha256(paths: Iterable[str], settings: Mapping[str, JSON]) -> str:
    """Sha256 over the settings and, in order, the content of every image."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in paths:
        digest.update(bytes.fromhex(sha256_file(path)))
    return digest.hexdigest()
