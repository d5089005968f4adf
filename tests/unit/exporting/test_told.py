"""A bundle whose gates are set for galleries of a known composition."""

import json

import numpy as np
import pytest
import torch

from nformer_edge.backends.open import open_model
from nformer_edge.core.errors import UsageError
from nformer_edge.core.spec import BackboneSpec, HeadSpec, ModelSpec, PreprocessSpec
from nformer_edge.exporting.export import export_bundle
from nformer_edge.model.backbone import Backbone
from nformer_edge.model.checkpoint import save_checkpoint
from nformer_edge.model.gated import GatedHead, start_as_gates
from nformer_edge.report.parity import parity


def test_its_head_and_its_live_form_have_those_gates_and_parity_compares_with_them(tmp_path, tiny_market):
    spec = ModelSpec(BackboneSpec("osnet_x0_25", 16), HeadSpec.gated(16), PreprocessSpec(32, 16))
    torch.manual_seed(0)
    head = GatedHead(spec.head).eval()
    start_as_gates(head, torch.zeros(1, 16), None)
    checkpoint, bundle = tmp_path / "m.safetensors", tmp_path / "bundle"
    save_checkpoint(checkpoint, spec, Backbone(spec.backbone).eval(), head)
    export_bundle(checkpoint, bundle, images_per_person=8)
    assert json.loads((bundle / "manifest.json").read_text())["images_per_person"] == 8
    found = parity(checkpoint, bundle, tiny_market, draws=20, landmark_seeds=(0,))
    gates = [g for p in found.parts for g in p.gates if g.gate != "tensor"]  # the center of noise is rounding
    assert {g.status for g in gates} <= {"passed", "undecided"}
    head.tell(8)
    rows = np.random.default_rng(0).standard_normal((60, 16)).astype(np.float32)
    with open_model(bundle) as runner, open_model(checkpoint) as untold:
        assert runner.images_per_person == 8
        numbers = runner.head_numbers()
        assert all(np.array_equal(numbers[name], value.numpy()) for name, value in head.state_dict().items())
        assert np.abs(runner.relate(rows) - untold.relate(rows)).max() > 1e-3


def test_a_head_that_is_not_gated_cannot_be_told(tmp_path, tiny_checkpoint):
    with pytest.raises(UsageError, match="images_per_person"):
        export_bundle(tiny_checkpoint, tmp_path / "bundle", images_per_person=8)
