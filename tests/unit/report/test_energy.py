"""Joules by the sensors of each board: what is summed is named, and what is unknown is never 0."""

from __future__ import annotations

import ctypes
import json
import threading
from pathlib import Path

import pytest
from helpers.energy_trees import END, START, TREES, ina3221, measured, table, write

from nformer_edge.core.machine import Conditions, MachineFacts, conditions, stable_clocks
from nformer_edge.core.values import dumps, from_json, to_json
from nformer_edge.report import energy
from nformer_edge.report.energy import Energy, Meter, Sensor, find_sensors

PAGE = Path(__file__).parents[3] / "docs" / "devices.md"


@pytest.fixture
def of(tmp_path):
    return lambda name: measured(TREES[name], tmp_path)


def test_the_table_in_docs_is_what_the_trees_give():
    assert START + table() + END in PAGE.read_text(), "cd tests && python -m helpers.energy_trees ../docs/devices.md"


def test_rails_that_feed_from_a_summed_one_are_not_added(of):
    found = of("AGX Orin")
    assert found.summed == ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0")
    assert found.joules == pytest.approx((843 * 6170 + 780 * 3437 + 4968 * 953) / 1e6)
    assert found.joules_per_query == pytest.approx(found.joules / 10)
    (memory,) = (rail for rail in found.rails if not rail.summed)
    assert (memory.name, memory.joules) == ("VDDQ_VDD2_1V8AO", pytest.approx(1.8 * 0.341))


@pytest.mark.parametrize(
    ("board", "rails", "joules"),
    [
        ("Orin NX, Orin Nano", "VDD_IN", 5.032 * 0.960),
        ("Nano, JetPack 4", "POM_5V_IN", 2.540),
        ("AGX Thor", "VIN", 23.04),
        ("AGX Xavier, JetPack 4", "GPU CPU SOC CV VDDRQ SYS5V", 7.604),
        ("Thor, no INA238", "VDD_GPU VDD_CPU_SOC_MSS VIN_SYS_5V0", 12 * 0.542 + 5.016 * 1.3),
    ],
)
def test_each_board_has_its_total(of, board, rails, joules):
    found = of(board)
    assert found.summed == tuple(rails.split())
    assert found.joules == pytest.approx(joules)


def test_a_counter_of_rapl_begins_again_and_the_zone_around_the_package_is_not_added(of):
    found = of("PC, RAPL begins again")
    assert found.summed == ("package-0", "package-0/dram")
    assert found.joules == pytest.approx(262143.328850 - 262143 + 14.671150 + 2.5)


@pytest.mark.parametrize(
    "board", [name for name, tree in TREES.items() if tree.source.startswith(("wrong", "missing"))]
)
def test_what_cannot_be_known_is_unknown_and_says_why(of, board):
    found = of(board)
    assert (found.joules, found.joules_per_query, found.watts) == (None, None, None)
    assert found.unknown
    assert "unknown" in str(found)
    assert from_json(Energy, json.loads(dumps(to_json(found)))) == found


def test_a_rail_that_fails_in_the_middle_takes_the_sum_with_it(of):
    assert "VDD_IN: no such file" in of("Orin Nano, gone in the middle").unknown


def test_a_short_run_has_no_joules(tmp_path):
    meter = Meter([Sensor("VDD_IN", "hwmon", lambda: 5.0, summed=True)], clock=iter([0.0, 0.0, 0.9, 0.9]).__next__)
    meter.sample()
    meter.sample()
    assert "too short" in meter.energy(1).unknown


def test_power_that_changes_is_integrated_between_the_reads():
    watts, times = iter([1.0, 3.0, 3.0]), iter([0.0, 0.0, 1.0, 1.0, 2.0, 2.0])
    meter = Meter([Sensor("VDD_IN", "hwmon", watts.__next__, summed=True)], clock=times.__next__)
    for _ in range(3):
        meter.sample()
    assert meter.energy(2).joules == pytest.approx(2 + 3)


def test_a_counter_without_a_range_that_goes_back_is_unknown():
    joules, times = iter([5.0, 1.0]), iter([0.0, 0.0, 2.0, 2.0])
    meter = Meter([Sensor("GPU 0", "nvml", joules.__next__, summed=True)], clock=times.__next__)
    meter.sample()
    meter.sample()
    assert "went back" in meter.energy(1).unknown


def test_a_meter_reads_in_the_background_until_the_block_ends(monkeypatch):
    monkeypatch.setattr(energy, "INTERVAL_S", 0.001)
    reads: list[int] = []
    often = threading.Event()

    def read() -> float:
        reads.append(len(reads))
        if len(reads) == 4:
            often.set()
        return 1.0

    with Meter([Sensor("VDD_IN", "hwmon", read)]):
        assert often.wait(60)
    count = len(reads)
    assert count >= 5
    assert len(reads) == count


class PlayedNvml:
    """NVML's functions, of which the counter gives millijoules or an error."""

    def __init__(self, *counters: int, error: int = 0) -> None:
        self.counters, self.error = list(counters), error

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetCount_v2(self, count) -> int:
        ctypes.cast(count, ctypes.POINTER(ctypes.c_uint))[0] = 1
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index, device) -> int:
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, device, millijoules) -> int:
        if not self.error:
            ctypes.cast(millijoules, ctypes.POINTER(ctypes.c_ulonglong))[0] = self.counters.pop(0)
        return self.error


def test_nvml_counts_millijoules_of_a_gpu(tmp_path):
    sensors = find_sensors(tmp_path, PlayedNvml(1_000, 1_000, 251_000))
    meter = Meter(sensors, clock=iter([0.0, 0.0, 2.0, 2.0]).__next__)
    meter.sample()
    meter.sample()
    found = meter.energy(100)
    assert (found.summed, found.joules, found.watts) == (("GPU 0",), pytest.approx(250), pytest.approx(125))
    assert str(found) == "2.5 J a query, 125 W, of GPU 0"


def test_nvml_of_a_jetson_is_said_to_have_no_counter_and_the_board_counts(tmp_path):
    write(tmp_path, ina3221(1, ("VDD_IN", "5032", "960")))
    rails = find_sensors(tmp_path, PlayedNvml(error=3))
    assert [(s.name, s.summed, s.unknown) for s in rails] == [
        ("VDD_IN", True, ""),
        ("GPU 0", False, "not supported by this GPU"),
    ]


def test_conditions_name_throttling_the_gpus_clock_and_what_drifted(tmp_path):
    for name, text in {
        "sys/class/devfreq/17000000.gpu/cur_freq": "1300500000",
        "sys/class/devfreq/17000000.vic/cur_freq": "115200000",
        "sys/class/hwmon/hwmon0/oc1_event_cnt": "2",
        "sys/class/thermal/cooling_device0/type": "pwm-fan",
        "sys/class/thermal/cooling_device0/cur_state": "3",
        "sys/class/thermal/cooling_device1/type": "devfreq-17000000.gpu",
        "sys/class/thermal/cooling_device1/cur_state": "1",
        "sys/class/thermal/thermal_zone0/temp": "71250",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1728000",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "schedutil",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    now = conditions(tmp_path)
    assert (now.gpu_mhz, now.throttled, now.slowed_by, now.temperature_c) == (
        1300.5,
        2,
        ("devfreq-17000000.gpu",),
        71.25,
    )
    before = Conditions(cpu_mhz=2201.6, temperature_c=50.0, gpu_mhz=1300.5, throttled=0, governor="schedutil")
    assert before.drift(now) == (
        "the CPU's clock moved from 2202 to 1728 MHz",
        "it warmed from 50 to 71 °C",
        "it was throttled 2 times",
        "it is slowed by devfreq-17000000.gpu",
    )
    assert before.drift(before) == ()


@pytest.mark.parametrize(
    ("governor", "facts", "command"),
    [
        ("schedutil", MachineFacts(l4t="36.4.3"), "sudo jetson_clocks"),
        ("performance", MachineFacts(l4t="36.4.3"), ""),
        ("powersave", MachineFacts(), "sudo cpupower frequency-set -g performance"),
        ("", MachineFacts(gpu="NVIDIA L4"), "sudo nvidia-smi --lock-gpu-clocks=MHZ,MHZ"),
    ],
)
def test_the_hint_on_stable_clocks_is_the_command_of_that_machine(governor, facts, command):
    assert stable_clocks(Conditions(governor=governor), facts) == command
