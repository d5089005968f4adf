"""What on this machine does not match a target, each with its hint, before minutes go into a build."""

from __future__ import annotations

from dataclasses import dataclass

from nformer_edge.backends import base
from nformer_edge.backends.tensorrt.build import NAME as TENSORRT
from nformer_edge.backends.tensorrt.plugin.ahead import hint_ahead_of_time, missing_ahead_of_time
from nformer_edge.backends.tensorrt.plugin.library import find_plugin, read_plugin
from nformer_edge.core.errors import BackendError, Error
from nformer_edge.core.machine import Conditions, MachineFacts, version_key
from nformer_edge.targets.recipe import CUDA, L4T, Target


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


def preflight(target: Target, machine: MachineFacts, now: Conditions, *, with_head: bool = True) -> Preflight:
    """Compares, and changes nothing.

    Args:
        target: what is to be built for.
        machine: what is here.
        now: and in what state.
        with_head: whether the model has an NFormer head, which in TensorRT needs the plugin library or a CUDA compiler.
    """
    found = _versions(target, machine) + _hardware(target, machine, now)
    if target.engine.backend == TENSORRT and with_head:
        found += _plugin(machine)
    return Preflight(target.name, target.summary, target.note, tuple(found))


def require_match(target: Target, machine: MachineFacts, now: Conditions, *, with_head: bool = True) -> Preflight:
    """The comparison, where nothing blocks.

    Raises:
        BackendError: if something blocks, naming all of it.
    """
    found = preflight(target, machine, now, with_head=with_head)
    blocking = [f"({i}) {m}" for i, m in enumerate((m for m in found.mismatches if m.blocks), 1)]
    if blocking:
        count = "1 thing on this machine does" if len(blocking) == 1 else f"{len(blocking)} things on this machine do"
        hint = f"See `nformer-edge doctor --target {target.name}`." + (f" Note: {target.note}" if target.note else "")
        raise BackendError(f"target {target.name}: {count} not match: {' '.join(blocking)}", hint=hint)
    return found


def _versions(target: Target, machine: MachineFacts) -> list[Mismatch]:
    found, known = [], {**machine.versions, L4T: machine.l4t, CUDA: machine.cuda}
    for name, (first, end) in target.machine.versions.items():
        here = known.get(name, "")
        if not version_key(first) <= version_key(here) < version_key(end):
            expected = f"from {first}, below {end}"
            found.append(Mismatch(name, here, expected, _version_hint(name, target), blocks=name != CUDA))
    return found


def _version_hint(name: str, target: Target) -> str:
    if name == L4T:
        return "Flash the board with NVIDIA's SDK Manager, or choose the target of its JetPack."
    if name == CUDA:
        return "Only build-plugin needs it: install that CUDA toolkit."
    if L4T in target.machine.versions:
        return "JetPack brings it: apt install nvidia-jetpack, and make the environment with --system-site-packages."
    return f"pip install 'nformer-edge[{base.get(name).EXTRA}]'"


def _hardware(target: Target, machine: MachineFacts, now: Conditions) -> list[Mismatch]:
    wanted, found = target.machine, []
    if wanted.architecture and machine.architecture != wanted.architecture:
        hint = "Build on the device itself, or choose another target."
        found.append(Mismatch("architecture", machine.architecture, wanted.architecture, hint))
    if wanted.compute_capability and machine.compute_capability not in wanted.compute_capability:
        here = f"{machine.compute_capability} ({machine.gpu})" if machine.compute_capability else ""
        hint = "A plan runs on the kind of GPU that it was built on: build it there."
        found.append(Mismatch("compute capability", here, " or ".join(wanted.compute_capability), hint))
    if target.engine.backend == TENSORRT and not machine.driver:
        found.append(Mismatch("NVIDIA driver", "", "one", "Install the driver; TensorRT builds on the GPU itself."))
    if wanted.power_mode and now.power_mode not in wanted.power_mode:
        hint = "`sudo nvpmodel -m N`, N as in /etc/nvpmodel.conf, then `sudo jetson_clocks`: the builder times kernels."
        found.append(Mismatch("power mode", now.power_mode, " or ".join(wanted.power_mode), hint, blocks=False))
    needed_gib, memory_gib = (
        2 * (target.engine.workspace or 0),
        (machine.gpu_memory_mib or machine.memory_mib or 0) / 1024,
    )
    if 0 < memory_gib < needed_gib:
        expected, hint = (
            f"{needed_gib:g} GiB, twice the workspace",
            "Close other programs, or give a smaller --workspace.",
        )
        found.append(Mismatch("memory", f"{memory_gib:.1f} GiB", expected, hint, blocks=False))
    return found


def _plugin(machine: MachineFacts) -> list[Mismatch]:
    what, here = "plugin library", version_key(machine.versions.get(TENSORRT, ""))
    library, reason = find_plugin(here[0] if here else None), missing_ahead_of_time(here)
    if library is None and not reason:
        return []  # the plan carries the kernels
    if library is None:
        hint = f"nformer-edge build-plugin; without TensorRT's headers: {hint_ahead_of_time(here)}"
        return [Mismatch(what, f"no libnformer_plugins.so, and {reason}", "one of the two", hint)]
    try:
        manifest = read_plugin(library)
    except Error as e:
        return [Mismatch(what, str(library), "one whose manifest holds", str(e))]
    if manifest is None:
        return []
    found = []
    built = version_key(manifest.tensorrt)[:1]
    if here and built != here[:1]:
        got = f"{library} for TensorRT {built[0]}"
        found.append(Mismatch(what, got, f"one for TensorRT {here[0]}", "nformer-edge build-plugin"))
    ours, wanted = manifest.architectures, machine.compute_capability.replace(".", "")
    if ours and wanted and wanted not in ours:
        got, hint = f"kernels for sm_{', sm_'.join(ours)}", "nformer-edge build-plugin on this machine"
        found.append(Mismatch(what, got, f"sm_{wanted} among them", hint, blocks=False))
    return found
