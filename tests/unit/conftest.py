"""A model and a dataset small enough to go down the whole road in a unit test, made once a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nformer_edge.core.spec import BackboneSpec, HeadSpec, ModelSpec, PreprocessSpec

TINY = ModelSpec(
    BackboneSpec("osnet_x0_25", 32), HeadSpec(features=32, layers=2, heads=2, k=4, landmarks=3), PreprocessSpec(64, 32)
)

#: Rooms whose tests run PyTorch on tiny tensors.
TORCH_ROOMS = ("backends", "compress", "exporting", "model", "quantize", "report", "training")


@pytest.fixture(autouse=True, scope="module")
def _one_thread(request) -> Iterator[None]:
    """Tiny tensors: on a busy machine torch's threads wait for each other longer than they work."""
    if request.path.parent.name not in TORCH_ROOMS:
        yield
        return
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """An untrained OSNet x0.25 for 64 x 32 images, with a head."""
    import torch

    from nformer_edge.model.backbone import Backbone
    from nformer_edge.model.checkpoint import save_checkpoint
    from nformer_edge.model.nformer import NFormer

    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_checkpoint(path, TINY, Backbone(TINY.backbone), NFormer(TINY.head))
    return path


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint) -> Path:
    """The exported bundle of `tiny_checkpoint`. Do not write into it."""
    from nformer_edge.exporting.export import export_bundle

    return export_bundle(tiny_checkpoint, tiny_checkpoint.parent / "bundle", landmark_seed=7)


@pytest.fixture(scope="session")
def tiny_market(tmp_path_factory) -> Path:
    """A folder in Market-1501's layout: 6 people to train on, 3 to find, 3 cameras; each person a color."""
    root = tmp_path_factory.mktemp("tiny-market")
    rng = np.random.default_rng(0)
    for folder, people, cameras in (
        ("bounding_box_train", range(1, 7), (1, 2, 3)),
        ("query", range(11, 14), (1,)),
        ("bounding_box_test", range(11, 14), (2, 3)),
    ):
        (root / folder).mkdir()
        for pid in people:
            color = np.random.default_rng(pid).integers(40, 215, 3)
            for camera in cameras:
                for shot in range(2):
                    pixels = np.clip(color + rng.normal(0, 20, (64, 32, 3)), 0, 255).astype(np.uint8)
                    name = f"{pid:04d}_c{camera}s1_{shot:06d}_00.jpg"
                    Image.fromarray(pixels).save(root / folder / name, quality=95)
    return root


@pytest.fixture(scope="session")
def overflowing_bundle(tiny_checkpoint, tmp_path_factory) -> Path:
    """The tiny model, with a first layer 1e6 times too large and the next ones as much smaller: ReLU lets it pass."""
    import torch

    from nformer_edge.exporting.export import export_bundle
    from nformer_edge.model.checkpoint import load_checkpoint, save_checkpoint

    whole = load_checkpoint(tiny_checkpoint)
    trunk = whole.backbone.trunk
    block = trunk.conv2[0]
    with torch.no_grad():
        for tensor in (trunk.conv1.bn.weight, trunk.conv1.bn.bias):
            tensor *= 1e6
        for layer in (block.conv1, block.downsample):
            layer.conv.weight *= 1e-6
    folder = tmp_path_factory.mktemp("overflowing")
    save_checkpoint(folder / "m.safetensors", whole.spec, whole.backbone, whole.head)
    return export_bundle(folder / "m.safetensors", folder / "bundle", landmark_seed=7)
