"""The calibration of an INT8 build: measured once from images, kept beside the engine, and taken up by later builds."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nformer_edge.core.artifact import atomic_write_json
from nformer_edge.core.errors import ArtifactError, BackendError, UsageError
from nformer_edge.data.records import Dataset
from nformer_edge.engine.backend import EngineSpec, OpenBundle
from nformer_edge.onnx.bundle import BACKBONE
from nformer_edge.onnx.calibration import calibration_images, calibration_sha256

if TYPE_CHECKING:
    from nformer_edge.onnx.ranges import Ranges

TABLE = "calibration.json"


@dataclass(frozen=True)
class Calibration:
    """Where the ranges come from: images, or another engine's table."""

    images: Sequence[str] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    table: Path | None = None

    def ranges(self, bundle: OpenBundle, folder: Path) -> tuple[Ranges, dict[str, Any]]:
        """The ranges of the bundle's backbone, written to `TABLE` in `folder`, and the manifest's field.

        Raises:
            ArtifactError: for a table of another backbone, or none.
            DataError: for an image that cannot be read.
            BackendError: without the packages that measure.
        """
        try:
            from nformer_edge.onnx.quantize import measure_ranges
        except ImportError as e:
            raise BackendError(
                "INT8", got=f"no package {e.name}", expected="onnx and onnxruntime",
                mend="pip install 'nformer-edge[quant]'",
            ) from e  # fmt: skip
        if self.table is not None:
            return self._read(self.table, bundle, folder)
        method = self.settings["method"]
        ranges = measure_ranges(bundle.folder / BACKBONE, self.images, bundle.spec.preprocess, method)
        facts = {**self.settings, "num": len(self.images)}
        facts["sha256"] = calibration_sha256(self.images, facts)
        _write(folder, ranges, bundle, facts)
        return ranges, facts

    def _read(self, table: Path, bundle: OpenBundle, folder: Path) -> tuple[Ranges, dict[str, Any]]:
        from nformer_edge.onnx.ranges import read_ranges

        data = table.read_bytes()
        ranges = read_ranges(data, str(table))
        found = json.loads(data)
        ours = bundle.manifest["files"][BACKBONE]["sha256"]
        if found.get("backbone_sha256") != ours:
            raise ArtifactError(
                str(table), got="ranges of another backbone", expected=f"those of {BACKBONE}, sha256 {ours[:12]}...",
                mend="Calibrate again: --calib-data DIR",
            )  # fmt: skip
        _write(folder, ranges, bundle, found["calibration"])
        return ranges, found["calibration"]


def _write(folder: Path, ranges: Ranges, bundle: OpenBundle, facts: dict[str, Any]) -> None:
    backbone = bundle.manifest["files"][BACKBONE]["sha256"]
    atomic_write_json(folder / TABLE, ranges.to_json() | {"backbone_sha256": backbone, "calibration": facts})


def choose_calibration(
    source: Dataset | str | os.PathLike[str] | None, spec: EngineSpec, *, force: bool = False
) -> Calibration:
    """What calibrates an INT8 build.

    Args:
        source: dataset, folder of images, or an earlier engine's `calibration.json`.
        spec: method, number and seed.
        force: accept query or gallery images.

    Raises:
        UsageError: without a source.
        DataError: for images that cannot be used.
    """
    if source is None:
        raise UsageError(
            "calib_data", got="none", expected="images to calibrate INT8 with",
            mend="Name the dataset that the model was trained on: --calib-data DIR",
        )  # fmt: skip
    if not isinstance(source, Dataset) and Path(source).suffix == ".json":
        return Calibration(table=Path(source))
    images = calibration_images(source, spec.calib_num, spec.seed, force=force)
    return Calibration(images, {"method": spec.calib_method, "seed": spec.seed, "forced": force})
