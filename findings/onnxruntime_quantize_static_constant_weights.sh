#!/usr/bin/env bash
# onnxruntime's quantize_static takes weights that stand in a Constant node for activations: per_channel is ignored.
#
# A weight may be an initializer or a Constant node; both are the same model. As an initializer it is stored as int8, one
# scale a channel. As a Constant node it stays float32 in the file, behind QuantizeLinear with one scale for all channels.
# No warning: the file is three times larger here, and small channels share the scale of the largest.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check onnx==1.23.2 onnxruntime==1.32.0 sympy==1.14.0
cd "$work"
"$work/env/bin/python" - <<'PY'
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
weights = random.standard_normal((32, 8, 3, 3)).astype(np.float32)


class Images(CalibrationDataReader):
    def __init__(self):
        self.rest = iter([{"x": random.standard_normal((1, 8, 16, 16)).astype(np.float32)} for _ in range(4)])

    def get_next(self):
        return next(self.rest, None)


initializer, constant = parser.parse_model(MODEL), parser.parse_model(MODEL)
initializer.graph.initializer.append(numpy_helper.from_array(weights, "w"))
constant.graph.node.insert(0, helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(weights)))
print("onnxruntime", onnxruntime.__version__)
seen = {}
for name, model in (("initializer", initializer), ("Constant node", constant)):
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, "given.onnx")
    quantize_static("given.onnx", "made.onnx", Images(), per_channel=True)
    tensors = {t.name: t for t in onnx.load("made.onnx").graph.initializer}
    scales, size = int(np.prod(tensors["w_scale"].dims)), os.path.getsize("made.onnx")
    print(f"{name}: {scales} scales for 32 channels, int8 weights stored: {'w_quantized' in tensors}, {size} bytes")
    seen[name] = (scales, "w_quantized" in tensors)
assert seen == {"initializer": (32, True), "Constant node": (1, False)}, f"changed: {seen}"
PY
