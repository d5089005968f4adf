#!/usr/bin/env bash
# polygraphy's `inspect sparsity` says of a BF16 layer with two zeros in each four weights that it is not sparse.
#
# In its check of BF16 tensors with raw data the loop over the four weights takes the name of the loop around it, which
# the index is computed from: weights 0, 2, 4 and 6 are read in place of 0, 1, 2 and 3. The same weights in FP32 and in
# FP16 are found sparse. The command ends with 0 whether it finds a layer sparse or not: the verdict is in its output.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check polygraphy==0.53.6 onnx==1.23.2
cd "$work"
PATH="$work/env/bin:$PATH" python - <<'PY'
import subprocess
from importlib.metadata import version

import numpy as np
import onnx
from onnx import TensorProto, helper

TYPES = {"FP32": TensorProto.FLOAT, "FP16": TensorProto.FLOAT16, "BF16": TensorProto.BFLOAT16}
WEIGHTS = np.tile(np.array([1, 0, 1, 0], np.float32), (4, 4))  # [4, 16]: two of each four along the inputs

print({name: version(name) for name in ("polygraphy", "onnx")})
seen = {}
for name, kind in TYPES.items():
    raw = WEIGHTS.astype(helper.tensor_dtype_to_np_dtype(kind)).tobytes()
    weights = helper.make_tensor("w", kind, WEIGHTS.shape, raw, raw=True)
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)],
        "g",
        [helper.make_tensor_value_info("x", kind, [2, 16])],
        [helper.make_tensor_value_info("y", kind, [2, 4])],
        [weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, f"{name}.onnx")
    command = ["polygraphy", "inspect", "sparsity", f"{name}.onnx"]
    done = subprocess.run(command, capture_output=True, text=True)
    said = done.stdout + done.stderr
    verdict = "not sparse" if "non-sparse tensor" in said else "sparse" if "sparse tensor" in said else said
    print(f"{name}: exit code {done.returncode}, {verdict}")
    seen[name] = (done.returncode, verdict)

expected = {"FP32": (0, "sparse"), "FP16": (0, "sparse"), "BF16": (0, "not sparse")}
assert seen == expected, f"changed: {seen}"
PY
