#!/usr/bin/env bash
# onnxruntime's quantize_static takes weights that stand in a Constant node for activations: per_channel is ignored.
#
# A weight may be an initializer or a Constant node; both are the same model. As an initializer it is stored as int8, one
# scale a channel. As a Constant node it stays float32 in the file, behind QuantizeLinear with one scale for all, found by
# calibration. No warning; with channels of unlike size the error is many times larger, and the file four times.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check onnx==1.23.2 onnxruntime==1.32.0 sympy==1.14.0
cd "$work"
"$work/env/bin/python" - 2>/dev/null <<'PY'
import os

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper, parser
from onnxruntime.quantization import CalibrationDataReader, quantize_static

MODEL = """
<ir_version: 9, opset_import: ["": 18]>
g (float[1, 8, 16, 16] x) => (float[1, 32, 16, 16] y) { y = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w) }
"""
random = np.random.default_rng(0)
sizes = np.logspace(-3, 0, 32, dtype=np.float32)[:, None, None, None]
weights = random.standard_normal((32, 8, 3, 3)).astype(np.float32) * sizes


class Images(CalibrationDataReader):
    def __init__(self):
        self.rest = iter([{"x": random.standard_normal((1, 8, 16, 16)).astype(np.float32)} for _ in range(4)])

    def get_next(self):
        return next(self.rest, None)


def run(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": image})[0]


image = random.standard_normal((1, 8, 16, 16)).astype(np.float32)
initializer, constant = parser.parse_model(MODEL), parser.parse_model(MODEL)
initializer.graph.initializer.append(numpy_helper.from_array(weights, "w"))
constant.graph.node.insert(0, helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(weights)))
print("onnxruntime", onnxruntime.__version__)
seen = {}
for name, model in (("initializer", initializer), ("Constant node", constant)):
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, "given.onnx")
    quantize_static("given.onnx", "made.onnx", Images(), per_channel=True)
    scales = max(len(t.dims) and t.dims[0] for t in onnx.load("made.onnx").graph.initializer if t.name == "w_scale")
    before, after = run("given.onnx"), run("made.onnx")
    error = np.linalg.norm(after - before, axis=(2, 3)) / np.linalg.norm(before, axis=(2, 3))
    size = os.path.getsize("made.onnx")
    print(f"{name}: {scales or 1} scales for 32 channels, {size} bytes, median error of a channel {np.median(error):.3f}")
    seen[name] = (int(scales) or 1, size, float(np.median(error)))
(s1, b1, e1), (s2, b2, e2) = seen.values()
assert (s1, s2) == (32, 1) and b2 > 2 * b1 and e2 > 2 * e1, f"changed: {seen}"
PY
