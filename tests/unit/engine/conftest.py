"""A bundle whose numbers leave FP16 half-way, for every backend that builds it."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def overflowing_bundle(tiny_checkpoint, tmp_path_factory) -> Path:
    """The tiny model, with a first layer 1e6 times too large and the next ones as much smaller: ReLU lets it pass."""
    import torch

    from nformer_edge.model.checkpoint import load_checkpoint, save_checkpoint
    from nformer_edge.onnx.export import export_bundle

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
