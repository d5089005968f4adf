"""A model that is really run, on pictures that are really read, in milliseconds."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nformer_edge.core.spec import BackboneSpec, HeadSpec, ModelSpec, PreprocessSpec
from nformer_edge.data.records import Dataset, ImageRecord

HEAD = HeadSpec(features=24, layers=2, heads=2, k=4, landmarks=2)


class GridRunner:
    """A Runner whose feature is a random projection of a coarse grid of the image; its head averages neighbors.

    `precision` is one word or one for each stage. `distort` changes the backbone's features,
    `distort_head` the head's output.
    """

    backend = "numpy"
    landmark_seed = 0
    sha256 = checkpoint = ""
    calibrated_on = ()
    images_per_person = None

    def __init__(self, name="grid", precision=None, head=True, distort=None, distort_head=None):
        self.name = name
        if not isinstance(precision, dict):
            precision = dict.fromkeys(("backbone", "head") if head else ("backbone",), precision or "fp32")
        self.precision = precision
        preprocess = PreprocessSpec(height=32, width=16)
        self.spec = ModelSpec(BackboneSpec("osnet_x0_25", 24, "fc"), HEAD if head else None, preprocess)
        self.has_head = head
        self.native = False
        self.distort = distort or (lambda x: x)
        self.distort_head = distort_head or (lambda x: x)
        self.projection = np.random.default_rng(0).normal(size=(3 * 8 * 4, 24)).astype(np.float32)

    def head_numbers(self):
        return {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def close(self):
        return None

    def embed(self, images: np.ndarray) -> np.ndarray:
        cells = images.reshape(len(images), 3, 8, 4, 4, 4).mean(axis=(3, 5)).reshape(len(images), -1)
        return self.distort((cells @ self.projection).astype(np.float32))

    def relate(
        self,
        features: np.ndarray,
        landmarks: np.ndarray | None = None,
        like: np.ndarray | None = None,
        swap: float = 0.0,
    ) -> np.ndarray:
        unit, chosen = (
            x / np.linalg.norm(x, axis=1, keepdims=True) for x in (features, features if like is None else like)
        )
        best = np.argsort(-(chosen @ chosen.T), axis=1, kind="stable")[:, : HEAD.k]
        return self.distort_head(unit[best].mean(axis=1).astype(np.float32))

    def float64(self):
        double = copy.copy(self)
        double.projection = self.projection.astype(np.float64)
        return double


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Dataset:
    """Twelve people in colored clothes, two queries and four gallery images each, and six distractors."""
    root = tmp_path_factory.mktemp("people")
    rng = np.random.default_rng(1)
    clothes = rng.uniform(112, 138, size=(13, 4, 3))

    def draw(name: str, pid: int, camid: int) -> ImageRecord:
        bands = clothes[pid] if pid else rng.uniform(112, 138, size=(4, 3))
        pixels = np.repeat(bands, 16, axis=0)[:, None].repeat(32, axis=1) + rng.normal(scale=52, size=(64, 32, 3))
        shade = np.linspace(0.9, 1.1, 32)[None, :, None] if camid == 2 else 1.0
        path = Path(root) / name
        Image.fromarray(np.clip(pixels * shade, 0, 255).astype(np.uint8)).save(path)
        return ImageRecord(str(path), pid, camid)

    query = tuple(draw(f"q{p}_{i}.png", p, 1) for p in range(1, 13) for i in range(2))
    gallery = tuple(draw(f"g{p}_{i}.png", p, 2) for p in range(1, 13) for i in range(4))
    distractors = tuple(draw(f"d{i}.png", 0, 2) for i in range(6))
    return Dataset("people", str(root), query=query, gallery=gallery + distractors)


@pytest.fixture(scope="session")
def grid_runner():
    return GridRunner


@pytest.fixture(scope="session")
def norms():
    """The BatchNorms of a module, in its order."""
    import torch

    def find(module):
        return [m for m in module.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]

    return find


@pytest.fixture(scope="session")
def changed():
    """Writes a copy of a checkpoint after `change(backbone, head)`."""
    import torch

    from nformer_edge.model.checkpoint import load_checkpoint, save_checkpoint

    def make(checkpoint, out, change):
        model = load_checkpoint(checkpoint)
        with torch.no_grad():
            change(model.backbone, model.head)
        save_checkpoint(out, model.spec, model.backbone, model.head)
        return out

    return make


@pytest.fixture(scope="session")
def checkpoint(tiny_checkpoint, changed, norms, tmp_path_factory):
    """The tiny model with BatchNorms as training leaves them: no two alike, or a swap would change nothing."""
    import torch

    def trained(backbone, head):
        generator = torch.Generator().manual_seed(3)
        for norm in norms(backbone) + norms(head):
            size = norm.num_features
            norm.weight.copy_(0.7 + 0.6 * torch.rand(size, generator=generator))
            norm.running_mean.copy_(0.2 * torch.randn(size, generator=generator))
            norm.running_var.copy_(0.5 + torch.rand(size, generator=generator))
            if norm.bias is not None and norm.bias.requires_grad:
                norm.bias.copy_(0.2 * torch.randn(size, generator=generator))

    return changed(tiny_checkpoint, tmp_path_factory.mktemp("trained") / "model.safetensors", trained)


@pytest.fixture(scope="session")
def bundle(checkpoint):
    """The exported bundle of `checkpoint`. Do not write into it."""
    from nformer_edge.exporting.export import export_bundle

    return export_bundle(checkpoint, checkpoint.parent / "bundle", landmark_seed=7)
