"""Both stages in one call: a dataset in, a checkpoint and its history out."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import replace

import torch

from nformer_edge.core.values import Table
from nformer_edge.data.holdout import split_holdout
from nformer_edge.data.loaders import TrainImages
from nformer_edge.data.readers import read_dataset
from nformer_edge.data.records import Dataset
from nformer_edge.model.checkpoint import load_checkpoint
from nformer_edge.training.compute import open_compute
from nformer_edge.training.config import TrainConfig
from nformer_edge.training.history import History, Identity, Stage, config_identity
from nformer_edge.training.run import Run, determinism, images_identity
from nformer_edge.training.stages import VIEWS, extract_views, first_stage, held_out, second_stage


def train(
    data: str | os.PathLike[str] | Dataset,
    out: str | os.PathLike[str],
    config: TrainConfig | None = None,
    *,
    layout: str = "auto",
    initial: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    resume: bool = False,
    tensorboard: str | os.PathLike[str] | None = None,
) -> History:
    """Trains backbone and head, and writes the checkpoint `out`, with the history beside it as ``.training.json``.

    Stage one leaves its own checkpoint, ``<stem>.backbone.safetensors``; `docs/training.md` names every file. Each is
    written whole or not at all: killed at any moment, the run leaves what stood there, and `resume` goes on to the
    same numbers. The same seed on the same machine gives the same checkpoint.

    Args:
        data: a dataset, or where one lies.
        config: the published recipe if None.
        initial: a checkpoint whose backbone is the start; with ``config.backbone.epochs`` 0, only the head is trained.
        device: ``cpu`` or a CUDA device.
        resume: go on from what an interrupted run of this training left; begin where there is nothing.
        tensorboard: folder for TensorBoard's event files.

    Returns:
        The history: what stands beside the checkpoint.

    Raises:
        UsageError: if `resume` finds the state of another training.
    """
    start = time.perf_counter()
    config = config or TrainConfig()
    with torch.random.fork_rng(devices=[]):
        source = None if initial is None else load_checkpoint(initial).sha256
    dataset = data if isinstance(data, Dataset) else read_dataset(data, layout)
    records, holdout = split_holdout(dataset.train, config.holdout, config.seed)
    identity = Identity(config_identity(config), images=images_identity(dataset.train, dataset.root), initial=source)
    compute = open_compute(device, config.precision)
    run = Run(out, identity, compute, config.save_minutes, resume=resume, tensorboard=tensorboard)
    done = run.finished()
    if done is not None:
        return done
    images = TrainImages(records, config.model.preprocess, config.cache_mib)
    stages: dict[str, Stage] = {}
    extra: Table = {"dataset": dataset.name, "config": config_identity(config)}
    with determinism(config.deterministic, device), torch.random.fork_rng(devices=[]):
        backbone, stages["backbone"], digest = first_stage(run, images, config, holdout, initial, extra)
        if config.model.head is not None:
            began = time.perf_counter()
            views = extract_views(run, images, backbone, config, digest)
            extracted = time.perf_counter() - began
            held = held_out(backbone, holdout, config.model, str(compute.device)) if holdout else None
            stages["head"], digest = second_stage(run, views, held, config, digest, backbone.to("cpu"), extra)
            stages["head"] = replace(stages["head"], extraction_seconds=extracted, seconds=time.perf_counter() - began)
    return finish(run, config, stages, digest, dataset.name, len(images), images.num_classes, device, start)


def finish(
    run: Run,
    config: TrainConfig,
    stages: Mapping[str, Stage],
    sha256: str,
    dataset: str,
    images: int,
    identities: int,
    device: str,
    start: float,
) -> History:
    """Writes the history and removes what only an interrupted run needs. `start` is when the training began."""
    out, versions, ranks = str(run.out), {"torch": torch.__version__}, run.compute.world
    seconds, threads = time.perf_counter() - start, torch.get_num_threads()
    size = (dataset, out, sha256, images, identities)
    history = History(*size, config, run.identity, stages, versions, threads, ranks, device, seconds)
    if run.compute.leads:
        history.save(run.history)
    run.clean("backbone.state.safetensors", "head.state.safetensors", VIEWS)
    run.logs.close()
    return history
