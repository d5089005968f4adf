"""Targets: what a kind of device has, and what is built for it, as data in `export/recipes/*.toml`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from nformer_edge.backends import base
from nformer_edge.backends.spec import EngineSpec
from nformer_edge.core.errors import ArtifactError, UsageError
from nformer_edge.core.machine import version_key
from nformer_edge.core.spec import check_choice
from nformer_edge.core.values import from_json

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_HERE = Path(__file__).resolve()

#: In an installed package, and in a checkout.
_PLACES = (_HERE.parents[1] / "export" / "recipes", _HERE.parents[2] / "export" / "recipes")

#: Jetson Linux, the system under JetPack, and the CUDA toolkit, which compiles the plugin library.
L4T, CUDA = "l4t", "cuda"


@dataclass(frozen=True)
class MachineSpec:
    """What the device must have; empty means that any will do.

    Args:
        architecture: as ``uname -m`` says.
        versions: of `L4T`, of `CUDA` and of the packages of backends: from the first version on, and below the second.
        compute_capability: of the GPU.
        power_mode: of a Jetson, best first.
    """

    architecture: str = ""
    versions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    compute_capability: tuple[str, ...] = ()
    power_mode: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, found in self.versions.items():
            check_choice("versions", name, (L4T, CUDA, *base.names()))
            if len(found) != 2 or not version_key(found[0]) < version_key(found[1]):
                raise UsageError(name, list(found), 'a range such as ["10.3", "10.4"]', "Correct the recipe.")


@dataclass(frozen=True)
class Target:
    """One recipe.

    Args:
        name: of the recipe's file.
        summary: the device.
        engine: what is built: fields of `EngineSpec`, the backend and the precision among them.
        machine: what the device must have.
        note: what else its user must know.
    """

    name: str
    summary: str
    engine: EngineSpec
    machine: MachineSpec = field(default_factory=MachineSpec)
    note: str = ""

    def __post_init__(self) -> None:
        if None in (self.engine.backend, self.engine.precision):
            raise UsageError("engine", "no backend or no precision", "both", "Correct the recipe.")


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
        data = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise UsageError(str(path), f"no readable TOML ({e})", "a recipe", "Correct the file.") from e
    return from_json(Target, {"name": path.stem, **data}, path.name)
