"""What on this machine does not match a target, and how each is mended, before minutes go into a build."""

from __future__ import annotations

from dataclasses import dataclass

from nformer_edge.backends.tensorrt.plugin.ahead import hint_ahead_of_time, lacking_ahead_of_time
from nformer_edge.backends.tensorrt.plugin.library import find_plugin, plugin_facts
from nformer_edge.core.errors import BackendError, Error
from nformer_edge.core.machine import Conditions, MachineFacts, version_key
from nformer_edge.targets.recipe import VERSIONS, Target

_PACKAGES = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx", "onnxruntime": "cpu"}


@dataclass(frozen=True)
class Mismatch:
    """One thing. `blocks`: an engine built here would not be the target's; otherwise it is only slower, say."""

    what: str
    got: str
    expected: str
    hint: str
    blocks: bool = True

    def __str__(self) -> str:
        return f"{self.what}: got {self.got or 'none'}, expected {self.expected}. {self.hint}"


def preflight(target: Target, machine: MachineFacts, now: Conditions, *, with_head: bool = True) -> list[Mismatch]:
    """Compares, and changes nothing; empty if all matches.

    Args:
        target: what is to be built for.
        machine: what is here.
        now: and in what state.
        with_head: whether the model has an NFormer head, which in TensorRT needs the plugin library or a CUDA compiler.
    """
    found = _versions(target, machine) + _hardware(target, machine, now)
    if target.engine.backend == "tensorrt" and with_head:
        found += _plugin(machine)
    return found


def require_match(target: Target, machine: MachineFacts, now: Conditions, *, with_head: bool = True) -> list[Mismatch]:
    """What does not match without being in the way.

    Raises:
        BackendError: if something is in the way, naming all of it.
    """
    found = preflight(target, machine, now, with_head=with_head)
    blocking = [m for m in found if m.blocks]
    if blocking:
        note = f" Note: {target.note}" if target.note else ""
        raise BackendError(
            f"target {target.name}: {len(blocking)} thing{'s' * (len(blocking) > 1)} on this machine "
            f"do{'es' * (len(blocking) == 1)} not match: " + " ".join(f"({i}) {m}" for i, m in enumerate(blocking, 1)),
            hint=f"`nformer-edge doctor --target {target.name}` tells this again.{note}",
        )
    return found


def format_preflight(name: str, summary: str, note: str, found: list[Mismatch]) -> str:
    """As text: one line a mismatch."""
    lines = [f"{name}: {summary}", *([f"  note: {note}"] if note else [])]
    lines += [f"  {'NO  ' if m.blocks else 'note'}  {m}" for m in found]
    return "\n".join([*lines, *([] if found else ["  all matches"])])


def _versions(target: Target, machine: MachineFacts) -> list[Mismatch]:
    found = []
    for name in VERSIONS:
        wanted, here = getattr(target.machine, name), _version(machine, name)
        if wanted and not version_key(wanted[0]) <= version_key(here) < version_key(wanted[1]):
            found.append(
                Mismatch(name, here, f"from {wanted[0]}, below {wanted[1]}", _mend(name, target), blocks=name != "cuda")
            )
    return found


def _version(machine: MachineFacts, name: str) -> str:
    own = {"l4t": machine.l4t, "cuda": machine.cuda}
    return own[name] if name in own else machine.versions.get(name.replace("_", "-"), "")


def _mend(name: str, target: Target) -> str:
    if name == "l4t":
        return "Flash the board with NVIDIA's SDK Manager, or choose the target of the JetPack that it has."
    if name == "cuda":
        return "Only build-plugin needs it: install that CUDA toolkit."
    if name == "tensorrt" and target.machine.l4t:
        return "JetPack brings it: apt install nvidia-jetpack, and make the environment with --system-site-packages."
    return f"pip install 'nformer-edge[{_PACKAGES[name]}]'"


def _hardware(target: Target, machine: MachineFacts, now: Conditions) -> list[Mismatch]:
    wanted, found = target.machine, []
    if wanted.architecture and machine.architecture != wanted.architecture:
        found.append(
            Mismatch(
                "architecture",
                machine.architecture,
                wanted.architecture,
                "Build on the device itself, or choose another target.",
            )
        )
    if wanted.compute_capability and machine.compute_capability not in wanted.compute_capability:
        here = f"{machine.compute_capability} ({machine.gpu})" if machine.compute_capability else ""
        found.append(
            Mismatch(
                "compute capability",
                here,
                " or ".join(wanted.compute_capability),
                "A plan runs on the kind of GPU that it was built on: build it there.",
            )
        )
    if target.engine.backend == "tensorrt" and not machine.driver:
        found.append(Mismatch("NVIDIA driver", "", "one", "Install the driver; TensorRT builds on the GPU itself."))
    if wanted.power_mode and now.power_mode not in wanted.power_mode:
        found.append(
            Mismatch(
                "power mode",
                now.power_mode,
                " or ".join(wanted.power_mode),
                "`sudo nvpmodel -m N` with its number in /etc/nvpmodel.conf, then `sudo jetson_clocks`: "
                "the builder chooses kernels by their time.",
                blocks=False,
            )
        )
    workspace = target.engine.workspace
    memory_gib = (machine.gpu_memory_mib or machine.memory_mib or 0) / 1024
    if workspace and memory_gib and memory_gib < 2 * workspace:
        found.append(
            Mismatch(
                "memory",
                f"{memory_gib:.1f} GiB",
                f"{2 * workspace:g} GiB, twice the workspace",
                "Close other programs, or give a smaller --workspace.",
                blocks=False,
            )
        )
    return found


def _plugin(machine: MachineFacts) -> list[Mismatch]:
    here = version_key(machine.versions.get("tensorrt", ""))
    library, lacking = find_plugin(here[0] if here else None), lacking_ahead_of_time(here)
    if library is None and not lacking:
        return []  # the plan carries the kernels
    if library is None:
        hint = f"nformer-edge build-plugin; without TensorRT's headers: {hint_ahead_of_time(here)}"
        return [Mismatch("plugin library", f"no libnformer_plugins.so, and {lacking}", "one of the two", hint)]
    try:
        facts = plugin_facts(library)
    except Error as e:
        return [Mismatch("plugin library", str(library), "one whose manifest holds", str(e))]
    found = []
    built = version_key(str(facts.get("tensorrt", "")))[:1]
    if built and here and built != here[:1]:
        found.append(
            Mismatch(
                "plugin library",
                f"{library} for TensorRT {built[0]}",
                f"one for TensorRT {here[0]}",
                "nformer-edge build-plugin",
            )
        )
    architectures = {str(a) for a in facts.get("architectures", ())}
    wanted = {c.replace(".", "") for c in (machine.compute_capability,) if c}
    if architectures and wanted - architectures:
        found.append(
            Mismatch(
                "plugin library",
                f"kernels for sm_{', sm_'.join(sorted(architectures))}",
                f"sm_{next(iter(wanted))} among them",
                "nformer-edge build-plugin on this machine",
                blocks=False,
            )
        )
    return found
