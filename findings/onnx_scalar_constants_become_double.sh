#!/usr/bin/env bash
# onnxslim and polygraphy's constant folding turn Constant <value_float> into float64: exit code 0, and an invalid model.
#
# ONNX gives a Constant five ways to hold one value; `value_float` is float32 by specification. Both tools keep such a
# constant as a Python float, fold it with numpy, and write a float64 tensor in its place. The next operator then has
# one float32 and one float64 input, which no runtime takes. The same constant as a `value` tensor is kept right.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check \
    onnxslim==0.1.98 polygraphy==0.53.6 onnx-graphsurgeon==0.6.1 onnx==1.23.2 onnxruntime==1.32.0
cd "$work"
PATH="$work/env/bin:$PATH" python - <<'PY'
import subprocess
from importlib.metadata import version

import numpy as np
import onnx
import onnxruntime

FORMS = {"value_float": "value_float = 2.0", "value": "value = float {2.0}"}
TOOLS = {
    "onnxslim": ["onnxslim", "given.onnx", "made.onnx"],
    "polygraphy": ["polygraphy", "surgeon", "sanitize", "--fold-constants", "given.onnx", "-o", "made.onnx"],
}


def outcome(path):
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return session.run(None, {"x": np.ones(2, np.float32)})[0].tolist()
    except Exception as e:
        return "refused: " + str(e).splitlines()[0][:150]


print({name: version(name) for name in ("onnxslim", "polygraphy", "onnx-graphsurgeon", "onnx", "onnxruntime")})
seen = {}
for form, text in FORMS.items():
    model = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["": 18]> g (float[2] x) => (float[2] y) '
        f"{{ c = Constant <{text}> ()  root = Sqrt (c)  y = Mul (x, root) }}"
    )
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, "given.onnx")
    print(f"{form}: as built, {outcome('given.onnx')}")
    for tool, command in TOOLS.items():
        done = subprocess.run(command, capture_output=True, text=True)
        found = outcome("made.onnx")
        print(f"{form}: {tool} exit code {done.returncode}, then {found}")
        seen[form, tool] = (done.returncode, str(found).startswith("refused"))

expected = {(form, tool): (0, form == "value_float") for form in FORMS for tool in TOOLS}
assert seen == expected, f"changed: {seen}"
PY
