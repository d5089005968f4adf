"""What the generated dataset measures: untrained and trained backbone, NFormer by both rules, and baselines.

Each seed draws its own dataset, harder than the demo's, and trains anew at 64 x 32. Prints mean and spread.

    python benchmarks/generated_data.py --seeds 0 1 2 3 4 -o generated_data.json

With --composition, the gated head at each of these numbers of gallery images a person, beside its backbone, on smaller
data with people whom no query asks for:

    python benchmarks/generated_data.py --composition 1 8 -o generated_composition.json
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from nformer_edge.core.artifact import atomic_write_json
from nformer_edge.core.machine import machine
from nformer_edge.core.spec import PreprocessSpec
from nformer_edge.data.generate import GenerateSpec, generate_dataset
from nformer_edge.report.accuracy import BACKBONE, NFORMER, NFORMER_PER_QUERY, NFORMER_TOLD, evaluate
from nformer_edge.report.table import format_table
from nformer_edge.training.config import TrainConfig
from nformer_edge.training.train import train

RULES = ("features", "affinity")

#: People in groups of four in the same main colors, and six cameras.
HARD = {"train_ids": 140, "test_ids": 80, "cameras": 6, "seen_by": 5, "images": 3, "alike": 4}


#: For `--composition`: half as many people, drawn at the size at which they are read.
SMALL = HARD | {
    "train_ids": 60,
    "test_ids": 60,
    "distractors": 60,
    "junk": 0,
    "open_set": 20,
    "height": 64,
    "width": 32,
}


def recipe(seed: int, rule: str) -> TrainConfig:
    """The demo's at 64 x 32, with 20 neighbors."""
    demo = TrainConfig.demo(seed, rule)
    assert demo.model.head is not None
    head = demo.model.head if rule == "gated" else replace(demo.model.head, k=20)
    model = replace(demo.model, head=head, preprocess=PreprocessSpec(64, 32))
    return replace(demo, model=model)


def one_seed(seed: int, folder: Path) -> dict[str, tuple[float, float]]:
    """mAP and Rank-1, in percent, of every row of the table."""
    dataset = generate_dataset(folder / "data", GenerateSpec(seed, **HARD))
    demo = recipe(seed, RULES[0])
    untrained = replace(demo, model=replace(demo.model, head=None), backbone=replace(demo.backbone, epochs=0))
    train(dataset, folder / "untrained.safetensors", untrained)
    rows = {"untrained backbone": _scores(folder / "untrained.safetensors", dataset)["backbone"]}
    backbone = folder / "features.backbone.safetensors"
    for rule in RULES:
        config = recipe(seed, rule)
        first = rule == RULES[0]
        if not first:
            config = replace(config, backbone=replace(config.backbone, epochs=0))
        model = folder / f"{rule}.safetensors"
        train(dataset, model, config, initial=None if first else backbone)
        scores = _scores(model, dataset, rerank=first)
        rows |= {name: value for name, value in scores.items() if not name.startswith("+NFormer") and first}
        rows[f"+NFormer, {rule} rule, joint"] = scores["+NFormer"]
        rows[f"+NFormer, {rule} rule, per-query"] = scores["+NFormer per-query"]
    return rows


def by_images(seed: int, folder: Path, counts: list[int]) -> dict[str, tuple[float, float]]:
    """mAP and Rank-1, in percent, of backbone and gated head by the number of gallery images a person: one query a
    person, all in one set, each alone, and alone with a head that knows the number."""
    model, rows = folder / "gated.safetensors", {}
    for n in counts:  # one seed draws the same people whatever their number of images
        dataset = generate_dataset(folder / f"data{n}", GenerateSpec(seed, **SMALL, gallery_images=(n,)))
        if n == counts[0]:
            train(dataset, model, recipe(seed, "gated"))
        found = evaluate(model, dataset, rank_lists=0, per_query=False).composition
        assert found is not None
        whole = found.rows[-1]
        ways = {BACKBONE: whole.backbone, NFORMER: whole.head, NFORMER_PER_QUERY: whole.alone, NFORMER_TOLD: whole.told}
        for name, scores in ways.items():
            assert scores is not None
            rows[f"{name}, {n} a person"] = 100 * scores.mAP.value, 100 * scores.rank1.value
    return rows


def _scores(model: Path, dataset: Any, rerank: bool = False) -> dict[str, tuple[float, float]]:
    rankings = evaluate(model, dataset, rerank=rerank, rank_lists=0).rankings
    return {r.name: (100 * r.mAP, 100 * r.cmc[0]) for r in rankings}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--composition", type=int, nargs="+", default=[], metavar="N")
    parser.add_argument("-o", "--output", metavar="FILE", default="generated_data.json")
    args = parser.parse_args()
    start, by_seed = time.perf_counter(), {}
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            counts = args.composition
            by_seed[seed] = by_images(seed, Path(folder), counts) if counts else one_seed(seed, Path(folder))
        print(f"seed {seed}: " + ", ".join(f"{k} {m:.1f}/{r:.1f}" for k, (m, r) in by_seed[seed].items()), flush=True)
        atomic_write_json(
            args.output,
            {"kind": "generated_data", "machine": asdict(machine()), "mAP_rank1_percent": by_seed,
             "seconds": time.perf_counter() - start},
        )  # fmt: skip
    body = []
    for name in by_seed[args.seeds[0]]:
        values = np.array([by_seed[s][name] for s in args.seeds])
        spread = values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(2)
        body.append([name, *(f"{m:.1f} ± {s:.1f}" for m, s in zip(values.mean(axis=0), spread, strict=True))])
    print(format_table(["", "mAP", "Rank-1"], body))


if __name__ == "__main__":
    main()
