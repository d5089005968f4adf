"""Stage one: the backbone, from images."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from nformer_edge.core.features import FeatureSet
from nformer_edge.core.spec import ModelSpec
from nformer_edge.core.terminal import PROGRESS
from nformer_edge.data.loaders import AugmentSpec, TrainImages, TrainLoader, augment, evaluation_batches
from nformer_edge.data.records import ImageRecord
from nformer_edge.data.sampler import PKSampler
from nformer_edge.model.backbone import Backbone
from nformer_edge.train.config import BackboneConfig
from nformer_edge.train.losses import Criterion
from nformer_edge.train.optimize import Optimizer

Watch = Callable[[Backbone], float]


def train_backbone(
    images: TrainImages,
    backbone: Backbone,
    config: BackboneConfig,
    *,
    seed: int = 0,
    device: str = "cpu",
    watch: Watch | None = None,
) -> list[dict[str, Any]]:
    """Trains `backbone` in place and leaves it in evaluation mode.

    Args:
        images: what to learn from.
        watch: called after each epoch with the backbone in evaluation mode; returns the held-out mAP.

    Returns:
        One row an epoch: epoch, loss, accuracy, lr, seconds and, with `watch`, held_out_map (0..1).

    Raises:
        DataError: if there are fewer than two identities, or the loss is not finite.
    """
    loader = TrainLoader(images, PKSampler(images.pids, config.p, config.k, seed), config.augment, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        criterion = Criterion(config.loss, images.num_classes, backbone.spec.features).to(device)
    backbone.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = Optimizer(backbone, criterion, config)
    rows = []
    with tqdm(total=config.epochs, desc="backbone", unit="epoch", **PROGRESS) as bar:
        for epoch in range(config.epochs):
            row = _epoch(epoch, loader, backbone, criterion, optimizer, device)
            if watch is not None:
                row["held_out_map"] = watch(backbone.eval())
            rows.append(row)
            bar.set_postfix(loss=f"{row['loss']:.3f}", accuracy=f"{row['accuracy']:.3f}")
            bar.update()
    backbone.to("cpu").to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    return rows


def _epoch(
    epoch: int, loader: TrainLoader, backbone: Backbone, criterion: Criterion, optimizer: Optimizer, device: str
) -> dict[str, Any]:
    start = time.perf_counter()
    backbone.train()
    loader.set_epoch(epoch)
    losses, accuracies, total = [], [], len(loader)
    for step, (batch, labels) in enumerate(loader):
        optimizer.schedule(epoch + step / total)
        batch = batch.to(device, memory_format=torch.channels_last)
        labels = labels.to(device)
        before, after = backbone.both(batch)
        loss, accuracy = criterion(before, after, labels)
        losses.append(optimizer.step(loss))
        accuracies.append(float(accuracy))
    return {
        "epoch": epoch + 1, "loss": float(np.mean(losses)), "accuracy": float(np.mean(accuracies)),
        "lr": optimizer.lr, "seconds": time.perf_counter() - start,
    }  # fmt: skip


@torch.inference_mode()
def extract(
    backbone: Backbone, records: Sequence[ImageRecord], spec: ModelSpec, *, batch: int = 64, device: str = "cpu"
) -> FeatureSet:
    """The features of `records`, preprocessed as at runtime."""
    backbone.to(device).eval()
    batches = evaluation_batches(records, spec.preprocess, batch)
    bar = tqdm(batches, total=-(-len(records) // batch), desc="features", unit="batch", **PROGRESS)
    rows = [backbone(images.to(device)).cpu().numpy() for images in bar]
    return _labelled(rows, records, spec)


@torch.inference_mode()
def extract_view(
    backbone: Backbone,
    images: TrainImages,
    spec: ModelSpec,
    recipe: AugmentSpec,
    *,
    seed: int,
    batch: int = 64,
    device: str = "cpu",
) -> FeatureSet:
    """The features of one augmented view of the training images; `seed` decides the view."""
    backbone.to(device).eval()
    rng = np.random.default_rng(seed)
    rows = []
    for start in tqdm(range(0, len(images), batch), desc="view", unit="batch", **PROGRESS):
        chosen = np.arange(start, min(start + batch, len(images)))
        view = torch.from_numpy(augment(images.pixels(chosen), spec.preprocess, recipe, rng))
        rows.append(backbone(view.to(device)).cpu().numpy())
    return _labelled(rows, images.records, spec)


def _labelled(rows: list[np.ndarray], records: Sequence[ImageRecord], spec: ModelSpec) -> FeatureSet:
    return FeatureSet(
        np.concatenate(rows) if rows else np.empty((0, spec.backbone.features), np.float32),
        np.array([r.pid for r in records], dtype=np.int64),
        np.array([r.camid for r in records], dtype=np.int64),
        tuple(r.path for r in records),
    )
