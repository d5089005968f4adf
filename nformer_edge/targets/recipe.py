"""Targets: what a kind of device has, and what is built for it, as data in `export/recipes/*.toml`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from nformer_edge.backends import base
from nformer_edge.backends.spec import EngineSpec
from nformer_edge.core.artifact import read_text
from nformer_edge.core.errors import ArtifactError, UsageError
from nformer_edge.core.machine import shipped, version_key
from nformer_edge.core.spec import check_choice
from nformer_edge.core.values import from_json

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: Jetson Linux, the system under JetPack, and the CUDA toolkit, which compiles the plugin library.
L4T, CUDA = "l4t", "cuda"


@dataclass(frozen=True)
class MachineSpec:
    """What the device must have; empty means that any will do."""

    architecture: str = ""  # as `uname -m` says
    #: Of `L4T`, of `CUDA` and of the packages of backends: from the first version on, and below the second.
    versions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    compute_capability: tuple[str, ...] = ()  # of the GPU
    power_mode: tuple[str, ...] = ()  # of a Jetson, best first

    def __post_init__(self) -> None:
        for name, found in self.versions.items():
            check_choice("versions", name, (L4T, CUDA, *base.names()))
            if len(found) != 2 or not version_key(found[0]) < version_key(found[1]):
                raise UsageError(name, list(found), 'a range such as ["10.3", "10.4"]', "Correct the recipe.")


@dataclass(frozen=True)
class Target:
    """One recipe."""

    name: str  # of the recipe's file
    summary: str  # the device
    engine: EngineSpec  # what is built; the backend and the precision are given
    machine: MachineSpec = field(default_factory=MachineSpec)
    note: str = ""  # what else its user must know

    def __post_init__(self) -> None:
        if None in (self.engine.backend, self.engine.precision):
            raise UsageError("engine", "no backend or no precision", "both", "Correct the recipe.")


def recipes_folder() -> Path:
    """Where the recipes lie."""
    return shipped("export/recipes")


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
        data = tomllib.loads(read_text(path, "a recipe"))
    except (ValueError, RecursionError, ArtifactError) as e:
        raise UsageError(str(path), f"no readable TOML ({e})", "a recipe", "Correct the file.") from e
    return from_json(Target, {"name": path.stem, **data}, path.name)
