#!/usr/bin/env bash
# MNN's converter ends with exit code 0 where it failed and wrote nothing.
#
# A valid model with an operator that MNN lacks: it prints "Converted Failed!" among its messages, no file appears, and
# a script that checks the exit code goes on with the file of an earlier run.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check mnn==3.6.1 onnx==1.23.2
cd "$work"
mkdir stub
printf '#!/bin/sh\nexit 1\n' > stub/pip # the converter calls pip: see mnnconvert_calls_pip_install.sh
chmod +x stub/pip
PATH="$work/stub:$work/env/bin:$PATH" python - <<'PY'
import os
import subprocess
from importlib.metadata import version

import onnx
from onnx import parser

MODELS = {"Relu": "y = Relu (x)", "IsNaN": "bad = IsNaN (x)  y = Where (bad, x, x)"}
print("mnn", version("mnn"))
seen = {}
for name, text in MODELS.items():
    model = parser.parse_model(f'<ir_version: 9, opset_import: ["": 18]> g (float[4] x) => (float[4] y) {{ {text} }}')
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, "given.onnx")
    command = ["mnnconvert", "-f", "ONNX", "--modelFile", "given.onnx", "--MNNModel", f"{name}.mnn", "--bizCode", "x"]
    done = subprocess.run(command, capture_output=True, text=True)
    said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if "Convert" in line or "Support" in line]
    seen[name] = (done.returncode, os.path.exists(f"{name}.mnn"))
    print(f"{name}: exit code {done.returncode}, file written: {seen[name][1]}, it said {said}")
assert seen == {"Relu": (0, True), "IsNaN": (0, False)}, f"changed: {seen}"
PY
