"""Both stages in one call: a dataset in, a checkpoint and its history out."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nformer_edge.core.artifact import atomic_write_json
from nformer_edge.core.errors import ArtifactError
from nformer_edge.core.features import FeatureSet
from nformer_edge.core.spec import ModelSpec, to_dict
from nformer_edge.data.loaders import TrainImages
from nformer_edge.data.readers import read_dataset
from nformer_edge.data.records import Dataset, ImageRecord
from nformer_edge.evaluate.ranking import evaluate
from nformer_edge.model.backbone import Backbone
from nformer_edge.model.checkpoint import load_checkpoint, save_checkpoint
from nformer_edge.model.nformer import NFormer
from nformer_edge.train.backbone import extract, extract_view, train_backbone
from nformer_edge.train.config import TrainConfig
from nformer_edge.train.head import relate, train_head


@dataclass(frozen=True)
class Holdout:
    """Training identities kept out of training: of each person and camera the first image asks for the others."""

    query: tuple[ImageRecord, ...]
    gallery: tuple[ImageRecord, ...]


def split_holdout(
    records: tuple[ImageRecord, ...], share: float, seed: int
) -> tuple[tuple[ImageRecord, ...], Holdout | None]:
    """Training records without a share of the identities, and those identities as query and gallery.

    Only people seen by two cameras can ask for anything. None if `share` rounds to nobody, or nobody remains.
    """
    seen: dict[int, set[int]] = {}
    for r in records:
        seen.setdefault(r.pid, set()).add(r.camid)
    able = sorted(pid for pid, cameras in seen.items() if len(cameras) > 1)
    count = min(round(share * len(seen)), len(able), len(seen) - 2)
    if count < 1:
        return records, None
    chosen = set(np.random.default_rng([seed, 1]).permutation(able)[:count].tolist())
    query: list[ImageRecord] = []
    gallery: list[ImageRecord] = []
    asked: set[tuple[int, int]] = set()
    for r in records:
        if r.pid in chosen:
            first = (r.pid, r.camid) not in asked
            (query if first else gallery).append(r)
            asked.add((r.pid, r.camid))
    rest = tuple(r for r in records if r.pid not in chosen)
    return rest, Holdout(tuple(query), tuple(gallery or query))


def train(
    data: str | os.PathLike[str] | Dataset,
    out: str | os.PathLike[str],
    config: TrainConfig | None = None,
    *,
    layout: str = "auto",
    initial: str | os.PathLike[str] | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Trains backbone and head, and writes the checkpoint `out`, with the history beside it as ``.training.json``.

    Stage one leaves its own checkpoint, ``<stem>.backbone.safetensors``. Every file is written whole or not at all;
    interrupted, the run leaves what stood there. The same seed on the same machine gives the same checkpoint.

    Args:
        data: a dataset, or where one lies.
        config: the published recipe if None.
        initial: a checkpoint whose backbone is the start; with ``config.backbone.epochs`` 0, only the head is trained.
        device: ``cpu`` or a CUDA device.

    Returns:
        The history: kind "training", config, one row an epoch of each stage, seconds, checkpoint and its sha256.
    """
    start = time.perf_counter()
    config = config or TrainConfig()
    dataset = data if isinstance(data, Dataset) else read_dataset(data, layout)
    records, holdout = split_holdout(dataset.train, config.holdout, config.seed)
    backbone = _initial(config, initial)
    images = TrainImages(records, config.model.preprocess, config.cache_mib)
    stages: dict[str, Any] = {}
    stages["backbone"] = _stage_one(images, backbone, config, holdout, device)
    beside = Path(out).with_name(f"{Path(out).stem}.backbone.safetensors")
    alone = replace(config.model, head=None)
    extra = {"dataset": dataset.name, "config": to_dict(config)}
    digest = save_checkpoint(out if config.model.head is None else beside, alone, backbone, None, extra)
    if config.model.head is not None:
        head, stages["head"] = _stage_two(images, backbone, config, holdout, device)
        digest = save_checkpoint(out, config.model, backbone, head, extra)
    history = {
        "kind": "training", "dataset": dataset.name, "checkpoint": str(out), "sha256": digest,
        "images": len(images), "identities": images.num_classes, "config": to_dict(config), "stages": stages,
        "versions": {"torch": torch.__version__}, "threads": torch.get_num_threads(), "device": device,
        "seconds": time.perf_counter() - start,
    }  # fmt: skip
    atomic_write_json(Path(out).with_suffix(".training.json"), history)
    return history


def _initial(config: TrainConfig, initial: str | os.PathLike[str] | None) -> Backbone:
    if initial is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            return Backbone(config.model.backbone)
    checkpoint = load_checkpoint(initial)
    if checkpoint.backbone is None or checkpoint.spec.backbone != config.model.backbone:
        got = "no backbone" if checkpoint.backbone is None else checkpoint.spec.backbone
        raise ArtifactError(
            str(initial), got=got, expected=config.model.backbone, mend="Train the model that it holds."
        )
    return checkpoint.backbone


def _stage_one(
    images: TrainImages, backbone: Backbone, config: TrainConfig, holdout: Holdout | None, device: str
) -> dict[str, Any]:
    start = time.perf_counter()

    def watch(model: Backbone) -> float:
        assert holdout is not None
        return evaluate(*_held_out(model, holdout, config.model, device)).mAP

    rows = train_backbone(
        images, backbone, config.backbone, seed=config.seed, device=device, watch=watch if holdout else None
    )
    return {"epochs": rows, "seconds": time.perf_counter() - start}


def _held_out(backbone: Backbone, holdout: Holdout, spec: ModelSpec, device: str) -> tuple[FeatureSet, FeatureSet]:
    both = extract(backbone, holdout.query + holdout.gallery, spec, device=device)
    first = np.arange(len(both)) < len(holdout.query)
    return both.take(first), both.take(~first)


def _stage_two(
    images: TrainImages, backbone: Backbone, config: TrainConfig, holdout: Holdout | None, device: str
) -> tuple[NFormer, dict[str, Any]]:
    start = time.perf_counter()
    assert config.model.head is not None
    views = [
        extract_view(backbone, images, config.model, config.backbone.augment, seed=config.seed + v, device=device)
        for v in range(config.head.views)
    ]
    extracted = time.perf_counter() - start
    held = _held_out(backbone, holdout, config.model, device) if holdout else None

    def watch(head: NFormer) -> float:
        assert held is not None
        return evaluate(*relate(head, *held, seed=config.seed)).mAP

    head, rows = train_head(
        views, config.model.head, config.head, seed=config.seed, device=device, watch=watch if held else None
    )
    backbone.to("cpu")
    return head, {"epochs": rows, "extraction_seconds": extracted, "seconds": time.perf_counter() - start}


def format_history(history: dict[str, Any]) -> str:
    """A training's history as text: a line a stage, then where the checkpoint is."""
    lines = [f"{history['dataset']}: {history['images']:,} images of {history['identities']:,} identities"]
    for stage, record in history["stages"].items():
        epochs = [e for e in record["epochs"] if "loss" in e]
        course = f"loss {epochs[0]['loss']:.3f} -> {epochs[-1]['loss']:.3f}, " if epochs else ""
        lines.append(f"  {stage}: {len(epochs)} epochs, {course}{record['seconds']:.0f} s")
    return "\n".join([*lines, f"wrote {history['checkpoint']}"])
