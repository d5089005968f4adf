"""The teacher, run once over views of the training images that can be drawn again."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from nformer_edge.compress.recipe import Recipe
from nformer_edge.compress.step import Lessons
from nformer_edge.core.artifact import sha256_file
from nformer_edge.core.errors import ArtifactError
from nformer_edge.core.features import Features, load_features
from nformer_edge.core.spec import to_dict
from nformer_edge.core.terminal import PROGRESS
from nformer_edge.data.loaders import TrainImages, draw_view
from nformer_edge.data.records import ImageRecord
from nformer_edge.model.backbone import Backbone, for_inference
from nformer_edge.model.gated import GatedHead
from nformer_edge.training.relate import relate

SPLIT = "train"


def stored_teacher(path: str | os.PathLike[str], records: Sequence[ImageRecord], checkpoint: str) -> Features:
    """The features of `records` in a store that `nformer-edge embed` wrote.

    Args:
        checkpoint: sha256 of the teacher's checkpoint.

    Raises:
        ArtifactError: if the store has no training images, or not all of these, or another model made it.
    """
    sets = load_features(path)
    if SPLIT not in sets or not sets[SPLIT].hashes:
        got = f"splits {', '.join(sets)}" if SPLIT not in sets else "no hashes of the images"
        raise ArtifactError(str(path), got, f"a split {SPLIT!r}", "Embed training images, with `--splits train`.")
    features = sets[SPLIT]
    if not features.shares_model(checkpoint, precision="fp32"):
        got = f"features of {features.model[:12]}... in {features.precision or 'unknown precision'}"
        raise ArtifactError(str(path), got, f"those of {checkpoint[:12]}... in fp32", "Embed with that model.")
    place = {digest: row for row, digest in enumerate(features.hashes)}
    rows = [place.get(sha256_file(record.path)) for record in records]
    missing = [record.path for record, row in zip(records, rows, strict=True) if row is None]
    if missing:
        got, hint = f"no features of {len(missing)} images, such as {missing[0]}", "Embed this dataset."
        raise ArtifactError(str(path), got, "those of every training image", hint)
    return features.take(np.array(rows))


@torch.inference_mode()
def extract_teacher(
    backbone: Backbone, images: TrainImages, recipe: Recipe, device: str, made_by: str, batch: int = 64
) -> Features:
    """The teacher's features of ``recipe.views`` views of each image, as `nformer-edge embed` stores them."""
    model = for_inference(backbone).to(device)
    hashes = tuple(sha256_file(record.path) for record in images.records)
    features = np.empty((recipe.views, len(images), backbone.spec.features), np.float32)
    bar = tqdm(total=len(images) * recipe.views, desc="teacher", unit="img", **PROGRESS)
    with bar:
        for start in range(0, len(images), batch):
            rows = np.arange(start, min(start + batch, len(images)))
            pixels, names = images.pixels(rows), [hashes[row] for row in rows]
            for view in range(recipe.views):
                drawn = draw_view(pixels, names, view, images.spec, recipe.augment, recipe.seed)
                features[view, rows] = model(torch.from_numpy(drawn).to(device)).cpu().numpy()
                bar.update(len(rows))
    paths = tuple(record.path for record in images.records)
    how = json.dumps({"seed": recipe.seed, **to_dict(recipe.augment)}, sort_keys=True) if recipe.views > 1 else ""
    plain = Features(features[0], images.pids, images.camids, paths, made_by, hashes)
    return replace(plain, augmented=features[1:] if recipe.views > 1 else None, augmentation=how)


@torch.inference_mode()
def keep_maps(path: Path, lessons: Lessons, size: tuple[int, int], device: torch.device, batch: int = 64) -> None:
    """The teacher's last feature maps of all its views go to a .npy file, float16 [V, N, C, h, w].

    Args:
        path: of the file; one that is there is taken as it is.
        size: height and width that the maps are averaged to.
    """
    if not path.is_file():
        images, trunk, whole = lessons.images, lessons.model.to(device).trunk, path.with_suffix(".part")
        path.parent.mkdir(parents=True, exist_ok=True)
        channels: int = trunk.channels  # type: ignore[assignment]
        shape = (lessons.teacher.views, len(images), channels, *size)
        kept = np.lib.format.open_memmap(whole, "w+", np.float16, shape)
        with tqdm(total=shape[0] * shape[1], desc="teacher's maps", unit="img", **PROGRESS) as bar:
            for view in range(shape[0]):
                for start in range(0, len(images), batch):
                    rows = np.arange(start, min(start + batch, len(images)))
                    drawn = lessons.drawn(np.full(len(rows), view), rows)
                    drawn = drawn.to(device, memory_format=torch.channels_last)
                    kept[view, rows] = F.adaptive_avg_pool2d(trunk(drawn), size).cpu().numpy()
                    bar.update(len(rows))
        kept.flush()
        os.replace(whole, path)


def keep_related(path: Path, lessons: Lessons, device: torch.device) -> None:
    """The teacher's plain features, all in one set through its head, go to a .npy file, float32 [N, D].

    Args:
        path: of the file; one that is there is taken as it is.
    """
    if not path.is_file():
        assert lessons.head is not None
        head = copy.deepcopy(lessons.head).to(device)
        if isinstance(head, GatedHead):
            head.tell(len(lessons.images) / lessons.images.num_classes)
        plain = lessons.teacher.view(0)
        _, related = relate(head, plain.take(np.arange(0)), plain)
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_suffix(".part.npy")
        np.save(whole, related.features)
        os.replace(whole, path)
