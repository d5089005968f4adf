"""Quantization-aware training against post-training INT8, at the same placement and from the same calibration.

    python benchmarks/market_qat.py osnet.safetensors --data Market-1501-v15.09.15 \\
        --calibration int8_engine/calibration.json --bundle bundle --work runs/qat --steps 200

The float model teaches: on plain training images, flipped half of the time, the INT8 model's features and their cosines
in the batch follow the float one's. Writes `student.safetensors`, `bundle` and `calibration.json` into `--work`:
``build-engine runs/qat/bundle --int8 --calib-data runs/qat/calibration.json`` makes the engine of it.
`benchmarks/market_int8.py --int8 ENGINE` then judges it.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nformer_edge.core.errors import Error
from nformer_edge.data.loaders import AugmentSpec, TrainImages, augment
from nformer_edge.data.readers import read_dataset
from nformer_edge.exporting.bundle import open_bundle
from nformer_edge.exporting.export import export_bundle
from nformer_edge.model.backbone import for_inference
from nformer_edge.model.checkpoint import load_checkpoint, save_checkpoint
from nformer_edge.quantize.learned import QuantizedBackbone
from nformer_edge.quantize.values import read_ranges


def loss_of(found: Tensor, taught: Tensor) -> Tensor:
    """Squared distance of unit features, and of their rows of cosines."""
    a, b = F.normalize(found, dim=1), F.normalize(taught, dim=1)
    return (a - b).pow(2).sum(1).mean() + (a @ a.T - b @ b.T).pow(2).sum(1).mean()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--data", required=True)
    parser.add_argument("--bundle", required=True, help="that the ranges were measured on")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--work", required=True)
    parser.add_argument("--where", choices=("cpu", "tensorrt"), default="cpu")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    bundle, ranges, work = open_bundle(args.bundle), read_ranges(args.calibration), Path(args.work)
    made = load_checkpoint(args.checkpoint)
    assert made.backbone is not None, "a model with a backbone"
    assert ranges.backbone_sha256 == bundle.backbone_sha256, "ranges of this bundle"
    spec = made.spec.preprocess
    images = TrainImages(read_dataset(args.data).train, spec, cache_mib=0)
    teacher = for_inference(made.backbone)
    student = QuantizedBackbone(made.backbone, (spec.height, spec.width), bundle.manifest.opset, ranges, args.where)
    student.train()
    optimizer = torch.optim.Adam(student.parameters(), args.lr)
    rng, recipe = np.random.default_rng(args.seed), AugmentSpec(pad=0, erase=0)
    begun, seen = time.perf_counter(), 0.0
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        rows = rng.choice(len(images), args.batch, replace=False)
        batch = torch.from_numpy(augment(images.pixels(rows), spec, recipe, rng))
        batch = batch.to(memory_format=torch.channels_last)
        with torch.no_grad():
            taught = teacher(batch)
        loss = loss_of(student(batch), taught)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen = float(loss.detach()) if step == 0 else 0.9 * seen + 0.1 * float(loss.detach())
        if step % 10 == 0 or step + 1 == args.steps:
            print(f"step {step + 1} loss {seen:.5f} {time.perf_counter() - begun:.0f} s", flush=True)
    learned, table = student.eval().learned()
    work.mkdir(parents=True, exist_ok=True)
    save_checkpoint(work / "student.safetensors", replace(made.spec, head=None), learned)
    export_bundle(work / "student.safetensors", work / "bundle", force=True)
    sha256 = open_bundle(work / "bundle").backbone_sha256
    replace(table, backbone_sha256=sha256).save(work / "calibration.json")


if __name__ == "__main__":
    try:
        main()
    except Error as e:
        raise SystemExit(str(e)) from e
