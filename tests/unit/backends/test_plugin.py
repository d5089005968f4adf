"""The plugin library: what is missing to build it, that it is built, and that only the right one is loaded."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from nformer_edge.backends.tensorrt.plugin import build as plugin_build
from nformer_edge.backends.tensorrt.plugin import library as plugin_library
from nformer_edge.backends.tensorrt.plugin.build import (
    build_plugin,
    find_headers,
    find_nvcc,
    find_tools,
    headers_version,
)
from nformer_edge.backends.tensorrt.plugin.library import find_plugin, load_plugin, read_plugin
from nformer_edge.core.artifact import read_manifest, sha256_file, write_manifest
from nformer_edge.core.errors import ArtifactError, BackendError, UsageError


@pytest.fixture(autouse=True)
def bare(tmp_path, monkeypatch):
    """No library of this machine is found, and none is loaded."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv(plugin_library.ENVIRONMENT, raising=False)
    monkeypatch.setattr(plugin_library, "_loaded", {})


def headers(root: Path, text: str) -> Path:
    (root / "include").mkdir(parents=True)
    (root / "include" / "NvInferVersion.h").write_text(text)
    return root


PARTS = ("MAJOR", "MINOR", "PATCH", "BUILD")
OLD = "".join(f"#define NV_TENSORRT_{p} {n} //!< x\n" for p, n in zip(PARTS, "8523", strict=True))
NEW = (
    "#define TRT_MAJOR_ENTERPRISE 10\n#define TRT_MINOR_ENTERPRISE 13\n#define TRT_PATCH_ENTERPRISE 3\n"
    "#define TRT_BUILD_ENTERPRISE 9\n"
) + "".join(f"#define NV_TENSORRT_{p} TRT_{p}_ENTERPRISE //!< x\n" for p in PARTS)


# ---- building ----


def test_everything_that_is_missing_is_named_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CXX", "CUDACXX", "TENSORRT_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(plugin_build.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(BackendError) as caught:
        find_tools(tmp_path)
    message = str(caught.value)
    for word in ("CMake 3.20", "C++17 compiler", "nvcc (JetPack: apt install", "TensorRT's headers under"):
        assert f"no {word}" in message
    assert "--tensorrt-root" in message


def test_the_version_of_the_headers_is_read_in_both_spellings(tmp_path):
    assert headers_version(headers(tmp_path / "old", OLD) / "include") == "8.5.2.3"
    assert headers_version(headers(tmp_path / "new", NEW) / "include") == "10.13.3.9"
    with pytest.raises(BackendError, match="no version in it"):
        headers_version(headers(tmp_path / "none", "// nothing") / "include")


def test_headers_are_looked_for_where_the_root_says(tmp_path, monkeypatch):
    root = headers(tmp_path / "trt", NEW)
    assert find_headers(root) == root / "include"
    assert find_headers(root / "include") == root / "include"
    assert find_headers(tmp_path) is None
    monkeypatch.setenv("TENSORRT_ROOT", str(root))
    assert find_headers() == root / "include"


def test_an_old_cmake_is_no_cmake(tmp_path, monkeypatch):
    script = tmp_path / "cmake"
    script.write_text("#!/bin/sh\necho cmake version 3.16.3\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin")
    monkeypatch.setattr(plugin_build.sys, "executable", str(tmp_path / "none" / "python"))
    assert plugin_build._find_cmake() is None


@pytest.mark.parametrize("said", ["orin", "8.7", "87;89", ""])
def test_architectures_that_are_none_are_refused(said):
    with pytest.raises(UsageError, match="arch: got"):
        plugin_build._architectures(said)


def fake_project(folder: Path, listing: str) -> Path:
    folder.mkdir()
    (folder / "CMakeLists.txt").write_text(listing)
    return folder


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """This machine's CMake with headers that only have a version, and no nvcc needed."""
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("no CMake: install it to build the plugin library")
    found = plugin_build.Tools(Path(cmake), Path("/bin/true"), tmp_path, "10.13.3.9")
    monkeypatch.setattr(plugin_build, "find_tools", lambda *_: found)
    return found


@pytest.mark.optional
def test_a_failed_build_tells_the_compilers_words_and_keeps_the_log(tmp_path, tools, monkeypatch):
    project = fake_project(tmp_path / "project", 'message(FATAL_ERROR "the words")\n')
    monkeypatch.setattr(plugin_build, "sources_folder", lambda: project)
    with pytest.raises(BackendError, match=r"build-plugin: configuring: got CMake Error.*The whole log: ") as caught:
        build_plugin(tmp_path / "out")
    log = Path(str(caught.value).rpartition("log: ")[2])
    assert "the words" in log.read_text()
    log.unlink()
    assert not (tmp_path / "out").exists()


@pytest.mark.optional
def test_a_library_that_does_not_open_is_refused_and_nothing_is_left(tmp_path, tools, monkeypatch):
    listing = """cmake_minimum_required(VERSION 3.20)
project(fake LANGUAGES NONE)
message(STATUS "Architectures: sm_87, PTX compute_87")
add_custom_target(all_of_it ALL COMMAND ${CMAKE_COMMAND} -E touch libnformer_plugins.so)
"""
    monkeypatch.setattr(plugin_build, "sources_folder", lambda: fake_project(tmp_path / "project", listing))
    with pytest.raises(BackendError, match=r"file too short.*expected a library that opens"):
        build_plugin(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.optional
def test_the_library_is_really_built_and_found(tmp_path, monkeypatch):
    roots = [*os.environ.get("NFORMER_TENSORRT_ROOTS", "").split(os.pathsep), os.environ.get("TENSORRT_ROOT", "")]
    root = next((r for r in roots if r and find_headers(r)), None)
    if find_nvcc() is None or find_headers(root) is None:
        pytest.skip("no nvcc or no TensorRT headers: install the CUDA toolkit and libnvinfer-dev, or set TENSORRT_ROOT")
    built = build_plugin(tensorrt_root=root, architectures="87")
    library = built.library
    assert library.parent == plugin_library.default_folder(int(built.facts.tensorrt.partition(".")[0]))
    assert find_plugin() == library
    assert built.sha256 == sha256_file(library)
    assert (built.facts.architectures, built.facts.ptx) == (("87",), "87")
    assert read_plugin(library) == built.facts
    assert "Used " in (library.parent / "build.log").read_text()  # what ptxas tells of registers
    assert read_manifest(library.parent, "plugin")["architectures"] == ["87"]


# ---- finding and loading ----


def test_a_library_is_found_by_its_hash(tmp_path, monkeypatch):
    assert find_plugin(10) is None
    for major, data in ((10, b"ten"), (11, b"eleven")):
        folder = plugin_library.default_folder(major)
        folder.mkdir(parents=True)
        (folder / plugin_library.LIBRARY).write_bytes(data)
    eleven = plugin_library.default_folder(11) / plugin_library.LIBRARY
    assert find_plugin(11) == eleven
    assert find_plugin(None, sha256_file(eleven)) == eleven
    assert find_plugin(10, sha256_file(eleven)) is None
    monkeypatch.setenv(plugin_library.ENVIRONMENT, str(eleven.parent))
    assert find_plugin(10) == eleven
    monkeypatch.setenv(plugin_library.ENVIRONMENT, "none")
    assert find_plugin(11) is None


def test_facts_come_from_a_manifest_that_holds(tmp_path):
    library = tmp_path / plugin_library.LIBRARY
    library.write_bytes(b"a library")
    assert read_plugin(library) is None
    write_manifest(tmp_path, "plugin", {"tensorrt": "10.3.0"})
    assert read_plugin(library).tensorrt == "10.3.0"
    library.write_bytes(b"b library")
    with pytest.raises(ArtifactError, match="got sha256"):
        read_plugin(library)


def test_the_doctor_tells_the_library_and_survives_a_changed_one(tmp_path, monkeypatch):
    from nformer_edge.targets.doctor import doctor

    def check():
        return next(c for c in doctor().checks if c.name == "TensorRT plugin library")

    assert "build-plugin" in check().hint
    library = tmp_path / plugin_library.LIBRARY
    library.write_bytes(b"a library")
    write_manifest(tmp_path, "plugin", {"tensorrt": "10.3.0", "architectures": ["87", "89"]})
    monkeypatch.setenv(plugin_library.ENVIRONMENT, str(library))
    assert check().found == f"{library} (TensorRT 10.3.0, sm_87, sm_89)"
    library.write_bytes(b"b library")
    assert not check().ok
    assert "Build it again" in check().hint


def test_a_library_of_other_bytes_is_never_opened(tmp_path):
    library = tmp_path / plugin_library.LIBRARY
    library.write_bytes(b"a library")

    class Untouched:
        def __getattr__(self, name):
            raise AssertionError(name)

    with pytest.raises(ArtifactError, match=r"got sha256 \w+\.\.\., expected 000000000000"):
        load_plugin(Untouched(), library, "0" * 64)


def test_the_command_prints_what_was_built(tmp_path, monkeypatch, capsys):
    from nformer_edge.cli import main

    facts = plugin_library.PluginManifest("10.13.3.9", "13.0.88", ("87",), "87")
    built = plugin_build.Plugin(Path("x.so"), "ab" * 32, facts, Path("x.log"), found=False)
    monkeypatch.setattr(plugin_build, "build_plugin", lambda *_, **__: built)
    assert main(["build-plugin", "--json"]) == 0
    assert plugin_build.Plugin.from_json(json.loads(capsys.readouterr().out)) == built
    assert main(["build-plugin", "-o", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "machine code for sm_87; PTX of compute_87" in text
    assert "NFORMER_EDGE_PLUGINS=x.so" in text
