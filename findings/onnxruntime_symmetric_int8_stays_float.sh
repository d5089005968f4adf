#!/usr/bin/env bash
# In onnxruntime on a CPU, a convolution with symmetric int8 activations (zero point 0) and a ReLU runs in float, silently.
#
# Symmetric int8 is what TensorRT wants, and `quantize_static` writes it for QuantType.QInt8 with ActivationSymmetric.
# onnxruntime fuses Conv and Relu first where the quantized output cannot stand in for the ReLU (zero point above the
# lowest code); the fused float node then no longer matches the pattern of QLinearConv. uint8, int8 with zero point -128, and the
# same layer without ReLU run in INT8. The file passes every check and gives right numbers, at float speed and less.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check onnx==1.23.2 onnxruntime==1.32.0
cd "$work"
"$work/env/bin/python" - <<'PY'
import json

import numpy as np
import onnx
import onnxruntime
from onnx import parser

MODEL = """
<ir_version: 9, opset_import: ["": 18]>
g (float[1, 8, 16, 16] x) => (float[1, 8, 16, 16] y) {{
  s = Constant <value = float {{0.02}}> ()  z = Constant <value = {kind} {{{zero}}}> ()
  ws = Constant <value = float {{0.01}}> ()  wz = Constant <value = int8 {{0}}> ()
  xq = QuantizeLinear (x, s, z)  xd = DequantizeLinear (xq, s, z)
  wd = DequantizeLinear (w, ws, wz)
  c = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (xd, wd)
  r = {after} (c)
  yq = QuantizeLinear (r, s, z)  y = DequantizeLinear (yq, s, z)
}}
"""


def kernels(kind, zero, after):
    model = parser.parse_model(MODEL.format(kind=kind, zero=zero, after=after))
    weights = np.random.default_rng(0).integers(-127, 128, (8, 8, 3, 3)).astype(np.int8)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    session.run(None, {"x": np.ones((1, 8, 16, 16), np.float32)})
    with open(session.end_profiling()) as file:
        events = json.load(file)
    names = [e["args"]["op_name"] for e in events if e.get("cat") == "Node" and e["name"].endswith("kernel_time")]
    return [n for n in names if "Conv" in n]


print("onnxruntime", onnxruntime.__version__)
seen = {}
for case in (("uint8", 0, "Relu"), ("int8", -128, "Relu"), ("int8", 0, "Identity"), ("int8", 0, "Relu")):
    seen[case] = kernels(*case)
    print("{} activations, zero point {}, then {}:".format(*case), seen[case])
assert list(seen.values())[:3] == [["QLinearConv"]] * 3, "changed"
assert seen["int8", 0, "Relu"] and "QLinearConv" not in seen["int8", 0, "Relu"], "changed"
PY
