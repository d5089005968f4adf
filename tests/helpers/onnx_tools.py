"""Tools of others that rewrite an ONNX file: each runs in a process of its own, as its users run it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

#: Name -> (package, Python program: `source` and `target` are paths, `target` is written).
TOOLS = {
    "onnxslim": ("onnxslim", "import onnxslim; onnxslim.slim(source, target)"),
    "onnxsim": (
        "onnxsim",
        "import onnx, onnxsim; model, ok = onnxsim.simplify(source); assert ok; onnx.save(model, target)",
    ),
    "onnx-graphsurgeon": (
        "onnx_graphsurgeon",
        "import onnx, onnx_graphsurgeon as gs; onnx.save(gs.export_onnx(gs.import_onnx(onnx.load(source))), target)",
    ),
    "polygraphy surgeon sanitize": (
        "polygraphy",
        "from polygraphy.tools import main; import sys;"
        "sys.argv = ['polygraphy', 'surgeon', 'sanitize', '--fold-constants', source, '-o', target]; main()",
    ),
    "onnx.inliner": (
        "onnx",
        "import onnx, onnx.inliner; onnx.save(onnx.inliner.inline_local_functions(onnx.load(source)), target)",
    ),
    "onnx shape inference": (
        "onnx",
        "import onnx; from onnx.shape_inference import infer_shapes as infer;"
        "onnx.save(infer(onnx.load(source), strict_mode=True, data_prop=True), target)",
    ),
    "onnx.version_converter": (
        "onnx",
        "import onnx; from onnx.version_converter import convert_version;"
        "onnx.save(convert_version(onnx.load(source), 20), target)",
    ),
    "onnxruntime quant_pre_process": (
        "onnxruntime",
        "from onnxruntime.quantization.shape_inference import quant_pre_process; quant_pre_process(source, target)",
    ),
    "ORT format, fixed": ("onnxruntime", "ORT"),
    "ORT format, runtime": ("onnxruntime", "ORT"),
}

_ORT = """
import shutil, pathlib
from onnxruntime.tools.convert_onnx_models_to_ort import OptimizationStyle as Style, convert_onnx_models_to_ort
given = pathlib.Path(target).with_suffix("") / "model.onnx"
given.parent.mkdir()
shutil.copy(source, given)
convert_onnx_models_to_ort(given, given.parent, optimization_styles=[Style.{style}])
found, = [f for f in given.parent.iterdir() if f.suffix == ".ort"]
shutil.copy(found, target)
"""


def missing(tool: str) -> str:
    """The package that `tool` needs and that is not installed, or ""."""
    package = TOOLS[tool][0]
    return "" if importlib.util.find_spec(package) else package


def rewritten(tool: str, source: Path, folder: Path) -> Path:
    """What `tool` makes of the file `source`, in `folder`. Raises RuntimeError with its last words where it fails."""
    _, program = TOOLS[tool]
    target = folder / f"{source.stem}_{tool.replace(' ', '_')}{'.ort' if program == 'ORT' else '.onnx'}"
    if program == "ORT":
        program = _ORT.format(style=tool.rpartition(" ")[2].title())
    program = f"source, target = {str(source)!r}, {str(target)!r}\n{program}"
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode or not target.exists():
        raise RuntimeError(f"{tool} ended with {done.returncode}: {(done.stdout + done.stderr)[-600:]}")
    return target
