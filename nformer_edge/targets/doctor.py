"""What this machine can do, and for each thing that is missing the next step."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from nformer_edge.backends import base
from nformer_edge.backends.tensorrt.build import NAME as TENSORRT
from nformer_edge.backends.tensorrt.plugin.ahead import hint_ahead_of_time, missing_ahead_of_time
from nformer_edge.backends.tensorrt.plugin.library import find_plugin, read_plugin
from nformer_edge.core.errors import Error
from nformer_edge.core.machine import MachineFacts, conditions, machine, package_version, version_key
from nformer_edge.core.values import Result
from nformer_edge.targets.preflight import Preflight, preflight
from nformer_edge.targets.recipe import read_target

#: Those of `core.machine.KNOWN` that multiply 8-bit integers.
_INT8 = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"}


@dataclass(frozen=True)
class Check:
    """One thing that this machine has or has not.

    Args:
        name: the thing.
        found: what there is, or "".
        hint: the next step where there is none, or "".
    """

    name: str
    found: str
    hint: str

    @property
    def ok(self) -> bool:
        """Whether it is there."""
        return bool(self.found)


@dataclass(frozen=True)
class Doctor(Result):
    """What this machine can do.

    Args:
        machine: what it is.
        int8: what INT8 can gain on its CPU.
        checks: what it has, and next steps.
        target: the comparison with a target, or null.
    """

    kind = "doctor"
    version = 2

    machine: MachineFacts
    int8: str
    checks: tuple[Check, ...]
    target: Preflight | None = None

    def __str__(self) -> str:
        facts, versions = self.machine, self.machine.versions
        lines = [
            f"nformer-edge {versions['nformer-edge']}, Python {versions['python']}, {facts.system}",
            f"CPU: {facts.cores} cores, {facts.architecture}, {' '.join(facts.instruction_sets) or 'unknown'}",
            f"     {self.int8}",
            "",
        ]
        width = max(len(c.name) for c in self.checks)
        lines += [f"{'yes' if c.ok else ' no'}  {c.name:<{width}}  {c.found or c.hint}" for c in self.checks]
        return "\n".join(lines if self.target is None else [*lines, "", str(self.target)])


def doctor(target: str | None = None) -> Doctor:
    """Looks, and changes nothing.

    Args:
        target: name or file of a recipe to compare this machine with.

    Raises:
        UsageError: if there is no such target.
    """
    here = machine()
    compared = None if target is None else preflight(read_target(target), here, conditions())
    native = importlib.util.find_spec("nformer_edge.ops._native") is not None
    gpu = f"{here.gpu}, {here.compute_capability}" if here.gpu else here.driver
    jetpack = f"Jetson Linux {here.l4t}" if here.l4t else ""
    found = [
        Check(
            "PyTorch", package_version("torch"), "to train, and to run checkpoints: pip install 'nformer-edge[train]'"
        ),
        Check("ONNX", package_version("onnx"), "to export and to build INT8: pip install 'nformer-edge[quant]'"),
        Check("native CPU kernels", "built" if native else "", "install with a C++ compiler: pip install ."),
        Check("NVIDIA GPU", gpu, "needed by TensorRT alone: install the NVIDIA driver"),
        Check("JetPack", jetpack, "none needed here; on a Jetson, flash it with NVIDIA's SDK Manager"),
    ]
    for backend in map(base.get, base.names()):
        step = f"{backend.USE}: pip install 'nformer-edge[{backend.EXTRA}]'"
        found.append(Check(backend.NAME, package_version(backend.NAME), step))
    checks = (*found, _plugin_library(package_version(TENSORRT)))
    return Doctor(here, int8_note(here), tuple(c if not c.ok else Check(c.name, c.found, "") for c in checks), compared)


def int8_note(here: MachineFacts) -> str:
    """What INT8 can gain on this CPU."""
    if _INT8 & set(here.instruction_sets):
        return "has instructions that multiply 8-bit integers: INT8 engines should be faster than FP32"
    return "no instructions that multiply 8-bit integers: INT8 engines are smaller, but may not be faster"


def _plugin_library(tensorrt: str) -> Check:
    name, library, here = "TensorRT plugin library", find_plugin(), version_key(tensorrt)
    if library is None and not missing_ahead_of_time(here):
        return Check(name, f"none, and none needed: TensorRT {tensorrt} puts the kernels into the plan", "")
    if library is None:
        step = f"nformer-edge build-plugin; without TensorRT's headers: {hint_ahead_of_time(here)}"
        return Check(name, "", f"needed by TensorRT alone: {step}")
    try:
        manifest = read_plugin(library)
    except Error as e:
        return Check(name, "", f"{e} Build it again: nformer-edge build-plugin")
    if manifest is None:
        return Check(name, str(library), "")
    codes = ", ".join(f"sm_{a}" for a in manifest.architectures)
    return Check(name, f"{library} (TensorRT {manifest.tensorrt}, {codes})", "")
