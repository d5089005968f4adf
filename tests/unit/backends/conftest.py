"""A machine with a GPU that the CPU plays, and engines for it."""

from __future__ import annotations

import dataclasses
import sys

import pytest
from helpers import fake_gpu

from nformer_edge.core.artifact import read_manifest, sha256_file, write_manifest
from nformer_edge.exporting.bundle import ModelManifest


@pytest.fixture
def gpu(monkeypatch):
    """A machine with pycuda, TensorRT 10.3 and one GPU; `install` puts another TensorRT in its place."""
    from nformer_edge.backends.tensorrt import context as tensorrt_context
    from nformer_edge.backends.tensorrt import cuda
    from nformer_edge.backends.tensorrt.plugin import library as plugin_library

    machine = fake_gpu.FakeGpu()

    def install(version="10.3.0", name="tensorrt"):
        monkeypatch.setitem(sys.modules, name, fake_gpu.fake_tensorrt(machine, version, name))

    for name, module in fake_gpu.fake_pycuda(machine).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(tensorrt_context, "driver_library", lambda: fake_gpu.FakeDriverLibrary(machine))
    monkeypatch.setattr(cuda, "_contexts", {})
    monkeypatch.setattr(plugin_library, "_loaded", {})
    monkeypatch.delenv(plugin_library.ENVIRONMENT, raising=False)
    machine.install = install
    install()
    return machine


@pytest.fixture
def plugin_library(tmp_path, monkeypatch):
    """A file that stands for the plugin library, named in the environment."""
    from nformer_edge.backends.tensorrt.plugin import library as plugin_library

    library = tmp_path / plugin_library.LIBRARY
    library.write_bytes(b"a library")
    monkeypatch.setenv(plugin_library.ENVIRONMENT, str(library))
    return library


@pytest.fixture
def make_engine(tiny_bundle, tmp_path, plugin_library):
    """Writes an engine's folder as a builder for TensorRT does, from the tiny bundle."""

    def make(batch=(1, 4, 8), gallery=(2, 50, 200), io="float32", plans=None, **fields):
        folder = tmp_path / "engine"
        folder.mkdir(exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        bundle = read_manifest(tiny_bundle, "bundle")
        images = [[n, 3, 64, 32] for n in batch]
        rows = [[n, 32] for n in gallery]
        written = {
            "backbone.engine": fake_gpu.fake_plan(
                (tiny_bundle / "backbone.onnx").read_bytes(),
                {"images": ("INPUT", io, [-1, 3, 64, 32]), "features": ("OUTPUT", io, [-1, 32])},
                {"images": images},
            ),
            "nformer.engine": fake_gpu.fake_plan(
                (tiny_bundle / "nformer.onnx").read_bytes(),
                {
                    "features": ("INPUT", "float32", [-1, 32]),
                    "landmarks": ("INPUT", "int32", [2, 3]),
                    "embeddings": ("OUTPUT", "float32", [-1, 32]),
                },
                {"features": rows},
            ),
        } | (plans or {})
        for name, data in written.items():
            (folder / name).write_bytes(data)
        (folder / "golden.npz").write_bytes((tiny_bundle / "golden.npz").read_bytes())
        inherited = [field.name for field in dataclasses.fields(ModelManifest)]
        known = {
            "backend": "tensorrt",
            "why": "as asked",
            "bundle_sha256": "0" * 64,
            "versions": {"tensorrt": "10.3.0"},
            "built_for": {"gpu": "Fake Orin", "compute_capability": "8.7", "multiprocessors": 16},
            "precision": {"backbone": "fp32", "head": "fp32"},
            "plugin_sha256": sha256_file(plugin_library),
            "spec": {"backend": "tensorrt", "precision": "fp16"},
        }
        write_manifest(folder, "engine", {key: bundle[key] for key in inherited} | known | fields)
        return folder

    return make


@pytest.fixture(scope="session")
def fakes():
    """The module that plays GPU, pycuda and TensorRT."""
    return fake_gpu
