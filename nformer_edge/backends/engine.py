"""An engine: a folder that one backend wrote and one backend runs, with a manifest that says what was really built.

For TensorRT and TensorRT-RTX it holds the plain plans `backbone.engine` and `nformer.engine` (trtexec opens them as
they are), for onnxruntime the ONNX files; `golden.npz`, `build.log` with every line of the builder, for INT8
`calibration.json` (the ranges that were measured; a later build may take them up), with a budget `budget.json`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from nformer_edge.backends.spec import BuildSpec
from nformer_edge.core.artifact import MANIFEST, OWN_FIELDS, open_artifact, read_text
from nformer_edge.core.errors import ArtifactError, Error
from nformer_edge.core.spec import Precision
from nformer_edge.core.values import from_json
from nformer_edge.exporting.bundle import ModelFiles, ModelManifest, check_model
from nformer_edge.quantize.values import CalibrationFacts, HalfFacts

KIND = "engine"

Shape = tuple[int, ...]
Profile = Mapping[str, tuple[Shape, ...]]  # of each input, its min, opt and max shape


@dataclass(frozen=True)
class Counts:
    """Convolutions and matrix multiplications that were asked for in one type.

    Args:
        asked: how many.
        built: of these, how many were built in that type.
        unknown: how many a builder does not tell.
    """

    asked: int
    built: int
    unknown: int = 0


@dataclass(frozen=True)
class PartAudit:
    """What precision a part really has.

    Args:
        multiplications: by the type that the graph asks for, its convolutions and matrix multiplications.
        other: names of those that came out in another type, with that type, such as ``{"/conv": "fp16"}``.
        layers: of a plan, the number of layers by the type of what they read.
    """

    multiplications: Mapping[str, Counts]
    other: Mapping[str, str] = field(default_factory=dict)
    layers: Mapping[str, int] = field(default_factory=dict)

    def lines(self, part: str) -> list[str]:
        """The same in words."""
        counts = [f"{c.built} of {c.asked} in {kind.upper()}" for kind, c in self.multiplications.items()]
        unknown = sum(c.unknown for c in self.multiplications.values())
        more = f"; {unknown} not reported by the builder" if unknown else ""
        found = [f"{part}: convolutions and matrix multiplications as built: {', '.join(counts)}{more}"]
        others = ", ".join(f"{name} {kind}" for name, kind in self.other.items())
        return found + ([f"{part}: in another type: {others}"] if others else [])


@dataclass(frozen=True)
class BuiltFor:
    """The machine that an engine is for; what does not apply is null or empty.

    Args:
        gpu: name of the GPU that it was built on.
        compute_capability: of that GPU, such as ``8.7``.
        multiprocessors: of that GPU.
        hardware_compat: where it is wider: `EngineSpec.hardware_compat`.
        compute_capabilities: for TensorRT-RTX, those that it is compiled for.
        instruction_sets: for INT8 on a CPU, those of the CPU that it was built on.
        reduce_range: for INT8 on a CPU, whether weights have 7 bits.
        device: for OpenVINO, where it is not the CPU.
    """

    gpu: str | None = None
    compute_capability: str | None = None
    multiprocessors: int | None = None
    hardware_compat: str | None = None
    compute_capabilities: tuple[str, ...] = ()
    instruction_sets: tuple[str, ...] = ()
    reduce_range: bool | None = None
    device: str | None = None

    def __str__(self) -> str:
        told = {name: value for name, value in vars(self).items() if value not in (None, (), "none")}
        return ", ".join(f"{k} {', '.join(v) if isinstance(v, tuple) else v}" for k, v in told.items())


@dataclass(frozen=True)
class KernelInPlan:
    """A kernel of ours in the plan itself.

    Args:
        operator: what it computes.
        entry: its name in the PTX.
        sha256: of the PTX.
        cuda: version that made it.
        ptx: its target, such as ``sm_75``.
    """

    operator: str
    entry: str
    sha256: str
    cuda: str
    ptx: str


@dataclass(frozen=True, kw_only=True)
class Built:
    """What a backend knows of what it built.

    Args:
        versions: of the modules that built, by name.
        precision: of each part, as built: the narrowest type of its convolutions and matrix multiplications.
        audit: of each part.
        built_for: the machine.
        profiles: of each part's inputs min, opt and max shape; empty where any shape runs.
        operators: what computes the head's operators: for TensorRT ``library``, ``ahead-of-time`` or null; for OpenVINO
            ``native`` (onnxruntime with our kernels) or ``inlined`` (OpenVINO itself).
        plugin_sha256: of the plugin library that the head needs to run, or null where it needs none.
        kernels: of ours in the plan itself.
        fp16: for FP16 and INT8 on a backend that computes in FP16, what stays FP32 and why.
    """

    versions: Mapping[str, str]
    precision: Mapping[str, Precision]
    audit: Mapping[str, PartAudit] = field(default_factory=dict)
    built_for: BuiltFor = field(default_factory=BuiltFor)
    profiles: Mapping[str, Mapping[str, tuple[Shape, ...]]] = field(default_factory=dict)
    operators: str | None = None
    plugin_sha256: str | None = None
    kernels: tuple[KernelInPlan, ...] = ()
    fp16: HalfFacts | None = None


@dataclass(frozen=True, kw_only=True)
class EngineManifest(Built, ModelManifest):
    """What an engine's manifest says besides its files, after what the bundle says of the model.

    Args:
        backend: that runs it.
        why: that one.
        spec: what was built.
        bundle_sha256: of the bundle's manifest.
        calibration: for INT8, what it was calibrated with.
        float_nodes: for INT8, nodes of the backbone that were left in float on purpose.
        padded: whether channels were added to the backbone, because it is faster so (`quantize.padding`).
    """

    backend: str
    why: str
    spec: BuildSpec
    bundle_sha256: str
    calibration: CalibrationFacts | None = None
    float_nodes: tuple[str, ...] = ()
    padded: bool = False


@dataclass(frozen=True)
class Engine(ModelFiles):
    """A verified engine. Fields as in `ModelFiles`."""

    manifest: EngineManifest

    @property
    def calibrated_on(self) -> tuple[str, ...]:
        """See `ModelFiles.calibrated_on`."""
        return () if self.manifest.calibration is None else self.manifest.calibration.images


def open_engine(path: str | os.PathLike[str] | Engine) -> Engine:
    """Verifies an engine; an open one comes back as it is. The one place where an engine's files are opened.

    Raises:
        ArtifactError: naming what does not hold: a file, or the manifest's fields.
    """
    if isinstance(path, Engine):
        return path
    with telling_rebuild(os.fspath(path)):
        files = open_artifact(path, KIND)
        manifest = from_json(EngineManifest, files.fields, str(files.folder), error=ArtifactError)
        check_model(str(files.folder), manifest)
    return Engine(files, manifest)


#: What a rebuild must repeat of `BuildSpec` besides backend and precision, where it is not the default.
_REPEATED = (
    *("head_precision", "batch", "gallery_size", "device", "workspace", "calib_num", "calib_method"),
    *("hardware_compat", "version_compat", "dla", "capabilities", "reduce_range"),
)


def how_to_rebuild(where: str, manifest: EngineManifest | None) -> str:
    """The hint to build this engine again, here: BUNDLE is the bundle that it came from."""
    words = ["Build it here: nformer-edge build-engine BUNDLE"]
    if manifest is not None:
        spec, default = manifest.spec, BuildSpec()
        words += [f"--backend {manifest.backend}"] + ([] if spec.precision == "fp32" else [f"--{spec.precision}"])
        for name in _REPEATED:
            value = getattr(spec, name)
            if value is not False and value != getattr(default, name):
                words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [_flag_value(name, value)])
        words += ["--calib-data DIR"] if spec.precision == "int8" else []
    return " ".join([*words, f"-o {where} --force"])


def _flag_value(name: str, value: object) -> str:
    if isinstance(value, tuple):
        return (" " if name == "capabilities" else ":").join(map(str, value))
    return str(value)


@contextmanager
def telling_rebuild(where: str, manifest: EngineManifest | None = None) -> Iterator[None]:
    """Adds the command that builds this engine again to whatever is refused of its files.

    Without `manifest` it is read, if it can be: good for the words of a refusal, and for nothing else.
    """
    try:
        yield
    except ArtifactError as e:
        hint = f"{e.hint.rstrip('.')}. {how_to_rebuild(where, manifest or _unverified_manifest(where))}"
        raise ArtifactError(e.subject, e.got, e.expected, hint) from e


def _unverified_manifest(where: str) -> EngineManifest | None:
    try:
        found = json.loads(read_text(Path(where) / MANIFEST, "a manifest"))
        fields = {key: value for key, value in found.items() if key not in OWN_FIELDS}
        return from_json(EngineManifest, fields)
    except (ValueError, AttributeError, RecursionError, Error):
        return None
