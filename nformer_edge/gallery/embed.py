"""Images to features, whatever backend runs."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from shutil import rmtree
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image
from tqdm import tqdm

from nformer_edge.backends.open import open_model
from nformer_edge.backends.runner import Runner
from nformer_edge.core.artifact import require_suffix, sha256_file
from nformer_edge.core.errors import BackendError, DataError, UsageError
from nformer_edge.core.features import Features, save_features
from nformer_edge.core.journal import Journal
from nformer_edge.core.preprocess import normalize
from nformer_edge.core.spec import PreprocessSpec, check_at_least, check_choice, from_dict, to_dict
from nformer_edge.core.terminal import PROGRESS
from nformer_edge.core.values import JSON, Result
from nformer_edge.data.batches import iter_batches, iter_pixels
from nformer_edge.data.files import require_images
from nformer_edge.data.records import SPLITS as KNOWN_SPLITS
from nformer_edge.data.records import Dataset, ImageRecord
from nformer_edge.data.summary import dataset_of
from nformer_edge.gallery.images import Images, image_sources
from nformer_edge.metrics.distance import alike

SPLITS = ("train", "query", "gallery")

#: Pixels uint8 [B, H, W, 3], the files' hashes and the view's number to the backbone's input [B, 3, H, W].
Draw = Callable[[np.ndarray, Sequence[str], int], np.ndarray]


def embed_images(
    runner: Runner, images: Images, boxes: ArrayLike | None = None, *, batch: int = 32, decoders: int | None = None
) -> Features:
    """The backbone's features of images as callers have them. Arguments and errors: `gallery.model.Model.embed`."""
    sources = image_sources(images, boxes)
    batches = iter_batches(sources, runner.spec.preprocess, batch, decoders)
    features = np.concatenate([_no_rows(runner), *map(runner.embed, batches)])
    names = [s if isinstance(s, str) else f"images[{i}]" for i, s in enumerate(sources)]
    _check_finite(features[None], names, runner.precision["backbone"])
    paths = tuple("" if isinstance(s, Image.Image) else s for s in sources)
    return made_by(runner, Features(features, paths=paths, spec=_spec(runner)))


def made_by(runner: Runner, features: Features) -> Features:
    """The same, which say what made them."""
    precision = runner.precision["backbone"]
    return replace(features, model=runner.sha256, checkpoint=runner.checkpoint, precision=precision)


def _no_rows(runner: Runner) -> np.ndarray:
    return np.empty((0, runner.spec.backbone.features), np.float32)


def _spec(runner: Runner) -> str:
    return json.dumps(to_dict(replace(runner.spec, head=None)), sort_keys=True)


def embed_records(
    runner: Runner,
    records: Sequence[ImageRecord],
    batch: int = 32,
    decoders: int | None = None,
    views: int = 1,
    augment: Mapping[str, float] | None = None,
    seed: int = 0,
    finite: bool = True,
    journal: Journal | None = None,
) -> Features:
    """The backbone's features of `records`, in their order, with their labels and the files' hashes.

    Args:
        runner: an open model.
        records: images.
        batch: images decoded and run at once.
        decoders: threads that decode files; one a core if None.
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
    journal = journal or Journal()
    draw, recipe = _views(runner.spec.preprocess, views, augment, seed)
    paths = tuple(r.path for r in records)
    if len(paths) > 1:
        require_images(paths)
    features = np.empty((views, len(paths), runner.spec.backbone.features), np.float32)
    hashes: list[str] = []
    with tqdm(total=len(paths) * views, desc="embedding", unit="img", **PROGRESS) as bar:
        for pixels in iter_pixels(paths, runner.spec.preprocess, batch, decoders):
            rows = slice(len(hashes), len(hashes) + len(pixels))
            hashes += [sha256_file(path) for path in paths[rows]]
            for view in range(views):
                how: JSON = [runner.sha256, runner.backend, view, recipe if view else "", *hashes[rows]]
                features[view, rows] = journal.recall_array(
                    how, partial(_embed_view, runner, draw, pixels, hashes[rows], view)
                )
                bar.update(len(pixels))
    if finite:
        _check_finite(features, paths, runner.precision["backbone"])
    return _labeled(runner, records, features, hashes, recipe)


def _labeled(
    runner: Runner, records: Sequence[ImageRecord], features: np.ndarray, hashes: Sequence[str], recipe: str
) -> Features:
    """Features [V, N, D] of `records`."""
    pids, camids = (np.array([getattr(r, name) for r in records], np.int64) for name in ("pid", "camid"))
    further = features[1:] if len(features) > 1 else None
    labels = pids, camids, tuple(r.path for r in records), "", tuple(hashes)
    return made_by(runner, Features(features[0], *labels, further, recipe, _spec(runner)))


def _embed_view(runner: Runner, draw: Draw, pixels: np.ndarray, hashes: Sequence[str], view: int) -> np.ndarray:
    return runner.embed(draw(pixels, hashes, view))


def _check_finite(features: np.ndarray, names: Sequence[str], precision: str) -> None:
    bad = ~np.isfinite(features).all(axis=(0, 2))
    if bad.any():
        got = f"a feature with NaN or infinity ({int(bad.sum())} such images)"
        hint = "The model overflows: build it in a higher precision."
        if precision == "fp32":
            hint = "The model's weights are damaged, or its training diverged: take another checkpoint."
        raise DataError(names[int(bad.argmax())], got, "finite numbers", hint)


def _views(spec: PreprocessSpec, views: int, augment: Mapping[str, float] | None, seed: int) -> tuple[Draw, str]:
    """What draws a view of a batch, and the JSON that says how; "" where there is the plain one alone."""
    if views == 1:
        return lambda pixels, hashes, view: normalize(pixels, spec), ""
    check_at_least("seed", seed, 0)
    if spec.pixels is not None:
        hint = "Embed views with the checkpoint, or with a bundle without --input uint8."
        raise UsageError("views", f"{views} for a graph that takes pixels", "1", hint)
    try:
        from nformer_edge.data import loaders
    except ImportError as e:
        hint = "pip install 'nformer-edge[train]'"
        raise BackendError("views", f"no {e.name} here", "PyTorch, for augmented views", hint) from e
    recipe = from_dict(loaders.AugmentSpec, dict(augment or {}), "augment")

    def draw(pixels: np.ndarray, hashes: Sequence[str], view: int) -> np.ndarray:
        return loaders.draw_view(pixels, hashes, view, spec, recipe, seed)

    return draw, json.dumps({"seed": seed, **to_dict(recipe)}, sort_keys=True)


def embed_dataset(
    runner: Runner, dataset: Dataset, splits: Sequence[str] = SPLITS, batch: int = 32, decoders: int | None = None
) -> dict[str, Features]:
    """The features of each of `splits` that has images."""
    return {s: embed_records(runner, dataset.split(s), batch, decoders) for s in splits if dataset.split(s)}


@dataclass(frozen=True)
class Embedding(Result):
    """A feature store that was written.

    Args:
        model: architecture and image size.
        backend: what computed.
        sha256: of the model.
        output: the store.
        seconds: from opening the model to the last image.
        images: of each split, how many.
        views: of each split, views of an image.
        notes: what is wrong with the features at a glance; none as a rule.
    """

    kind: ClassVar[str] = "embed"
    version: ClassVar[int] = 2

    model: str
    backend: str
    sha256: str
    output: str
    seconds: float
    images: Mapping[str, int]
    views: Mapping[str, int]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        views = self.views
        counts = [f"{s} {n:,}" + (f" x {views[s]} views" if views[s] > 1 else "") for s, n in self.images.items()]
        total = sum(n * views[s] for s, n in self.images.items())
        wrote = f"wrote {self.output}: {', '.join(counts)}; {total / self.seconds:.1f} images/s"
        return "\n".join([wrote, *self.notes])


def embed_files(
    model: str | os.PathLike[str],
    data: Dataset | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    batch: int = 32,
    decoders: int | None = None,
    intra_op_threads: int | None = None,
    layout: str = "auto",
    splits: Sequence[str] | None = None,
    views: int = 1,
    augment: Mapping[str, float] | None = None,
    seed: int = 0,
    workers: int | None = None,
) -> Embedding:
    """Embeds a dataset's images, or a folder of images, into the feature store `out`.

    An interrupted run leaves its finished batches in ``OUTPUT.journal``: the next one goes on there, and removes it.
    A folder of images is one split, ``gallery``.

    Args:
        splits: which to embed; those of SPLITS that have images if None.
        views: views of each training image (`embed_records`); every other split has the plain one alone.
        workers: processes of Ray Data that share the work (`embed_ray`), each with `intra_op_threads` threads or one;
            finished batches are then in ``OUTPUT.journals``. None: this process alone.

    Raises:
        BackendError: for workers without Ray, or workers that keep dying.
        DataError: if a split that was asked for has no image.
        UsageError: for views without training images.
    """
    require_suffix(out, ".npz")
    records = _split_records(data, layout, splits)
    if views > 1 and "train" not in records:
        raise UsageError("views", f"{views} without a split train", "1", "Only training images have several views.")
    start = time.perf_counter()
    journal, folder = Journal(Path(f"{os.fspath(out)}.journal")), Path(f"{os.fspath(out)}.journals")
    with open_model(model, intra_op_threads=intra_op_threads) as runner:
        sets = {}
        for split, chosen in records.items():
            count = views if split == "train" else 1
            if workers is None:
                sets[split] = embed_records(runner, chosen, batch, decoders, count, augment, seed, journal=journal)
                continue
            from nformer_edge.gallery.embed_ray import embed_by_ray

            recipe = _views(runner.spec.preprocess, count, augment, seed)[1]
            options = {"batch": batch, "decoders": decoders, "views": count, "augment": augment, "seed": seed}
            threads = intra_op_threads or 1
            made = embed_by_ray(model, chosen, folder / split, workers, threads=threads, options=options)
            sets[split] = _labeled(runner, chosen, *made, recipe)
        save_features(out, sets)
        journal.remove()
        rmtree(folder, ignore_errors=True)
        seconds = time.perf_counter() - start
        counts = {split: len(s) for split, s in sets.items()}, {split: s.views for split, s in sets.items()}
        notes = tuple(note for split, s in sets.items() for note in alike(s.features, split))
        return Embedding(runner.name, runner.backend, runner.sha256, str(out), seconds, *counts, notes)


def _split_records(
    data: Dataset | str | os.PathLike[str], layout: str, splits: Sequence[str] | None
) -> Mapping[str, tuple[ImageRecord, ...]]:
    for name in splits or ():
        check_choice("split", name, KNOWN_SPLITS)
    dataset = dataset_of(data, layout, whole=True)
    found = {s: dataset.split(s) for s in splits or SPLITS if dataset.split(s)}
    for name in splits or ():
        if name not in found:
            raise DataError(f"{dataset.root}: {name}", "no image", "at least one", "Leave that split out of --splits.")
    return found if splits is None else {s: found[s] for s in splits}
