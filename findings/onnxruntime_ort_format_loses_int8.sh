#!/usr/bin/env bash
# onnxruntime's own conversion to ORT format, with its style for any target ("Runtime"), turns INT8 convolutions to float.
#
# `--optimization_style Runtime` is the one meant for files that several devices share: it saves optimizations that the
# device's session shall apply. The fusion of Q/DQ and Conv into QLinearConv is not among what the session applies: the
# file computes in float, between quantizing nodes that are still there. Sizes and results look the same. Style "Fixed"
# keeps INT8, and so does the ONNX file.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check onnx==1.23.2 onnxruntime==1.32.0
cd "$work"
"$work/env/bin/python" - <<'PY'
import json
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
from onnx import parser

MODEL = """
<ir_version: 9, opset_import: ["": 18]>
g (float[1, 8, 16, 16] x) => (float[1, 8, 16, 16] y) {
  s = Constant <value = float {0.02}> ()  z = Constant <value = uint8 {128}> ()
  ws = Constant <value = float {0.01}> ()  wz = Constant <value = int8 {0}> ()
  os = Constant <value = float {0.05}> ()  oz = Constant <value = uint8 {0}> ()
  xq = QuantizeLinear (x, s, z)  xd = DequantizeLinear (xq, s, z)
  wd = DequantizeLinear (w, ws, wz)
  c = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (xd, wd)
  r = Relu (c)
  yq = QuantizeLinear (r, os, oz)  y = DequantizeLinear (yq, os, oz)
}
"""


def kernels(data):
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.log_severity_level = True, 3
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    session.run(None, {"x": np.ones((1, 8, 16, 16), np.float32)})
    with open(session.end_profiling()) as file:
        events = json.load(file)
    names = [e["args"]["op_name"] for e in events if e.get("cat") == "Node" and e["name"].endswith("kernel_time")]
    return [n for n in names if "Conv" in n]


model = parser.parse_model(MODEL)
weights = np.random.default_rng(0).integers(-127, 128, (8, 8, 3, 3)).astype(np.int8)
model.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
onnx.checker.check_model(model, full_check=True)
onnx.save(model, "m.onnx")
print("onnxruntime", onnxruntime.__version__)
seen = {"ONNX": kernels(model.SerializeToString())}
for style, file in (("Fixed", "m.ort"), ("Runtime", "m.with_runtime_opt.ort")):
    command = [sys.executable, "-m", "onnxruntime.tools.convert_onnx_models_to_ort", "m.onnx"]
    subprocess.run([*command, "--optimization_style", style], check=True, capture_output=True)
    with open(file, "rb") as made:
        seen[f"ORT format, {style}"] = kernels(made.read())
for name, found in seen.items():
    print(f"{name}: {found}")
assert seen == {
    "ONNX": ["QLinearConv"],
    "ORT format, Fixed": ["QLinearConv"],
    "ORT format, Runtime": ["Conv"],
}, "changed"
PY
