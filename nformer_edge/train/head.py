"""Stage two: the NFormer head, from extracted features alone."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from nformer_edge.core.errors import DataError
from nformer_edge.core.features import FeatureSet, check_features
from nformer_edge.core.ops import draw_landmarks
from nformer_edge.core.spec import HeadSpec
from nformer_edge.core.terminal import PROGRESS
from nformer_edge.model.nformer import NFormer
from nformer_edge.model.start import start_as_reciprocal_mean
from nformer_edge.train.config import HeadConfig
from nformer_edge.train.losses import Criterion
from nformer_edge.train.optimize import Optimizer

Watch = Callable[[NFormer], float]


def train_head(
    views: Sequence[FeatureSet],
    spec: HeadSpec,
    config: HeadConfig,
    *,
    seed: int = 0,
    device: str = "cpu",
    watch: Watch | None = None,
) -> tuple[NFormer, list[dict[str, Any]]]:
    """Trains a head on the features of the training images.

    Args:
        views: the same images in the same order, each time augmented otherwise; one will do.
        watch: called before the first and after each epoch; returns the held-out mAP. The best epoch's head is kept.

    Returns:
        The head in evaluation mode, and one row an epoch: epoch (0 is the start), loss, accuracy, lr, seconds and,
        with `watch`, held_out_map (0..1).

    Raises:
        DataError: if features are not usable, or there are fewer than two identities.
    """
    stack, labels = _stack(views, spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = NFormer(spec)
        criterion = Criterion(config.loss, int(labels.max()) + 1, spec.features).to(device)
    if config.start == "reciprocal_mean":
        start_as_reciprocal_mean(head, stack[0], config.strength)
    head.to(device)
    optimizer = Optimizer(head, criterion, config)
    rng = np.random.default_rng([seed, 2])
    _settle(head, stack, config, rng, device)
    keeper = _Keeper(head, watch)
    with tqdm(total=config.epochs, desc="head", unit="epoch", **PROGRESS) as bar:
        for epoch in range(config.epochs):
            row = _epoch(epoch, stack, labels, head, criterion, optimizer, rng, device)
            keeper.note(row)
            bar.set_postfix(loss=f"{row['loss']:.3f}")
            bar.update()
    return keeper.best.to("cpu").eval(), keeper.rows


class _Keeper:
    """Keeps the head of the best epoch by held-out mAP; of the last where nothing is held out."""

    def __init__(self, head: NFormer, watch: Watch | None) -> None:
        self.head, self.watch, self.best = head, watch, head
        self.rows: list[dict[str, Any]] = []
        self.highest = -1.0
        if watch is not None:
            self.note({"epoch": 0})

    def note(self, row: dict[str, Any]) -> None:
        if self.watch is not None:
            row["held_out_map"] = self.watch(self.head.eval())
            if row["held_out_map"] > self.highest:
                self.highest, self.best = row["held_out_map"], copy.deepcopy(self.head)
        self.rows.append(row)


def _stack(views: Sequence[FeatureSet], spec: HeadSpec) -> tuple[Tensor, Tensor]:
    """Views as float32 [V, M, D] and labels int64 [M] in 0..C-1."""
    if not views or len(views[0]) == 0:
        raise DataError("training features", got="none", expected="one view or more", mend="Extract them first.")
    for view in views:
        check_features(view.features, "training features", spec.features)
        if not np.array_equal(view.pids, views[0].pids):
            raise DataError("training features", got="views of other images", expected="the same images in the same "
                            "order", mend="Extract every view from the same list.")  # fmt: skip
    classes, labels = np.unique(views[0].pids, return_inverse=True)
    if len(classes) < 2:
        raise DataError(
            "training features", got=f"{len(classes)} identities", expected="at least two", mend="Add people."
        )
    stack = np.stack([v.features.astype(np.float32) for v in views])
    return torch.from_numpy(stack), torch.from_numpy(labels.astype(np.int64))


def _draw(stack: Tensor, size: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A set of images around a random one, each in a random view: features [N, D], rows int64 [N].

    As published: of the nearest ``size * (1 + u)`` images to a random centre, `size` are drawn at random.
    """
    views, images, _ = stack.shape
    view = torch.from_numpy(rng.integers(0, views, images))
    mixed = stack[view, torch.arange(images)]
    if images <= size:
        return mixed, torch.arange(images)
    unit = torch.nn.functional.normalize(mixed, dim=1)
    similar = unit @ unit[int(rng.integers(images))]
    near = similar.argsort(descending=True, stable=True)[: int(size * (1 + rng.random()))].numpy()
    rows = torch.from_numpy(rng.permutation(near)[:size])
    return mixed[rows], rows


def _landmarks(spec: HeadSpec, images: int, rng: np.random.Generator, device: str) -> Tensor:
    drawn = draw_landmarks(images, spec.layers, spec.landmarks, int(rng.integers(2**31)))
    return torch.from_numpy(drawn).to(device)


@torch.no_grad()
def _settle(head: NFormer, stack: Tensor, config: HeadConfig, rng: np.random.Generator, device: str) -> None:
    """Gives the neck's batch norm the statistics of the untrained head, so that the start ranks as it should."""
    features, _ = _draw(stack, config.set_size, rng)
    encoded = head.encode(features.to(device), _landmarks(head.spec, len(features), rng, device))
    head.bottleneck.running_mean = encoded.mean(dim=0)
    head.bottleneck.running_var = encoded.var(dim=0)


def _epoch(
    epoch: int,
    stack: Tensor,
    labels: Tensor,
    head: NFormer,
    criterion: Criterion,
    optimizer: Optimizer,
    rng: np.random.Generator,
    device: str,
) -> dict[str, Any]:
    start = time.perf_counter()
    head.train()
    config = optimizer.config
    assert isinstance(config, HeadConfig)
    losses, accuracies = [], []
    for step in range(config.sets):
        optimizer.schedule(epoch + step / config.sets)
        features, rows = _draw(stack, config.set_size, rng)
        before = head.encode(features.to(device), _landmarks(head.spec, len(features), rng, device))
        loss, accuracy = criterion(before, head.bottleneck(before), labels[rows].to(device))
        losses.append(optimizer.step(loss))
        accuracies.append(float(accuracy))
    return {
        "epoch": epoch + 1, "loss": float(np.mean(losses)), "accuracy": float(np.mean(accuracies)),
        "lr": optimizer.lr, "seconds": time.perf_counter() - start,
    }  # fmt: skip


@torch.inference_mode()
def relate(head: NFormer, query: FeatureSet, gallery: FeatureSet, seed: int = 0) -> tuple[FeatureSet, FeatureSet]:
    """Query and gallery through the head together, as published: the held-out evaluation's way."""
    joint = torch.from_numpy(np.concatenate([query.features, gallery.features]).astype(np.float32))
    device = head.bottleneck.weight.device
    drawn = draw_landmarks(len(joint), head.spec.layers, head.spec.landmarks, seed)
    out = head(joint.to(device), torch.from_numpy(drawn).to(device)).cpu().numpy()
    return query.with_features(out[: len(query)]), gallery.with_features(out[len(query) :])
