"""One TensorRT of a version's own names, on a GPU that the tests play, and what is built with it."""

from __future__ import annotations

from helpers import fake_tensorrt
from nformer_edge.backends.spec import BuildSpec
from nformer_edge.backends.tensorrt import build as tensorrt
from nformer_edge.backends.tensorrt import network
from nformer_edge.backends.tensorrt.cuda import Gpu
from nformer_edge.backends.tensorrt.plugin import library as plugin_library
from nformer_edge.exporting.bundle import open_bundle
from nformer_edge.quantize.prepare import prepare

GPU = Gpu("Fake Orin", "8.7", 16)


class Bench:
    """One TensorRT on one GPU, a bundle, and what is built of it."""

    def __init__(self, bundle, folder, monkeypatch, version):
        self.machine = fake_tensorrt.Machine()
        self.trt = fake_tensorrt.fake_tensorrt(version, self.machine)
        self.bundle, self.folder = bundle, folder
        numbers = tuple(int(n) for n in self.trt.__version__.split(".")[:3])
        monkeypatch.setattr(tensorrt, "installed_version", lambda: numbers)
        monkeypatch.setattr(network, "gpu_facts", lambda ordinal: GPU)
        monkeypatch.setattr(plugin_library, "_loaded", {})
        self.library = folder / plugin_library.LIBRARY
        self.library.write_bytes(b"a library")
        monkeypatch.setenv(plugin_library.ENVIRONMENT, str(self.library))
        self.out = folder / "engine"
        self.out.mkdir()

    def build(self, precision="fp32", calib_data=None, **settings):
        wanted, bundle = BuildSpec(backend="tensorrt", precision=precision, **settings), open_bundle(self.bundle)
        low = prepare(bundle, wanted, calib_data, self.out, half=True)
        return tensorrt.build(bundle, self.out, wanted, low, self.plan)

    def plan(self, job):
        return network.build_plan(self.trt, job)
