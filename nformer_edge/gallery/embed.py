"""Images to features, and features seen together, whatever backend runs."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nformer_edge.backends.open import open_model
from nformer_edge.backends.runner import Runner, require_head
from nformer_edge.core.artifact import sha256_file
from nformer_edge.core.batch_journal import BatchJournal
from nformer_edge.core.errors import BackendError, DataError, UsageError
from nformer_edge.core.features import Features, save_features
from nformer_edge.core.preprocess import SUFFIXES, normalize
from nformer_edge.core.spec import PreprocessSpec, check_at_least, check_choice, from_dict, to_dict
from nformer_edge.core.terminal import PROGRESS
from nformer_edge.data.batches import iter_pixels
from nformer_edge.data.readers import read_dataset
from nformer_edge.data.records import SPLITS as KNOWN_SPLITS
from nformer_edge.data.records import UNKNOWN_CAMERA, Dataset, ImageRecord
from nformer_edge.ops.contract import draw_landmarks

SPLITS = ("train", "query", "gallery")

_UNKNOWN_PERSON = -1

#: Pixels uint8 [B, H, W, 3], the files' hashes and the view's number to the backbone's input [B, 3, H, W].
Draw = Callable[[np.ndarray, Sequence[str], int], np.ndarray]


def embed_records(
    runner: Runner,
    records: Sequence[ImageRecord],
    batch: int = 32,
    threads: int | None = None,
    views: int = 1,
    augment: Mapping[str, Any] | None = None,
    seed: int = 0,
    finite: bool = True,
    journal: BatchJournal | None = None,
) -> Features:
    """The backbone's features of `records`, in their order, with their labels and the files' hashes.

    Args:
        runner: an open model.
        records: images.
        batch: images decoded and run at once.
        threads: decoders; one a core if None.
        views: views of each image, the plain one first. More than one needs the extra ``train``.
        augment: fields of `data.loaders.AugmentSpec` for views 1 and up, where they are not training's own.
        seed: with an image file's contents and a view's number it decides that view, whatever stands beside it.
        finite: refuse a feature with NaN or infinity.
        journal: of batches that are finished; what it knows is not computed again.

    Raises:
        DataError: for the first image that cannot be read, or whose feature is not finite.
        UsageError: if `views` is below 1, or `augment` does not fit.
    """
    check_at_least("views", views, 1)
    journal = journal or BatchJournal()
    draw, recipe = _views(runner.spec.preprocess, views, augment, seed)
    paths = tuple(r.path for r in records)
    features = np.empty((views, len(paths), runner.spec.backbone.features), np.float32)
    hashes: list[str] = []
    with tqdm(total=len(paths) * views, desc="embedding", unit="img", **PROGRESS) as bar:
        for pixels in iter_pixels(paths, runner.spec.preprocess, batch, threads):
            rows = slice(len(hashes), len(hashes) + len(pixels))
            hashes += [sha256_file(path) for path in paths[rows]]
            for view in range(views):
                how = [runner.sha256, runner.backend, view, recipe if view else ""]
                features[view, rows] = journal.recall(
                    [how, hashes[rows]], partial(_embed_view, runner, draw, pixels, hashes[rows], view)
                )
                bar.update(len(pixels))
    if finite:
        _check_finite(features, paths)
    pids, camids = (np.array([getattr(r, name) for r in records], np.int64) for name in ("pid", "camid"))
    further = features[1:] if views > 1 else None
    spec = json.dumps(to_dict(replace(runner.spec, head=None)), sort_keys=True)
    return Features(features[0], pids, camids, paths, runner.sha256, tuple(hashes), further, recipe, spec)


def _embed_view(runner: Runner, draw: Draw, pixels: np.ndarray, hashes: Sequence[str], view: int) -> np.ndarray:
    return runner.embed(draw(pixels, hashes, view))


def _check_finite(features: np.ndarray, paths: tuple[str, ...]) -> None:
    bad = ~np.isfinite(features).all(axis=(0, 2))
    if bad.any():
        raise DataError(
            paths[int(bad.argmax())],
            f"a feature with NaN or infinity ({int(bad.sum())} such images)",
            "finite numbers",
            "The model overflows: build it in a higher precision.",
        )


def _views(spec: PreprocessSpec, views: int, augment: Mapping[str, Any] | None, seed: int) -> tuple[Draw, str]:
    """What draws a view of a batch, and the JSON that says how; "" where there is the plain one alone."""
    if views == 1:
        return lambda pixels, hashes, view: normalize(pixels, spec), ""
    check_at_least("seed", seed, 0)
    try:
        from nformer_edge.data import loaders
    except ImportError as e:
        raise BackendError(
            "views", f"no {e.name} here", "PyTorch, for augmented views", "pip install 'nformer-edge[train]'"
        ) from e
    recipe = from_dict(loaders.AugmentSpec, dict(augment or {}), "augment")

    def draw(pixels: np.ndarray, hashes: Sequence[str], view: int) -> np.ndarray:
        if view == 0:
            return normalize(pixels, spec)
        images = [
            loaders.augment(image[None], spec, recipe, np.random.default_rng([seed, view, int(digest[:16], 16)]))
            for image, digest in zip(pixels, hashes, strict=True)
        ]
        return np.concatenate(images)

    return draw, json.dumps({"seed": seed, **to_dict(recipe)}, sort_keys=True)


def embed_dataset(
    runner: Runner, dataset: Dataset, splits: Sequence[str] = SPLITS, batch: int = 32, threads: int | None = None
) -> dict[str, Features]:
    """The features of each of `splits` that has images."""
    return {s: embed_records(runner, dataset.split(s), batch, threads) for s in splits if dataset.split(s)}


def relate_sets(
    runner: Runner, query: Features, gallery: Features, seed: int | None = None
) -> tuple[Features, Features]:
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
        raise DataError(", ".join(map(str, sources)), "zero images", f"{', '.join(SUFFIXES)} files", "Check the path.")
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
    splits: Sequence[str] | None = None,
    views: int = 1,
    augment: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Embeds a dataset's images, or a folder of images, into the feature store `output`.

    An interrupted run leaves its finished batches in ``OUTPUT.journal``: the next one goes on there, and removes it.

    Args:
        splits: which to embed; those of SPLITS that have images if None.
        views: views of each training image (`embed_records`); every other split has the plain one alone.

    Returns:
        JSON of kind ``embed``: model and its sha256, output, seconds, images and views a split. A folder of images is
        one split, ``gallery``.

    Raises:
        DataError: if a split that was asked for has no image.
        UsageError: for views without training images.
    """
    records = _split_records(data, layout, splits)
    if views > 1 and "train" not in records:
        raise UsageError("views", f"{views} without a split train", "1", "Only training images have several views.")
    start = time.perf_counter()
    journal = BatchJournal(Path(f"{os.fspath(output)}.journal"))
    with open_model(model, intra_op_threads=threads) as runner:
        sets = {
            split: embed_records(
                runner, chosen, batch, threads, views if split == "train" else 1, augment, seed, journal=journal
            )
            for split, chosen in records.items()
        }
        save_features(output, sets)
        journal.remove()
        return {
            "kind": "embed",
            "model": runner.name,
            "backend": runner.backend,
            "sha256": runner.sha256,
            "output": str(output),
            "seconds": time.perf_counter() - start,
            "images": {split: len(s) for split, s in sets.items()},
            "views": {split: s.views for split, s in sets.items()},
        }


def _split_records(
    data: str | os.PathLike[str], layout: str, splits: Sequence[str] | None
) -> dict[str, tuple[ImageRecord, ...]]:
    for name in splits or ():
        check_choice("split", name, KNOWN_SPLITS)
    if layout == "auto" and holds_images(data):
        found = {"gallery": image_records([data])}
    else:
        dataset = read_dataset(data, layout)
        found = {s: dataset.split(s) for s in splits or SPLITS if dataset.split(s)}
    for name in splits or ():
        if name not in found:
            raise DataError(f"{data}: {name}", "no image", "at least one", "Leave that split out of --splits.")
    return found if splits is None else {s: found[s] for s in splits}


def format_embedding(result: dict[str, Any]) -> str:
    """What `embed_files` wrote, as text."""
    views = result["views"]
    counts = [f"{s} {n:,}" + (f" x {views[s]} views" if views[s] > 1 else "") for s, n in result["images"].items()]
    total = sum(n * views[s] for s, n in result["images"].items())
    return f"wrote {result['output']}: {', '.join(counts)}; {total / result['seconds']:.1f} images/s"
