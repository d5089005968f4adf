"""Targets: what a kind of device has, and what is built for it, as data in `export/recipes/*.toml`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from nformer_edge.core.errors import ArtifactError, UsageError
from nformer_edge.core.machine import version_key
from nformer_edge.core.spec import Backend, Precision, check_choice, from_dict

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_HERE = Path(__file__).resolve()

#: In an installed package, and in a checkout.
_PLACES = (_HERE.parents[1] / "export" / "recipes", _HERE.parents[2] / "export" / "recipes")

#: Packages and systems of which a recipe may ask a range of versions.
VERSIONS = ("l4t", "cuda", "tensorrt", "tensorrt_rtx", "onnxruntime")


@dataclass(frozen=True)
class MachineSpec:
    """What the device must have; empty means that any will do.

    Args:
        architecture: as ``uname -m`` says.
        l4t: Jetson Linux, the system under JetPack: from this version on, and below that one. So are the next four.
        cuda: of the toolkit, which compiles the plugin library.
        tensorrt: of the package.
        tensorrt_rtx: of the package.
        onnxruntime: of the package.
        compute_capability: of the GPU.
        power_mode: of a Jetson, best first.
    """

    architecture: str = ""
    l4t: tuple[str, ...] = ()
    cuda: tuple[str, ...] = ()
    tensorrt: tuple[str, ...] = ()
    tensorrt_rtx: tuple[str, ...] = ()
    onnxruntime: tuple[str, ...] = ()
    compute_capability: tuple[str, ...] = ()
    power_mode: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in VERSIONS:
            found = getattr(self, name)
            if found and (len(found) != 2 or not version_key(found[0]) < version_key(found[1])):
                raise UsageError(name, list(found), 'a range such as ["10.3", "10.4"]', "Correct the recipe.")


@dataclass(frozen=True)
class BuildSpec:
    """What is built: fields of `quantize.spec.EngineSpec`, and no others.

    Args:
        backend: who runs it.
        precision: of the backbone.
        batch: images the backbone sees at once: fewest, tuned for, most.
        gallery_size: images the head sees together: fewest, tuned for, most; empty where any number runs.
        workspace: GiB that the builder may use; its own choice if None.
    """

    backend: Backend
    precision: Precision
    batch: tuple[int, ...] = (1, 32, 32)
    gallery_size: tuple[int, ...] = ()
    workspace: float | None = None

    def __post_init__(self) -> None:
        check_choice("backend", self.backend, ("onnxruntime", "tensorrt", "tensorrt-rtx"))
        check_choice("precision", self.precision, ("fp32", "fp16", "int8"))
        for name in ("batch", "gallery_size"):
            sizes = getattr(self, name)
            if sizes and not (len(sizes) == 3 and 1 <= sizes[0] <= sizes[1] <= sizes[2]):
                raise UsageError(name, list(sizes), "fewest, tuned for, most", "Correct the recipe.")


@dataclass(frozen=True)
class Target:
    """One recipe."""

    name: str
    summary: str
    engine: BuildSpec
    machine: MachineSpec = field(default_factory=MachineSpec)
    note: str = ""


def recipes_folder() -> Path:
    """Where the recipes lie.

    Raises:
        ArtifactError: if they are neither in a checkout nor in the installed package.
    """
    for place in _PLACES:
        if place.is_dir():
            return place
    raise ArtifactError(str(_PLACES[0]), "no such folder", "the recipes of this package", "Install it again.")


def target_names() -> tuple[str, ...]:
    """Every target there is a recipe for, sorted."""
    return tuple(sorted(p.stem for p in recipes_folder().glob("*.toml")))


def read_target(name: str) -> Target:
    """The target `name`, or that of a recipe of the user's own where `name` is a file.

    Raises:
        UsageError: if there is no such recipe (with the nearest name), or it says what a recipe cannot say.
    """
    known = target_names()
    path = Path(name) if name.endswith(".toml") else recipes_folder() / f"{name}.toml"
    if not path.is_file() or not (name.endswith(".toml") or name in known):
        near = get_close_matches(name, known, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else "Choose one of these, or name a recipe file."
        raise UsageError("target", repr(name), " | ".join(known), hint)
    try:
        data: dict[str, Any] = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise UsageError(str(path), f"no readable TOML ({e})", "a recipe", "Correct the file.") from e
    return from_dict(Target, {"name": path.stem, **data}, path.name)
