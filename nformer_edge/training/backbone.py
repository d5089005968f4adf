"""Stage one: the backbone, from images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from nformer_edge.core.features import Features
from nformer_edge.core.spec import ModelSpec
from nformer_edge.core.terminal import PROGRESS
from nformer_edge.data.loaders import AugmentSpec, TrainImages, TrainLoader, augment, evaluation_batches
from nformer_edge.data.records import ImageRecord
from nformer_edge.data.sampler import PKSampler
from nformer_edge.model.backbone import Backbone
from nformer_edge.training.compute import Compute, share_batch_norm
from nformer_edge.training.config import BackboneConfig
from nformer_edge.training.history import Epoch
from nformer_edge.training.losses import Criterion
from nformer_edge.training.optimize import Optimizer
from nformer_edge.training.state import TrainingState

Watch = Callable[[Backbone], float]


class Loader(Protocol):
    """Yields batches: images float32 [B, 3, H, W], then what the criterion is told of each."""

    def set_epoch(self, epoch: int, start: int = 0) -> None: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]: ...


def train_backbone(
    images: TrainImages,
    backbone: Backbone,
    config: BackboneConfig,
    *,
    seed: int = 0,
    device: str = "cpu",
    watch: Watch | None = None,
    compute: Compute | None = None,
    loader: Loader | None = None,
    criterion: Criterion | None = None,
    after_step: Callable[[], None] | None = None,
    **kept: Any,
) -> list[Epoch]:
    """Trains `backbone` in place and leaves it in evaluation mode.

    Args:
        images: what to learn from.
        watch: called after each epoch with the backbone in evaluation mode; returns the held-out mAP.
        compute: who computes; one process in float32 on `device` if None.
        loader: what to learn from in place of augmented images and their labels.
        criterion: the loss in place of the labels' own; it is given what `loader` yields after the images.
        after_step: called after each batch, such as to set pruned weights back to zero.
        kept: ``state``, ``on_row`` and ``on_best`` of `TrainingState`: to go on after an interruption, and to look on.

    Returns:
        One row an epoch: epoch, loss, accuracy, lr, seconds and, with `watch`, held_out_map (0..1).

    Raises:
        DataError: if there are fewer than two identities, or the loss is not finite.
        UsageError: if a batch cannot be shared out among the ranks.
    """
    compute = compute or Compute(device)
    if loader is None:
        sampler = PKSampler(images.pids, config.p, config.k, seed)
        loader = TrainLoader(images, sampler, config.augment, seed, compute.rank, compute.world)
    if criterion is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            criterion = Criterion(config.loss, images.num_classes, backbone.spec.features)
    criterion.to(compute.device, compute.dtype)
    backbone.to(compute.device, compute.dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    trained = share_batch_norm(backbone, compute.device) if compute.world > 1 else backbone
    state = TrainingState(trained, criterion, Optimizer(trained, criterion, config, compute), watch=watch, **kept)
    state.restore()
    with state.bar("backbone", config.epochs) as bar:
        while state.epoch < config.epochs:
            _epoch(state, loader, after_step)
            row = state.close_epoch()
            bar.set_postfix(loss=f"{row.loss:.3f}", accuracy=f"{row.accuracy:.3f}")
            bar.update()
    state.finish()
    if trained is not backbone:
        backbone.load_state_dict(trained.state_dict())
    backbone.to("cpu", torch.float32).to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    return state.rows


def _epoch(state: TrainingState, loader: Loader, after_step: Callable[[], None] | None) -> None:
    """What is left of the epoch."""
    compute, optimizer = state.compute, state.optimizer
    state.model.train()
    loader.set_epoch(state.epoch, state.step)
    total = len(loader)
    for images, *targets in loader:
        part = optimizer.part(state.step, total)
        optimizer.schedule(state.epoch + (state.step - part[0]) / total)
        batch = images.to(compute.device, compute.dtype, memory_format=torch.channels_last)
        outputs = compute.forward(partial(state.criterion.outputs, images=batch), sync=part[0] == part[1] - 1)
        said = [compute.gather(output.to(compute.dtype)) for output in outputs]
        told = [compute.gather(target.to(compute.device)) for target in targets]
        loss, accuracy = state.criterion(*said, *told)
        value = optimizer.step(loss, part)
        if after_step is not None:
            after_step()
        state.took(value, float(accuracy), part)


@torch.inference_mode()
def extract(
    backbone: Backbone, records: Sequence[ImageRecord], spec: ModelSpec, *, batch: int = 64, device: str = "cpu"
) -> Features:
    """The features of `records`, preprocessed as at runtime."""
    backbone.to(device).eval()
    batches = evaluation_batches(records, spec.preprocess, batch)
    bar = tqdm(batches, total=-(-len(records) // batch), desc="features", unit="batch", **PROGRESS)
    dtype = next(backbone.parameters()).dtype
    rows = [backbone(images.to(device, dtype)).float().cpu().numpy() for images in bar]
    return _labeled(rows, records, spec)


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
) -> Features:
    """The features of one augmented view of the training images; `seed` decides the view."""
    backbone.to(device).eval()
    rng = np.random.default_rng(seed)
    rows = []
    for start in tqdm(range(0, len(images), batch), desc="view", unit="batch", **PROGRESS):
        chosen = np.arange(start, min(start + batch, len(images)))
        view = torch.from_numpy(augment(images.pixels(chosen), spec.preprocess, recipe, rng))
        rows.append(backbone(view.to(device)).cpu().numpy())
    return _labeled(rows, images.records, spec)


def _labeled(rows: list[np.ndarray], records: Sequence[ImageRecord], spec: ModelSpec) -> Features:
    return Features(
        np.concatenate(rows) if rows else np.empty((0, spec.backbone.features), np.float32),
        np.array([r.pid for r in records], dtype=np.int64),
        np.array([r.camid for r in records], dtype=np.int64),
        tuple(r.path for r in records),
    )
