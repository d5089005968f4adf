"""What this machine is, as far as engines care: read from files and packages, changing nothing."""

from __future__ import annotations

import importlib.util
import json
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

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
        cuda=_cuda(root),
        tensorrt=module_version("tensorrt"),
        tensorrt_rtx=module_version("tensorrt_rtx"),
        onnxruntime=module_version("onnxruntime"),
        driver=nvidia_driver() or l4t,
        gpu=gpu or chip,
        compute_capability=capability or _CHIPS.get(chip, ""),
        power_mode=_power_mode(root),
        memory_gib=memory or (_board_memory(root) if l4t else 0.0),
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


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
        written = re.search(r'^__version__\s*=\s*["\']([\w.]+)', _read(Path((spec and spec.origin) or "/none")), re.M)
        if written:
            return written[1]
    return "unknown"


def _l4t(root: Path) -> str:
    """Of ``# R36 (release), REVISION: 4.3, GCID: ...``."""
    found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", _read(root / "etc/nv_tegra_release"))
    return f"{found[1]}.{found[2]}" if found else ""


def _cuda(root: Path) -> str:
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
