"""What pruning to half the multiplications and 2:4 sparsity cost ResNet-18 on the generated dataset.

Each seed draws the data of `generated_data.py`, trains the whole backbone as it does, and compresses it twice, each
time distilled from itself without labels. Prints mAP of the test split, and what is lost.

    python benchmarks/compress_generated.py --seeds 0 1 2 3 4 -o compress_generated.json

With --related, the pruned student with and without the teacher's related features (docs/compress.md), and with labels,
alone and with a gated head of its own:

    python benchmarks/compress_generated.py --related --seeds 0 -o related_generated.json
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from generated_data import HARD, recipe

from nformer_edge.compress.compress import compress
from nformer_edge.compress.distil import Distil
from nformer_edge.compress.prune import Prune
from nformer_edge.compress.recipe import Recipe
from nformer_edge.compress.sparsify import Sparsify
from nformer_edge.compress.step import Step
from nformer_edge.core.artifact import atomic_write_json
from nformer_edge.core.machine import machine
from nformer_edge.data.generate import GenerateSpec, generate_dataset
from nformer_edge.data.records import Dataset
from nformer_edge.model.checkpoint import load_checkpoint
from nformer_edge.report.accuracy import BACKBONE, NFORMER, evaluate
from nformer_edge.report.table import format_table
from nformer_edge.training.config import BackboneConfig, TrainConfig
from nformer_edge.training.train import train

WHOLE, AGAIN, HALF, SPARSE = "whole", "whole, distilled", "half the multiplications", "2:4 sparse"


def distil(epochs: int, **losses: float) -> Distil:
    """From the model itself, without labels."""
    train = BackboneConfig(epochs=epochs, p=8, lr=1e-3, weight_decay=1e-4, schedule="cosine", warmup=1)
    return replace(Distil(logits=0.5, maps=1.0, train=train), **losses)


def one_seed(seed: int, folder: Path, epochs: int, control: bool, related: bool) -> dict[str, float]:
    """mAP in percent of each backbone, and of what follows its head where `related` features are learned, too."""
    dataset = generate_dataset(folder / "data", GenerateSpec(seed, **HARD))
    config = recipe(seed, "gated")
    whole = folder / "whole.safetensors"
    train(dataset, whole, replace(config, model=replace(config.model, head=None)))
    half, sparse = Prune(gmacs=0.5), Sparsify(distil(epochs))
    chains: dict[str, tuple[Step, ...]] = {HALF: (half, distil(epochs)), SPARSE: (sparse,)}
    if control:
        chains[AGAIN] = (distil(epochs),)
    if related:
        alone = {"related": 1.0, "feature": 0.0, "similarity": 0.0, "logits": 0.0}
        tried = {
            "features": {},
            "features and related": {"related": 1.0},
            "related": alone,
            "features and labels": {"identity": 1.0},
            "features, labels and related": {"identity": 1.0, "related": 1.0},
            "related and labels": alone | {"identity": 1.0},
        }
        chains = {f"{HALF}: {name}": (half, distil(epochs, **losses)) for name, losses in tried.items()}
        whole = with_head(whole, dataset, config)
    rows = scores(WHOLE, whole, dataset)
    for name, steps in chains.items():
        student = folder / f"{name}.safetensors"
        how = Recipe(steps, views=2, augment=config.backbone.augment, holdout=config.holdout, seed=seed)
        print(f"seed {seed}, {name}: {compress(whole, dataset, how, student)}", flush=True)
        rows |= scores(name, with_head(student, dataset, config) if related else student, dataset)
    return rows


def with_head(model: Path, dataset: Dataset, config: TrainConfig) -> Path:
    """The gated head of this backbone, by the ordinary road."""
    backbone, path = load_checkpoint(model).spec.backbone, model.with_name(f"{model.stem} head.safetensors")
    model_spec = replace(config.model, backbone=backbone)
    train(dataset, path, replace(config, model=model_spec, backbone=replace(config.backbone, epochs=0)), initial=model)
    return path


def scores(name: str, model: Path, dataset: Dataset) -> dict[str, float]:
    """mAP in percent of the backbone, and with the head if it has one."""
    found = {ranking.name: 100 * ranking.mAP for ranking in evaluate(model, dataset, rank_lists=0).rankings}
    rows = {name: found[BACKBONE]}
    return rows | {f"{name} + head": found[NFORMER]} if NFORMER in found else rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=int, default=5, help="of each distillation")
    parser.add_argument("--control", action="store_true", help="the whole backbone distilled as long, too")
    parser.add_argument("--related", action="store_true", help="distil the head, too")
    parser.add_argument("-o", "--output", metavar="FILE", default="compress_generated.json")
    args = parser.parse_args()
    start, by_seed = time.perf_counter(), {}
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            by_seed[seed] = one_seed(seed, Path(folder), args.epochs, args.control, args.related)
        print(f"seed {seed}: " + ", ".join(f"{k} {v:.2f}" for k, v in by_seed[seed].items()), flush=True)
        content = {"machine": asdict(machine()), "mAP_percent": by_seed, "seconds": time.perf_counter() - start}
        atomic_write_json(args.output, {"kind": "compress_generated", **content})
    body = []
    for name in by_seed[args.seeds[0]]:
        against = f"{WHOLE} + head" if name.endswith(" + head") else WHOLE
        found, whole = (np.array([rows[row] for rows in by_seed.values()]) for row in (name, against))
        body.append([name, *(f"{x.mean():.2f} ({x.min():.2f} to {x.max():.2f})" for x in (found, whole - found))])
    print(format_table(["mean (min to max)", "mAP", "lost"], body))


if __name__ == "__main__":
    main()
