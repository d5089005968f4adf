"""What pruning to half the multiplications and 2:4 sparsity cost ResNet-18 on the generated dataset.

Each seed draws the data of `generated_data.py`, trains the whole backbone as it does, and compresses it twice, each
time distilled from itself without labels. Prints mAP of the test split, and what is lost.

    python benchmarks/compress_generated.py --seeds 0 1 2 3 4 -o compress_generated.json
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
from nformer_edge.core.artifact import atomic_write_json
from nformer_edge.core.machine import machine
from nformer_edge.data.generate import GenerateSpec, generate_dataset
from nformer_edge.data.records import Dataset
from nformer_edge.report.accuracy import evaluate
from nformer_edge.report.table import format_table
from nformer_edge.training.config import BackboneConfig
from nformer_edge.training.train import train

WHOLE, HALF, SPARSE = "whole", "half the multiplications", "2:4 sparse"


def distil(epochs: int) -> Distil:
    """Chosen on held-out training people of seed 0."""
    train = BackboneConfig(epochs=epochs, p=8, lr=1e-3, weight_decay=1e-4, schedule="cosine", warmup=1)
    return Distil(logits=0.5, maps=1.0, train=train)


def one_seed(seed: int, folder: Path, epochs: int) -> dict[str, float]:
    """mAP in percent of each backbone."""
    dataset = generate_dataset(folder / "data", GenerateSpec(seed, **HARD))
    config = recipe(seed, "gated")
    whole = folder / "whole.safetensors"
    train(dataset, whole, replace(config, model=replace(config.model, head=None)))
    rows = {WHOLE: _mean_ap(whole, dataset)}
    steps = {HALF: (Prune(gmacs=0.5), distil(epochs)), SPARSE: (Sparsify(distil(epochs)),)}
    for i, (name, chain) in enumerate(steps.items()):
        student = folder / f"{i}.safetensors"
        how = Recipe(chain, views=2, augment=config.backbone.augment, holdout=config.holdout, seed=seed)
        print(f"seed {seed}, {name}: {compress(whole, dataset, how, student)}", flush=True)
        rows[name] = _mean_ap(student, dataset)
    return rows


def _mean_ap(model: Path, dataset: Dataset) -> float:
    return 100 * evaluate(model, dataset, rank_lists=0).rankings[0].mAP


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=int, default=5, help="of each distillation")
    parser.add_argument("-o", "--output", metavar="FILE", default="compress_generated.json")
    args = parser.parse_args()
    start, by_seed = time.perf_counter(), {}
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            by_seed[seed] = one_seed(seed, Path(folder), args.epochs)
        print(f"seed {seed}: " + ", ".join(f"{k} {v:.2f}" for k, v in by_seed[seed].items()), flush=True)
        content = {"machine": asdict(machine()), "mAP_percent": by_seed, "seconds": time.perf_counter() - start}
        atomic_write_json(args.output, {"kind": "compress_generated", **content})
    whole = np.array([rows[WHOLE] for rows in by_seed.values()])
    body = []
    for name in (WHOLE, HALF, SPARSE):
        found = np.array([rows[name] for rows in by_seed.values()])
        lost = whole - found
        spread = "" if name == WHOLE else f"{lost.mean():.2f} ({lost.min():.2f} to {lost.max():.2f})"
        body.append([name, f"{found.mean():.2f} ({found.min():.2f} to {found.max():.2f})", spread])
    print(format_table(["", "mAP: mean, min to max", "lost"], body))


if __name__ == "__main__":
    main()
