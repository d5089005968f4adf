"""A backbone from outside: one file and one line in a table."""

from __future__ import annotations

import sys
import types

import torch
from torch import nn

from nformer_edge.core import spec
from nformer_edge.core.spec import BackboneSpec, ModelSpec, PreprocessSpec
from nformer_edge.model.backbone import Backbone
from nformer_edge.model.checkpoint import load_checkpoint, save_checkpoint


class Stripes(nn.Module):
    channels = 8

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, stride=4)

    def forward(self, images):
        return self.conv(images)


def test_a_backbone_from_outside_is_one_module_and_one_line_and_goes_down_the_whole_road(monkeypatch, tmp_path):
    module = types.ModuleType("nformer_edge.model.stripes")
    module.stripes = Stripes
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(spec.TRUNKS, "stripes", "stripes:stripes")

    described = ModelSpec(BackboneSpec("stripes", 16), None, PreprocessSpec(64, 32))
    backbone = Backbone(described.backbone).eval()
    save_checkpoint(tmp_path / "m.safetensors", described, backbone, None)
    from nformer_edge.backends.open import open_model
    from nformer_edge.exporting.export import export_bundle

    images = torch.randn(2, 3, 64, 32, generator=torch.Generator().manual_seed(0))
    expected = backbone(images)
    assert torch.equal(load_checkpoint(tmp_path / "m.safetensors").backbone.eval()(images), expected)
    with open_model(export_bundle(tmp_path / "m.safetensors", tmp_path / "bundle")) as runner:
        assert torch.allclose(torch.from_numpy(runner.embed(images.numpy())), expected, atol=1e-5)
