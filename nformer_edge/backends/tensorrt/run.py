"""TensorRT engines, run on one GPU: checked against the machine first, then by as many threads as ask.

What is refused, and by which name: a byte that is not the manifest's, another TensorRT, another GPU, another plugin
library, no driver, a plan that TensorRT cannot read, images beyond the profile, memory that is not enough.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from nformer_edge.backends.runner import check_head_input, check_images, model_name
from nformer_edge.backends.tensorrt.compatibility import (
    check_gpu,
    check_version,
    no_plugin,
    telling_rebuild,
    unverified_manifest,
)
from nformer_edge.backends.tensorrt.cuda import Device
from nformer_edge.backends.tensorrt.engine import BACKBONE_STAGE, HEAD_STAGE, Stage, StageSpec, make_logger
from nformer_edge.backends.tensorrt.plugin.library import find_plugin, load_plugin
from nformer_edge.core.artifact import MANIFEST, read_manifest, read_verified, sha256_file
from nformer_edge.core.errors import ArtifactError, BackendError, UsageError
from nformer_edge.core.spec import check_at_least
from nformer_edge.exporting.bundle import model_spec, read_golden

#: The Python package of each backend.
PACKAGES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}

#: Threads that compute at once unless told otherwise: one copies while another computes.
CONTEXTS = 2


class TensorRTRunner:
    """See `backends.runner.Runner`. The GPU is touched when the context is entered, and not before.

    Args:
        path: folder of an engine built for TensorRT or TensorRT-RTX.
        device: ``cuda:0`` or another; the first GPU if None.
        contexts: threads that compute at once, `CONTEXTS` if None; each takes the memory of one execution context.
        graphs: keep shapes that come again as CUDA graphs.

    Raises:
        ArtifactError: if the folder does not verify, or is of a version that this one does not know.
        UsageError: for a device that is no GPU.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        device: str | None = None,
        contexts: int | None = None,
        graphs: bool = True,
    ) -> None:
        contexts = CONTEXTS if contexts is None else contexts
        check_at_least("contexts", contexts, 1)
        self._path = os.fspath(path)
        self._ordinal = _ordinal(device)
        self._contexts, self._graphs = contexts, graphs
        with telling_rebuild(self._path, unverified_manifest(self._path)):
            self._manifest = read_manifest(path, "engine")
        self.backend = str(self._manifest.get("backend"))
        if self.backend not in PACKAGES:
            raise ArtifactError(
                self._path,
                f"an engine for {self.backend}",
                " or ".join(PACKAGES),
                "Open it with nformer_edge.backends.open.open_model.",
            )
        self.spec = model_spec(self._path, self._manifest)
        self.name = model_name(self.spec)
        self.sha256 = sha256_file(os.path.join(self._path, MANIFEST))
        self.checkpoint = str(self._manifest.get("checkpoint_sha256", ""))
        self.has_head = HEAD_STAGE.file in self._manifest["files"]
        if self.has_head != (self.spec.head is not None):
            raise ArtifactError(
                self._path,
                f"{HEAD_STAGE.file} {'without' if self.has_head else 'missing for'} a head in its spec",
                "both or neither",
                "Build the engine again.",
            )
        self.precision: Mapping[str, str] = self._manifest["precision"]
        self.landmark_seed = int(self._manifest["landmark_seed"])
        self.native = False
        self._device: Device | None = None
        self._runtime: Any = None
        self._stages: dict[str, Stage] = {}
        self._opening = threading.Lock()
        self._last = threading.local()

    def __enter__(self) -> TensorRTRunner:
        with self._opening:
            if self._device is None:
                self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    @property
    def copy_ms(self) -> tuple[float, float]:
        """Of this thread's last call: what the copies to the GPU and back took, in ms."""
        device_ms = self.device_ms
        return device_ms.get("copy_in", 0.0), device_ms.get("copy_out", 0.0)

    @property
    def device_ms(self) -> dict[str, float]:
        """Of this thread's last call: ``copy_in``, ``compute`` and ``copy_out`` in ms, by the GPU's own events."""
        return getattr(self._last, "device_ms", {})

    def golden(self) -> dict[str, np.ndarray]:
        """See `Runner.golden`."""
        return read_golden(self._path, self._manifest)

    def embed(self, images: np.ndarray) -> np.ndarray:
        """See `Runner.embed`. Batches above the profile are split; smaller ones are filled up with their last image."""
        images = check_images(images, self.spec)
        stage = self._stage(BACKBONE_STAGE)
        limits = stage.limits["images"]
        least, most = limits.least[0], limits.most[0]
        parts = [stage.run({"images": _filled(images[i : i + most], least)}) for i in range(0, len(images), most)]
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
        related, device_ms = self._stage(HEAD_STAGE).run({"features": features, "landmarks": landmarks})
        self._add_up([device_ms])
        return related

    def _add_up(self, parts: list[dict[str, float]]) -> None:
        self._last.device_ms = {key: sum(part[key] for part in parts) for key in parts[0]}

    def _load_plugin(self, trt: Any) -> None:
        sha256 = str(self._manifest.get("plugin_sha256") or "")
        if not sha256:
            return
        major = int(str(trt.__version__).partition(".")[0])
        library = find_plugin(major, sha256, beside=Path(self._path))
        if library is None:
            raise no_plugin(self._path, self._manifest, sha256, str(find_plugin(major) or ""))
        load_plugin(trt, library, sha256)

    def _open(self) -> None:
        """Everything that can be refused without reading a plan is refused first."""
        package = PACKAGES[self.backend]
        trt = _import_tensorrt(package, self.backend)
        check_version(self._path, self._manifest, package, str(trt.__version__))
        device = Device(self._ordinal)
        check_gpu(self._path, self._manifest, device)
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
        if (self._manifest.get("spec") or {}).get("version_compat"):
            self._runtime.engine_host_code_allowed = True  # such a plan carries its runtime; its hash has been checked
        for stage in (BACKBONE_STAGE, HEAD_STAGE) if self.has_head else (BACKBONE_STAGE,):
            plan = read_verified(self._path, self._manifest, stage.file)
            self._stages[stage.name] = Stage(
                trt, self._runtime, logger, device, stage, plan, contexts=self._contexts, graphs=self._graphs
            )

    def _stage(self, spec: StageSpec) -> Stage:
        self.__enter__()
        return self._stages[spec.name]

    def _close(self) -> None:
        if self._device is not None:
            with self._device.current():
                for stage in self._stages.values():
                    stage.close()
                self._stages.clear()
                self._runtime = None
        self._device = None


def _ordinal(device: str | None) -> int:
    if device is None:
        return 0
    name, _, number = device.partition(":")
    if name != "cuda" or not (number.isdecimal() or device == "cuda"):
        raise UsageError("device", device, "a GPU, such as cuda:0", "Choose one, or leave it out.")
    return int(number or 0)


def _import_tensorrt(package: str, backend: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as e:
        found = "not installed" if e.name == package else str(e)
        raise BackendError(
            package,
            found,
            f"{package}, to run this engine",
            f"pip install 'nformer-edge[{backend}]'; on a Jetson, JetPack brings it: use the system's Python.",
        ) from e


def _filled(images: np.ndarray, least: int) -> np.ndarray:
    """At least so many images: the last one again and again. An image's result does not depend on the others."""
    missing = least - len(images)
    return images if missing <= 0 else np.concatenate([images, np.repeat(images[-1:], missing, axis=0)])
