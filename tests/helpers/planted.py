"""A bundle of a few convolutions, one of them planted so that INT8 ruins it, and people to tell apart by it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from nformer_edge.core.artifact import write_manifest
from nformer_edge.core.spec import BackboneSpec, ModelSpec, PreprocessSpec
from nformer_edge.core.values import to_table
from nformer_edge.exporting.bundle import BundleManifest, Normalization
from nformer_edge.ops.contract import LANDMARK_RULE

SPEC = ModelSpec(BackboneSpec("resnet18", 16), None, PreprocessSpec(32, 16))
GOOD = ("first", "third", "fourth")
BAD = "second"


def planted_bundle(folder: Path) -> Path:
    """Writes it.

    The node BAD multiplies a channel that is always 0 by 2000. So its other weights, near 1, are less than one step of
    INT8: quantized, it gives all images the same. In float nothing is wrong with it.
    """
    folder.mkdir()
    rng = np.random.default_rng(0)
    weights = {
        "first": rng.normal(0, 0.3, (8, 3, 3, 3)), BAD: np.eye(8)[:, :, None, None] + rng.normal(0, 0.1, (8, 8, 1, 1)),
        "third": rng.normal(0, 0.3, (8, 8, 1, 1)), "fourth": rng.normal(0, 0.3, (16, 8, 3, 3)),
    }  # fmt: skip
    biases = {name: rng.normal(0.3, 0.1, len(w)) for name, w in weights.items()}
    biases["first"][0] = -1000.0  # behind the ReLU: always 0
    weights[BAD][:, 0] = 2000.0
    constants = {f"{n}.w": w for n, w in weights.items()} | {f"{n}.b": b for n, b in biases.items()}
    constants |= {"neck.w": rng.normal(0, 1, (16, 16)), "neck.b": np.zeros(16)}
    nodes, last = [], "images"
    for name, w in weights.items():
        pads = [w.shape[2] // 2] * 4
        nodes.append(helper.make_node("Conv", [last, f"{name}.w", f"{name}.b"], [f"{name}.y"], name=name, pads=pads))
        nodes.append(helper.make_node("Relu", [f"{name}.y"], [f"{name}.z"], name=f"{name}.relu"))
        last = f"{name}.z"
    nodes += [
        helper.make_node("GlobalAveragePool", [last], ["pooled"], name="pool"),
        helper.make_node("Flatten", ["pooled"], ["flat"], name="flatten"),
        helper.make_node("Gemm", ["flat", "neck.w", "neck.b"], ["features"], name="neck"),
    ]
    ends = {
        "images": helper.make_tensor_value_info("images", TensorProto.FLOAT, ["B", 3, 32, 16]),
        "features": helper.make_tensor_value_info("features", TensorProto.FLOAT, ["B", 16]),
    }
    initializers = [numpy_helper.from_array(v.astype(np.float32), n) for n, v in constants.items()]
    graph = helper.make_graph(nodes, "planted", [ends["images"]], [ends["features"]], initializers)
    model = helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 18)])
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, folder / "backbone.onnx")
    images = rng.normal(0, 1, (2, 3, 32, 16)).astype(np.float32)
    np.savez(folder / "golden.npz", images=images, features=np.zeros((2, 16), np.float32))
    manifest = BundleManifest(
        model=SPEC,
        preprocess=SPEC.preprocess,
        normalization=Normalization(None, "nowhere"),
        landmark_rule=LANDMARK_RULE,
        landmark_seed=0,
        opset=18,
        checkpoint_sha256="",
        ir_version=9,
        versions={},
        self_check={},
    )
    write_manifest(folder, "bundle", to_table(manifest))
    return folder


def colored_people(folder: Path, people: int = 20) -> Path:
    """A training set in Market-1501's layout: each person a color, from three cameras, twice each."""
    (folder / "bounding_box_train").mkdir(parents=True)
    (folder / "query").mkdir()
    (folder / "bounding_box_test").mkdir()
    for pid in range(1, people + 3):
        rng = np.random.default_rng(pid)
        color = rng.integers(30, 226, 3)
        for camera in (1, 2, 3):
            for shot in range(2):
                split = "bounding_box_train" if pid <= people else "query" if camera == 1 else "bounding_box_test"
                pixels = np.clip(color + rng.normal(0, 25, (32, 16, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / f"{pid:04d}_c{camera}s1_{shot:06d}_00.jpg", quality=95)
    return folder
