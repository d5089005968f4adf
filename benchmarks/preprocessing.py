"""What it costs if queries are prepared as another project does, and the gallery as this model's manifest says.

    python benchmarks/preprocessing.py bundle --data Market-1501-v15.09.15      # needs opencv-python-headless

For each way: cosine of the queries' features to those by the manifest, mean and lowest, and mAP and Rank-1.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import cv2
import numpy as np
from PIL import Image

from nformer_edge.backends.open import open_model
from nformer_edge.core.preprocess import load_image, normalize, resize
from nformer_edge.core.spec import PreprocessSpec
from nformer_edge.data.readers import read_dataset
from nformer_edge.gallery.embed import embed_dataset
from nformer_edge.metrics.distance import unit_rows
from nformer_edge.metrics.ranking import evaluate
from nformer_edge.report.table import format_table

BATCH = 32
Resize = Callable[[Image.Image, PreprocessSpec], np.ndarray]


def by_opencv(interpolation: int, image: Image.Image, spec: PreprocessSpec) -> np.ndarray:
    """Not antialiased, as `cv2.resize`."""
    return cv2.resize(np.asarray(image), (spec.width, spec.height), interpolation=interpolation)


def with_aspect_ratio(image: Image.Image, spec: PreprocessSpec) -> np.ndarray:
    """As large as fits, in the upper left corner of a black image."""
    scale = min(spec.width / image.width, spec.height / image.height)
    width, height = round(image.width * scale), round(image.height * scale)
    whole = np.zeros((spec.height, spec.width, 3), np.uint8)
    whole[:height, :width] = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    return whole


def ways(spec: PreprocessSpec) -> dict[str, tuple[Resize, PreprocessSpec]]:
    """By name: what brings an image to the model's size, and what normalizes it."""
    one = (sum(spec.std) / 3,) * 3
    return {
        "the manifest's": (resize, spec),
        "Pillow, bicubic": (resize, replace(spec, interpolation="bicubic")),
        "OpenCV, linear": (partial(by_opencv, cv2.INTER_LINEAR), spec),
        "OpenCV, cubic": (partial(by_opencv, cv2.INTER_CUBIC), spec),
        "aspect ratio kept, black beside it": (with_aspect_ratio, spec),
        "one deviation for three channels": (resize, replace(spec, std=one)),
        "mean and deviation 0.5": (resize, replace(spec, mean=(0.5,) * 3, std=(0.5,) * 3)),
        "BGR": (resize, replace(spec, channels="BGR")),
    }


def batches(paths: list[str], way: Resize, spec: PreprocessSpec) -> Iterable[np.ndarray]:
    for start in range(0, len(paths), BATCH):
        yield normalize(np.stack([way(load_image(path), spec) for path in paths[start : start + BATCH]]), spec)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    args = parser.parse_args()
    rows: list[list[str]] = []
    with open_model(args.model) as runner:
        split = embed_dataset(runner, read_dataset(args.data), ("query", "gallery"))
        query, gallery = split["query"], split["gallery"]
        ours = unit_rows(query.features)
        for name, (way, spec) in ways(runner.spec.preprocess).items():
            found = np.concatenate([runner.embed(images) for images in batches(list(query.paths), way, spec)])
            cosine = (unit_rows(found) * ours).sum(1)
            score = evaluate(replace(query, features=found), gallery)
            figures = f"{cosine.mean():.4f}", f"{cosine.min():.4f}", f"{score.mAP:.2%}", f"{score.rank(1):.2%}"
            rows.append([name, *figures])
    print(format_table(["queries prepared by", "cosine, mean", "lowest", "mAP", "Rank-1"], rows))


if __name__ == "__main__":
    main()
