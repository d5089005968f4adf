"""The machine that a figure was measured on or an engine is built on, without importing anything heavy."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from nformer_edge.core.errors import ArtifactError

#: Names in /proc/cpuinfo.
_X86 = "sse4_2 avx avx2 fma f16c avx512f avx512bw avx512_vnni avx_vnni avx512_bf16 amx_int8 amx_bf16"
_ARM = "asimd asimdhp fphp asimddp i8mm bf16 sve"
KNOWN = (*_X86.split(), *_ARM.split())

VNNI = ("avx512_vnni", "avx_vnni", "amx_int8")

#: A Jetson's GPU among the devices with a clock: 17000000.gpu, 17000000.ga10b, gpu-gpc-0.
_GPUS = re.compile(r"gpu|g[vpamb]\d+b")

#: Intel's, of a core and of a package, and the over-current events of a Jetson.
_THROTTLE_COUNTS = (
    "sys/devices/system/cpu/cpu*/thermal_throttle/*_throttle_count",
    "sys/class/hwmon/hwmon*/oc*_event_cnt",
)

#: Compute capability of a Jetson's chip, by its name in the device tree: not every JetPack has nvidia-smi.
_CHIPS = {"tegra194": "7.2", "tegra234": "8.7", "tegra264": "11.0"}


@dataclass(frozen=True)
class MachineFacts:
    """What a machine is; "" and null where there is none or it is not known.

    Args:
        cpu: its name.
        architecture: as ``uname -m`` says.
        cores: processors that this process may run on.
        instruction_sets: those of the CPU that matter here.
        memory_mib: of the system; on a Jetson the GPU shares it.
        system: the kernel's name and release.
        board: of an Arm board, as its device tree calls it.
        l4t: Jetson Linux's version, such as ``36.4.3``.
        driver: the NVIDIA driver's line about itself.
        gpu: the first GPU's name.
        compute_capability: of the first GPU, such as ``8.7``.
        gpu_memory_mib: of the first GPU; null on a Jetson.
        cuda: version of the toolkit.
        versions: of Python, this package and those installed of the packages that it may use.
    """

    cpu: str = ""
    architecture: str = ""
    cores: int = 0
    instruction_sets: tuple[str, ...] = ()
    memory_mib: int | None = None
    system: str = ""
    board: str = ""
    l4t: str = ""
    driver: str = ""
    gpu: str = ""
    compute_capability: str = ""
    gpu_memory_mib: int | None = None
    cuda: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Conditions:
    """What changes from minute to minute; "" and null where it is not known.

    Args:
        cpu_mhz: clock of the first processor.
        governor: of its clock.
        power_mode: of a Jetson, such as ``MAXN``.
        temperature_c: of the hottest sensor.
        load_average: over the last minute.
        gpu_mhz: clock of the GPU.
        throttled: times that heat or current slowed the machine since it was started.
        slowed_by: what slows it now: cooling devices of the kernel, fans excepted.
    """

    cpu_mhz: float | None = None
    governor: str = ""
    power_mode: str = ""
    temperature_c: float | None = None
    load_average: float | None = None
    gpu_mhz: float | None = None
    throttled: int | None = None
    slowed_by: tuple[str, ...] = ()

    def drift(self, after: Conditions) -> tuple[str, ...]:
        """What changed until `after` so far that figures taken in between may not be repeated, each in words."""
        found = []
        for name, old, new in (("CPU", self.cpu_mhz, after.cpu_mhz), ("GPU", self.gpu_mhz, after.gpu_mhz)):
            if old and new and not abs(new / old - 1) <= 0.05:
                found.append(f"the {name}'s clock moved from {old:.0f} to {new:.0f} MHz")
        if after.power_mode != self.power_mode:
            found.append(f"the power mode changed from {self.power_mode or 'none'} to {after.power_mode or 'none'}")
        if self.temperature_c and after.temperature_c and after.temperature_c - self.temperature_c > 5:
            found.append(f"it warmed from {self.temperature_c:.0f} to {after.temperature_c:.0f} °C")
        if (after.throttled or 0) > (self.throttled or 0):
            found.append(f"it was throttled {(after.throttled or 0) - (self.throttled or 0)} times")
        if after.slowed_by:
            found.append(f"it is slowed by {', '.join(after.slowed_by)}")
        return tuple(found)


@functools.cache
def machine(root: Path = Path("/")) -> MachineFacts:
    """This machine. It is looked at once a process.

    Args:
        root: what stands for ``/`` when files are read.
    """
    info, board, l4t = _cpuinfo(), _read(root / "proc/device-tree/model"), _l4t(root)
    chip = re.search(r"nvidia,(tegra\d{3})", _read(root / "proc/device-tree/compatible"))
    jetson = chip[1] if chip else ""
    gpu, capability, gpu_memory = (jetson, _CHIPS.get(jetson, ""), None) if l4t else _first_gpu()
    memory = re.search(r"MemTotal:\s+(\d+) kB", _read(root / "proc/meminfo"))
    return MachineFacts(
        cpu=info.get("model name") or board or platform.processor() or platform.machine(),
        architecture=platform.machine(),
        cores=usable_cores(),
        instruction_sets=instruction_sets(),
        memory_mib=int(memory[1]) >> 10 if memory else None,
        system=f"{platform.system()} {platform.release()}",
        board=board,
        l4t=l4t,
        driver=nvidia_driver() or l4t,
        gpu=gpu,
        compute_capability=capability,
        gpu_memory_mib=gpu_memory,
        cuda=_cuda_toolkit(root),
        versions=versions(),
    )


def conditions(root: Path = Path("/")) -> Conditions:
    """As they are now."""
    clock = root / "sys/devices/system/cpu/cpu0/cpufreq"
    mhz = _read(clock / "scaling_cur_freq")
    gpu = [_whole(path) for path in (root / "sys/class/devfreq").glob("*/cur_freq") if _GPUS.search(path.parent.name)]
    counts = [path for pattern in _THROTTLE_COUNTS for path in root.glob(pattern)]
    cooling = sorted((root / "sys/class/thermal").glob("cooling_device*"))
    slowing = {_read(device / "type") for device in cooling if (_whole(device / "cur_state") or 0) > 0}
    zones = sorted((root / "sys/class/thermal").glob("thermal_zone*/temp"))
    degrees = [int(text) / 1000 for text in map(_read, zones) if text.lstrip("-").isdigit()]
    return Conditions(
        cpu_mhz=(int(mhz) / 1000 if mhz.isdigit() else float(_cpuinfo().get("cpu MHz") or 0)) or None,
        governor=_read(clock / "scaling_governor"),
        power_mode=_power_mode(root),
        temperature_c=max(degrees, default=None),
        load_average=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        gpu_mhz=max((hz / 1e6 for hz in gpu if hz), default=None) if root != Path("/") or gpu else _gpu_mhz(),
        throttled=sum(_whole(path) or 0 for path in counts) if counts else None,
        slowed_by=tuple(sorted(name for name in slowing if name and "fan" not in name.lower())),
    )


def stable_clocks(now: Conditions, here: MachineFacts) -> str:
    """The command that fixes the clocks of this machine; "" where they are fixed, or it is not known."""
    if here.l4t:
        return "" if now.governor == "performance" else "sudo jetson_clocks"
    hints = [] if now.governor in ("", "performance") else ["sudo cpupower frequency-set -g performance"]
    hints += ["sudo nvidia-smi --lock-gpu-clocks=MHZ,MHZ"] if here.gpu else []
    return "; ".join(hints)


def instruction_sets() -> tuple[str, ...]:
    """Those of KNOWN that this CPU has; empty where there is no /proc/cpuinfo."""
    info = _cpuinfo()
    flags = (info.get("flags") or info.get("Features") or "").split()
    return tuple(name for name in KNOWN if name in flags)


def user_cache() -> Path:
    """The folder of this package in the user's cache, which may not be there."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "nformer-edge"


def saturates_int8() -> bool:
    """Whether 16-bit sums of u8 x s8 saturate here: x86 from SSE4 to AVX-512, but for VNNI."""
    found = instruction_sets()
    return ("sse4_2" in found or "avx2" in found) and not any(name in found for name in VNNI)


def usable_cores() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of Python, of this package and of `packages` (all that it may use if none are named)."""
    found = {name: package_version(name) for name in ("nformer-edge", *(packages or _requirements()))}
    return {"python": platform.python_version(), **{name: version for name, version in found.items() if version}}


@functools.cache
def _requirements() -> tuple[str, ...]:
    """The packages that this one may use: its requirements and its extras', without those of its developers."""
    try:
        lines = metadata.requires("nformer-edge") or []
    except metadata.PackageNotFoundError:
        lines = []
    lines = [line for line in lines if not re.search("extra == .dev.", line)]
    names = [re.sub(r"-cu\d+$", "", re.split(r"[^\w.-]", line)[0]) for line in lines]
    return tuple(sorted({name for name in names if name != "nformer-edge"}, key=str.lower))


def package_version(name: str) -> str:
    """The version of an installed package, which is not imported; "" where there is none.

    Its module may come from a package of another name (``tensorrt_rtx_cu13``), or from JetPack without any metadata:
    then ``__version__`` is read where it is written.
    """
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        module = name.replace("-", "_")
    try:
        specs = [importlib.util.find_spec(place) for place in (module, f"{module}_bindings")]
    except ValueError:  # it was put into sys.modules by hand
        return "unknown"
    if specs[0] is None:
        return ""
    for spec in specs:
        written = re.search(r'^__version__\s*=\s*["\']([\w.]+)', _read(Path((spec and spec.origin) or "/none")), re.M)
        if written:
            return written[1]
    return "unknown"


def version_key(text: str) -> tuple[int, ...]:
    """``10.13.3.9.post1`` as (10, 13, 3, 9), to compare."""
    return tuple(int(n) for n in re.findall(r"\d+", text.partition(".post")[0]))


def shipped(folder: str) -> Path:
    """A folder that comes with this package: inside it once installed, beside it in a checkout.

    Raises:
        ArtifactError: if it is in neither place.
    """
    package = Path(__file__).resolve().parents[1]
    for place in (package / folder, package.parent / folder):
        if place.is_dir():
            return place
    raise ArtifactError(str(package / folder), "no such folder", "a part of this package", "Install it again.")


def nvidia_driver() -> str:
    """The NVIDIA driver's own line about itself, on a PC, a server or a Jetson; "" where there is none."""
    for place in ("/proc/driver/nvidia/version", "/sys/module/nvidia/version", "/sys/module/nvgpu/version"):
        text = _read(Path(place))
        if text:
            return text.splitlines()[0].strip()
    return "nvgpu" if Path("/dev/nvhost-gpu").exists() else ""


def nvcc_version(nvcc: str | Path) -> str:
    """Of CUDA's compiler, such as ``12.4.131``."""
    said = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"V([\d.]+)", said)
    return found[1] if found else ""


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip("\0\n ")
    except OSError:
        return ""


def _whole(path: Path) -> int | None:
    """The whole number in a file, if there is one."""
    text = _read(path)
    return int(text) if re.fullmatch(r"-?\d+", text) else None


def _cpuinfo() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo; empty where there is no such file."""
    lines = (line.partition(":") for line in _read(Path("/proc/cpuinfo")).split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def _l4t(root: Path) -> str:
    """Of ``# R36 (release), REVISION: 4.3, GCID: ...``."""
    found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", _read(root / "etc/nv_tegra_release"))
    return f"{found[1]}.{found[2]}" if found else ""


def _cuda_toolkit(root: Path) -> str:
    try:
        return str(json.loads(_read(root / "usr/local/cuda/version.json"))["cuda"]["version"])
    except (ValueError, KeyError, TypeError):
        nvcc = shutil.which("nvcc") if root == Path("/") else None
        return nvcc_version(nvcc) if nvcc else ""


def _power_mode(root: Path) -> str:
    """The name, in nvpmodel's configuration, of the mode whose number its status file holds."""
    number = re.search(r"pmode:(\d+)", _read(root / "var/lib/nvpmodel/status"))
    names = re.findall(r"POWER_MODEL ID=(\d+) NAME=(\S+)", _read(root / "etc/nvpmodel.conf"))
    return next((name for ident, name in names if number and int(ident) == int(number[1])), "")


def _first_gpu() -> tuple[str, str, int | None]:
    """Name, compute capability and MiB, by nvidia-smi."""
    try:
        name, capability, memory = _nvidia_smi("name", "compute_cap", "memory.total")
        return name, capability, int(memory)
    except ValueError:
        return "", "", None


def _gpu_mhz() -> float | None:
    try:
        (mhz,) = _nvidia_smi("clocks.sm")
        return float(mhz)
    except ValueError:
        return None


def _nvidia_smi(*asked: str) -> list[str]:
    """What nvidia-smi says of the first GPU; empty where it says nothing."""
    tool = shutil.which("nvidia-smi")
    command = [tool or "", f"--query-gpu={','.join(asked)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False) if tool else None
        return [part.strip() for part in done.stdout.splitlines()[0].split(",")] if done else []
    except (OSError, subprocess.TimeoutExpired, IndexError):
        return []
