"""TensorRT engines, run on one GPU: checked against the machine first, then by as many threads as ask.

What is refused, and by which name: a byte that is not the manifest's, another TensorRT, another GPU, another plugin
library, no driver, a plan that TensorRT cannot read, images beyond the profile, memory that is not enough.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from nformer_edge.backends.engine import BuiltFor, Engine, EngineManifest, how_to_rebuild, open_engine, telling_rebuild
from nformer_edge.backends.runner import check_head_input, check_images, model_name
from nformer_edge.backends.tensorrt.cuda import Device, Gpu
from nformer_edge.backends.tensorrt.plan import BACKBONE, HEAD, Plan, PlanSpec, make_logger
from nformer_edge.backends.tensorrt.plugin.library import ENVIRONMENT, LIBRARY, find_plugin, load_plugin
from nformer_edge.core.errors import ArtifactError, BackendError, UsageError
from nformer_edge.core.machine import version_key
from nformer_edge.core.spec import check_at_least

#: Threads that compute at once unless asked otherwise: one copies while another computes.
CONTEXTS = 2


def run(
    engine: Engine,
    *,
    device: str | None = None,
    intra_op_threads: int | None = None,
    contexts: int | None = None,
    native: bool = True,
) -> TensorRTRunner:
    """See `backends.base.Backend.run`; `native` does not matter to a plan."""
    if intra_op_threads is not None:
        hint = "Set contexts: threads of the caller that compute at once."
        raise UsageError("intra_op_threads", intra_op_threads, "none for a plan", hint)
    return TensorRTRunner(engine, device=device, contexts=contexts)


class TensorRTRunner:
    """See `backends.runner.Runner`. The GPU is touched when the context is entered, and not before.

    Args:
        source: an engine for TensorRT or TensorRT-RTX, or its folder.
        device: ``cuda:0`` or another; the first GPU if None.
        contexts: threads that compute at once, `CONTEXTS` if None; each takes the memory of one execution context.
        graphs: keep shapes that come again as CUDA graphs.

    Raises:
        ArtifactError: if the folder does not verify, or is of a version that this one does not know.
        UsageError: for a device that is no GPU.
    """

    native = False

    def __init__(
        self,
        source: Engine | str | os.PathLike[str],
        *,
        device: str | None = None,
        contexts: int | None = None,
        graphs: bool = True,
    ) -> None:
        self._contexts, self._graphs = CONTEXTS if contexts is None else contexts, graphs
        check_at_least("contexts", self._contexts, 1)
        self._ordinal = gpu_ordinal(device)
        self._opened = opened = open_engine(source)
        self._path, self._manifest = str(opened.folder), opened.manifest
        self.spec, self.has_head = opened.spec, opened.has_head
        self._specs = (BACKBONE, HEAD) if self.has_head else (BACKBONE,)
        plans, expected = {f for f in opened.files.files if f.endswith(".engine")}, {s.file for s in self._specs}
        if plans != expected:
            got = f"the plans {', '.join(sorted(plans)) or 'none'}"
            raise ArtifactError(self._path, got, f"{', '.join(sorted(expected))}, by its spec", "Build it again.")
        self.backend = self._manifest.backend
        self._package = self.backend.replace("-", "_")
        self.name = model_name(self.spec)
        self.sha256, self.checkpoint = opened.sha256, self._manifest.checkpoint_sha256
        self.precision: Mapping[str, str] = self._manifest.precision
        self.landmark_seed, self.accuracy = self._manifest.landmark_seed, self._manifest.accuracy
        self.images_per_person, self.calibrated_on = self._manifest.images_per_person, opened.calibrated_on
        self._device: Device | None = None
        self._runtime: Any = None
        self._plans: dict[str, Plan] = {}
        self._opening = threading.Lock()
        self._last = threading.local()

    def __enter__(self) -> TensorRTRunner:
        with self._opening:
            if self._device is None:
                self._open()
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()

    @property
    def copy_ms(self) -> tuple[float, float]:
        """Of this thread's last call: what the copies to the GPU and back took, in ms."""
        return self.device_ms.get("copy_in", 0.0), self.device_ms.get("copy_out", 0.0)

    @property
    def device_ms(self) -> dict[str, float]:
        """Of this thread's last call: ``copy_in``, ``compute`` and ``copy_out`` in ms, by the GPU's own events."""
        return getattr(self._last, "device_ms", {})

    def golden(self) -> dict[str, np.ndarray]:
        """See `Runner.golden`."""
        return self._opened.golden

    def head_numbers(self) -> dict[str, np.ndarray]:
        """See `Runner.head_numbers`."""
        return self._opened.head_numbers

    def embed(self, images: np.ndarray) -> np.ndarray:
        """See `Runner.embed`. Batches above the profile are split; smaller ones are filled up with their last image."""
        images = check_images(images, self.spec)
        plan = self._plan(BACKBONE)
        limits = plan.limits["images"]
        smallest, largest = limits.min[0], limits.max[0]
        batches = [images[i : i + largest] for i in range(0, len(images), largest)]
        parts = [plan.run({"images": _filled(batch, smallest)}) for batch in batches]
        if not parts:
            return np.empty((0, self.spec.backbone.features), np.float32)
        self._add_up([device_ms for _, device_ms in parts])
        return np.concatenate([features for features, _ in parts])[: len(images)]

    def relate(self, features: np.ndarray, landmarks: np.ndarray | None = None) -> np.ndarray:
        """See `Runner.relate`.

        Raises:
            UsageError: if there are fewer or more images than the head's profile has: they cannot be split.
        """
        features, landmarks = check_head_input(features, landmarks, self.spec, self.landmark_seed)
        if len(features) == 0:
            return features
        related, device_ms = self._plan(HEAD).run({"features": features, "landmarks": landmarks})
        self._add_up([device_ms])
        return related

    def _add_up(self, parts: list[dict[str, float]]) -> None:
        self._last.device_ms = {key: sum(part[key] for part in parts) for key in parts[0]}

    def _load_plugin(self, trt: Any) -> None:
        sha256 = self._manifest.plugin_sha256
        if not sha256:
            return
        major = int(str(trt.__version__).partition(".")[0])
        library = find_plugin(major, sha256, beside=self._opened.folder)
        if library is None:
            raise no_plugin(self._path, self._manifest, str(find_plugin(major) or ""))
        load_plugin(trt, library, sha256)

    def _open(self) -> None:
        """Everything that can be refused without reading a plan is refused first."""
        trt = _import_tensorrt(self._package, self.backend)
        check_version(self._path, self._manifest, self._package, str(trt.__version__))
        device = Device(self._ordinal)
        check_gpu(self._path, self._manifest, device.gpu)
        self._load_plugin(trt)
        self._device = device
        try:
            with device.current(), telling_rebuild(self._path, self._manifest):
                self._deserialize(trt, device)
        except BaseException:
            self._close()
            raise

    def _deserialize(self, trt: Any, device: Device) -> None:
        logger = make_logger(trt)
        self._runtime = trt.Runtime(logger)
        if self._manifest.spec.version_compat:
            self._runtime.engine_host_code_allowed = True  # such a plan carries its runtime; its hash has been checked
        for spec in self._specs:
            data = self._opened.files.files[spec.file]
            plan = Plan(trt, self._runtime, logger, device, spec, data, contexts=self._contexts, graphs=self._graphs)
            self._plans[spec.part] = plan

    def _plan(self, spec: PlanSpec) -> Plan:
        self.__enter__()
        return self._plans[spec.part]

    def _close(self) -> None:
        if self._device is not None:
            with self._device.current():
                for plan in self._plans.values():
                    plan.close()
                self._plans.clear()
                self._runtime = None
        self._device = None


def check_version(where: str, manifest: EngineManifest, package: str, version: str) -> None:
    """Refuses an engine of another TensorRT: `package` is the Python module that runs it, of `version` here.

    Raises:
        BackendError: naming both versions and the command that rebuilds the engine.
    """
    built = manifest.versions.get(package, "")
    if built and (_same_version(built, version) or (manifest.spec.version_compat and _later_minor(built, version))):
        return
    got = f"an engine built with {built or 'a version that its manifest does not have'}"
    raise BackendError(f"{where}: {package}", got, f"{version}, as installed", how_to_rebuild(where, manifest))


def _same_version(built: str, here: str) -> bool:
    """Equal as far as both are known: the packages of some releases leave the build number out."""
    ours, theirs = version_key(built), version_key(here)
    shared = min(len(ours), len(theirs))
    return shared >= 2 and ours[:shared] == theirs[:shared]


def _later_minor(built: str, here: str) -> bool:
    """What NVIDIA promises of a version-compatible plan: later versions of the same major one run it."""
    ours, theirs = version_key(built), version_key(here)
    return ours[:1] == theirs[:1] and ours <= theirs


def check_gpu(where: str, manifest: EngineManifest, gpu: Gpu) -> None:
    """Refuses an engine that was built for another GPU.

    A plan's kernels were chosen by timing them on one model of GPU. ``hardware_compat`` widens that:
    ``same_compute_capability`` to every GPU of that capability, ``ampere_plus`` to 8.0 and later.

    Raises:
        BackendError: naming both GPUs and the command that rebuilds the engine.
    """
    wrong = _differences(manifest.built_for, gpu)
    if wrong:
        got = f"an engine for {', '.join(wrong)}"
        expected = f"one for {gpu.name}, compute capability {gpu.compute_capability}"
        raise BackendError(f"{where}: GPU", got, expected, how_to_rebuild(where, manifest))


def _differences(built: BuiltFor, gpu: Gpu) -> list[str]:
    if built.compute_capabilities:  # TensorRT-RTX, which compiles for all of one capability
        some = ", ".join(built.compute_capabilities)
        return [] if gpu.compute_capability in built.compute_capabilities else [f"compute capability {some}"]
    if built.hardware_compat == "ampere_plus":
        return [] if version_key(gpu.compute_capability) >= (8, 0) else ["compute capability 8.0 and later"]
    if built.compute_capability is None:
        return ["a GPU that its manifest does not name"]
    compared: list[tuple[str, object, object]] = [
        ("compute capability", built.compute_capability, gpu.compute_capability)
    ]
    if built.hardware_compat != "same_compute_capability":
        compared.append(("GPU", built.gpu, gpu.name))
        compared.append(("multiprocessors", built.multiprocessors, gpu.multiprocessors))
    return [f"{name} {ours} (here {here})" for name, ours, here in compared if ours not in (None, here)]


def no_plugin(where: str, manifest: EngineManifest, found: str) -> BackendError:
    """The refusal of a head whose plugin library is not here; `found` is the library that is here instead, or ""."""
    got = f"another library, {found}" if found else f"no {LIBRARY}"
    expected = f"the library that the engine was built with, sha256 {str(manifest.plugin_sha256)[:12]}..."
    hint = f"Name it in {ENVIRONMENT}; or run `nformer-edge build-plugin`. {how_to_rebuild(where, manifest)}"
    return BackendError(f"{where}: plugin", got, expected, hint)


def gpu_ordinal(device: str | None) -> int:
    """0, the first GPU, where none is named. Raises UsageError for a device that is no GPU."""
    name, _, number = (device or "cuda").partition(":")
    if name != "cuda" or not (number.isdecimal() or device in (None, "cuda")):
        raise UsageError("device", device, "a GPU, such as cuda:0", "Choose one, or leave it out.")
    return int(number or 0)


def _import_tensorrt(package: str, backend: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as e:
        got = "not installed" if e.name == package else str(e)
        hint = f"pip install 'nformer-edge[{backend}]'; on a Jetson, JetPack brings it: use the system's Python."
        raise BackendError(package, got, f"{package}, to run this engine", hint) from e


def _filled(images: np.ndarray, count: int) -> np.ndarray:
    """At least `count`: the last one again and again. An image's result does not depend on the others."""
    more = count - len(images)
    return images if more <= 0 else np.concatenate([images, np.repeat(images[-1:], more, axis=0)])
