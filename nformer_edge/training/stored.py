"""Stage two alone: a feature store in, a head's checkpoint out. No image is needed, nor a GPU."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace

import numpy as np
import torch

from nformer_edge.core.artifact import sha256_file
from nformer_edge.core.errors import ArtifactError, UsageError
from nformer_edge.core.features import Features, load_features
from nformer_edge.core.spec import ModelSpec, from_dict
from nformer_edge.core.values import Table
from nformer_edge.data.holdout import held_out_rows
from nformer_edge.model.backbone import Backbone
from nformer_edge.model.checkpoint import load_checkpoint
from nformer_edge.training.compute import open_compute
from nformer_edge.training.config import TrainConfig
from nformer_edge.training.history import History, Identity, config_identity
from nformer_edge.training.run import Run, determinism
from nformer_edge.training.stages import second_stage
from nformer_edge.training.train import finish

SPLIT = "train"


def train_from_features(
    store: str | os.PathLike[str],
    out: str | os.PathLike[str],
    config: TrainConfig | None = None,
    *,
    backbone: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    resume: bool = False,
    tensorboard: str | os.PathLike[str] | None = None,
) -> History:
    """Trains a head on the split ``train`` of a feature store, and writes the checkpoint `out` with its history.

    Every view in the store is used, the plain one among them; held-out identities are watched in the plain view.

    Args:
        store: what `nformer-edge embed` wrote.
        config: ``config.head``, ``config.model.head``, ``holdout`` and ``seed`` count; the model's other parts are
            those that made the features.
        backbone: the checkpoint that made the features: `out` is then a whole model, otherwise a head alone.
        device, resume, tensorboard: as in `training.train`.

    Returns:
        The history, as `training.train` gives it, with the stage ``head`` alone.

    Raises:
        ArtifactError: if the store has no training images or does not say what made it, or another backbone did.
        UsageError: if the configuration has no head, or `resume` finds the state of another training.
    """
    start = time.perf_counter()
    features = _training_features(store)
    with torch.random.fork_rng(devices=[]):
        parts = _backbone(backbone, features, str(store))
    config = _configured(config or TrainConfig(), features, parts, str(store))
    digest = sha256_file(store)
    identity = Identity(config_identity(config), features=digest, backbone=None if parts is None else parts[2])
    compute = open_compute(device, config.precision)
    run = Run(out, identity, compute, config.save_minutes, resume=resume, tensorboard=tensorboard)
    done = run.finished()
    if done is not None:
        return done
    rows = held_out_rows(features.pids, features.camids, config.holdout, config.seed)
    learnt = features if rows is None else features.take(np.array(rows[0]))
    views = [learnt.view(v) for v in range(learnt.views)]
    plain = features.view(0)
    held = None if rows is None else (plain.take(np.array(rows[1])), plain.take(np.array(rows[2])))
    extra: Table = {"features": digest, "model": features.model, "config": config_identity(config)}
    with determinism(config.deterministic, device), torch.random.fork_rng(devices=[]):
        record, sha256 = second_stage(run, views, held, config, digest, parts[1] if parts else None, extra)
    people, name = len(np.unique(learnt.pids)), os.path.basename(store)
    return finish(run, config, {"head": record}, sha256, name, len(learnt), people, device, start)


def _training_features(store: str | os.PathLike[str]) -> Features:
    sets = load_features(store)
    if SPLIT not in sets:
        raise ArtifactError(
            str(store),
            f"splits {', '.join(sets)}",
            f"a split {SPLIT!r}",
            "Embed training images, with `--splits train`.",
        )
    features = sets[SPLIT]
    return features.take(features.pids > 0)


def _backbone(
    path: str | os.PathLike[str] | None, features: Features, store: str
) -> tuple[ModelSpec, Backbone, str] | None:
    """Spec, backbone and sha256 of the checkpoint that made the features."""
    if path is None:
        return None
    checkpoint = load_checkpoint(path)
    if checkpoint.backbone is None or not features.shares_model(checkpoint.sha256):
        got = "no backbone" if checkpoint.backbone is None else f"sha256 {checkpoint.sha256[:12]}..."
        raise ArtifactError(str(path), got, f"the model that made {store}", "Pass that checkpoint.")
    return checkpoint.spec, checkpoint.backbone, checkpoint.sha256


def _configured(
    config: TrainConfig, features: Features, parts: tuple[ModelSpec, Backbone, str] | None, store: str
) -> TrainConfig:
    """The configuration with the model that made the features in place of its own."""
    if config.model.head is None:
        raise UsageError("--features", "no head to train", "a head", "Leave out --no-head.")
    if not features.spec and parts is None:
        raise ArtifactError(
            store, "features without their model's spec", "the spec beside them", "Embed again, or pass --backbone."
        )
    made = parts[0] if parts else from_dict(ModelSpec, json.loads(features.spec), store)
    head = replace(config.model.head, features=made.backbone.features)
    return replace(config, model=replace(made, head=head), head=replace(config.head, views=features.views))
