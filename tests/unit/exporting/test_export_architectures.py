"""Every detail of a backbone that published weights need is in the exported graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nformer_edge.backends.open import open_model
from nformer_edge.core.spec import BackboneSpec, ModelSpec, PreprocessSpec
from nformer_edge.exporting.export import export_bundle
from nformer_edge.model.backbone import Backbone
from nformer_edge.model.checkpoint import save_checkpoint

SPECS = {
    "osnet-ibn": BackboneSpec("osnet_ibn_x1_0", 32, "fc"),
    "osnet-ain": BackboneSpec("osnet_ain_x0_25", 32, "fc"),
    "stride-2-without-neck": BackboneSpec("resnet18", 512, "none", last_stride=2),
    "gem": BackboneSpec("resnet18", 512, "bn", "ceil_pool", "gem"),
    "fc": BackboneSpec("resnet18", 32, "fc"),
    "non-local": BackboneSpec("resnet50", 32, "bnneck", "ceil_pool", "gem", 1, True),
}


@pytest.mark.parametrize("name", SPECS)
@torch.no_grad()
def test_the_exported_backbone_equals_pytorch(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = Backbone(SPECS[name]).eval()
    for module in backbone.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm1d)):
            module.running_mean, module.running_var = (torch.rand(module.num_features) + x for x in (-0.5, 0.5))
            module.weight.uniform_(0.3, 0.9)
    if SPECS[name].pooling == "gem":
        backbone.get_parameter("pool.p").fill_(2.7)
    spec = ModelSpec(SPECS[name], None, PreprocessSpec(64, 32))
    save_checkpoint(tmp_path / "m.safetensors", spec, backbone, None)
    images = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 3, 64, 32)).astype(np.float32))
    with open_model(export_bundle(tmp_path / "m.safetensors", tmp_path / "bundle")) as runner:
        found = torch.from_numpy(runner.embed(images.numpy()))
    expected = backbone(images)
    assert bool((nn.functional.cosine_similarity(found, expected) >= 0.99999).all())
    assert bool(((found - expected).norm(dim=1) <= 1e-4 * expected.norm(dim=1)).all())
