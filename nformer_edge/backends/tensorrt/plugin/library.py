"""The plugin library: where it lies, whether it is the one that an engine was built with, its way into TensorRT."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nformer_edge.core.artifact import MANIFEST, open_artifact, sha256_file
from nformer_edge.core.errors import ArtifactError, BackendError
from nformer_edge.core.values import from_json
from nformer_edge.ops.contract import RECIPROCAL_NEIGHBOR_ATTENTION, ROW_TOP_K

LIBRARY = "libnformer_plugins.so"
KIND = "plugin"

#: Who computes the head's two operators: a plugin library, kernels that the plan carries, or the standard operators of
#: their ONNX bodies.
Operators = Literal["library", "ahead-of-time", "inlined"]

#: What the library registers; `plugins/tensorrt` says the same in C++.
CREATORS = (ROW_TOP_K, RECIPROCAL_NEIGHBOR_ATTENTION)
VERSION = "1"

#: The attention as Python plugins, by its number of inputs: one has as many inputs as its function has parameters.
ATTENTIONS = {
    4: RECIPROCAL_NEIGHBOR_ATTENTION,
    5: f"{RECIPROCAL_NEIGHBOR_ATTENTION}Gated",
    6: f"{RECIPROCAL_NEIGHBOR_ATTENTION}GatedByCamera",
}

#: Names a library file, or a folder with one, before every other place; or ``none``: no library, wherever one may lie.
ENVIRONMENT = "NFORMER_EDGE_PLUGINS"
NO_LIBRARY = "none"

# TensorRT's registry is one a process, and so is what we know of it: sha256 of the library -> what keeps it there.
_loaded: dict[str, object] = {}
_lock = threading.Lock()


def default_folder(major: int) -> Path:
    """Where `build-plugin` puts the library for this TensorRT major version, and where it is looked for."""
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "nformer-edge" / f"plugins-tensorrt{major}"


def plugin_places(major: int | None = None) -> Iterator[Path]:
    """Files that may be the library, likeliest first; ``major`` None looks at every TensorRT version's folder."""
    named = os.environ.get(ENVIRONMENT, "")
    if named == NO_LIBRARY:
        return
    if named:
        yield Path(named) / LIBRARY if Path(named).is_dir() else Path(named)
    for version in (major,) if major is not None else range(12, 7, -1):
        yield default_folder(version) / LIBRARY
    for prefix in (Path(sys.prefix), Path.home() / ".local", Path("/usr/local")):
        yield prefix / "lib" / LIBRARY


def find_plugin(major: int | None = None, sha256: str = "", beside: Path | None = None) -> Path | None:
    """The first library found, or the first whose bytes have `sha256`; None if there is none.

    `major` is TensorRT's; None where any will do. `beside` is an engine's folder, looked into first.
    """
    places = [beside / LIBRARY] if beside is not None else []
    for place in (*places, *plugin_places(major)):
        if place.is_file() and (not sha256 or sha256_file(place) == sha256):
            return place
    return None


@dataclass(frozen=True)
class PluginManifest:
    """What the manifest beside a library says.

    Args:
        tensorrt: version of the headers that it was built with.
        cuda: version of the compiler.
        architectures: compute capabilities times ten with machine code in it.
        ptx: the one whose PTX later GPUs compile.
    """

    tensorrt: str
    cuda: str = ""
    architectures: tuple[str, ...] = ()
    ptx: str = ""


def read_plugin(library: Path) -> PluginManifest | None:
    """What the manifest beside a library says of it; None where there is none.

    Raises:
        ArtifactError: if there is a manifest and the library is not the file that it lists.
    """
    if not (library.parent / MANIFEST).is_file():
        return None
    fields = open_artifact(library.parent, KIND).fields
    return from_json(PluginManifest, fields, str(library.parent), error=ArtifactError)


def load_plugin(trt: Any, library: Path, sha256: str) -> None:
    """Brings the library's two creators into the registry of `trt`, the module. A second time does nothing.

    Raises:
        ArtifactError: if the file has other bytes.
        BackendError: if TensorRT does not take it, or already has creators of these names from elsewhere.
    """
    actual = sha256_file(library)  # code is loaded only once it is known which
    if actual != sha256:
        hint = "Build the engine again with this library, or bring back the other one."
        raise ArtifactError(str(library), f"sha256 {actual[:12]}...", f"{sha256[:12]}...", hint)
    with _lock:
        if sha256 in _loaded:
            return
        registry = trt.get_plugin_registry()
        if _registered(registry):
            got = f"plugins named {' and '.join(CREATORS)} that this process loaded before"
            raise BackendError(str(library), got, "only those of this library", "Start a new process for it.")
        try:
            handle = _load(registry, library)
        except OSError as e:
            raise _refused(trt, library, str(e)) from e
        if handle is None or not _registered(registry):
            raise _refused(trt, library, f"no {' or '.join(CREATORS)} from it")
        _loaded[sha256] = handle


def _load(registry: Any, library: Path) -> Any:
    if hasattr(registry, "load_library"):  # TensorRT 8.6 and later
        return registry.load_library(str(library))
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # 8.5: opening it registers


def _registered(registry: Any) -> bool:
    # get_creator came with 10.0; get_plugin_creator left with 11.0.
    find = registry.get_creator if hasattr(registry, "get_creator") else registry.get_plugin_creator
    return all(find(name, VERSION, "") is not None for name in CREATORS)


def _refused(trt: Any, library: Path, why: str) -> BackendError:
    expected = f"a plugin library that TensorRT {trt.__version__} takes"
    return BackendError(str(library), why, expected, "Build it for this version: nformer-edge build-plugin")
