"""Recipes say what a device has and what is built for it; the preflight says what of that is not here."""

from __future__ import annotations

import dataclasses

import pytest

from nformer_edge.backends.tensorrt.plugin import library as plugin_library
from nformer_edge.core.artifact import write_manifest
from nformer_edge.core.errors import BackendError, UsageError
from nformer_edge.core.machine import Conditions, MachineFacts, conditions, package_version, version_key
from nformer_edge.core.machine import machine as look_around
from nformer_edge.targets import doctor as doctor_module
from nformer_edge.targets import recipe
from nformer_edge.targets.doctor import Doctor, Preflight, doctor, int8_note, preflight, require_match
from nformer_edge.targets.recipe import read_target, target_names

ORIN = MachineFacts(
    architecture="aarch64", l4t="36.4.3", cuda="12.6.68", versions={"tensorrt": "10.3.0"}, driver="nvgpu",
    gpu="tegra234", compute_capability="8.7", memory_mib=30 << 10,
)  # fmt: skip
MAXN = Conditions(power_mode="MAXN")


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A plugin library of ours for TensorRT 10, found by its environment variable."""
    folder = tmp_path / "plugins"
    folder.mkdir()
    (folder / plugin_library.LIBRARY).write_bytes(b"a library")
    write_manifest(folder, "plugin", {"tensorrt": "10.3.0", "architectures": ["87"]})
    monkeypatch.setenv(plugin_library.ENVIRONMENT, str(folder))
    return folder / plugin_library.LIBRARY


def what(target_name, machine, now=MAXN, **settings):
    return {m.what: m for m in preflight(read_target(target_name), machine, now, **settings).mismatches}


def test_every_target_of_the_house_has_a_recipe_that_reads():
    expected = {"jetson-orin-jp62", "jetson-orin-jp72", "jetson-thor-jp72", "jetson-xavier-jp51", "desktop-ampere",
                "desktop-ada", "desktop-blackwell", "rtx", "cpu", "jetson-agx-orin-jp722", "jetson-thor-jp722",
                "jetson-orin-jp62-cpu", "rk3588", "intel-n"}  # fmt: skip
    assert set(target_names()) == expected
    for name in target_names():
        recipe = read_target(name)
        assert recipe.name == name
        assert recipe.summary
        if "tensorrt" in recipe.engine.backend:
            assert len(recipe.engine.gallery_size) == 3


#: What each board and PC has, by its vendor's lists (L4T of JetPack 7.2.2 by 7.2.1's): nothing is missing.
_JP722 = {"l4t": "39.2.2", "versions": {"tensorrt": "11.4.1.3"}, "cuda": "13.2.1"}
BOARDS = {
    "jetson-orin-jp62": ORIN,
    "jetson-orin-jp62-cpu": dataclasses.replace(ORIN, versions={"onnxruntime": "1.23.2"}),
    "jetson-agx-orin-jp722": dataclasses.replace(ORIN, **_JP722),
    "jetson-thor-jp722": dataclasses.replace(ORIN, **_JP722, compute_capability="11.0", memory_mib=120 << 10),
    "rk3588": MachineFacts(architecture="aarch64", versions={"onnxruntime": "1.32.0"}, memory_mib=8 << 10),
    "intel-n": MachineFacts(architecture="x86_64", versions={"openvino": "2026.4.1"}, memory_mib=8 << 10),
    "desktop-ada": MachineFacts(
        architecture="x86_64", versions={"tensorrt": "11.5.0.9"}, cuda="13.0", driver="580", compute_capability="8.9"
    ),
}


@pytest.mark.parametrize("name", BOARDS)
def test_a_board_with_what_its_vendor_lists_passes_the_preflight_of_its_recipe(name):
    assert what(name, BOARDS[name], with_head=False) == {}


@pytest.mark.parametrize("name", ["jetson-agx-orin-jp722", "jetson-thor-jp722"])
def test_a_board_of_the_jetpack_before_is_told_to_be_flashed(name):
    before = dataclasses.replace(BOARDS[name], l4t="39.2.1", versions={"tensorrt": "10.16.1"})
    assert set(what(name, before, with_head=False)) == {"l4t", "tensorrt"}
    assert "l4t" in what(name.replace("-agx", "").replace("jp722", "jp72"), BOARDS[name], with_head=False)


def test_a_recipe_names_only_gpus_that_the_kernels_are_compiled_for():
    cmake = (recipe.recipes_folder().parents[1] / "plugins" / "CMakeLists.txt").read_text()
    wanted = next(line for line in cmake.splitlines() if "foreach(wanted" in line)
    for name in target_names():
        for capability in read_target(name).machine.compute_capability:
            assert f" {capability.replace('.', '')}" in wanted


def test_a_misspelt_target_is_refused_with_the_nearest_name():
    with pytest.raises(UsageError, match="Did you mean 'jetson-orin-jp62'"):
        read_target("jetson-orin-jp63")
    with pytest.raises(UsageError, match=r"target: got '\.\./recipes/cpu'"):
        read_target("../recipes/cpu")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("summary = 'x'\n[engine]\nbackend = 'tensorrt'\nprecision = 'int9'", "engine.precision: got 'int9'"),
        ("summary = 'x'\n[engine]\nbackend = 'tensorrt'\nprecision = 'int8'\nbatch = [8, 4, 1]", "batch: got"),
        (
            "summary = 'x'\n[engine]\nbackend = 'tensorrt'\nprecision = 'int8'\n[machine]\nversions.cuda = ['12']",
            "cuda: got",
        ),
        ("summary = 'x'\n[engine]\nbackend = 'tensorrt'\nprecision = 'int8'\n[machine]\nversions.cudo = []", "'cudo'"),
        ("summary = 'x'\n[engine]\nbackend = 'tensorrt'", "engine: got no backend or no precision"),
        ("sumary = 'x'", "Did you mean 'summary'"),
        ("= x", "no readable TOML"),
    ],
)
def test_a_recipe_of_ones_own_is_checked(tmp_path, text, message):
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(UsageError, match=message):
        read_target(str(tmp_path / "mine.toml"))


def test_a_recipe_of_ones_own_is_read(tmp_path):
    (tmp_path / "mine.toml").write_text("summary = 'x'\n[engine]\nbackend = 'tensorrt'\nprecision = 'int8'\n")
    assert read_target(str(tmp_path / "mine.toml")).engine.precision == "int8"


def test_a_machine_that_matches_has_nothing_to_mend(library):
    assert what("jetson-orin-jp62", ORIN) == {}
    assert require_match(read_target("jetson-orin-jp62"), ORIN, MAXN).mismatches == ()
    assert "all matches" in str(Preflight("mine", "a device", "", ()))


@pytest.mark.parametrize(
    ("field", "value", "name", "expected", "hint"),
    [
        ("l4t", "39.2.0", "l4t", "from 36.4, below 36.6", "SDK Manager"),
        ("versions", {"tensorrt": "10.13.3.9"}, "tensorrt", "from 10.3, below 10.4", "nvidia-jetpack"),
        ("versions", {}, "tensorrt", "from 10.3, below 10.4", "nvidia-jetpack"),
        ("compute_capability", "7.2", "compute capability", "8.7", "build it there"),
        ("architecture", "x86_64", "architecture", "aarch64", "on the device itself"),
        ("driver", "", "NVIDIA driver", "one", "Install the driver"),
    ],
)
def test_what_is_in_the_way_is_named_with_its_mend(library, field, value, name, expected, hint):
    machine = dataclasses.replace(ORIN, **{field: value})
    mismatch = what("jetson-orin-jp62", machine)[name]
    assert (mismatch.expected, mismatch.blocks) == (expected, True)
    assert hint in mismatch.hint
    with pytest.raises(BackendError, match=f"target jetson-orin-jp62: .* not match.*{name}.*doctor --target"):
        require_match(read_target("jetson-orin-jp62"), machine, MAXN)


@pytest.mark.parametrize(
    ("field", "value", "name"),
    [("power_mode", "15W", "power mode"), ("memory_mib", 3 << 10, "memory"), ("cuda", "", "cuda")],
)
def test_what_only_costs_time_does_not_block(library, field, value, name):
    machine, now = (dataclasses.replace(v, **{field: value}) if hasattr(v, field) else v for v in (ORIN, MAXN))
    (mismatch,) = require_match(read_target("jetson-orin-jp62"), machine, now).mismatches
    assert (mismatch.what, mismatch.blocks) == (name, False)


def test_a_head_needs_the_plugin_library_and_a_backbone_alone_does_not(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.delenv(plugin_library.ENVIRONMENT, raising=False)
    assert "build-plugin" in what("jetson-orin-jp62", ORIN)["plugin library"].hint
    assert what("jetson-orin-jp62", ORIN, with_head=False) == {}


def test_a_plugin_library_for_another_tensorrt_or_gpu_is_named(library):
    other = dataclasses.replace(ORIN, versions={"tensorrt": "11.1.0"})
    assert "for TensorRT 10" in what("desktop-ada", other)["plugin library"].got
    thor = dataclasses.replace(ORIN, compute_capability="11.0")
    mismatch = what("jetson-thor-jp72", thor)["plugin library"]
    assert (mismatch.expected, mismatch.blocks) == ("sm_110 among them", False)


def test_a_plugin_library_that_was_changed_is_named(library):
    library.write_bytes(b"another!!")
    assert "sha256" in what("jetson-orin-jp62", ORIN)["plugin library"].hint


def test_a_jetson_is_known_by_its_files(tmp_path):
    for name, text in {
        "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64",
        "usr/local/cuda/version.json": '{"cuda": {"name": "CUDA SDK", "version": "12.6.68"}}',
        "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005-super\0nvidia,p3767-0005\0nvidia,tegra234\0",
        "var/lib/nvpmodel/status": "pmode:0002 fmode:quiet",
        "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n",
        "proc/meminfo": "MemTotal:        7802732 kB\nMemFree: 1 kB\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    machine = look_around(tmp_path)
    assert (machine.l4t, machine.cuda, machine.compute_capability) == ("36.4.3", "12.6.68", "8.7")
    assert (conditions(tmp_path).power_mode, machine.gpu, machine.memory_mib) == ("MAXN_SUPER", "tegra234", 7619)


def test_a_machine_that_is_no_jetson_has_none_of_it(tmp_path):
    machine = look_around(tmp_path)
    assert (machine.l4t, conditions(tmp_path).power_mode, machine.cuda) == ("", "", "")


def test_a_version_is_told_without_importing_and_without_metadata(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, text in {
        "played_trt": "__version__ = '10.3.0'\nraise RuntimeError('imported')\n",
        "played_rtx": "raise RuntimeError('imported')\n",
        "played_rtx_bindings": '__version__ = "1.7.1.116"\n',
        "played_none": "",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
    assert package_version("played_trt") == "10.3.0"
    assert package_version("played_rtx") == "1.7.1.116"
    assert package_version("played_none") == "unknown"
    assert package_version("played_nothing") == ""
    assert package_version("numpy")[0].isdecimal()


def test_the_doctor_compares_with_a_target():
    found = doctor("jetson-orin-jp62")
    assert found.target.name == "jetson-orin-jp62"
    assert any(m.what == "l4t" and m.blocks for m in found.target.mismatches)
    assert "NO    l4t: got none, expected from 36.4" in str(found)
    assert Doctor.from_json(found.to_json()) == found
    assert doctor().target is None


def test_the_advice_for_a_missing_tensorrt_is_of_the_targets_own_version(monkeypatch):
    monkeypatch.delenv(plugin_library.ENVIRONMENT, raising=False)
    monkeypatch.setattr("nformer_edge.targets.doctor.find_plugin", lambda *_: None)
    bare = MachineFacts(architecture="x86_64")
    jetson = what("jetson-orin-jp62", bare)
    assert "JetPack brings it" in jetson["tensorrt"].hint
    assert jetson["plugin library"].hint == "nformer-edge build-plugin, with the headers of this TensorRT"
    desktop = what("desktop-blackwell", bare)
    assert "'tensorrt>=10.8,<12'" in desktop["tensorrt"].hint
    assert "tensorrt>=10.9" in desktop["plugin library"].hint


def test_int8_is_called_faster_only_where_it_was_timed():
    def told(*sets):
        return int8_note(MachineFacts(instruction_sets=sets))

    assert "INT8 may be faster than FP32; a build times both" in told("avx2", "avx512_vnni")
    for sets in (("neon", "asimddp"), ("i8mm",), ("avx_vnni",), ("avx2",)):
        assert "a build times both" not in told(*sets)
        assert "nformer-edge benchmark FP32 INT8" in told(*sets)


def test_versions_compare_by_number():
    assert version_key("10.13.3.9.post1") == (10, 13, 3, 9)
    assert version_key("10.3") < version_key("10.13") < version_key("11")


def test_the_doctor_names_the_next_step_for_whatever_is_missing():
    found = doctor()
    assert {"PyTorch", "onnxruntime", "NVIDIA GPU", "JetPack", "tensorrt", "native CPU kernels"} <= {
        c.name for c in found.checks
    }
    assert all(bool(c.hint) != c.ok for c in found.checks)
    assert all(c.name in str(found) for c in found.checks)


def test_the_doctor_names_installed_packages_with_known_holes(monkeypatch):
    monkeypatch.setattr(
        doctor_module, "package_version", lambda name: {"onnx": "1.20.1", "torch": "2.10.0"}.get(name, "")
    )
    assert [(c.name, c.ok, c.hint) for c in doctor_module.known_holes()] == [
        (
            "safe onnx",
            False,
            "1.20.1 has known holes in reading ONNX files that name other files: pip install 'onnx>=1.21'",
        )
    ]
