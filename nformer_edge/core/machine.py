"""What machine a figure was measured on, as JSON data, without importing anything heavy."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("numpy", "Pillow", "torch", "onnx", "onnxruntime", "tensorrt", "tensorrt-rtx")

#: Name in /proc/cpuinfo; x86 first, then Arm.
KNOWN = (
    "sse4_2",
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimdhp",
    "fphp",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)

VNNI = ("avx512_vnni", "avx_vnni", "amx_int8")


def instruction_sets() -> tuple[str, ...]:
    """Those of KNOWN that this CPU has; empty where there is no /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return ()
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return tuple(name for name in KNOWN if name in flags)


def saturates_int8() -> bool:
    """Whether u8 x s8 products may saturate here: x86 with AVX2 or AVX-512 but without VNNI."""
    found = instruction_sets()
    return "avx2" in found and not any(name in found for name in VNNI)


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(errors="replace").strip("\0\n ")
    except OSError:
        return ""


def _cpuinfo() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo; empty where there is no such file."""
    lines = (line.partition(":") for line in _read("/proc/cpuinfo").split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def usable_cores() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_mib() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    except (ValueError, OSError, AttributeError):
        return None


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of Python, of this package and of `packages` (PACKAGES if none are named); none if absent."""
    found = {"python": platform.python_version()}
    for name in ("nformer-edge", *(packages or PACKAGES)):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """CPU, cores, instruction sets, memory, system and versions. Every value is JSON; null where it is not known."""
    info = _cpuinfo()
    board = _read("/proc/device-tree/model")
    return {
        "cpu": info.get("model name") or board or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": usable_cores(),
        "instruction_sets": list(instruction_sets()),
        "memory_mib": _memory_mib(),
        "system": f"{platform.system()} {platform.release()}",
        "board": board or None,
        "versions": versions(),
    }


def conditions() -> dict[str, Any]:
    """What changes from minute to minute: clock, governor, power mode, temperature, load; null where not known."""
    mhz = _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq")
    zones = sorted(Path("/sys/class/thermal").glob("thermal_zone*/temp"))
    degrees = [int(text) / 1000 for text in (_read(str(zone)) for zone in zones) if text.lstrip("-").isdigit()]
    clock = int(mhz) / 1000 if mhz.isdigit() else float(_cpuinfo().get("cpu MHz") or 0)
    return {
        "cpu_mhz": clock or None,
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or None,
        "power_mode": _read("/var/lib/nvpmodel/status") or None,
        "temperature_c": max(degrees) if degrees else None,
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def version_key(text: str) -> tuple[int, ...]:
    """``10.13.3.9.post1`` as (10, 13, 3, 9), to compare."""
    return tuple(int(n) for n in re.findall(r"\d+", text.partition(".post")[0]))


def nvidia_driver() -> str:
    """The NVIDIA driver's own line about itself, on a PC, a server or a Jetson; "" where there is none."""
    for place in ("/proc/driver/nvidia/version", "/sys/module/nvidia/version", "/sys/module/nvgpu/version"):
        try:
            return Path(place).read_text().splitlines()[0].strip()
        except (OSError, IndexError):
            continue
    return "nvgpu" if Path("/dev/nvhost-gpu").exists() else ""


def module_version(name: str) -> str:
    """The version of an importable module, which is not imported; "" where there is none.

    It may come from a package of another name (``tensorrt_rtx_cu13``), or from JetPack without any metadata: then
    ``__version__`` is read where it is written.
    """
    if importlib.util.find_spec(name) is None:
        return ""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
    for module in (name, f"{name}_bindings"):
        spec = importlib.util.find_spec(module)
        written = re.search(r'^__version__\s*=\s*["\']([\w.]+)', _read((spec and spec.origin) or "/none"), re.M)
        if written:
            return written[1]
    return "unknown"


#: Compute capability of a Jetson's chip, by what the device tree calls it: nvidia-smi does not tell on every JetPack.
_CHIPS = {"tegra194": "7.2", "tegra234": "8.7", "tegra264": "11.0"}


@dataclass(frozen=True)
class Machine:
    """Each field is "" where there is none or it cannot be told.

    Args:
        architecture: as ``uname -m`` says.
        l4t: Jetson Linux's version, such as ``36.4.3``.
        cuda: of the toolkit.
        tensorrt: of the package; so are the next two.
        tensorrt_rtx: see above.
        onnxruntime: see above.
        driver: the NVIDIA driver's line about itself.
        gpu: the first GPU's name.
        compute_capability: of the first GPU, such as ``8.7``.
        power_mode: a Jetson's, such as ``MAXN``.
        memory_gib: of the GPU, or of a Jetson, whose GPU shares it; 0 where it cannot be told.
    """

    architecture: str = ""
    l4t: str = ""
    cuda: str = ""
    tensorrt: str = ""
    tensorrt_rtx: str = ""
    onnxruntime: str = ""
    driver: str = ""
    gpu: str = ""
    compute_capability: str = ""
    power_mode: str = ""
    memory_gib: float = 0.0


def this_machine(root: Path = Path("/")) -> Machine:
    """Looks around.

    Args:
        root: what stands for ``/`` when files are read.
    """
    l4t = _l4t(root)
    gpu, capability, memory = ("", "", 0.0) if l4t else _first_gpu()
    chip = _chip(root)
    return Machine(
        architecture=platform.machine(),
        l4t=l4t,
        cuda=_cuda_toolkit(root),
        tensorrt=module_version("tensorrt"),
        tensorrt_rtx=module_version("tensorrt_rtx"),
        onnxruntime=module_version("onnxruntime"),
        driver=nvidia_driver() or l4t,
        gpu=gpu or chip,
        compute_capability=capability or _CHIPS.get(chip, ""),
        power_mode=_power_mode(root),
        memory_gib=memory or (_board_memory(root) if l4t else 0.0),
    )


def _l4t(root: Path) -> str:
    """Of ``# R36 (release), REVISION: 4.3, GCID: ...``."""
    found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", _read(root / "etc/nv_tegra_release"))
    return f"{found[1]}.{found[2]}" if found else ""


def _cuda_toolkit(root: Path) -> str:
    try:
        return str(json.loads(_read(root / "usr/local/cuda/version.json"))["cuda"]["version"])
    except (ValueError, KeyError, TypeError):
        nvcc = shutil.which("nvcc") if root == Path("/") else None
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout if nvcc else ""
        found = re.search(r"V([\d.]+)", said)
        return found[1] if found else ""


def _chip(root: Path) -> str:
    """``tegra234``, from names that end in NUL bytes."""
    found = re.search(r"nvidia,(tegra\d{3})", _read(root / "proc/device-tree/compatible"))
    return found[1] if found else ""


def _power_mode(root: Path) -> str:
    """The name, in nvpmodel's configuration, of the mode whose number its status file holds."""
    number = re.search(r"pmode:(\d+)", _read(root / "var/lib/nvpmodel/status"))
    names = re.findall(r"POWER_MODEL ID=(\d+) NAME=(\S+)", _read(root / "etc/nvpmodel.conf"))
    return next((name for ident, name in names if number and int(ident) == int(number[1])), "")


def _board_memory(root: Path) -> float:
    found = re.search(r"MemTotal:\s+(\d+) kB", _read(root / "proc/meminfo"))
    return int(found[1]) / (1 << 20) if found else 0.0


def _first_gpu() -> tuple[str, str, float]:
    """Name, compute capability and GiB, by nvidia-smi."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "", "", 0.0
    command = [tool, "--query-gpu=name,compute_cap,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        name, capability, memory = (part.strip() for part in done.stdout.splitlines()[0].split(","))
        return name, capability, float(memory) / 1024
    except (OSError, subprocess.TimeoutExpired, IndexError, ValueError):
        return "", "", 0.0
