"""Whether a TensorRT engine was built for what is here. A plan is code: where anything differs it is not loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nformer_edge.backends.engine import BuiltFor, EngineManifest
from nformer_edge.backends.spec import BuildSpec
from nformer_edge.backends.tensorrt.cuda import Gpu
from nformer_edge.backends.tensorrt.plugin.library import ENVIRONMENT, LIBRARY
from nformer_edge.core.artifact import MANIFEST
from nformer_edge.core.errors import ArtifactError, BackendError, Error
from nformer_edge.core.machine import version_key
from nformer_edge.core.values import from_json

#: What a rebuild must repeat of `BuildSpec` besides backend and precision, where it is not the default.
_REPEATED = (
    *("batch", "gallery_size", "workspace", "calib_num", "calib_method"),
    *("hardware_compat", "version_compat", "dla", "capabilities"),
)


def how_to_rebuild(where: str, manifest: EngineManifest | None) -> str:
    """The hint to build this engine again, here: BUNDLE is the bundle that it came from."""
    words = ["Build it here: nformer-edge build-engine BUNDLE"]
    if manifest is not None:
        spec, default = manifest.spec, BuildSpec()
        words += [f"--backend {manifest.backend}"] + ([] if spec.precision == "fp32" else [f"--{spec.precision}"])
        for name in _REPEATED:
            value = getattr(spec, name)
            if value != getattr(default, name):
                words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [_flag_value(name, value)])
        words += ["--calib-data DIR"] if spec.precision == "int8" else []
    return " ".join([*words, f"-o {where}"])


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
        found = json.loads((Path(where) / MANIFEST).read_text())
        fields = {key: value for key, value in found.items() if key not in ("kind", "format_version", "files")}
        return from_json(EngineManifest, fields)
    except (OSError, ValueError, AttributeError, Error):
        return None


def check_version(where: str, manifest: EngineManifest, package: str, version: str) -> None:
    """Refuses an engine of another TensorRT: `package` is the Python module that runs it, of `version` here.

    Raises:
        BackendError: naming both versions and the command that rebuilds the engine.
    """
    built = manifest.versions.get(package, "")
    if built and (_same_version(built, version) or (manifest.spec.version_compat and _later_minor(built, version))):
        return
    got = f"an engine built with {built or 'a version that its manifest does not have'}"
    raise BackendError(f"{where}: {package}", got, f"{version}, as installed", how_to_rebuild(where, manifest))


def _same_version(built: str, here: str) -> bool:
    """Equal as far as both are known: the packages of some releases leave the build number out."""
    ours, theirs = version_key(built), version_key(here)
    shared = min(len(ours), len(theirs))
    return shared >= 2 and ours[:shared] == theirs[:shared]


def _later_minor(built: str, here: str) -> bool:
    """What NVIDIA promises of a version-compatible plan: later versions of the same major one run it."""
    ours, theirs = version_key(built), version_key(here)
    return ours[:1] == theirs[:1] and ours <= theirs


def check_gpu(where: str, manifest: EngineManifest, gpu: Gpu) -> None:
    """Refuses an engine that was built for another GPU.

    A plan's kernels were chosen by timing them on one model of GPU. ``hardware_compat`` widens that:
    ``same_compute_capability`` to every GPU of that capability, ``ampere_plus`` to 8.0 and later.

    Raises:
        BackendError: naming both GPUs and the command that rebuilds the engine.
    """
    wrong = _differences(manifest.built_for, gpu)
    if wrong:
        got = f"an engine for {', '.join(wrong)}"
        expected = f"one for {gpu.name}, compute capability {gpu.compute_capability}"
        raise BackendError(f"{where}: GPU", got, expected, how_to_rebuild(where, manifest))


def _differences(built: BuiltFor, gpu: Gpu) -> list[str]:
    if built.compute_capabilities:  # TensorRT-RTX, which compiles for all of one capability
        some = ", ".join(built.compute_capabilities)
        return [] if gpu.compute_capability in built.compute_capabilities else [f"compute capability {some}"]
    if built.hardware_compat == "ampere_plus":
        return [] if version_key(gpu.compute_capability) >= (8, 0) else ["compute capability 8.0 and later"]
    if built.compute_capability is None:
        return ["a GPU that its manifest does not name"]
    compared: list[tuple[str, object, object]] = [
        ("compute capability", built.compute_capability, gpu.compute_capability)
    ]
    if built.hardware_compat != "same_compute_capability":
        compared.append(("GPU", built.gpu, gpu.name))
        compared.append(("multiprocessors", built.multiprocessors, gpu.multiprocessors))
    return [f"{name} {ours} (here {here})" for name, ours, here in compared if ours not in (None, here)]


def no_plugin(where: str, manifest: EngineManifest, found: str) -> BackendError:
    """The refusal of a head whose plugin library is not here; `found` is the library that is here instead, or ""."""
    got = f"another library, {found}" if found else f"no {LIBRARY}"
    expected = f"the library that the engine was built with, sha256 {str(manifest.plugin_sha256)[:12]}..."
    hint = f"Name it in {ENVIRONMENT}; or run `nformer-edge build-plugin`. {how_to_rebuild(where, manifest)}"
    return BackendError(f"{where}: plugin", got, expected, hint)
