"""Graphs and commands for a TensorRT that no Python of ours reaches: JetPack 5.1 has TensorRT 8.5 for Python 3.8.

What `backends.tensorrt.build` would ask of TensorRT through its bindings is asked of its own trtexec on the device:
of TensorRT 8 precisions and layers that keep FP32; from 10 on the types are in the graph, and it is strongly typed.
The plans are plain: trtexec runs them, and so does whatever is written in C++.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nformer_edge.backends.spec import BuildSpec, EngineSpec, resolve
from nformer_edge.backends.tensorrt.build import NAME as TENSORRT
from nformer_edge.backends.tensorrt.build import PRECISIONS
from nformer_edge.backends.tensorrt.plans import PLANS, prepare_part, profiles
from nformer_edge.backends.tensorrt.plugin.library import LIBRARY
from nformer_edge.core.artifact import atomic_folder, require_new, write_manifest
from nformer_edge.core.errors import UsageError
from nformer_edge.core.machine import version_key
from nformer_edge.core.spec import ModelSpec, PreprocessSpec, check_choice
from nformer_edge.core.values import Result, to_table
from nformer_edge.exporting.bundle import GOLDEN, open_bundle
from nformer_edge.quantize.prepare import CalibrationData, Data, prepare
from nformer_edge.quantize.values import CalibrationFacts, HalfFacts
from nformer_edge.targets.recipe import read_target

if TYPE_CHECKING:
    from nformer_edge.backends.tensorrt.graphs import PreparedGraph

KIND = "graphs"
SCRIPT = "build.sh"

_HEADER = f"""#!/bin/sh
# Builds plans of these graphs with TensorRT's trtexec, on the device that will run them.
set -eu
cd "$(dirname "$0")"
TRTEXEC="${{TRTEXEC:-/usr/src/tensorrt/bin/trtexec}}"
PLUGIN="${{PLUGIN:-./{LIBRARY}}}"
"""


@dataclass(frozen=True)
class GraphsManifest:
    """What the folder's manifest says besides its files: what a program on the device must know.

    Args:
        spec: what was prepared.
        bundle_sha256: of the bundle's manifest.
        model: what the model is.
        preprocess: how an image becomes the backbone's input.
        landmark_rule: how landmarks follow from N and the seed.
        landmark_seed: the seed.
        calibration: for INT8.
        fp16: for FP16 and INT8, what stays FP32 and why.
        float_nodes: for INT8, nodes that stay in float on purpose.
    """

    spec: BuildSpec
    bundle_sha256: str
    model: ModelSpec
    preprocess: PreprocessSpec
    landmark_rule: str
    landmark_seed: int
    calibration: CalibrationFacts | None
    fp16: HalfFacts | None
    float_nodes: tuple[str, ...]


@dataclass(frozen=True)
class PreparedGraphs(Result):
    """Graphs and commands that were written.

    Args:
        graphs: the folder.
    """

    kind = KIND

    graphs: str

    def __str__(self) -> str:
        return f"wrote {self.graphs}; on the device: {self.graphs}/{SCRIPT}"


def prepare_for_target(
    bundle: str | os.PathLike[str],
    out: str | os.PathLike[str],
    target: str,
    spec: EngineSpec | None = None,
    calib_data: CalibrationData | Data | None = None,
    *,
    force: bool = False,
) -> PreparedGraphs:
    """`prepare_for_trtexec` by a recipe: what `spec` has wins over it.

    Raises:
        UsageError: if there is no such target.
    """
    recipe = read_target(target)
    if recipe.engine.backend != TENSORRT:
        hint = f"Build it there: nformer-edge build-engine BUNDLE --target {recipe.name}"
        raise UsageError("target", f"{recipe.name}, for {recipe.engine.backend}", "one for TensorRT", hint)
    first = recipe.machine.versions.get(TENSORRT, ("8",))[0]
    chosen = resolve(spec, recipe.engine)
    return prepare_for_trtexec(bundle, out, chosen, calib_data, typed=version_key(first) >= (10,), force=force)


def prepare_for_trtexec(
    bundle: str | os.PathLike[str],
    out: str | os.PathLike[str],
    spec: BuildSpec,
    calib_data: CalibrationData | Data | None = None,
    *,
    typed: bool = False,
    force: bool = False,
) -> PreparedGraphs:
    """Writes the folder `out`: a bundle's graphs as a TensorRT parses them, and `SCRIPT`.

    Args:
        bundle: folder that `export_bundle` wrote.
        out: folder, written whole or not at all.
        spec: precision, sizes and workspace; the backend plays no part.
        calib_data: as for `build_engine`.
        typed: for TensorRT 10 and 11; otherwise for 8.5 and 8.6.
        force: replace earlier graphs.

    Raises:
        ArtifactError: if there is something at `out`, or the bundle does not verify.
        UsageError, DataError, GateError: as `quantize.prepare.prepare`.
    """
    check_choice("precision", spec.precision, PRECISIONS)
    check_choice("head_precision", spec.head_precision, ("fp32",))  # here it follows the backbone's
    opened, path = open_bundle(bundle), Path(out)
    require_new(path, KIND, force)
    low = prepare(opened, spec, calib_data, path, half=True)
    with atomic_folder(path, KIND) as folder:
        low.save(folder)
        commands, beyond = [], {}
        for part, profile in profiles(opened, spec).items():
            graph = prepare_part(part, opened, folder, spec, low, typed=typed, operators="library")
            beyond[part] = graph.beyond
            commands.append(
                trtexec_command(graph, PLANS[part], profile, spec.workspace, plugin=part == "head", typed=typed)
            )
        opened.files.copy(GOLDEN, folder)
        (folder / SCRIPT).write_text(_HEADER + "".join(f"\n{command}\n" for command in commands))
        (folder / SCRIPT).chmod(0o755)
        found = opened.manifest
        manifest = GraphsManifest(
            spec=replace(spec, exclude_nodes=low.exclude_nodes),
            bundle_sha256=opened.sha256,
            model=found.model,
            preprocess=found.preprocess,
            landmark_rule=found.landmark_rule,
            landmark_seed=found.landmark_seed,
            calibration=low.calibration,
            fp16=None if spec.precision == "fp32" else HalfFacts(low.searched, beyond),
            float_nodes=low.exclude_nodes,
        )
        write_manifest(folder, KIND, to_table(manifest))
    return PreparedGraphs(str(path))


def trtexec_command(
    graph: PreparedGraph,
    plan: str,
    profile: Mapping[str, Sequence[Sequence[int]]],
    workspace: float | None,
    *,
    plugin: bool,
    typed: bool = False,
) -> str:
    """A line of shell that builds `plan`; ``$TRTEXEC`` and ``$PLUGIN`` are set before it.

    For TensorRT 8, nodes that keep FP32 are named twice, for what they compute in and for what they write. From 10 on
    (`typed`) the graph says it, and the flags have other names.
    """
    options = [f"--onnx={graph.path.name}", f"--saveEngine={plan}", "--noTF32"]
    options += ["--stronglyTyped", "--skipInference"] if typed else ["--buildOnly"]
    options.append("--profilingVerbosity=detailed")
    for which, name in enumerate(("minShapes", "optShapes", "maxShapes")):
        sizes = ",".join(f"{tensor}:{'x'.join(map(str, shapes[which]))}" for tensor, shapes in profile.items())
        options.append(f"--{name}={sizes}")
    if workspace is not None:
        options.append(f"--memPoolSize=workspace:{round(workspace * 1024)}")
    if not typed:
        options += [f"--{flag.lower()}" for flag in graph.flags]
    if graph.flags and not typed:
        options.append("--precisionConstraints=obey")
        computing, writing = graph.float_layers()
        options.append("--layerPrecisions=" + ",".join(f"{name}:fp32" for name in computing))
        options.append("--layerOutputTypes=" + ",".join(f"{name}:fp32" for name in writing))
    library = f'--{"staticPlugins" if typed else "plugins"}="$PLUGIN"'
    line = ['"$TRTEXEC"', *([library] if plugin else []), *(shlex.quote(option) for option in options)]
    return " \\\n    ".join(line)
