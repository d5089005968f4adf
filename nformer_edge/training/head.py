"""Stage two: the NFormer head, from extracted features alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nformer_edge.core.errors import DataError
from nformer_edge.core.features import Features, check_features
from nformer_edge.core.spec import HeadSpec
from nformer_edge.model.gated import GatedHead, Head, make_head, start_as_gates
from nformer_edge.model.nformer import NFormer, unit
from nformer_edge.model.per_query import nearby_cosines
from nformer_edge.model.start import start_as_discriminant, start_as_reciprocal_mean
from nformer_edge.ops.contract import draw_landmarks
from nformer_edge.training.compute import Compute
from nformer_edge.training.config import HeadConfig
from nformer_edge.training.history import Epoch
from nformer_edge.training.losses import Criterion
from nformer_edge.training.mixed import IMAGES, QUERIES, MixedSet, draw_mixed, ranking_loss
from nformer_edge.training.optimize import Optimizer
from nformer_edge.training.state import TrainingState

Watch = Callable[[Head], float]


def train_head(
    views: Sequence[Features],
    spec: HeadSpec,
    config: HeadConfig,
    *,
    seed: int = 0,
    device: str = "cpu",
    watch: Watch | None = None,
    compute: Compute | None = None,
    **kept: Any,
) -> tuple[Head, list[Epoch]]:
    """Trains a head on the features of the training images.

    Args:
        views: the same images in the same order, each time augmented otherwise; one will do.
        watch: called before the first and after each epoch; returns the held-out mAP. The best epoch's head is kept.
        compute: who computes; one process in float32 on `device` if None.
        kept: ``state``, ``on_row`` and ``on_best`` of `TrainingState`, and ``on_last``, which is called with the last
            epoch's tensors.

    Returns:
        The head in evaluation mode, and one row an epoch: epoch (0 is the start), loss, accuracy, lr, seconds and,
        with `watch`, held_out_map (0..1).

    Raises:
        DataError: if features are not usable, or there are fewer than two identities.
        UsageError: if a batch's sets cannot be shared out among the ranks.
    """
    compute = compute or Compute(device)
    compute.share_of(config.batch, "batch")
    stack, labels = _stack(views, spec, config.spread)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = make_head(spec)
        criterion = Criterion(config.loss, int(labels.max()) + 1, spec.features)
    criterion.to(compute.device, compute.dtype)
    camids = torch.from_numpy(views[0].camids.astype(np.int64))
    _start(head, stack[0], labels, camids, config)
    head.to(compute.device, compute.dtype)
    on_last = kept.pop("on_last", None)
    rng = np.random.default_rng([seed, 2])  # everything random in this stage comes from here: its state is saved
    state = TrainingState(head, criterion, Optimizer(head, criterion, config, compute), watch=watch, rng=rng, **kept)
    if not state.restore():
        if isinstance(head, NFormer):
            _settle(head, stack, config, rng, compute)
        if watch is not None:
            state.note(Epoch(0))
    held = _Held(head if config.hold_choice and isinstance(head, NFormer) else None)
    with state.bar("head", config.epochs) as bar:
        while state.epoch < config.epochs:
            if isinstance(head, NFormer):
                _epoch(state, stack, labels, head, config, held)
            else:
                _mixed_epoch(state, stack, labels, camids, head, config)
            row = state.close_epoch()
            bar.set_postfix(loss=f"{row.loss:.3f}")
            bar.update()
    state.finish()
    if on_last is not None:
        on_last(head.state_dict())
    if state.best is not None:
        head.load_state_dict(state.best)
    return head.to("cpu", torch.float32).eval(), state.rows


def spread(features: np.ndarray, pids: np.ndarray, factor: float) -> np.ndarray:
    """Moves each image `factor` times as far from its person's mean. Returns float32 [N, D].

    Features of images that their own backbone was trained on lie closer together than those of people it never saw.
    Features that are nowhere negative, as a ReLU leaves them, are cut off at 0.
    """
    _, labels = np.unique(pids, return_inverse=True)
    sums = np.zeros((int(labels.max()) + 1, features.shape[1]))
    np.add.at(sums, labels, features)
    means = (sums / np.bincount(labels)[:, None])[labels]
    floor = 0.0 if features.min() >= 0 else -np.inf
    moved: np.ndarray = np.maximum(means + factor * (features - means), floor).astype(np.float32)
    return moved


def _stack(views: Sequence[Features], spec: HeadSpec, factor: float) -> tuple[Tensor, Tensor]:
    """Views as float32 [V, M, D] and labels int64 [M] in 0..C-1."""
    if not views or len(views[0]) == 0:
        raise DataError("training features", "none", "one view or more", "Extract them first.")
    for view in views:
        check_features(view.features, "training features", spec.features)
        if not np.array_equal(view.pids, views[0].pids):
            got, expected = "views of other images", "the same images in one order"
            raise DataError("training features", got, expected, "Extract all from one list.")
    classes, labels = np.unique(views[0].pids, return_inverse=True)
    if len(classes) < 2:
        raise DataError(
            "training features", f"{len(classes)} identities", "at least two", "Add images of other people."
        )
    features = [v.features if factor == 1 else spread(v.features, v.pids, factor) for v in views]
    stack = np.stack([x.astype(np.float32) for x in features])
    return torch.from_numpy(stack), torch.from_numpy(labels.astype(np.int64))


def _start(head: Head, features: Tensor, labels: Tensor, camids: Tensor, config: HeadConfig) -> None:
    """Gives the head the weights that `config.start` names; ``random`` leaves those it has."""
    cameras = camids if config.start == "camera_discriminant" else None
    if isinstance(head, GatedHead):
        if config.start != "random":
            start_as_gates(head, features, None if config.start == "reciprocal_mean" else labels, cameras, config.power)
    elif config.start == "reciprocal_mean":
        start_as_reciprocal_mean(head, features, config.strength, config.sharpness)
    elif config.start != "random":
        sharpness = config.sharpness or 0.0
        start_as_discriminant(head, features, labels, config.strength, sharpness, cameras, config.power)


def _draw(stack: Tensor, size: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A set of images around a random one, each in a random view: features [N, D], rows int64 [N].

    As published: of the nearest ``size * (1 + u)`` images to a random center, `size` are drawn at random.
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


def _landmarks(spec: HeadSpec, images: int, rng: np.random.Generator, device: torch.device) -> Tensor:
    drawn = draw_landmarks(images, spec.layers, spec.landmarks, int(rng.integers(2**31)))
    return torch.from_numpy(drawn).to(device)


@torch.no_grad()
def _settle(head: NFormer, stack: Tensor, config: HeadConfig, rng: np.random.Generator, compute: Compute) -> None:
    """Gives the neck's batch norm the statistics of the untrained head, so that the start ranks as it should."""
    features, _ = _draw(stack, config.set_size, rng)
    landmarks = _landmarks(head.spec, len(features), rng, compute.device)
    encoded = head.encode(features.to(compute.device, compute.dtype), landmarks)
    head.bottleneck.running_mean = encoded.mean(dim=0)
    head.bottleneck.running_var = encoded.var(dim=0)


def _encode(head: NFormer, sets: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    return torch.cat([head.encode(features, landmarks) for features, landmarks, _ in sets])


class _Held:
    """Queries and keys as they are now, to be put back after every step; nothing where there is no head."""

    def __init__(self, head: NFormer | None) -> None:
        tensors = [t for block in head.h for t in (block.attn.c_attn.w, block.attn.c_attn.b)] if head else []
        self._kept = [(t, t.detach()[..., : t.shape[-1] // 3 * 2].clone()) for t in tensors]

    @torch.no_grad()
    def put_back(self) -> None:
        for tensor, kept in self._kept:
            tensor[..., : kept.shape[-1]] = kept


def _epoch(state: TrainingState, stack: Tensor, labels: Tensor, head: NFormer, config: HeadConfig, held: _Held) -> None:
    """What is left of the epoch. Ranks share out a batch's sets; batch norm and losses see all of them."""
    compute, optimizer = state.compute, state.optimizer
    assert state.rng is not None
    head.train()
    share = config.batch // compute.world
    while state.step < config.sets:
        part = optimizer.part(state.step, config.sets)
        optimizer.schedule(state.epoch + (state.step - part[0]) / config.sets)
        sets = []
        for place in range(config.batch):  # every rank draws every set, so that all go on from the same state
            features, rows = _draw(stack, config.set_size, state.rng)
            landmarks = _landmarks(head.spec, len(features), state.rng, compute.device)
            if place // share == compute.rank:
                sets.append((features.to(compute.device, compute.dtype), landmarks, labels[rows].to(compute.device)))
        encoded = compute.forward(partial(_encode, sets=sets), sync=part[0] == part[1] - 1)
        before = compute.gather(encoded.to(compute.dtype))
        chosen = compute.gather(torch.cat([target for _, _, target in sets]))
        loss, accuracy = state.criterion(before, head.bottleneck(before), chosen)
        value = optimizer.step(loss, part)
        held.put_back()
        state.took(value, float(accuracy), part)


def _mixed_epoch(
    state: TrainingState, stack: Tensor, labels: Tensor, camids: Tensor, head: GatedHead, config: HeadConfig
) -> None:
    """What is left of an epoch of the gated head: a ranking loss over sets of mixed composition (`training.mixed`).

    Half of the sets have all queries together, half each query alone, as a search asks.
    """
    compute, optimizer, rng = state.compute, state.optimizer, state.rng
    assert rng is not None
    head.train()
    share, people, cameras = config.batch // compute.world, labels.numpy(), camids.numpy()
    while state.step < config.sets:
        part = optimizer.part(state.step, config.sets)
        optimizer.schedule(state.epoch + (state.step - part[0]) / config.sets)
        sets = []
        for place in range(config.batch):  # every rank draws every set, so that all go on from the same state
            images = IMAGES[(state.step * config.batch + place) % len(IMAGES)]
            drawn = draw_mixed(people, cameras, images, config.set_size, rng)
            asked, alone = rng.permutation(drawn.queries)[:QUERIES], bool(drawn.queries and rng.random() < 0.5)
            landmarks = _landmarks(head.spec, len(drawn.rows) - alone * drawn.queries, rng, compute.device)
            view, seed = int(rng.integers(len(stack))), int(rng.integers(2**31))
            if place // share == compute.rank:
                x = stack[view, drawn.rows].to(compute.device, compute.dtype)
                sets.append(_Asked(x, landmarks, drawn, torch.from_numpy(asked).to(x.device), alone, seed))
        scores = compute.forward(partial(_scores, sets=sets), sync=part[0] == part[1] - 1)
        losses, accuracies = [], []
        for found, each in zip(scores, sets, strict=True):
            of_rows = [x[each.drawn.rows].to(found.device) for x in (labels, camids)]
            query, gallery = (
                (of_rows[0][rows], of_rows[1][rows]) for rows in (each.asked, slice(each.drawn.queries, None))
            )
            loss, accuracy = ranking_loss(found, query, gallery, np.random.default_rng(each.seed))
            losses.append(loss)
            accuracies.append(float(accuracy))
        state.took(optimizer.step(torch.stack(losses).mean(), part), float(np.mean(accuracies)), part)


class _Asked(NamedTuple):
    """A set [N, D] with its landmarks, and which of its queries are asked, alone or with all others."""

    x: Tensor
    landmarks: Tensor
    drawn: MixedSet
    asked: Tensor
    alone: bool
    seed: int


def _scores(head: GatedHead, sets: Sequence[_Asked]) -> list[Tensor]:
    """Cosines of the queries asked to the gallery, of each set."""
    found = []
    for each in sets:
        query, gallery = each.x[: each.drawn.queries], each.x[each.drawn.queries :]
        if each.alone:
            found.append(nearby_cosines(head, query[each.asked], gallery, each.landmarks))
        else:
            related = unit(head(each.x, each.landmarks))
            found.append(related[each.asked] @ related[each.drawn.queries :].T)
    return found
