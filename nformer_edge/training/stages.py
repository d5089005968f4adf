"""The two stages with their files: what each starts from, keeps on the way and leaves behind."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from nformer_edge.core.artifact import sha256_file
from nformer_edge.core.errors import ArtifactError
from nformer_edge.core.features import Features, load_features, save_features
from nformer_edge.core.spec import ModelSpec
from nformer_edge.core.values import Table, from_json, to_json
from nformer_edge.data.holdout import Holdout
from nformer_edge.data.loaders import TrainImages
from nformer_edge.metrics.composition import Composition, composition
from nformer_edge.metrics.ranking import evaluate
from nformer_edge.model.backbone import Backbone
from nformer_edge.model.checkpoint import load_checkpoint, save_checkpoint
from nformer_edge.model.gated import GatedHead, Head, make_head
from nformer_edge.training.backbone import extract, extract_view, train_backbone
from nformer_edge.training.config import TrainConfig
from nformer_edge.training.head import train_head
from nformer_edge.training.history import Best, Stage, config_identity
from nformer_edge.training.relate import per_query, relate
from nformer_edge.training.run import Run

#: Files of a run beside its checkpoint ``<stem>.safetensors``, each ``<stem>.<name>``.
BACKBONE, BEST_BACKBONE = "backbone.safetensors", "backbone.best.safetensors"
BEST_HEAD, LAST_HEAD = "head.best.safetensors", "head.last.safetensors"
VIEWS = "views.npz"


def first_stage(
    run: Run,
    images: TrainImages,
    config: TrainConfig,
    holdout: Holdout | None,
    initial: str | os.PathLike[str] | None,
    extra: Table,
) -> tuple[Backbone, Stage, str]:
    """Stage one, unless an earlier run of this training has already done it.

    Returns:
        The backbone of the last epoch, the stage's record for the history, and its checkpoint's sha256.
    """
    start = time.perf_counter()
    spec = replace(config.model, head=None)
    path = run.checkpoint if config.model.head is None else run.beside(BACKBONE)
    state = run.state("backbone", replace(run.identity, config=config_identity(config, "head")))
    done = state.finished()
    if done is not None and path.is_file() and sha256_file(path) == done["sha256"]:
        record = from_json(Stage, done["record"])
        run.logs.rows["backbone"] = record.epochs
        kept = load_checkpoint(path)
        assert kept.backbone is not None
        return kept.backbone, record, kept.sha256
    backbone, device = start_backbone(config, initial), str(run.compute.device)
    if holdout is None:
        run.without(BEST_BACKBONE)

    def watch(model: Backbone) -> float:
        assert holdout is not None
        return evaluate(*held_out(model, holdout, spec, device)).mAP

    def keep_best(tensors: dict[str, Tensor], epoch: int) -> None:
        best = Backbone(spec.backbone)
        best.load_state_dict(tensors)
        save_checkpoint(run.beside(BEST_BACKBONE), spec, best, None, {**extra, "epoch": epoch})

    rows = train_backbone(
        images,
        backbone,
        config.backbone,
        seed=config.seed,
        watch=watch if holdout else None,
        compute=run.compute,
        state=state,
        on_row=partial(run.logs.note, "backbone"),
        on_best=keep_best,
    )
    record = Stage(tuple(rows), Best.of(rows), time.perf_counter() - start)
    if run.compute.leads:
        digest = save_checkpoint(path, spec, backbone, None, extra)
        if config.model.head is not None:
            state.finish({"sha256": digest, "record": to_json(record)})
    run.compute.wait()
    return backbone, record, sha256_file(path)


def second_stage(
    run: Run,
    views: Sequence[Features],
    held: tuple[Features, Features] | None,
    config: TrainConfig,
    source: str,
    backbone: Backbone | None,
    extra: Table,
) -> tuple[Stage, str]:
    """Stage two, and the run's checkpoint.

    Args:
        views: the training images' features, each time augmented otherwise.
        held: query and gallery of the held-out identities; features are needed on the leading rank alone.
        source: sha256 of what the features come from.
        backbone: goes into the checkpoint; None leaves a head alone.

    Returns:
        The stage's record for the history, and the checkpoint's sha256.
    """
    start = time.perf_counter()
    spec = config.model
    assert spec.head is not None
    if held is None:
        run.without(BEST_HEAD)
    state = run.state("head", replace(run.identity, config=config_identity(config, "backbone"), features=source))

    def watch(head: Head) -> float:
        assert held is not None
        return evaluate(*relate(head, *held, seed=config.seed)).mAP

    def keep(name: str, tensors: dict[str, Tensor], epoch: int) -> None:
        assert spec.head is not None
        head = make_head(spec.head)
        head.load_state_dict(tensors)
        if run.compute.leads:
            save_checkpoint(run.beside(name), spec, None, head, {**extra, "epoch": epoch})

    head, rows = train_head(
        views,
        spec.head,
        config.head,
        seed=config.seed,
        watch=watch if held is not None else None,
        compute=run.compute,
        state=state,
        on_row=partial(run.logs.note, "head"),
        on_best=partial(keep, BEST_HEAD),
        on_last=partial(keep, LAST_HEAD, epoch=config.head.epochs),
    )
    if run.compute.leads:
        measured: Table = {} if held is None else {"accuracy": to_json(_accuracy(head, *held, config.seed))}
        save_checkpoint(run.checkpoint, spec, backbone, head, {**extra, **measured})
    run.compute.wait()
    alone = None if held is None or not run.compute.leads else evaluate(*held).mAP
    record = Stage(tuple(rows), Best.of(rows), time.perf_counter() - start, backbone_map=alone)
    return record, sha256_file(run.checkpoint)


def _accuracy(head: Head, query: Features, gallery: Features, seed: int) -> Composition:
    """Backbone and head by images a person, on the held-out identities."""
    people = f"{len(np.unique(query.pids))} people held out of this training"

    def alone(
        asks: Features, stays: Features, landmark_seed: int, images: float
    ) -> tuple[np.ndarray, np.ndarray | None]:
        found = per_query(head, asks, stays, landmark_seed, follow=False).distances
        if not isinstance(head, GatedHead):
            return found, None
        told = copy.deepcopy(head)
        told.tell(images)
        return found, per_query(told, asks, stays, landmark_seed, follow=False).distances

    return composition(query, gallery, partial(relate, head), alone, landmark_seeds=(seed,), measured_on=people)


def extract_views(
    run: Run, images: TrainImages, backbone: Backbone, config: TrainConfig, source: str
) -> list[Features]:
    """The training images' augmented views, extracted by the leading rank and kept in a file until the run ends.

    Args:
        source: sha256 of the backbone's checkpoint: views of another one are extracted anew.
    """
    path, device = run.kept(VIEWS), str(run.compute.device)
    views: list[Features] = []
    if run.compute.leads:
        kept = list(load_features(path).values()) if run.resume and path.is_file() else []
        if len(kept) == config.head.views and all(v.model == source for v in kept):
            views = kept
        else:
            recipe, seed = config.backbone.augment, config.seed
            for v in range(config.head.views):
                view = extract_view(backbone, images, config.model, recipe, seed=seed + v, device=device)
                views.append(replace(view, model=source))
            save_features(path, {f"view-{v}": view for v, view in enumerate(views)})
    run.compute.wait()
    return views or list(load_features(path).values())


def held_out(backbone: Backbone, holdout: Holdout, spec: ModelSpec, device: str) -> tuple[Features, Features]:
    """The held-out identities' features: query and gallery."""
    both = extract(backbone, holdout.query + holdout.gallery, spec, device=device)
    first = np.arange(len(both)) < len(holdout.query)
    return both.take(first), both.take(~first)


def start_backbone(config: TrainConfig, initial: str | os.PathLike[str] | None) -> Backbone:
    """A new backbone by the seed, or that of the checkpoint `initial`.

    Raises:
        ArtifactError: if the checkpoint holds another one.
    """
    if initial is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            return Backbone(config.model.backbone)
    checkpoint = load_checkpoint(initial)
    if checkpoint.backbone is None or checkpoint.spec.backbone != config.model.backbone:
        got = "no backbone" if checkpoint.backbone is None else checkpoint.spec.backbone
        raise ArtifactError(str(initial), got, config.model.backbone, "Train the model that it holds.")
    return checkpoint.backbone
