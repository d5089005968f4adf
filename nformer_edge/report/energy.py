"""Joules of a run, by the sensors that a machine has: rails that were summed are named, and what is unknown is null.

Power sensors: the INA3221 and INA238 of Jetson boards, by hwmon (Documentation/hwmon/ina3221.rst, ina238.rst in Linux:
millivolts and milliamperes, or microwatts) and, before JetPack 5, by iio (``ina3221x``: milliwatts). They are read
every `INTERVAL_S` and integrated. Energy counters: NVML's of a GPU, in millijoules since the driver was loaded, and
RAPL's of a CPU (Documentation/power/powercap), in microjoules, which begin again at 0 after ``max_energy_range_uj``.

The sensors of a module do not see its carrier board, fan and disks; those of a CPU and a GPU not the rest of the PC.
"""

from __future__ import annotations

import ctypes
import math
import re
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Source = Literal["hwmon", "iio", "nvml", "rapl"]

INTERVAL_S = 0.2

#: Shorter runs say nothing: the sensors average over tens of milliseconds, and counters move in steps.
MIN_SECONDS = 1.0

#: Rails of Jetsons that make up a total; the first row whose rails can all be read counts. Others feed from these.
TOTALS = (
    ("VIN",),  # AGX Thor: input of its carrier board, which feeds the module (forums.developer.nvidia.com/t/366461)
    ("VDD_IN",),  # Orin NX, Orin Nano, Xavier NX, TX2: input of the module (forums.developer.nvidia.com/t/200883)
    ("POM_5V_IN",),  # Nano: input of the module (forums.developer.nvidia.com/t/73608)
    ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),  # AGX Xavier: side by side (forums.developer.nvidia.com/t/81016)
    # AGX Orin: VIN_SYS_5V0 feeds VDDQ_VDD2_1V8AO, which must not be added (energymon 00718bc, energymon-jetson.c)
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),
    ("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"),  # Thor on a carrier board without an INA238
)

#: An INA238 need not have a label: on Thor it is the board's input (github.com/rbonghi/jetson_stats/pull/900).
_THOR = "tegra264"


@dataclass(frozen=True)
class Rail:
    """What one sensor said.

    Args:
        name: as the board, the GPU or the kernel calls it.
        source: hwmon, iio, nvml or rapl.
        summed: whether it is part of the total.
        joules: of the run; null where unknown.
        unknown: why there is no figure; "" where there is one.
    """

    name: str
    source: Source
    summed: bool
    joules: float | None
    unknown: str = ""


@dataclass(frozen=True)
class Energy:
    """Energy that was used while a run's queries were timed; the idle machine's share is in it.

    Args:
        joules: sum of the rails that are `summed`; null where it is unknown, never 0.
        joules_per_query: the same by query.
        watts: mean power of the sum.
        seconds: that were measured.
        rails: every sensor, also those that are part of others and those that cannot be read.
        unknown: why there is no sum; "" where there is one.
    """

    joules: float | None
    joules_per_query: float | None
    watts: float | None
    seconds: float
    rails: tuple[Rail, ...]
    unknown: str = ""

    @property
    def summed(self) -> tuple[str, ...]:
        """Names of the rails that make up the sum."""
        return tuple(rail.name for rail in self.rails if rail.summed)

    def __str__(self) -> str:
        unread = [f"{rail.name}: {rail.unknown}" for rail in self.rails if rail.unknown and not rail.summed]
        tail = f"; not read: {', '.join(unread)}" if unread else ""
        if self.joules is None or self.joules_per_query is None or self.watts is None:
            return f"energy unknown: {self.unknown}"
        return f"{self.joules_per_query:.3g} J a query, {self.watts:.3g} W, of {' + '.join(self.summed)}{tail}"


@dataclass(frozen=True)
class Sensor:
    """One sensor: `read` gives watts; or joules, which begin again at 0 after `wraps`, where that is given.

    A sensor that cannot be used has `unknown`, the reason.
    """

    name: str
    source: Source
    read: Callable[[], float]
    wraps: float | None = None
    summed: bool = False
    unknown: str = ""


class Unreadable(Exception):
    """A sensor that has no figure."""


def find_sensors(root: Path = Path("/"), nvml: ctypes.CDLL | None = None) -> tuple[Sensor, ...]:
    """Every sensor of this machine, with those of the total marked.

    Args:
        root: what stands for ``/``.
        nvml: the library; that of the NVIDIA driver if None and `root` is this machine's.
    """
    rails = _tried([*_hwmon(root), *_iio(root)])
    readable = {sensor.name for sensor in rails if not sensor.unknown}
    total = next((row for row in TOTALS if readable.issuperset(row)), ())
    rails = [_with(sensor, summed=sensor.name in total) for sensor in rails]
    if nvml is None and root == Path("/"):
        nvml = _library()
    chips = _tried([*_rapl(root), *([] if nvml is None else _gpus(nvml))])
    return (*rails, *(_with(sensor, summed=sensor.summed and not (total or sensor.unknown)) for sensor in chips))


def _with(sensor: Sensor, *, summed: bool, unknown: str | None = None) -> Sensor:
    why = sensor.unknown if unknown is None else unknown
    return Sensor(sensor.name, sensor.source, sensor.read, sensor.wraps, summed, why)


def _tried(sensors: Iterable[Sensor]) -> list[Sensor]:
    """Each read once, to know which can be."""
    found = []
    for sensor in sensors:
        try:
            sensor.read()
            found.append(sensor)
        except Unreadable as e:
            found.append(_with(sensor, summed=sensor.summed, unknown=str(e)))
    return found


def _number(path: Path) -> float:
    """A whole number in a file of sysfs."""
    try:
        text = path.read_text().strip()
    except OSError as e:
        raise Unreadable(e.strerror.lower() if e.strerror else "cannot be read") from e
    if not re.fullmatch(r"-?\d+", text):
        raise Unreadable(f"no number in {path.name}: {text[:20]!r}")
    return float(text)


def _line(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip("\0\n ")
    except OSError:
        return ""


def _order(path: Path) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", path.name)]


def _hwmon(root: Path) -> Iterable[Sensor]:
    thor = _THOR in _line(root / "proc/device-tree/compatible")
    for chip in sorted((root / "sys/class/hwmon").glob("hwmon*"), key=_order):
        kind = _line(chip / "name")
        if kind == "ina238":
            label = _line(chip / "label") or _line(chip / "in1_label") or ("VIN" if thor else kind)
            yield Sensor(label, "hwmon", lambda at=chip / "power1_input": _number(at) / 1e6)  # type: ignore[misc]
        for n in (1, 2, 3) if kind == "ina3221" else ():  # 4 to 6 are shunts, 7 is the sum of their voltages
            label = _line(chip / f"in{n}_label")
            if label and "NC" not in label and _line(chip / f"in{n}_enable") != "0":
                yield Sensor(label, "hwmon", lambda at=chip, n=n: _ina3221(at, n))  # type: ignore[misc]


def _ina3221(chip: Path, n: int) -> float:
    volts, amperes = _number(chip / f"in{n}_input") / 1e3, _number(chip / f"curr{n}_input") / 1e3
    if volts <= 0:
        raise Unreadable(f"reads {volts:g} V")
    return volts * amperes


def _iio(root: Path) -> Iterable[Sensor]:
    for chip in sorted((root / "sys/bus/iio/devices").glob("iio:device*"), key=_order):
        for path in sorted(chip.glob("rail_name_*"), key=_order):
            label, power = _line(path), chip / f"in_power{path.name.removeprefix('rail_name_')}_input"
            if label and "NC" not in label:
                yield Sensor(label, "iio", lambda at=power: _number(at) / 1e3)  # type: ignore[misc]


def _rapl(root: Path) -> Iterable[Sensor]:
    """A package's zone has its cores and graphics; memory is beside it, and ``psys`` is around it."""
    for zone in sorted((root / "sys/class/powercap").glob("intel-rapl:*"), key=_order):
        own, above = _line(zone / "name"), _line(zone.parent / zone.name.rpartition(":")[0] / "name")
        sub = zone.name.count(":") == 2
        try:
            wraps = _number(zone / "max_energy_range_uj") / 1e6
        except Unreadable:
            wraps = None
        summed = own == "dram" if sub else own.startswith("package")
        name = f"{above}/{own}" if sub else own
        yield Sensor(name, "rapl", lambda at=zone / "energy_uj": _number(at) / 1e6, wraps, summed)  # type: ignore[misc]


def _library() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None


def _gpus(nvml: ctypes.CDLL) -> Iterable[Sensor]:
    """On Jetsons NVML begins, and then has no counter (error 3, not supported)."""
    count = ctypes.c_uint()
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
        return
    for i in range(count.value):
        device = ctypes.c_void_p()
        if not nvml.nvmlDeviceGetHandleByIndex_v2(i, ctypes.byref(device)):
            yield Sensor(f"GPU {i}", "nvml", lambda at=device: _counted(nvml, at), summed=True)  # type: ignore[misc]


def _counted(nvml: ctypes.CDLL, device: ctypes.c_void_p) -> float:
    millijoules = ctypes.c_ulonglong()
    error = nvml.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(millijoules))
    if error:
        raise Unreadable("not supported by this GPU" if error == 3 else f"NVML's error {error}")
    return millijoules.value / 1e3


class Meter:
    """Reads sensors at the beginning and the end of a block, and every `INTERVAL_S` in between.

    Args:
        sensors: as `find_sensors` gives them.
        clock: seconds.
    """

    def __init__(self, sensors: Iterable[Sensor], clock: Callable[[], float] = time.perf_counter) -> None:
        self.sensors = tuple(sensors)
        self._clock = clock
        self._last: dict[int, tuple[float, float]] = {}
        self._joules = [0.0] * len(self.sensors)
        self._unknown = [sensor.unknown for sensor in self.sensors]
        self._first = self._now = math.nan
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Meter:
        self.sample()
        if not all(self._unknown):
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self.sample()

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            self.sample()

    def sample(self) -> None:
        """Reads every sensor once."""
        self._now = self._clock()
        self._first = self._now if math.isnan(self._first) else self._first
        for i, sensor in enumerate(self.sensors):
            if self._unknown[i]:
                continue
            try:
                value, now = sensor.read(), self._clock()
            except Unreadable as e:
                self._unknown[i] = str(e)
                continue
            before, read = self._last.get(i, (now, value))
            self._last[i] = now, value
            self._joules[i] += self._spent(i, sensor, value, read, now - before)

    def _spent(self, i: int, sensor: Sensor, value: float, before: float, seconds: float) -> float:
        if sensor.source in ("hwmon", "iio"):
            return (value + before) / 2 * seconds
        if value < before and sensor.wraps is None:
            self._unknown[i] = "the counter went back"
        return value - before + (sensor.wraps or 0.0 if value < before else 0.0)

    def energy(self, queries: int) -> Energy:
        """What was used from the first sample to the last."""
        seconds = self._now - self._first
        short = f"{seconds:.2g} s are too short, {MIN_SECONDS:g} s needed" if not seconds >= MIN_SECONDS else ""
        rails = []
        for sensor, joules, unknown in zip(self.sensors, self._joules, self._unknown, strict=True):
            why = unknown or short
            rails.append(Rail(sensor.name, sensor.source, sensor.summed, None if why else joules, why))
        summed = [rail for rail in rails if rail.summed]
        missing = [f"{rail.name}: {rail.unknown}" for rail in summed if rail.unknown and rail.unknown != short]
        total = sum(rail.joules or 0.0 for rail in summed)
        if not rails:
            why = "no sensor"
        elif not summed:
            unread = [f"{rail.name}: {rail.unknown}" for rail in rails if rail.unknown and rail.unknown != short]
            why = "no known total" + (f" without {', '.join(unread)}" if unread else "")
        else:
            why = ", ".join(missing) or short or ("" if total > 0 else "the rails read 0")
        if why:
            return Energy(None, None, None, seconds, tuple(rails), why)
        return Energy(total, total / queries, total / seconds, seconds, tuple(rails))
