#!/usr/bin/env bash
# onnx's version converter drops a model's local functions, keeps the nodes that call them, and the checker approves.
#
# A model of one function becomes a model of none whose only node calls it. `check_model(full_check=True)` passes before
# and after, since an operator of an unknown domain is no error to it. onnxruntime refuses the result. Calling
# onnx.inliner.inline_local_functions first keeps the model whole.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check onnx==1.23.2 onnxruntime==1.32.0
"$work/env/bin/python" - <<'PY'
import numpy as np
import onnx
import onnxruntime
from onnx import checker, inliner, parser, version_converter

MODEL = """
<ir_version: 9, opset_import: ["": 18, "shop": 1]>
g (float[2] price) => (float[2] total) { total = shop.AddTax (price) }
<domain: "shop", opset_import: ["": 18]>
AddTax (net) => (gross) { rate = Constant <value = float {1.25}> ()  gross = Mul (net, rate) }
"""


def outcome(model):
    checker.check_model(model, full_check=True)
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        return session.run(None, {"price": np.array([4, 8], np.float32)})[0].tolist()
    except Exception as e:
        return "refused: " + str(e).splitlines()[0][:150]


print("onnx", onnx.__version__, "onnxruntime", onnxruntime.__version__)
given = parser.parse_model(MODEL)
made = {
    "as built": given,
    "converted to opset 20": version_converter.convert_version(given, 20),
    "inlined, then converted": version_converter.convert_version(inliner.inline_local_functions(given), 20),
}
seen = {}
for name, model in made.items():
    found = outcome(model)
    print(f"{name}: checker passes, {len(model.functions)} functions, {found}")
    seen[name] = (len(model.functions), str(found).startswith("refused"))
assert seen == {
    "as built": (1, False),
    "converted to opset 20": (0, True),
    "inlined, then converted": (0, False),
}, f"changed: {seen}"
PY
