#!/usr/bin/env bash
# TensorRT-RTX builds no plan for a Scan with TopK of min(20, columns) where the profile's smallest size is below 20.
#
# The same TopK outside a Scan builds for 1 to 100 rows. Inside one it builds for 20 to 100 rows and fails for 1 to 100
# with an internal message, "Shape tensor ... is not initialized", that names neither TopK nor the profile. The model
# is valid and onnxruntime runs it at 5 rows and at 50. Parsing and building need no GPU.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check \
    tensorrt-rtx-cu13==1.7.1.116 onnx==1.23.2 onnxruntime==1.32.0
cd "$work"
cat > build.py <<'PY'
import sys

import tensorrt_rtx as trt

said = []


class Logger(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)

    def log(self, severity, message):
        if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
            said.append(message)


logger = Logger()
builder = trt.Builder(logger)
network = builder.create_network(0)
parser = trt.OnnxParser(network, logger)
with open(sys.argv[1], "rb") as file:
    assert parser.parse(file.read()), parser.get_error(0)
config, profile = builder.create_builder_config(), builder.create_optimization_profile()
profile.set_shape("x", (int(sys.argv[2]), 8), (50, 8), (100, 8))
config.add_optimization_profile(profile)
config.num_compute_capabilities = 1
config.set_compute_capability(trt.ComputeCapability.SM89, 0)
plan = builder.build_serialized_network(network, config)
print("built" if plan is not None else "no plan: " + " ".join(said)[:170])
PY
"$work/env/bin/python" - <<'PY'
import subprocess
import sys
from importlib.metadata import version

import numpy as np
import onnx
import onnxruntime
from onnx import parser

MODEL = """
<ir_version: 9, opset_import: ["": 18]>
g (float[N, 8] x) => (float[N, K] best) {
  keys = Transpose <perm = [1, 0]> (x)
  %s
}
"""
FORMS = {
    "TopK": """score = MatMul (x, keys)  columns = Shape <start = 0, end = 1> (x)
      twenty = Constant <value = int64[1] {20}> ()  k = Min (columns, twenty)
      best, at = TopK <axis = -1> (score, k)""",
    "TopK in a Scan": """keys_end, best = Scan <num_scan_inputs = 1,
      body = rank (float[8, M] keys_now, float[8] row) => (float[8, M] keys_next, float[F] found) {
        first = Constant <value = int64[1] {0}> ()  twenty = Constant <value = int64[1] {20}> ()
        line = Unsqueeze (row, first)  product = MatMul (line, keys_now)  score = Squeeze (product, first)
        columns = Shape <start = 1, end = 2> (keys_now)  k = Min (columns, twenty)
        found, at = TopK <axis = -1> (score, k)  keys_next = Identity (keys_now) }> (keys, x)""",
}

print("tensorrt-rtx-cu13", version("tensorrt-rtx-cu13"))
seen = {}
for name, text in FORMS.items():
    model = parser.parse_model(MODEL % text)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, "m.onnx")
    session = onnxruntime.InferenceSession("m.onnx", providers=["CPUExecutionProvider"])
    shapes = [session.run(None, {"x": np.ones((rows, 8), np.float32)})[0].shape for rows in (5, 50)]
    print(f"{name}: onnxruntime gives {shapes}")
    for smallest in (1, 20):
        done = subprocess.run([sys.executable, "build.py", "m.onnx", str(smallest)], capture_output=True, text=True)
        seen[name, smallest] = done.stdout.strip() == "built"
        print(f"{name}, {smallest} to 100 rows: {done.stdout.strip() or done.stderr[-300:]}")
expected = {("TopK", 1): True, ("TopK", 20): True, ("TopK in a Scan", 1): False, ("TopK in a Scan", 20): True}
assert seen == expected, f"changed: {seen}"
PY
