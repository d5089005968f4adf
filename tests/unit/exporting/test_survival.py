"""Tools that rewrite ONNX files leave ours as they are: same numbers, bodies and INT8 kept (docs/deploy.md)."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers.onnx_tools import TOOLS, missing, rewritten

from nformer_edge.core.spec import BackboneSpec, HeadSpec
from nformer_edge.exporting.trace import portable_head, trace_backbone, trace_head
from nformer_edge.model.backbone import Backbone
from nformer_edge.model.gated import GatedHead, start_as_gates
from nformer_edge.model.nformer import NFormer
from nformer_edge.ops.contract import draw_landmarks
from nformer_edge.quantize.fp16 import multiplication_types
from nformer_edge.quantize.placement_cpu import quantize_backbone
from nformer_edge.quantize.values import Ranges

pytestmark = pytest.mark.optional

SPEC = HeadSpec(features=16, layers=2, heads=1, k=4, landmarks=3)
HEADS = ("the paper's head", "the gated head", "the portable gated head")
BACKBONES = ("osnet_x0_25", "resnet18", "resnet18 in INT8")

#: What no form of ours survives, and why.
LOST = {("onnx.version_converter", head): "it drops functions: the portable head is for it" for head in HEADS[:2]}
LOST |= {("onnxruntime quant_pre_process", head): "its shape inference knows no Scan or function" for head in HEADS}
LOST["ORT format, runtime", BACKBONES[2]] = "its convolutions become float: use the fixed style"


def gated_head(rows):
    head = GatedHead(HeadSpec(16, layers=2, heads=1, k=4, landmarks=40, rule="gated")).eval()
    start_as_gates(head, torch.from_numpy(rows), torch.arange(280) // 4)
    return head


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Name -> (file, inputs)."""
    folder, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    people = np.repeat(rng.standard_normal((70, 16)), 4, axis=0)
    rows = (people + 0.3 * rng.standard_normal(people.shape)).astype(np.float32)
    images = rng.standard_normal((2, 3, 32, 16)).astype(np.float32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        gated = trace_head(gated_head(rows), 18)
        models = {HEADS[0]: trace_head(NFormer(SPEC).eval(), 18), HEADS[1]: gated, HEADS[2]: portable_head(gated)}
        models |= {arch: trace_backbone(Backbone(BackboneSpec(arch, 8)).eval(), (32, 16), 18) for arch in BACKBONES[:2]}
    float32 = models["resnet18"]
    reach = {name: (-8.0, 8.0) for n in float32.graph.node for name in (*n.input, *n.output)}
    models[BACKBONES[2]] = quantize_backbone(float32.SerializeToString(), Ranges("minmax", reach))
    found = {}
    for name, model in models.items():
        feed = {"images": images}
        if name in HEADS:
            landmarks = draw_landmarks(280, 2, 40 if "gated" in name else 3, 0)
            feed = {"features": rows, "landmarks": landmarks}
        found[name] = (folder / f"{name.replace(' ', '_').replace(chr(39), '')}.onnx", feed)
        onnx.save(model, found[name][0])
    return found


def run(path, feed):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, feed)[0]


def computed_in(model):
    return sorted(multiplication_types(model).values())


@pytest.mark.parametrize("name", [*HEADS, *BACKBONES])
@pytest.mark.parametrize("tool", TOOLS)
def test_a_file_survives(tool, name, files, tmp_path):
    if missing(tool):
        pytest.skip(f"no package {missing(tool)}")
    if (tool, name) in LOST:
        pytest.skip(f"{tool}: {LOST[tool, name]}")
    source, feed = files[name]
    before = source.read_bytes()
    made = rewritten(tool, source, tmp_path)
    assert source.read_bytes() == before
    expected = run(source, feed)
    assert np.abs(run(made, feed) - expected).max() <= 1e-4 * np.abs(expected).max()
    if made.suffix == ".onnx":
        wanted = 0 if tool == "onnx.inliner" else len(onnx.load(source).functions)
        assert len(onnx.load(made).functions) == wanted
        assert computed_in(onnx.load(made)).count("int8") == computed_in(onnx.load(source)).count("int8")


@pytest.mark.parametrize("name", HEADS[2:] + BACKBONES)
def test_openvino_computes_the_same(name, files):
    openvino = pytest.importorskip("openvino", reason="no package openvino")
    source, feed = files[name]
    model = openvino.Core().compile_model(str(source), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    expected = run(source, feed)
    error = np.linalg.norm(model(feed)[0] - expected) / np.linalg.norm(expected)
    assert error <= (0.05 if "INT8" in name else 1e-4)
