"""Images become features, and features become features that know their neighbours."""

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
from nformer_edge.data.records import ImageRecord
from nformer_edge.runtime.open import open_runner
from nformer_edge.runtime.runner import Runner

SPLITS = ("train", "query", "gallery")


def embed_records(runner: Runner, records: Sequence[ImageRecord], *, batch: int = 32) -> FeatureSet:
    """The backbone's features of labelled images, in their order.

    Raises:
        DataError: for an image that cannot be read, or whose feature is not finite, by name.
    """
    features = np.empty((len(records), runner.spec.backbone.features), np.float32)
    done = 0
    with tqdm(total=len(records), desc="embed", unit="image", **PROGRESS) as bar:
        for images in iter_batches([r.path for r in records], runner.spec.preprocess, batch):
            features[done : done + len(images)] = runner.embed(images)
            done += len(images)
            bar.update(len(images))
    bad = ~np.isfinite(features).all(axis=1)
    if bad.any():
        raise DataError(
            records[int(bad.argmax())].path, got=f"a feature with NaN or infinity ({int(bad.sum())} such images)",
            expected="finite numbers", mend="The model overflows: build it in a higher precision.",
        )  # fmt: skip
    return FeatureSet(
        features,
        np.array([r.pid for r in records], np.int64),
        np.array([r.camid for r in records], np.int64),
        tuple(r.path for r in records),
    )


def relate_sets(
    runner: Runner, query: FeatureSet, gallery: FeatureSet, seed: int | None = None
) -> tuple[FeatureSet, FeatureSet]:
    """Query and gallery through the head together: the joint protocol, as the published code evaluates.

    Args:
        seed: of the landmarks; the runner's own if None.
    """
    joint = np.concatenate([query.features, gallery.features])
    head = runner.spec.head
    landmarks = None
    if seed is not None and head is not None and len(joint):
        landmarks = draw_landmarks(len(joint), head.layers, head.landmarks, seed)
    related = runner.relate(joint, landmarks)
    return query.with_features(related[: len(query)]), gallery.with_features(related[len(query) :])


def list_images(folder: str | os.PathLike[str]) -> tuple[ImageRecord, ...]:
    """Every image below `folder`, sorted by path, with unknown identity and camera.

    Raises:
        DataError: if the folder is missing or holds none.
    """
    root = Path(folder)
    found = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        got = "no image" if root.is_dir() else "no such folder"
        raise DataError(str(root), got=got, expected="a folder of images", mend="Check the path.")
    return tuple(ImageRecord(str(p), -1, -1) for p in found)


def embed_files(
    model: str | os.PathLike[str], data: str | os.PathLike[str], out: str | os.PathLike[str], *, batch: int = 32,
    threads: int | None = None, layout: str = "auto",
) -> dict[str, Any]:  # fmt: skip
    """Embeds a dataset, or a plain folder of images, into a feature store.

    Returns:
        JSON: ``images`` a split, ``store`` the file written. A plain folder becomes the one split ``gallery``.
    """
    sets = _records(data, layout)
    with open_runner(model, threads=threads) as runner:
        features = {split: embed_records(runner, records, batch=batch) for split, records in sets.items()}
        save_features(out, features)
    return {"kind": "embed", "store": str(out), "images": {split: len(s) for split, s in features.items()}}


def _records(data: str | os.PathLike[str], layout: str) -> dict[str, tuple[ImageRecord, ...]]:
    try:
        dataset = read_dataset(data, layout)
    except DataError:
        if layout != "auto" or not Path(data).is_dir():
            raise
        return {"gallery": list_images(data)}
    return {split: dataset.split(split) for split in SPLITS if dataset.split(split)}
