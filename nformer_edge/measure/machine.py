"""What machine a figure was measured on, as JSON data, without importing anything heavy."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from nformer_edge.core.cpu import instruction_sets

PACKAGES = ("numpy", "Pillow", "torch", "onnx", "onnxruntime", "tensorrt", "tensorrt-rtx")


def _read(path: str) -> str:
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


def versions() -> dict[str, str]:
    """Installed versions of Python and of what a figure may depend on; a package that is absent has no entry."""
    found = {"python": platform.python_version()}
    for name in ("nformer-edge", *PACKAGES):
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
