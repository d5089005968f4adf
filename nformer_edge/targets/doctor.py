"""What this machine can do, and for each thing that is missing the next step; and what does not match a target."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

from nformer_edge.backends import base
from nformer_edge.backends.tensorrt.build import NAME as TENSORRT
from nformer_edge.backends.tensorrt.plugin.ahead import hint_for_operators, missing_ahead_of_time
from nformer_edge.backends.tensorrt.plugin.library import LIBRARY, find_plugin, read_plugin
from nformer_edge.core.errors import BackendError, Error
from nformer_edge.core.machine import Conditions, MachineFacts, conditions, machine, package_version, version_key
from nformer_edge.core.values import Result
from nformer_edge.targets.recipe import CUDA, L4T, Target, read_target

#: Those of `core.machine.KNOWN` that multiply 8-bit integers; and with which INT8 was timed here (docs/results.md).
_INT8 = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"}
_TIMED = {"avx512_vnni"}

#: How to find out.
_COMPARE = "`nformer-edge benchmark FP32 INT8 --data DIR` times both"


#: First versions without known holes in what reads files that others made, and what older ones read badly.
_FIXED = {
    "Pillow": ("12.3", "images"),
    "torch": ("2.10", "checkpoints of others"),
    "onnx": ("1.21", "ONNX files that name other files"),
    "protobuf": ("6.33.5", "nested messages"),
    "onnxruntime": ("1.24", "ONNX files that name other files; it needs Python 3.11"),
    "cryptography": ("46.0.5", "keys"),
}


@dataclass(frozen=True)
class Mismatch:
    """One thing that does not match.

    Args:
        what: the thing.
        got: what is here.
        expected: what the recipe asks for.
        hint: what to do.
        blocks: an engine built here would not be the target's; otherwise it is only slower, say.
    """

    what: str
    got: str
    expected: str
    hint: str
    blocks: bool = True

    def __str__(self) -> str:
        return f"{self.what}: got {self.got or 'none'}, expected {self.expected}. {self.hint}"


@dataclass(frozen=True)
class Preflight:
    """A machine compared with a target.

    Args:
        name: the target's.
        summary: the device.
        note: what else its user must know.
        mismatches: none if all matches.
    """

    name: str
    summary: str
    note: str
    mismatches: tuple[Mismatch, ...]

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.summary}", *([f"  note: {self.note}"] if self.note else [])]
        lines += [f"  {'NO  ' if m.blocks else 'note'}  {m}" for m in self.mismatches]
        return "\n".join([*lines, *([] if self.mismatches else ["  all matches"])])


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
    """What this machine can do, or what is right with a file.

    Args:
        machine: what it is.
        int8: what INT8 can gain on its CPU.
        checks: what it has, and next steps; of a file where one was given.
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


def doctor(target: str | None = None, *, file: str | os.PathLike[str] | None = None) -> Doctor:
    """Looks, and changes nothing.

    Args:
        target: name or file of a recipe to compare this machine with.
        file: an ONNX file of a bundle or engine that another tool may have changed: it is looked at, not the machine.

    Raises:
        UsageError: if there is no such target.
        ArtifactError: if `file` is none of ours (`onnx_file.checks_of`).
    """
    here = machine()
    if file is not None:
        from nformer_edge.targets.onnx_file import checks_of

        return Doctor(here, int8_note(here), tuple(checks_of(file)))
    compared = None if target is None else preflight(read_target(target), here, conditions())
    native = importlib.util.find_spec("nformer_edge.ops._kernels") is not None
    gpu = f"{here.gpu}, {here.compute_capability}" if here.gpu else here.driver
    jetpack = f"Jetson Linux {here.l4t}" if here.l4t else ""
    found = [
        ("PyTorch", package_version("torch"), "to train, and to run checkpoints: pip install 'nformer-edge[train]'"),
        ("ONNX", package_version("onnx"), "to export and to build INT8: pip install 'nformer-edge[quant]'"),
        ("native CPU kernels", "built" if native else "", "install with a C++ compiler: pip install ."),
        ("NVIDIA GPU", gpu, "needed by TensorRT alone: install the NVIDIA driver"),
        ("JetPack", jetpack, "none needed here; on a Jetson, flash it with NVIDIA's SDK Manager"),
    ]
    for b in map(base.get, base.names()):
        found.append((b.NAME, package_version(b.NAME), f"{b.USE}: pip install 'nformer-edge[{b.EXTRA}]'"))
    checks = [Check(name, there, "" if there else hint) for name, there, hint in found] + known_holes()
    return Doctor(here, int8_note(here), (*checks, _plugin_library(package_version(TENSORRT))), compared)


def known_holes() -> list[Check]:
    """Installed packages that are older than the version which mends what is known of them."""
    found = [(name, package_version(name), fixed, reads) for name, (fixed, reads) in _FIXED.items()]
    return [
        Check(f"safe {name}", "", f"{here} has known holes in reading {reads}: pip install '{name}>={fixed}'")
        for name, here, fixed, reads in found
        if here and version_key(here) < version_key(fixed)
    ]


def int8_note(here: MachineFacts) -> str:
    """What INT8 can gain on this CPU."""
    if _TIMED & set(here.instruction_sets):
        return "has instructions that multiply 8-bit integers: INT8 may be faster than FP32; a build times both"
    if _INT8 & set(here.instruction_sets):
        return f"has instructions that multiply 8-bit integers; INT8 was not timed with these: {_COMPARE}"
    return f"no instructions that multiply 8-bit integers: INT8 engines are smaller, and may be faster: {_COMPARE}"


def _plugin_library(tensorrt: str) -> Check:
    name, library, here = "TensorRT plugin library", find_plugin(), version_key(tensorrt)
    if library is None and not missing_ahead_of_time(here):
        return Check(name, f"none, and none needed: TensorRT {tensorrt} puts the kernels into the plan", "")
    if library is None:
        return Check(name, "", f"needed by TensorRT alone: {hint_for_operators(here)}")
    try:
        manifest = read_plugin(library)
    except Error as e:
        return Check(name, "", f"{e} Build it again: nformer-edge build-plugin")
    if manifest is None:
        return Check(name, str(library), "")
    codes = ", ".join(f"sm_{a}" for a in manifest.architectures)
    return Check(name, f"{library} (TensorRT {manifest.tensorrt}, {codes})", "")


# ---- a machine and a target ----


def preflight(target: Target, here: MachineFacts, now: Conditions, *, with_head: bool = True) -> Preflight:
    """Compares, and changes nothing. An NFormer head needs the plugin library in TensorRT, or a CUDA compiler."""
    found = _versions(target, here) + _hardware(target, here, now)
    if target.engine.backend == TENSORRT and with_head:
        found += _plugin(here, target)
    return Preflight(target.name, target.summary, target.note, tuple(found))


def require_match(target: Target, here: MachineFacts, now: Conditions, *, with_head: bool = True) -> Preflight:
    """The comparison, where nothing blocks. Raises BackendError if something blocks, naming all of it."""
    found = preflight(target, here, now, with_head=with_head)
    blocking = [f"({i}) {m}" for i, m in enumerate((m for m in found.mismatches if m.blocks), 1)]
    if blocking:
        count = "1 thing on this machine does" if len(blocking) == 1 else f"{len(blocking)} things on this machine do"
        hint = f"See `nformer-edge doctor --target {target.name}`." + (f" Note: {target.note}" if target.note else "")
        raise BackendError(f"target {target.name}: {count} not match: {' '.join(blocking)}", hint=hint)
    return found


def _versions(target: Target, here: MachineFacts) -> list[Mismatch]:
    found, known = [], {**here.versions, L4T: here.l4t, CUDA: here.cuda}
    for name, (first, end) in target.machine.versions.items():
        got, expected = known.get(name, ""), f"from {first}, below {end}"
        if not version_key(first) <= version_key(got) < version_key(end):
            found.append(Mismatch(name, got, expected, _version_hint(name, target), blocks=name != CUDA))
    return found


def _version_hint(name: str, target: Target) -> str:
    if name == L4T:
        return "Flash the board with NVIDIA's SDK Manager, or choose the target of its JetPack."
    if name == CUDA:
        return "Only build-plugin needs it: install that CUDA toolkit."
    if L4T in target.machine.versions:
        return "JetPack brings it: apt install nvidia-jetpack, and make the environment with --system-site-packages."
    first, end = target.machine.versions[name]
    package = {TENSORRT: "tensorrt"}.get(name)
    return f"pip install 'nformer-edge[{base.get(name).EXTRA}]'" + (f" '{package}>={first},<{end}'" if package else "")


def _hardware(target: Target, here: MachineFacts, now: Conditions) -> list[Mismatch]:
    wanted, found = target.machine, []
    if wanted.architecture and here.architecture != wanted.architecture:
        hint = "Build on the device itself, or choose another target."
        found.append(Mismatch("architecture", here.architecture, wanted.architecture, hint))
    if wanted.compute_capability and here.compute_capability not in wanted.compute_capability:
        got = f"{here.compute_capability} ({here.gpu})" if here.compute_capability else ""
        hint = "A plan runs on the kind of GPU that it was built on: build it there."
        found.append(Mismatch("compute capability", got, " or ".join(wanted.compute_capability), hint))
    if target.engine.backend == TENSORRT and not here.driver:
        found.append(Mismatch("NVIDIA driver", "", "one", "Install the driver; TensorRT builds on the GPU itself."))
    if wanted.power_mode and now.power_mode not in wanted.power_mode:
        hint = "`sudo nvpmodel -m N`, N as in /etc/nvpmodel.conf, then `sudo jetson_clocks`: the builder times kernels."
        found.append(Mismatch("power mode", now.power_mode, " or ".join(wanted.power_mode), hint, blocks=False))
    needed_gib, memory_gib = 2 * (target.engine.workspace or 0), (here.gpu_memory_mib or here.memory_mib or 0) / 1024
    if 0 < memory_gib < needed_gib:
        expected, hint = f"{needed_gib:g} GiB, twice the workspace", "Close other programs; or a smaller --workspace."
        found.append(Mismatch("memory", f"{memory_gib:.1f} GiB", expected, hint, blocks=False))
    return found


def _plugin(here: MachineFacts, target: Target) -> list[Mismatch]:
    below = version_key(target.machine.versions.get(TENSORRT, ("", ""))[1])
    what, tensorrt = "plugin library", version_key(here.versions.get(TENSORRT, ""))
    library, reason = find_plugin(tensorrt[0] if tensorrt else None), missing_ahead_of_time(tensorrt)
    if library is None and not reason:
        return []  # the plan carries the kernels
    if library is None:
        return [Mismatch(what, f"no {LIBRARY}, and {reason}", "one of the two", hint_for_operators(tensorrt, below))]
    try:
        manifest = read_plugin(library)
    except Error as e:
        return [Mismatch(what, str(library), "one with a valid manifest", str(e))]
    if manifest is None:
        return []
    found, built = [], version_key(manifest.tensorrt)[:1]
    if tensorrt and built != tensorrt[:1]:
        got, expected = f"{library} for TensorRT {built[0]}", f"one for TensorRT {tensorrt[0]}"
        found.append(Mismatch(what, got, expected, "nformer-edge build-plugin"))
    ours, wanted = manifest.architectures, here.compute_capability.replace(".", "")
    if ours and wanted and wanted not in ours:
        got, hint = f"kernels for sm_{', sm_'.join(ours)}", "nformer-edge build-plugin on this machine"
        found.append(Mismatch(what, got, f"sm_{wanted} among them", hint, blocks=False))
    return found
