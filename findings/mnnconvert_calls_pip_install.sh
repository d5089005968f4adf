#!/usr/bin/env bash
# MNN's converter calls `pip install` by itself, at its first run and unasked, for a client of a logging service.
#
# Before it reads its arguments it tries to import that client, and where it is missing runs whatever `pip` the PATH has:
# often another environment's than its own, whose packages are then changed. With the client there it reports the
# command's arguments and the model's sizes. Where the install fails it goes on and converts. Here a stub that only
# writes down its arguments stands for pip, so that nothing is installed or sent.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check mnn==3.6.1 onnx==1.23.2
cd "$work"
mkdir stub
printf '#!/bin/sh\necho "pip $*" >> "%s/calls"\nexit 1\n' "$work" > stub/pip
chmod +x stub/pip
PATH="$work/stub:$work/env/bin:$PATH" python - <<'PY'
import os
import subprocess
from importlib.metadata import version

import onnx
from onnx import parser

onnx.save(
    parser.parse_model('<ir_version: 9, opset_import: ["": 18]> g (float[4] x) => (float[4] y) { y = Relu (x) }'), "m.onnx"
)
command = ["mnnconvert", "-f", "ONNX", "--modelFile", "m.onnx", "--MNNModel", "m.mnn", "--bizCode", "x"]
subprocess.run(command, capture_output=True)
calls = open("calls").read().splitlines() if os.path.exists("calls") else []
print("mnn", version("mnn"), "called:", calls, "converted:", os.path.exists("m.mnn"))
assert set(calls) == {"pip install -U aliyun-log-python-sdk"} and os.path.exists("m.mnn"), "changed"
PY
