"""What every backend file says of itself, and what it is given to build from."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nformer_edge.core.artifact import MANIFEST, read_manifest, read_verified, sha256_file
from nformer_edge.core.spec import (
    Backend,
    CalibrationMethod,
    ModelSpec,
    Precision,
    check_at_least,
    check_choice,
)
from nformer_edge.onnx.bundle import HEAD, KIND, model_spec


@dataclass(frozen=True)
class EngineSpec:
    """What to build.

    Args:
        backend: who will run it; ``auto`` takes the best that this machine has.
        precision: of the backbone. The head stays FP32 on onnxruntime.
        calib_method: for INT8, how ranges follow from activations.
        calib_num: for INT8, calibration images at most.
        batch: the batch that the builder tunes for; onnxruntime runs any.
        workspace: GiB that a builder may use; its own choice if None.
        device: where it will run.
        seed: of the choice of calibration images.
        reduce_range: for INT8 on onnxruntime, 7-bit weights; None decides by this machine's CPU.
    """

    backend: Backend = "auto"
    precision: Precision = "fp32"
    calib_method: CalibrationMethod = "percentile"
    calib_num: int = 256
    batch: int = 32
    workspace: float | None = None
    device: str = "cpu"
    seed: int = 0
    reduce_range: bool | None = None

    def __post_init__(self) -> None:
        check_choice("backend", self.backend, ("auto", "onnxruntime", "tensorrt", "tensorrt-rtx"))
        check_choice("precision", self.precision, ("fp32", "fp16", "int8"))
        check_choice("calib_method", self.calib_method, ("minmax", "entropy", "percentile"))
        check_at_least("calib_num", self.calib_num, 1)
        check_at_least("batch", self.batch, 1)
        check_at_least("seed", self.seed, 0)
        if self.workspace is not None:
            check_at_least("workspace", self.workspace, 0.0)


@dataclass(frozen=True)
class OpenBundle:
    """A verified bundle: its folder, manifest and model."""

    folder: Path
    manifest: Mapping[str, Any]
    spec: ModelSpec
    sha256: str

    @property
    def has_head(self) -> bool:
        """Whether there is an NFormer head beside the backbone."""
        return HEAD in self.manifest["files"]

    def copy(self, name: str, folder: Path) -> None:
        """Writes one of the bundle's files, verified once more, into `folder`."""
        (folder / name).write_bytes(read_verified(self.folder, self.manifest, name))


def open_bundle(path: str | os.PathLike[str]) -> OpenBundle:
    """Verifies a bundle.

    Raises:
        ArtifactError: naming what does not hold.
    """
    folder = Path(path)
    manifest = read_manifest(folder, KIND)
    return OpenBundle(folder, manifest, model_spec(str(folder), manifest), sha256_file(folder / MANIFEST))


class BackendModule(Protocol):
    """What each backend's file has."""

    NAME: str
    PRECISIONS: tuple[str, ...]

    @staticmethod
    def lacking() -> tuple[str, ...]:
        """What this machine lacks for it, in words that follow "got"; empty if it can build."""
        ...

    @staticmethod
    def build(bundle: OpenBundle, folder: Path, spec: EngineSpec, images: Sequence[str] | None) -> dict[str, Any]:
        """Writes the engine's files into `folder`. Returns the manifest's fields that only the backend knows."""
        ...
