"""Whether a TensorRT engine was built for what is here. A plan is code: where anything differs it is not loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from nformer_edge.core.artifact import MANIFEST
from nformer_edge.core.errors import ArtifactError, BackendError
from nformer_edge.core.machine import version_key
from nformer_edge.core.spec import to_dict
from nformer_edge.quantize.spec import EngineSpec

Manifest = Mapping[str, Any]

#: What a rebuild must repeat of `EngineSpec` besides backend and precision, where it is not the default.
_FLAGS = {
    "batch": "--batch",
    "gallery_size": "--gallery-size",
    "workspace": "--workspace",
    "calib_num": "--calib-num",
    "calib_method": "--calib-method",
    "hardware_compat": "--hardware-compat",
    "version_compat": "--version-compat",
    "dla": "--dla",
    "capabilities": "--capabilities",
}


class Gpu(Protocol):
    """What is compared of a GPU; `backends.tensorrt.cuda.Device` has it."""

    name: str
    compute_capability: str
    multiprocessors: int


def rebuild_command(where: str, manifest: Manifest) -> str:
    """The command that builds this engine again, here: BUNDLE is the bundle that it came from."""
    spec, default = manifest.get("spec") or {}, to_dict(EngineSpec())
    words = [f"nformer-edge build-engine BUNDLE --backend {manifest.get('backend')}"]
    words += [f"--{spec['precision']}"] if spec.get("precision") in ("fp16", "int8") else []
    for name, flag in _FLAGS.items():
        value = spec.get(name)
        if value in (None, False, "", [], default.get(name)):
            continue
        words.append(flag if value is True else f"{flag} {_flag_value(name, value)}")
    words += ["--calib-data DIR"] if spec.get("precision") == "int8" else []
    return " ".join([*words, f"-o {where}"])


def _flag_value(name: str, value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return (" " if name == "capabilities" else ":").join(map(str, value))
    return str(value)


@contextmanager
def telling_rebuild(where: str, manifest: Manifest) -> Iterator[None]:
    """Adds the command that builds this engine again to whatever is refused of its files."""
    try:
        yield
    except ArtifactError as e:
        hint = f"{e.hint.rstrip('.')}. {_again(where, manifest)}"
        raise ArtifactError(e.subject, e.got, e.expected, hint) from e


def unverified_manifest(where: str) -> Manifest:
    """What the manifest says, if it can be read at all: good for the words of a refusal, and for nothing else."""
    try:
        found = json.loads((Path(where) / MANIFEST).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("spec", {}), dict) else {}


def check_version(where: str, manifest: Manifest, package: str, version: str) -> None:
    """Refuses an engine of another TensorRT.

    Args:
        where: the engine's folder.
        manifest: its manifest.
        package: ``tensorrt`` or ``tensorrt_rtx``.
        version: of that package here.

    Raises:
        BackendError: naming both versions and the command that rebuilds the engine.
    """
    built = str((manifest.get("versions") or {}).get(package) or "")
    if built and (_same_version(built, version) or (_carries_its_runtime(manifest) and _later_minor(built, version))):
        return
    raise BackendError(
        f"{where}: {package}",
        f"an engine built with {built or 'a version that its manifest does not tell'}",
        f"{version}, which is installed here",
        _again(where, manifest),
    )


def _same_version(built: str, here: str) -> bool:
    """Equal as far as both are told: the packages of some releases leave the build number out."""
    ours, theirs = version_key(built), version_key(here)
    shared = min(len(ours), len(theirs))
    return shared >= 2 and ours[:shared] == theirs[:shared]


def _later_minor(built: str, here: str) -> bool:
    """What NVIDIA promises of a version-compatible plan: later versions of the same major one run it."""
    ours, theirs = version_key(built), version_key(here)
    return ours[:1] == theirs[:1] and ours <= theirs


def _carries_its_runtime(manifest: Manifest) -> bool:
    return bool((manifest.get("spec") or {}).get("version_compat"))


def check_gpu(where: str, manifest: Manifest, gpu: Gpu) -> None:
    """Refuses an engine that was built for another GPU.

    A plan's kernels were chosen by timing them on one model of GPU. ``hardware_compat`` in the manifest's ``built_for``
    widens that: ``same_compute_capability`` to every GPU of that capability, ``ampere_plus`` to 8.0 and later.

    Raises:
        BackendError: naming both GPUs and the command that rebuilds the engine.
    """
    built = manifest.get("built_for") or {}
    if "compute_capabilities" in built:  # TensorRT-RTX, which compiles for all of one capability
        some = [str(c) for c in built["compute_capabilities"]]
        wrong = [] if gpu.compute_capability in some else [f"compute capability {', '.join(some)}"]
    elif built.get("hardware_compat") == "ampere_plus":
        capability = tuple(int(n) for n in gpu.compute_capability.split("."))
        wrong = [] if capability >= (8, 0) else ["compute capability 8.0 and later"]
    elif "compute_capability" not in built:
        wrong = ["a GPU that its manifest does not tell"]
    else:
        wrong = _differences(built, gpu)
    if wrong:
        raise BackendError(
            f"{where}: GPU",
            f"an engine for {', '.join(wrong)}",
            f"one for {gpu.name}, compute capability {gpu.compute_capability}",
            _again(where, manifest),
        )


def _differences(built: Mapping[str, Any], gpu: Gpu) -> list[str]:
    facts = {
        "compute_capability": ("compute capability", gpu.compute_capability),
        "gpu": ("GPU", gpu.name),
        "multiprocessors": ("multiprocessors", gpu.multiprocessors),
    }
    compared = ["compute_capability"] if built.get("hardware_compat") == "same_compute_capability" else list(facts)
    return [
        f"{facts[key][0]} {built[key]} (here {facts[key][1]})"
        for key in compared
        if key in built and str(built[key]) != str(facts[key][1])
    ]


def no_plugin(where: str, manifest: Manifest, sha256: str, found: str) -> BackendError:
    """The refusal of a head whose plugin library is not here.

    Args:
        where: the engine's folder.
        manifest: its manifest.
        sha256: of the library that the engine was built with.
        found: the library that is here instead, or "".
    """
    got = f"another library, {found}" if found else "no libnformer_plugins.so"
    return BackendError(
        f"{where}: plugin",
        got,
        f"the library that the engine was built with, sha256 {sha256[:12]}...",
        "Name it in NFORMER_EDGE_PLUGINS; or run `nformer-edge build-plugin`, then build the engine again: "
        + rebuild_command(where, manifest),
    )


def _again(where: str, manifest: Manifest) -> str:
    return f"Build it here: {rebuild_command(where, manifest)}"
