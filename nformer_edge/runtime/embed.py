"""Images to features, and features seen together, whatever backend runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nformer_edge.core.errors import DataError
from nformer_edge.core.features import FeatureSet, save_features
from nformer_edge.core.ops import draw_landmarks
from nformer_edge.core.preprocess import SUFFIXES
from nformer_edge.core.terminal import PROGRESS
from nformer_edge.data.batches import iter_batches
from nformer_edge.data.readers import read_dataset
from nformer_edge.data.records import UNKNOWN_CAMERA, Dataset, ImageRecord
from nformer_edge.runtime.open import open_runner
from nformer_edge.runtime.runner import Runner, require_head

SPLITS = ("train", "query", "gallery")

_UNKNOWN_PERSON = -1


def embed_records(
    runner: Runner, records: Sequence[ImageRecord], batch: int = 32, threads: int | None = None
) -> FeatureSet:
    """The backbone's features of `records`, in their order, with their labels.

    Args:
        runner: an open model.
        records: images.
        batch: images decoded and run at once.
        threads: decoders; one a core if None.

    Raises:
        DataError: for the first image that cannot be read, or whose feature is not finite.
    """
    paths = tuple(r.path for r in records)
    features = np.empty((len(paths), runner.spec.backbone.features), np.float32)
    with tqdm(total=len(paths), desc="embedding", unit="img", **PROGRESS) as bar:
        done = 0
        for images in iter_batches(paths, runner.spec.preprocess, batch, threads):
            features[done : done + len(images)] = runner.embed(images)
            done += len(images)
            bar.update(len(images))
    bad = ~np.isfinite(features).all(axis=1)
    if bad.any():
        raise DataError(
            paths[int(bad.argmax())], got=f"a feature with NaN or infinity ({int(bad.sum())} such images)",
            expected="finite numbers", mend="The model overflows: build it in a higher precision.",
        )  # fmt: skip
    return FeatureSet(
        features, np.array([r.pid for r in records], np.int64), np.array([r.camid for r in records], np.int64), paths,
        runner.sha256,
    )  # fmt: skip


def embed_dataset(
    runner: Runner, dataset: Dataset, splits: Sequence[str] = SPLITS, batch: int = 32, threads: int | None = None
) -> dict[str, FeatureSet]:
    """The features of each of `splits` that has images."""
    return {s: embed_records(runner, dataset.split(s), batch, threads) for s in splits if dataset.split(s)}


def relate_sets(
    runner: Runner, query: FeatureSet, gallery: FeatureSet, seed: int | None = None
) -> tuple[FeatureSet, FeatureSet]:
    """Query and gallery through the head together, as the authors evaluate: every image sees every other.

    Args:
        runner: an open model with a head.
        query: features as the backbone gave them.
        gallery: likewise.
        seed: for the landmarks; the model's own if None.

    Raises:
        UsageError: if the model has no head.
        DataError: for a feature that is not finite or is all zeros.
    """
    head = require_head(runner.spec)
    rows = np.concatenate([query.features, gallery.features])
    if not len(rows):
        return query, gallery
    chosen = runner.landmark_seed if seed is None else seed
    related = runner.relate(rows, draw_landmarks(len(rows), head.layers, head.landmarks, chosen))
    return query.with_features(related[: len(query)]), gallery.with_features(related[len(query) :])


def image_records(sources: Sequence[str | os.PathLike[str]]) -> tuple[ImageRecord, ...]:
    """Image files, and those in folders (at any depth, sorted), as records of nobody known.

    Raises:
        DataError: if there is none.
    """
    paths: list[str] = []
    for source in map(Path, sources):
        found = [source] if not source.is_dir() else sorted(p for p in source.rglob("*") if _is_image(p))
        paths += map(str, found)
    if not paths:
        raise DataError(
            ", ".join(map(str, sources)), got="zero images", expected=f"{', '.join(SUFFIXES)} files",
            mend="Check the path.",
        )  # fmt: skip
    return tuple(ImageRecord(path, _UNKNOWN_PERSON, UNKNOWN_CAMERA) for path in paths)


def holds_images(folder: str | os.PathLike[str]) -> bool:
    """Whether image files lie directly in `folder`: then it is just that, not a dataset."""
    return Path(folder).is_dir() and any(_is_image(p) for p in Path(folder).iterdir())


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()


def embed_files(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    batch: int = 32,
    threads: int | None = None,
    layout: str = "auto",
) -> dict[str, Any]:
    """Embeds a dataset's query and gallery, or a folder of images, into the feature store `output`.

    Returns:
        JSON of kind ``embed``: model, output, and images a split. A folder of images is one split, ``gallery``.
    """
    if layout == "auto" and holds_images(data):
        records = {"gallery": image_records([data])}
    else:
        dataset = read_dataset(data, layout)
        records = {s: dataset.split(s) for s in SPLITS if dataset.split(s)}
    with open_runner(model, threads=threads) as runner:
        sets = {split: embed_records(runner, chosen, batch, threads) for split, chosen in records.items()}
        save_features(output, sets)
        return {
            "kind": "embed", "model": runner.name, "backend": runner.backend, "output": str(output),
            "images": {split: len(s) for split, s in sets.items()},
        }  # fmt: skip
