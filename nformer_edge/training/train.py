"""Training in one call: a dataset or its features in, a checkpoint and its history out."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from nformer_edge.core.artifact import require_suffix, sha256_file, working_in
from nformer_edge.core.errors import ArtifactError, UsageError
from nformer_edge.core.features import Features, load_features
from nformer_edge.core.spec import ModelSpec, from_dict
from nformer_edge.core.values import Table
from nformer_edge.data.holdout import held_out_rows, split_holdout
from nformer_edge.data.loaders import TrainImages
from nformer_edge.data.records import Dataset
from nformer_edge.data.summary import dataset_of
from nformer_edge.model.backbone import Backbone
from nformer_edge.model.checkpoint import load_checkpoint
from nformer_edge.training.compute import open_compute
from nformer_edge.training.config import TrainConfig
from nformer_edge.training.history import History, Identity, Stage, config_identity, head_notes
from nformer_edge.training.run import Run, determinism, images_identity
from nformer_edge.training.stages import extract_views, first_stage, held_out, second_stage

StrPath = str | os.PathLike[str]
SPLIT = "train"


@dataclass(frozen=True)
class _Source:
    """What a training learns from, and how; `learn` returns the stages and the checkpoint's sha256."""

    name: str
    images: int
    identities: int
    config: TrainConfig
    identity: Identity
    learn: Callable[[Run], tuple[dict[str, Stage], str]]


def train(
    data: StrPath | Dataset | None = None,
    out: StrPath = "model.safetensors",
    config: TrainConfig | None = None,
    *,
    features: StrPath | None = None,
    backbone: StrPath | None = None,
    layout: str = "auto",
    initial: StrPath | None = None,
    device: str = "cpu",
    resume: bool = False,
    tensorboard: StrPath | None = None,
    force: bool = False,
) -> History:
    """Trains backbone and head, or a head on `features` alone, and writes the checkpoint `out`.

    The history stands beside it as ``.training.json``. Stage one leaves its own checkpoint,
    ``<stem>.backbone.safetensors``; `docs/training.md` names every file. They are one set: killed at any moment, the
    run leaves all files that stood there or all new ones, and `resume` goes on to the same numbers. The same seed on
    the same machine gives the same checkpoint.

    Args:
        data: a dataset, or where one lies.
        config: the published backbone with the gated head if None. With `features` the model's other parts are those
            that made them.
        features: a feature store with a split ``train``, as `nformer-edge embed` wrote it, in place of `data`: all its
            views are learnt from, and held-out identities are watched in the plain one.
        backbone: the checkpoint that made `features`: `out` is then a whole model, otherwise a head alone.
        initial: a checkpoint whose backbone is the start; with ``config.backbone.epochs`` 0, only the head is trained.
        device: ``cpu`` or a CUDA device.
        resume: go on from what an interrupted run of this training left; begin where there is nothing.
        tensorboard: folder for TensorBoard's event files.
        force: replace an earlier checkpoint.

    Returns:
        The history: what stands beside the checkpoint.

    Raises:
        UsageError: if `out` is not named as a checkpoint, unless there is either `data` or `features`, if a
            configuration for `features` has no head, or if `resume` finds the state of another training.
        ArtifactError: if there is something at `out`, or the store has no training images or does not say what made
            it, or another backbone did.
    """
    start = time.perf_counter()
    require_suffix(out, ".safetensors")
    config = config or TrainConfig.gated()
    with torch.random.fork_rng(devices=[]):
        if data is not None and features is None and backbone is None:
            source = _images(data, config, layout, initial)
        elif data is None and features is not None:
            source = _features(features, config, backbone)
        else:
            raise UsageError("train", "no data, or more", "data, or features", "Pass backbone with features alone.")
    config = source.config
    compute = open_compute(device, config.precision)
    run = Run(out, source.identity, compute, config.save_minutes, resume=resume, tensorboard=tensorboard)
    done = run.finished(History)
    if done is not None:
        return done
    run.begin(force)
    with working_in(run.folder, run.out):
        with determinism(config.deterministic, device), torch.random.fork_rng(devices=[]):
            stages, sha256 = source.learn(run)
        size = (source.name, str(run.out), sha256, source.images, source.identities)
        where = ({"torch": torch.__version__}, torch.get_num_threads(), compute.world, device)
        told = config, source.identity, stages, head_notes(stages)
        history = History(*size, *told, *where, time.perf_counter() - start)
        run.finish(history)
    return history


def _images(data: StrPath | Dataset, config: TrainConfig, layout: str, initial: StrPath | None) -> _Source:
    made = None if initial is None else load_checkpoint(initial).sha256
    dataset = dataset_of(data, layout)
    records, holdout = split_holdout(dataset.train, config.holdout, config.seed)
    identity = Identity(config_identity(config), images=images_identity(dataset.train, dataset.root), initial=made)
    extra: Table = {"dataset": dataset.name, "config": config_identity(config)}

    def learn(run: Run) -> tuple[dict[str, Stage], str]:
        images = TrainImages(records, config.model.preprocess, config.cache_mib)
        backbone, first, sha256 = first_stage(run, images, config, holdout, initial, extra)
        if config.model.head is None:
            return {"backbone": first}, sha256
        start = time.perf_counter()
        views = extract_views(run, images, backbone, config, sha256)
        extracted = time.perf_counter() - start
        held = held_out(backbone, holdout, config.model, str(run.compute.device)) if holdout else None
        second, sha256 = second_stage(run, views, held, config, sha256, backbone.to("cpu"), extra)
        second = replace(second, extraction_seconds=extracted, seconds=time.perf_counter() - start)
        return {"backbone": first, "head": second}, sha256

    return _Source(dataset.name, len(records), len({r.pid for r in records}), config, identity, learn)


def _features(store: StrPath, config: TrainConfig, checkpoint: StrPath | None) -> _Source:
    sets = load_features(store)
    if SPLIT not in sets:
        got = f"splits {', '.join(sets)}"
        raise ArtifactError(str(store), got, f"a split {SPLIT!r}", "Embed training images, with `--splits train`.")
    features = sets[SPLIT].take(sets[SPLIT].pids > 0)
    spec, backbone, made = _maker(checkpoint, features, str(store))
    if config.model.head is None:
        raise UsageError("--features", "no head to train", "a head", "Leave out --no-head.")
    head = replace(config.model.head, features=spec.backbone.features)
    config = replace(config, model=replace(spec, head=head), head=replace(config.head, views=features.views))
    source = sha256_file(store)
    extra: Table = {"features": source, "model": features.model, "config": config_identity(config)}
    rows = held_out_rows(features.pids, features.camids, config.holdout, config.seed)
    learnt = features if rows is None else features.take(np.array(rows[0]))

    def learn(run: Run) -> tuple[dict[str, Stage], str]:
        views, plain = [learnt.view(v) for v in range(learnt.views)], features.view(0)
        held = None if rows is None else (plain.take(np.array(rows[1])), plain.take(np.array(rows[2])))
        stage, sha256 = second_stage(run, views, held, config, source, backbone, extra)
        return {"head": stage}, sha256

    identity = Identity(config_identity(config), features=source, backbone=made)
    people = len(np.unique(learnt.pids))
    return _Source(os.path.basename(store), len(learnt), people, config, identity, learn)


def _maker(path: StrPath | None, features: Features, store: str) -> tuple[ModelSpec, Backbone | None, str | None]:
    """The spec of what made the features; its backbone and sha256 where the checkpoint is given."""
    if path is None:
        if not features.spec:
            got = "features without their model's spec"
            raise ArtifactError(store, got, "the spec with them", "Embed again, or pass --backbone.")
        return from_dict(ModelSpec, json.loads(features.spec), store), None, None
    made = load_checkpoint(path)
    if made.backbone is None or not features.shares_model(made.sha256, precision="fp32"):
        got = "no backbone" if made.backbone is None else f"sha256 {made.sha256[:12]}... in fp32"
        raise ArtifactError(str(path), got, f"the model that made {store}", "Pass that checkpoint.")
    return made.spec, made.backbone, made.sha256
