"""Layer by layer, TensorRT against onnxruntime: a script of Polygraphy's commands, written where graphs are kept.

A plan tells its outputs alone, so Polygraphy builds each part's graph once more with every tensor an output, which
takes fusions apart; what it finds are wrong layers, not wrong fusions. `report.layers` compares graphs on the CPU.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from nformer_edge.backends.engine import Profile
from nformer_edge.exporting.bundle import GOLDEN, HEAD, Bundle

if TYPE_CHECKING:
    from nformer_edge.backends.tensorrt.graphs import PreparedGraph

SCRIPT, INPUTS = "compare.sh", "compare_inputs.py"

#: Polygraphy's --atol and --rtol, for every tensor on the way.
_TOLERANCES = {"fp32": ("1e-06", "0.001"), "fp16": ("0.0025", "0.001")}

_HEADER = f"""#!/bin/sh
# Every tensor of every layer, TensorRT against onnxruntime, by Polygraphy: pip install 'nformer-edge[quant]' polygraphy
# PART is backbone or head; both unless one is named. The head needs the plugin library: PLUGIN=FILE {SCRIPT} head
set -eu
cd "$(dirname "$0")"
PLUGIN="${{PLUGIN:-./libnformer_plugins.so}}"
PART="${{1:-all}}"
"""

_INPUTS = f'''"""What `polygraphy run` feeds: the engine's self-test, as many rows as its profile asks."""

import pathlib

import numpy as np

GOLDEN = pathlib.Path(__file__).with_name("{GOLDEN}")


def _rows(name, count, size):
    with np.load(GOLDEN) as z:
        rows = z[name] if name in z.files else np.random.default_rng(0).standard_normal((count, *size), np.float32)
    return rows[np.arange(max(len(rows), count)) % len(rows)]

'''


def write_comparison(
    folder: Path,
    bundle: Bundle,
    graphs: Mapping[str, PreparedGraph],
    profiles: Mapping[str, Profile],
    *,
    rtx: bool,
    typed: bool,
) -> None:
    """Writes `SCRIPT`, `INPUTS` and, for a head with plugin nodes, its graph for onnxruntime into `folder`.

    The prepared `graphs`, by part, lie there. `rtx`: it is TensorRT-RTX that is compared. `typed`: precision stands in
    the graphs' types.
    """
    inputs, lines = _INPUTS, _HEADER
    if rtx:
        lines += "export POLYGRAPHY_USE_TENSORRT_RTX=1\n"
    for part, graph in graphs.items():
        inputs += _loader(part, profiles[part])
        ours = _for_onnxruntime(bundle, graph.path) if part == "head" else graph.path
        calls = " &&\n    ".join(polygraphy_commands(part, graph, ours, profiles[part], typed=typed))
        lines += f'\nif [ "$PART" = all ] || [ "$PART" = {part} ]; then\n    {calls}\nfi\n'
    (folder / INPUTS).write_text(inputs)
    (folder / SCRIPT).write_text(lines)
    (folder / SCRIPT).chmod(0o755)


def polygraphy_commands(
    part: str, graph: PreparedGraph, ours: Path, profile: Profile, *, typed: bool
) -> tuple[str, str]:
    """Two lines of shell: onnxruntime's tensors of the graph `ours` to a file, and TensorRT's compared with them."""
    loader, results = f"{INPUTS}:{part}", f"onnxruntime-{part}.json"
    run = ["polygraphy", "run", ours.name, "--onnxrt", "--onnx-outputs", "mark", "all"]
    run += ["--data-loader-script", loader, "--save-outputs", results]
    atol, rtol = _TOLERANCES["fp32" if set(graph.asked.values()) == {"fp32"} else "fp16"]
    compare = ["polygraphy", "run", graph.path.name, "--trt", "--trt-outputs", "mark", "all"]
    for which, name in enumerate(("min", "opt", "max")):
        sizes = [f"{tensor}:{str(list(shapes[which])).replace(' ', '')}" for tensor, shapes in profile.items()]
        compare += [f"--trt-{name}-shapes", *sizes]
    compare += ["--strongly-typed"] if typed else _flags(graph)
    compare += ["--data-loader-script", loader, "--load-outputs", results]
    compare += ["--atol", atol, "--rtol", rtol, "--check-error-stat", "median"]
    plugin = ' --plugins "$PLUGIN"' if ours != graph.path else ""
    return shlex.join(run), shlex.join(compare) + plugin


def _flags(graph: PreparedGraph) -> list[str]:
    """For TensorRT 8: precisions that are allowed, and layers that keep FP32."""
    if not graph.flags:
        return []
    held = [f"{name}:float32" for name in graph.float_layers()[0]]
    allowed = [f"--{flag.lower()}" for flag in graph.flags]
    return [*allowed, "--precision-constraints", "obey", "--layer-precisions", *held]


def _for_onnxruntime(bundle: Bundle, graph: Path) -> Path:
    """The head's graph with bodies for our nodes again; the same file where it has them."""
    import onnx
    import onnx.version_converter

    model = onnx.load(graph)
    if model.functions:
        return graph
    whole = onnx.load_from_string(bundle.head)
    opsets = [next(o.version for o in m.opset_import if not o.domain) for m in (model, whole)]
    if opsets[0] < opsets[1]:  # TensorRT 8's graphs are older than the bodies
        model = onnx.version_converter.convert_version(model, opsets[1])
    model.functions.extend(whole.functions)
    for node in model.graph.node:
        kept = [a for a in node.attribute if not a.name.startswith("plugin_")]
        del node.attribute[:]
        node.attribute.extend(kept)
    path = graph.with_name(f"onnxruntime-{HEAD}")
    onnx.save(model, path)
    return path


def _loader(part: str, profile: Profile) -> str:
    """The function of `INPUTS` that feeds this part."""
    smallest = {name: shapes[0] for name, shapes in profile.items()}
    if part == "backbone":
        rows, *size = smallest["images"]
        return f'\ndef backbone():\n    yield {{"images": _rows("images", {rows}, {tuple(size)})}}\n'
    rows, *size = smallest["features"]
    layers, count = smallest["landmarks"]
    return (
        f'\n\ndef head():\n    features = _rows("head_input", {rows}, {tuple(size)})\n'
        f"    landmarks = np.arange({layers * count}, dtype=np.int32).reshape({layers}, {count}) % len(features)\n"
        '    yield {"features": features, "landmarks": landmarks}\n'
    )
