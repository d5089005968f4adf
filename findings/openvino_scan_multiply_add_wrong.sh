#!/usr/bin/env bash
# OpenVINO's CPU plugin computes a running sum in a Scan wrong where what is added was multiplied by a constant: no error.
#
# next = sum + row * weights, over the rows of a matrix. With the weights as a constant of the body (or captured from
# outside, which is the same to it) the second and all later steps give row + row * weights: the state is lost. Without
# the multiplication, or with the weights as a second state that never changes, the same sum is right.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check onnx==1.23.2 openvino==2026.4.1
cd "$work"
"$work/env/bin/python" - <<'PY'
import numpy as np
import onnx
import openvino
from onnx import parser
from onnx.reference import ReferenceEvaluator

MODEL = """
<ir_version: 9, opset_import: ["": 18]>
g (float[N, 2] x) => (float[N, 2] y) {
  start = Constant <value = float[2] {0, 0}> ()  w = Constant <value = float[2] {2, 3}> ()
  %s
}
"""
FORMS = {
    "no multiplication": """end, y = Scan <num_scan_inputs = 1,
      body = step (float[2] sum, float[2] row) => (float[2] next, float[2] now) {
        next = Add (sum, row)  now = Identity (next) }> (start, x)""",
    "weights as state": """w_end, end, y = Scan <num_scan_inputs = 1,
      body = step (float[2] v, float[2] sum, float[2] row) => (float[2] v_next, float[2] next, float[2] now) {
        part = Mul (row, v)  next = Add (sum, part)  now = Identity (next)  v_next = Identity (v) }> (w, start, x)""",
    "weights as constant": """end, y = Scan <num_scan_inputs = 1,
      body = step (float[2] sum, float[2] row) => (float[2] next, float[2] now) {
        v = Constant <value = float[2] {2, 3}> ()
        part = Mul (row, v)  next = Add (sum, part)  now = Identity (next) }> (start, x)""",
}

print("openvino", openvino.__version__)
x = np.array([[1, 2], [3, 4], [5, 6]], np.float32)
right = {}
for name, scan in FORMS.items():
    model = parser.parse_model(MODEL % scan)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, "m.onnx")
    expected = ReferenceEvaluator(model).run(None, {"x": x})[0]
    found = openvino.Core().compile_model("m.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x)[0]
    print(f"{name}: expected {expected.tolist()}, got {found.tolist()}")
    right[name] = bool(np.array_equal(expected, found))
assert right == {"no multiplication": True, "weights as state": True, "weights as constant": False}, f"changed: {right}"
PY
