"""Graphs and commands for a TensorRT 8 that no Python of ours reaches: JetPack 5.1 has TensorRT 8.5 for Python 3.8.

What `backends.tensorrt.build` would ask of TensorRT 8 through its bindings is asked of its own trtexec on the device.
The plans are plain: trtexec runs them, and so does whatever is written in C++.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nformer_edge.backends.tensorrt.plans import PLANS, prepare_part, profiles
from nformer_edge.backends.tensorrt.plugin.library import LIBRARY
from nformer_edge.core.artifact import atomic_folder, write_manifest
from nformer_edge.core.spec import to_dict
from nformer_edge.exporting.bundle import GOLDEN
from nformer_edge.quantize.calibrate import choose_calibration
from nformer_edge.quantize.overflow_search import fp16_fields, search_overflow
from nformer_edge.quantize.spec import EngineSpec, open_bundle
from nformer_edge.targets.build import with_target
from nformer_edge.targets.recipe import read_target

if TYPE_CHECKING:
    from nformer_edge.backends.tensorrt.graphs import PreparedGraph

KIND = "graphs"
SCRIPT = "build.sh"

#: What a program on the device must know of the model, from the bundle's manifest.
_INHERITED = ("model", "preprocess", "landmark_rule", "landmark_seed")

_HEADER = f"""#!/bin/sh
# Builds plans of these graphs with TensorRT 8's trtexec, on the device that will run them.
set -eu
cd "$(dirname "$0")"
TRTEXEC="${{TRTEXEC:-/usr/src/tensorrt/bin/trtexec}}"
PLUGIN="${{PLUGIN:-./{LIBRARY}}}"
"""


def prepare_for_target(
    bundle: str | os.PathLike[str], out: str | os.PathLike[str], target: str, spec: EngineSpec, **images: Any
) -> Path:
    """`prepare_for_trtexec` by a recipe: fields of `spec` that are not their defaults win over it.

    Raises:
        UsageError: if there is no such target.
    """
    return prepare_for_trtexec(bundle, out, with_target(spec, read_target(target)), **images)


def prepare_for_trtexec(
    bundle: str | os.PathLike[str],
    out: str | os.PathLike[str],
    spec: EngineSpec,
    calib_data: Any = None,
    force_calibration: bool = False,
) -> Path:
    """Writes the folder `out`: a bundle's graphs as TensorRT 8.5 and 8.6 parse them, and `SCRIPT`.

    Args:
        bundle: folder that `export_bundle` wrote.
        out: folder, written whole or not at all.
        spec: precision, sizes and workspace; the backend plays no part.
        calib_data: as for `build_engine`.
        force_calibration: likewise.

    Raises:
        ArtifactError: if the bundle does not verify.
        UsageError: for INT8 without `calib_data`.
        DataError: for images that cannot be used.
    """
    opened = open_bundle(bundle)
    calibration = ranges = search = None
    if spec.precision == "int8" or (spec.precision == "fp16" and calib_data is not None):
        calibration = choose_calibration(calib_data, spec, force=force_calibration)
    fields: dict[str, Any] = {"spec": to_dict(spec), "bundle_sha256": opened.sha256}
    fields |= {key: opened.manifest[key] for key in _INHERITED}
    with atomic_folder(out, KIND) as folder:
        if calibration is not None and spec.precision == "int8":
            ranges, fields["calibration"] = calibration.ranges(opened, folder)
        if calibration is not None and calibration.images:
            search = search_overflow(opened, calibration.images)
        commands, beyond = [], {}
        for part, profile in profiles(opened, spec).items():
            graph = prepare_part(part, opened, folder, spec, ranges, search, typed=False, operators="library")
            beyond[part] = graph.beyond
            commands.append(trtexec_command(graph, PLANS[part], profile, spec.workspace, plugin=part == "head"))
        opened.copy(GOLDEN, folder)
        (folder / SCRIPT).write_text(_HEADER + "".join(f"\n{command}\n" for command in commands))
        (folder / SCRIPT).chmod(0o755)
        if spec.precision != "fp32":
            fields["fp16"] = fp16_fields(search, beyond)
        write_manifest(folder, KIND, fields)
    return Path(out)


def trtexec_command(
    graph: PreparedGraph,
    plan: str,
    profile: Mapping[str, tuple[tuple[int, ...], ...]],
    workspace: float | None,
    *,
    plugin: bool,
) -> str:
    """A line of shell that builds `plan`; ``$TRTEXEC`` and ``$PLUGIN`` are set before it.

    Nodes that keep FP32 are named twice, for what they compute in and for what they write.
    """
    options = [f"--onnx={graph.path.name}", f"--saveEngine={plan}", "--buildOnly", "--noTF32"]
    options.append("--profilingVerbosity=detailed")
    for which, name in enumerate(("minShapes", "optShapes", "maxShapes")):
        sizes = ",".join(f"{tensor}:{'x'.join(map(str, shapes[which]))}" for tensor, shapes in profile.items())
        options.append(f"--{name}={sizes}")
    if workspace is not None:
        options.append(f"--memPoolSize=workspace:{round(workspace * 1024)}")
    options += [f"--{flag.lower()}" for flag in graph.flags]
    if graph.flags:
        options.append("--precisionConstraints=obey")
        computing, writing = graph.float_layers()
        options.append("--layerPrecisions=" + ",".join(f"{name}:fp32" for name in computing))
        options.append("--layerOutputTypes=" + ",".join(f"{name}:fp32" for name in writing))
    line = ['"$TRTEXEC"', *(['--plugins="$PLUGIN"'] if plugin else []), *(shlex.quote(option) for option in options)]
    return " \\\n    ".join(line)
