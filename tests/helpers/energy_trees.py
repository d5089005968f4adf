"""Power sensors of boards and PCs as files of sysfs, and what a second of each gives: the table in docs/devices.md.

``cd tests && python -m helpers.energy_trees ../docs/devices.md`` writes that table. A tree is *recorded* where its
labels and numbers were published by somebody who read them on the board. The others are *reconstructed*: labels and
channels of the device tree that is named, files and units of the driver's documentation, numbers made up.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nformer_edge.report.energy import Energy, Meter, find_sensors

Files = Mapping[str, str]

_DRIVER = "Linux, Documentation/hwmon"
_RAILS = "energymon/energymon 00718bc, jetson/JetsonPowerRails.md"


@dataclass(frozen=True)
class Tree:
    """Files below ``/``; where they are from; and files as they are a second later."""

    source: str
    files: Files
    later: Files | None = None


def ina3221(at: int, *channels: tuple[str, str, str] | None, enable: str = "1") -> Files:
    """A chip: label, millivolts and milliamperes of each channel; None for a channel that is switched off."""
    files = {f"sys/class/hwmon/hwmon{at}/name": "ina3221\n"}
    for n, channel in enumerate(channels, 1):
        label, *values = channel or ("", "", "")
        files[f"sys/class/hwmon/hwmon{at}/in{n}_label"] = f"{label}\n"
        files[f"sys/class/hwmon/hwmon{at}/in{n}_enable"] = f"{enable if channel else 0}\n"
        for file, value in zip((f"in{n}_input", f"curr{n}_input"), values, strict=True):
            files |= {f"sys/class/hwmon/hwmon{at}/{file}": f"{value}\n"} if value else {}
    files[f"sys/class/hwmon/hwmon{at}/in7_label"] = "sum of shunt voltages\n"
    files[f"sys/class/hwmon/hwmon{at}/in7_input"] = "760\n"
    files[f"sys/class/hwmon/hwmon{at}/curr4_input"] = "380\n"
    return files


def ina3221x(at: int, *channels: tuple[str, str]) -> Files:
    """A chip under the driver before JetPack 5: label and milliwatts."""
    folder = f"sys/bus/iio/devices/iio:device{at}"
    files = {f"{folder}/name": "ina3221x\n"}
    for n, (label, power) in enumerate(channels):
        files |= {f"{folder}/rail_name_{n}": f"{label}\n", f"{folder}/in_power{n}_input": f"{power}\n"}
    return files


def rapl(**zones: tuple[str, str]) -> Files:
    """Zones of powercap: name and microjoules; ``z0_1`` is ``intel-rapl:0:1``. A counter begins again at 262,143 J."""
    files: dict[str, str] = {}
    for zone, (name, energy) in zones.items():
        folder = f"sys/class/powercap/intel-rapl:{zone[1:].replace('_', ':')}"
        files |= {f"{folder}/name": f"{name}\n", f"{folder}/energy_uj": f"{energy}\n"}
        files[f"{folder}/max_energy_range_uj"] = "262143328850\n"
    return files


_ORIN = {"proc/device-tree/compatible": "nvidia,p3701-0005\0nvidia,tegra234\0"}
_THOR = {"proc/device-tree/compatible": "nvidia,p4071-0000+p3834-0008\0nvidia,p3834-0008\0nvidia,tegra264\0"}
_MODULE = ina3221(4, ("VDD_GPU", "12000", "0"), ("VDD_CPU_SOC_MSS", "12000", "542"), ("VIN_SYS_5V0", "5016", "1300"))
_AGX_ORIN = ina3221(3, ("VDD_GPU_SOC", "843", "6170"), ("VDD_CPU_CV", "780", "3437"), ("VIN_SYS_5V0", "4968", "953"))
_MEMORY = ina3221(4, None, ("VDDQ_VDD2_1V8AO", "1800", "341"), None)
_VIN = {"sys/class/hwmon/hwmon5/name": "ina238\n", "sys/class/hwmon/hwmon5/power1_input": "23040000\n"}
_PC = rapl(z0=("package-0", "262143000000"), z0_0=("core", "5000"), z0_1=("dram", "7000000"), z1=("psys", "9000000"))
_PC_LATER = rapl(z0=("package-0", "14671150"), z0_0=("core", "9000"), z0_1=("dram", "9500000"), z1=("psys", "40000000"))

TREES = {
    "AGX Orin": Tree(
        "recorded: justincdavis/fastnvmetrics, adding a new Jetson board (its example of both chips)",
        {**_ORIN, **_AGX_ORIN, **_MEMORY},
    ),
    "Orin NX, Orin Nano": Tree(
        f"reconstructed: Linux, tegra234-p3767.dtsi; {_DRIVER}/ina3221.rst",
        ina3221(1, ("VDD_IN", "5032", "960"), ("VDD_CPU_GPU_CV", "5032", "112"), ("VDD_SOC", "5032", "288")),
    ),
    "Xavier NX, JetPack 5": Tree(
        f"reconstructed: alumet-dev/alumet 2aed567, plugins/nvidia-jetson/README.md; {_DRIVER}/ina3221.rst",
        ina3221(6, ("VDD_IN", "5016", "880"), ("VDD_CPU_GPU_CV", "5016", "160"), ("VDD_SOC", "5016", "200")),
    ),
    "AGX Xavier, JetPack 5": Tree(
        f"reconstructed: {_RAILS}; {_DRIVER}/ina3221.rst",
        {
            **ina3221(2, ("GPU", "19152", "40"), ("CPU", "19152", "60"), ("SOC", "19152", "100")),
            **ina3221(3, ("CV", "19152", "10"), ("VDDRQ", "19152", "30"), ("SYS5V", "5016", "600")),
        },
    ),
    "AGX Xavier, JetPack 4": Tree(
        f"reconstructed: {_RAILS}",
        {
            **ina3221x(0, ("GPU", "766"), ("CPU", "1149"), ("SOC", "1915")),
            **ina3221x(1, ("CV", "191"), ("VDDRQ", "574"), ("SYS5V", "3009")),
        },
    ),
    "Nano, JetPack 4": Tree(
        f"reconstructed: {_RAILS}; sustainable-computing-io/kepler pull request 2438",
        ina3221x(0, ("POM_5V_IN", "2540"), ("POM_5V_GPU", "123"), ("POM_5V_CPU", "412")),
    ),
    "AGX Thor": Tree(
        f"reconstructed: rbonghi/jetson_stats pull request 900; {_DRIVER}/ina238.rst", {**_THOR, **_MODULE, **_VIN}
    ),
    "Thor, no INA238": Tree(
        "reconstructed: the module of the row above on another carrier board", {**_THOR, **_MODULE}
    ),
    "PC, RAPL begins again": Tree(
        "reconstructed: Linux, Documentation/power/powercap/powercap.rst; 15 J and 2.5 J in the second", _PC, _PC_LATER
    ),
    "AGX Orin, one rail switched off": Tree(
        "wrong: recorded tree without VDD_CPU_CV",
        {**_ORIN, **ina3221(3, ("VDD_GPU_SOC", "843", "6170"), None, ("VIN_SYS_5V0", "4968", "953"))},
    ),
    "AGX Orin, no numbers": Tree(
        "wrong: VIN_SYS_5V0's current is text",
        {**_ORIN, **_AGX_ORIN, "sys/class/hwmon/hwmon3/curr3_input": "warn 32760 ma\n"},
    ),
    "Orin Nano, sensor off": Tree("wrong: 0 mV and 0 mA", ina3221(1, ("VDD_IN", "0", "0"), None, None)),
    "Orin Nano, file missing": Tree("wrong: VDD_IN without curr1_input", ina3221(1, ("VDD_IN", "5032", ""))),
    "Orin Nano, gone in the middle": Tree(
        "wrong: VDD_IN's file goes while it is measured",
        ina3221(1, ("VDD_IN", "5032", "960")),
        {"sys/class/hwmon/hwmon1/curr1_input": ""},
    ),
    "board with other rails": Tree("wrong: labels of no known board", ina3221(1, ("VDD_FOO", "5000", "500"))),
    "PC, RAPL for root alone": Tree("wrong: energy_uj cannot be read", rapl(z0=("package-0", ""))),
    "nothing": Tree("missing: no sensor", {}),
}


def write(root: Path, files: Files) -> None:
    """Puts the files below `root`; a file without text goes."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        if not text:
            path.unlink()


def measured(tree: Tree, root: Path) -> Energy:
    """Of ten queries in a second of eleven reads, by a clock of its own."""
    write(root, tree.files)
    now = 0.0
    meter = Meter(find_sensors(root), clock=lambda: now)
    for at in range(11):
        now = at / 10
        if at == 5 and tree.later:
            write(root, tree.later)
        meter.sample()
    return meter.energy(queries=10)


def table() -> str:
    """Of every tree, as Markdown."""
    lines = [
        "| board | joules in a second | rails summed | not summed, or why unknown | tree |",
        "|---|---|---|---|---|",
    ]
    for name, tree in TREES.items():
        with tempfile.TemporaryDirectory() as root:
            energy = measured(tree, Path(root))
        joules = "unknown" if energy.joules is None else f"{energy.joules:.2f}"
        beside = energy.unknown or ", ".join(rail.name for rail in energy.rails if not rail.summed)
        lines.append(f"| {name} | {joules} | {', '.join(energy.summed)} | {beside} | {tree.source} |")
    return "\n".join(lines)


START, END = "<!-- energy -->\n", "\n<!-- /energy -->"


def main(page: str) -> None:
    """Writes the table between its two marks."""
    before, _, rest = Path(page).read_text().partition(START)
    Path(page).write_text(before + START + table() + END + rest.partition(END)[2])


if __name__ == "__main__":
    main(sys.argv[1])
