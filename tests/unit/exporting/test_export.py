"""A checkpoint becomes a bundle that stock onnxruntime runs and that equals PyTorch."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers.manifests import reseal

from nformer_edge.core.artifact import read_manifest
from nformer_edge.core.errors import ArtifactError, UsageError
from nformer_edge.core.features import Features
from nformer_edge.core.spec import BackboneSpec, HeadSpec, ModelSpec, PreprocessSpec, to_dict
from nformer_edge.core.values import to_json
from nformer_edge.exporting import export
from nformer_edge.exporting.bundle import BACKBONE, GOLDEN, HEAD, LIVE, PORTABLE, open_bundle
from nformer_edge.exporting.trace import folded_neck, portable_head, trace_head
from nformer_edge.metrics.agreement import ROUNDING, row_errors
from nformer_edge.metrics.composition import composition
from nformer_edge.model.backbone import Backbone
from nformer_edge.model.checkpoint import load_checkpoint, save_checkpoint
from nformer_edge.model.gated import GatedHead, start_as_gates
from nformer_edge.model.nformer import NFormer
from nformer_edge.ops.contract import DOMAIN, draw_landmarks
from nformer_edge.ops.operators import operators


def run(model, feed):
    data = model if isinstance(model, bytes) else model.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return session.run(None, {k: np.ascontiguousarray(v) for k, v in feed.items()})[0]


def worst(found, expected):
    return row_errors(found, expected).max() / ROUNDING


def test_a_bundle_says_what_a_device_must_know(tiny_bundle, tiny_checkpoint):
    manifest = read_manifest(tiny_bundle, "bundle")
    checkpoint = load_checkpoint(tiny_checkpoint)
    assert sorted(manifest["files"]) == [BACKBONE, GOLDEN, LIVE, HEAD]
    assert open_bundle(tiny_bundle).spec == checkpoint.spec
    assert manifest["preprocess"] == to_dict(checkpoint.spec.preprocess)
    assert manifest["checkpoint_sha256"] == checkpoint.sha256
    assert (manifest["landmark_seed"], manifest["opset"]) == (7, 18)
    assert {"torch", "onnx", "onnxruntime", "nformer-edge"} <= set(manifest["versions"])
    assert all(error <= 1 for error in manifest["self_check"]["worst_error_in_fp32_tolerances"].values())


def test_the_manifest_carries_what_was_measured_by_images_a_person_and_claims_nothing_else(
    tiny_bundle, tiny_checkpoint, tmp_path
):
    assert open_bundle(tiny_bundle).manifest.accuracy is None
    few = Features(np.random.default_rng(0).normal(size=(6, 32)), np.repeat([1, 2, 3], 2), np.array([1, 2] * 3))
    measured = composition(few, few, lambda query, gallery, seed: (query, gallery), measured_on="three people")
    model = load_checkpoint(tiny_checkpoint)
    extra = {"accuracy": to_json(measured)}
    save_checkpoint(tmp_path / "m.safetensors", model.spec, model.backbone, model.head, extra)
    bundle = export.export_bundle(tmp_path / "m.safetensors", tmp_path / "b")
    assert open_bundle(bundle).manifest.accuracy == measured
    other = replace(measured, measured_on="others")
    assert open_bundle(export.export_bundle(tiny_checkpoint, tmp_path / "o", accuracy=other)).manifest.accuracy == other


def test_both_files_run_in_stock_onnxruntime_at_any_size_and_equal_pytorch(tiny_bundle, tiny_checkpoint):
    checkpoint = load_checkpoint(tiny_checkpoint)
    rng = np.random.default_rng(1)
    with torch.no_grad():
        for batch in (1, 3):
            images = rng.standard_normal((batch, 3, 64, 32)).astype(np.float32)
            expected = checkpoint.backbone(torch.from_numpy(images)).numpy()
            assert worst(run((tiny_bundle / BACKBONE).read_bytes(), {"images": images}), expected) <= 1
        for count in (1, 3, 130):  # fewer than k, and more than a block of the bodies
            features = rng.standard_normal((count, 32)).astype(np.float32)
            landmarks = draw_landmarks(count, 2, 3, 7)
            expected = checkpoint.head(torch.from_numpy(features), torch.from_numpy(landmarks)).numpy()
            found = run((tiny_bundle / HEAD).read_bytes(), {"features": features, "landmarks": landmarks})
            assert worst(found, expected) <= 1


@pytest.mark.parametrize("opset", [18, 20])
@pytest.mark.parametrize("rule", ["features", "affinity"])
@pytest.mark.parametrize(("input_scale", "landmarks"), [("unit", 2), ("sqrt_dim", 2), ("none", 2), ("unit", 12)])
def test_every_rule_and_input_scale_is_inside_the_graph(rule, input_scale, landmarks, opset):
    torch.manual_seed(0)
    head = NFormer(
        HeadSpec(features=16, layers=2, heads=2, k=3, landmarks=landmarks, rule=rule, input_scale=input_scale)
    ).eval()
    model = trace_head(head, opset)
    features = 5 * np.random.default_rng(0).standard_normal((21, 16)).astype(np.float32)
    drawn = draw_landmarks(21, 2, landmarks, 0)
    expected = head(torch.from_numpy(features), torch.from_numpy(drawn)).detach().numpy()
    assert worst(run(model, {"features": features, "landmarks": drawn}), expected) <= 1


@pytest.mark.parametrize("power", [1.0, 0.7])
@pytest.mark.parametrize("rows", [3, 60, 300])
def test_the_gated_head_is_inside_the_graph(rows, power):
    rng = np.random.default_rng(0)
    people = np.repeat(rng.standard_normal((-(-rows // 4), 16)), 4, axis=0)[:rows]
    features = (people + 0.3 * rng.standard_normal((rows, 16))).astype(np.float32)
    head = GatedHead(HeadSpec(16, layers=2, heads=1, k=6, landmarks=40, rule="gated")).eval()
    start_as_gates(head, torch.from_numpy(features), torch.arange(rows) // 4 if rows > 3 else None, power=power)
    model = trace_head(head, 18)
    assert [i.name for i in model.graph.input] == ["features", "landmarks"]
    drawn = draw_landmarks(rows, 2, 40, 0)
    expected = head(torch.from_numpy(features), torch.from_numpy(drawn)).detach().numpy()
    found = run(model, {"features": features, "landmarks": drawn})
    if rows > 3:
        assert worst(found, expected) <= 1
    else:  # profiles that end at once: PyTorch's own rounding is 1e-5 there
        assert np.abs(found - expected).max() <= 2e-4


class OneGate(NFormer):
    """A head of one gated attention, with its sum of weights, and with cameras if its spec has two heads."""

    def forward(self, features, landmarks):
        x = torch.nn.functional.normalize(features)[None]
        cameras = (features[:, 0] > 0).int() if self.spec.heads == 2 else None
        values = torch.cat([features[None], torch.ones_like(x[:, :, :1])], dim=2)
        lists = operators().row_top_k(x, x, self.spec.k)
        t = (x @ x[:, landmarks[0].long()].transpose(1, 2)).mean(dim=2)
        attended = operators().reciprocal_neighbor_attention(x, x, values, lists, 2.0, t, cameras, 0.5)[0]
        return (features + attended[:, :-1]) / (1 + attended[:, -1:])


@pytest.mark.parametrize("heads", [1, 2])
def test_a_gated_head_has_its_own_body_and_imports_version_2(heads):
    head = OneGate(HeadSpec(features=16, layers=1, heads=heads, k=4, landmarks=2)).eval()
    model = trace_head(head, 18)
    onnx.checker.check_model(model, full_check=True)
    assert [len(f.input) for f in model.functions] == [2, 4 + heads]
    assert next(o.version for o in model.opset_import if o.domain == DOMAIN) == 2
    features, drawn = np.random.default_rng(0).standard_normal((21, 16)).astype(np.float32), draw_landmarks(21, 1, 2, 0)
    expected = head(torch.from_numpy(features), torch.from_numpy(drawn)).detach().numpy()
    assert worst(run(model, {"features": features, "landmarks": drawn}), expected) <= 1


def test_a_head_of_the_paper_still_imports_version_1(tiny_bundle):
    assert next(o.version for o in onnx.load(tiny_bundle / HEAD).opset_import if o.domain == DOMAIN) == 1


def test_the_head_has_our_nodes_with_their_bodies_and_no_data_outside(tiny_bundle):
    onnx.checker.check_model(str(tiny_bundle / HEAD), full_check=True)
    model = onnx.load(tiny_bundle / HEAD)
    ours = [n for n in model.graph.node if n.domain == DOMAIN]
    assert sorted({n.op_type for n in ours}) == ["ReciprocalNeighborAttention", "RowTopK"]
    assert {f.name for f in model.functions} == {n.op_type for n in ours}
    assert all(a.HasField("f") for n in ours for a in n.attribute if a.name == "scale")
    assert not any(t.external_data for t in model.graph.initializer)


def test_a_zero_feature_does_not_divide_by_zero(tiny_bundle):
    features = np.zeros((5, 32), np.float32)
    features[1:] = np.random.default_rng(0).standard_normal((4, 32))
    landmarks = draw_landmarks(5, 2, 3, 0)
    found = run((tiny_bundle / HEAD).read_bytes(), {"features": features, "landmarks": landmarks})
    assert np.isfinite(found).all()


def test_batch_norms_after_products_are_folded(tiny_bundle):
    nodes = [n.op_type for n in onnx.load(tiny_bundle / BACKBONE).graph.node]
    assert nodes.count("Conv") == 187
    assert "BatchNormalization" not in nodes
    assert "Identity" not in nodes


@pytest.mark.parametrize("neck", ["bnneck", "fc"])
def test_the_neck_of_either_kind_folds_without_changing_what_it_gives(neck):
    torch.manual_seed(0)
    backbone = Backbone(BackboneSpec("osnet_x0_25", 8, neck)).eval()
    for module in backbone.neck.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    images = torch.randn(2, 3, 32, 16)
    with torch.no_grad():
        torch.testing.assert_close(folded_neck(backbone)(images), backbone(images), rtol=1e-5, atol=1e-5)
    assert any(isinstance(m, torch.nn.BatchNorm1d) for m in backbone.neck.modules())


def test_golden_vectors_are_those_of_pytorch(tiny_bundle, tiny_checkpoint):
    golden, checkpoint = open_bundle(tiny_bundle).golden, load_checkpoint(tiny_checkpoint)
    with torch.no_grad():
        features = checkpoint.backbone(torch.from_numpy(golden["images"])).numpy()
        related = checkpoint.head(torch.from_numpy(golden["head_input"]), torch.from_numpy(golden["landmarks"])).numpy()
    np.testing.assert_array_equal(golden["landmarks"], draw_landmarks(len(golden["head_input"]), 2, 3, 7))
    np.testing.assert_allclose(features, golden["features"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(related, golden["embeddings"], rtol=1e-5, atol=1e-6)


def test_a_backbone_alone_makes_a_bundle_without_head(tmp_path):
    spec = ModelSpec(BackboneSpec("resnet18", 8), None, PreprocessSpec(32, 16))
    save_checkpoint(tmp_path / "c.safetensors", spec, Backbone(spec.backbone))
    bundle = export.export_bundle(tmp_path / "c.safetensors", tmp_path / "bundle")
    assert sorted(read_manifest(bundle, "bundle")["files"]) == [BACKBONE, GOLDEN]


def test_an_export_that_computes_something_else_writes_nothing(tiny_checkpoint, tiny_bundle, tmp_path, monkeypatch):
    model = onnx.load(tiny_bundle / BACKBONE)
    weights = next(t for t in model.graph.initializer if t.name == "neck.projection.weight")
    weights.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weights) * 1.01, weights.name))
    monkeypatch.setattr(export, "trace_backbone", lambda *_: model)
    with pytest.raises(ArtifactError, match=r"backbone.onnx: got a row .* times as far off float64 as it may be"):
        export.export_bundle(tiny_checkpoint, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("opset", [11, 17, 21])
def test_an_opset_without_bodies_is_refused_before_anything_is_read(opset, tmp_path):
    with pytest.raises(UsageError, match=f"opset: got {opset}"):
        export.export_bundle(tmp_path / "none.safetensors", tmp_path / "bundle", opset=opset)


def test_a_head_alone_cannot_be_exported(tmp_path):
    spec = ModelSpec(BackboneSpec("osnet_x0_25", 8), HeadSpec(features=8, layers=1))
    save_checkpoint(tmp_path / "c.safetensors", spec, None, NFormer(spec.head))
    with pytest.raises(ArtifactError, match="a head alone"):
        export.export_bundle(tmp_path / "c.safetensors", tmp_path / "bundle")


def test_a_folder_that_is_not_a_bundle_is_not_replaced(tiny_checkpoint, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="not ours to replace"):
        export.export_bundle(tiny_checkpoint, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"opset": 25}, "opset: got 25"),
        ({"landmark_rule": "dice"}, "landmark_rule: got 'dice'"),
        ({"model": {"backbone": {"arch": "vgg"}}}, "model.backbone.arch: got 'vgg'"),
    ],
)
def test_a_manifest_of_an_unknown_opset_rule_or_model_is_refused(tiny_bundle, tmp_path, change, message):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_bundle, copy)
    reseal(copy, **change)
    with pytest.raises(ArtifactError, match=message):
        open_bundle(copy)


def test_a_graph_whose_tensors_lie_elsewhere_is_refused(tiny_bundle, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_bundle, copy)
    model = onnx.load(copy / BACKBONE)
    onnx.save(model, copy / BACKBONE, save_as_external_data=True, location="outside.bin", size_threshold=0)
    export.write_manifest(
        copy, "bundle", {k: v for k, v in json.loads((copy / "manifest.json").read_text()).items() if k != "files"}
    )
    with pytest.raises(ArtifactError, match="stored in another file"):
        open_bundle(copy)


def test_a_trace_changes_nothing_in_the_module_it_takes():
    spec = HeadSpec(features=8, layers=1, heads=1, k=2, landmarks=1)
    head = NFormer(replace(spec)).train()
    before = {name: value.clone() for name, value in head.state_dict().items()}
    trace_head(head, 18)
    assert head.training
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())
    assert type(head.h[0].ln_1).__name__ == "LayerNorm"
    assert not isinstance(head.h[0].ln_1, torch.nn.LayerNorm)


def test_an_earlier_bundle_is_replaced_only_by_force(tiny_checkpoint, tmp_path):
    first = export.export_bundle(tiny_checkpoint, tmp_path / "bundle")
    with pytest.raises(ArtifactError, match=r"got an earlier bundle there.*--force"):
        export.export_bundle(tiny_checkpoint, first)
    assert export.export_bundle(tiny_checkpoint, first, landmark_seed=5, force=True) == first
    assert json.loads((first / "manifest.json").read_text())["landmark_seed"] == 5


def test_a_portable_head_has_standard_operators_alone_and_computes_the_same(tiny_checkpoint, tiny_bundle, tmp_path):
    bundle = export.export_bundle(tiny_checkpoint, tmp_path / "bundle", landmark_seed=7, portable=True)
    model = onnx.load(bundle / PORTABLE)
    assert [o.domain for o in model.opset_import] == [""]
    assert not model.functions
    assert (bundle / HEAD).read_bytes() == (tiny_bundle / HEAD).read_bytes()
    golden = open_bundle(bundle).golden
    feed = {"features": golden["head_input"], "landmarks": golden["landmarks"]}
    np.testing.assert_array_equal(run(model, feed), run((bundle / HEAD).read_bytes(), feed))


@pytest.mark.parametrize("rule", ["features", "gated"])
def test_every_constant_of_a_portable_head_is_a_tensor(rule):
    spec = HeadSpec(features=16, layers=1, heads=1, k=3, landmarks=4, rule=rule)
    model = portable_head(trace_head((GatedHead if rule == "gated" else NFormer)(spec).eval(), 18))
    inner = [a.g for n in model.graph.node if n.op_type == "Scan" for a in n.attribute if a.HasField("g")]
    constants = [n for g in [model.graph, *inner] for n in g.node if n.op_type == "Constant"]
    assert {a.name for n in constants for a in n.attribute} == {"value"}


def test_a_portable_head_without_a_head_is_refused(tmp_path):
    spec = ModelSpec(BackboneSpec("resnet18", 8), None, PreprocessSpec(32, 16))
    save_checkpoint(tmp_path / "c.safetensors", spec, Backbone(spec.backbone))
    with pytest.raises(UsageError, match="a checkpoint without a head"):
        export.export_bundle(tmp_path / "c.safetensors", tmp_path / "bundle", portable=True)
