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
from nformer_edge.core.journal import Journal
from nformer_edge.data.calibration import calibration_images, calibration_sha256
from nformer_edge.data.records import Dataset
from nformer_edge.exporting.bundle import BACKBONE
from nformer_edge.quantize.spec import EngineSpec, OpenBundle

if TYPE_CHECKING:
    from nformer_edge.quantize.ranges import Ranges
    from nformer_edge.quantize.score import Judge

TABLE = "calibration.json"

#: What `--calib-method` calls the choice by held-out people.
AUTO = "auto"


@dataclass
class Calibration:
    """Where the ranges come from: images, or another engine's table.

    Args:
        images: to calibrate with.
        settings: method, seed and the like, for the manifest.
        table: another engine's `TABLE`, in place of images.
        judge: for the method ``auto``, who says which ranges are best.
        reduce_range: for the method ``auto``, whether weights have 7 bits.
        journal: keeps what was measured.
    """

    images: Sequence[str] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    table: Path | None = None
    judge: Judge | None = None
    reduce_range: bool = False
    journal: Journal = field(default_factory=Journal)
    _measured: tuple[Ranges, dict[str, Any]] | None = None

    def ranges(self, bundle: OpenBundle, folder: Path) -> tuple[Ranges, dict[str, Any]]:
        """The ranges of the bundle's backbone, written to `TABLE` in `folder`, and the manifest's field.

        Raises:
            ArtifactError: for a table of another backbone, or none.
            DataError: for an image that cannot be read.
            BackendError: without the packages that measure.
        """
        ranges, facts = self.measure(bundle)
        backbone = bundle.manifest["files"][BACKBONE]["sha256"]
        atomic_write_json(folder / TABLE, ranges.to_json() | {"backbone_sha256": backbone, "calibration": facts})
        return ranges, facts

    def measure(self, bundle: OpenBundle) -> tuple[Ranges, dict[str, Any]]:
        """The same without a file; measured once."""
        require_packages()
        if self._measured is None:
            self._measured = self._read(self.table, bundle) if self.table is not None else self._measure(bundle)
        return self._measured

    def _measure(self, bundle: OpenBundle) -> tuple[Ranges, dict[str, Any]]:
        from nformer_edge.quantize.place_cpu import measure_all_ranges
        from nformer_edge.quantize.ranges import METHODS, read_ranges

        wanted = METHODS if self.settings["method"] == AUTO else (self.settings["method"],)
        backbone = bundle.folder / BACKBONE
        images = calibration_sha256(self.images, {"backbone": bundle.manifest["files"][BACKBONE]["sha256"]})
        tables = self.journal.recall(
            {"calibration": images, "methods": wanted},
            lambda: {
                method: ranges.to_json()
                for method, ranges in measure_all_ranges(backbone, self.images, bundle.spec.preprocess, wanted).items()
            },
        )
        found = {method: read_ranges(json.dumps(table).encode(), "journal") for method, table in tables.items()}
        facts = {**self.settings, "num": len(self.images)}
        if self.settings["method"] == AUTO:
            facts |= self._choose(bundle, found)
        facts["sha256"] = calibration_sha256(self.images, {**self.settings, "num": len(self.images)})
        return found[facts["method"]], facts

    def _choose(self, bundle: OpenBundle, found: dict[str, Ranges]) -> dict[str, Any]:
        """The best method, and what it was chosen by."""
        from nformer_edge.quantize.place_cpu import place_for_cpu

        judge = self.judge
        assert judge is not None, "choose_calibration gave one"
        scores = {}
        for method, ranges in found.items():
            scores[method] = self.journal.recall(
                {**judge.facts(), "ranges": ranges.to_json(), "reduce_range": self.reduce_range, "score": []},
                lambda ranges=ranges: judge.score(  # type: ignore[misc]
                    place_for_cpu(bundle.folder / BACKBONE, ranges, reduce_range=self.reduce_range).without()
                ),
            )
        last = judge.stages[-1]
        best = max(scores, key=lambda m: (round(scores[m][last]["mAP"], 3), scores[m][last]["overlap_at_10"]))
        return {"method": best, AUTO: {"stage": last, "held_out": judge.held_out.describe(), "scores": scores}}

    @staticmethod
    def _read(table: Path, bundle: OpenBundle) -> tuple[Ranges, dict[str, Any]]:
        from nformer_edge.quantize.ranges import read_ranges

        data = table.read_bytes()
        ranges = read_ranges(data, str(table))
        found = json.loads(data)
        ours = bundle.manifest["files"][BACKBONE]["sha256"]
        if found.get("backbone_sha256") != ours:
            raise ArtifactError(
                str(table),
                "ranges of another backbone",
                f"those of {BACKBONE}, sha256 {ours[:12]}...",
                "Calibrate again: --calib-data DIR",
            )
        return ranges, found["calibration"]


def require_packages() -> None:
    """Raises BackendError without the packages that calibrate and quantize."""
    try:
        import nformer_edge.quantize.place_cpu  # noqa: F401
    except ImportError as e:
        raise BackendError(
            "INT8", f"no package {e.name}", "onnx and onnxruntime", "pip install 'nformer-edge[quant]'"
        ) from e


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
            "calib_data",
            "none",
            "images to calibrate INT8 with",
            "Name the dataset that the model was trained on: --calib-data DIR",
        )
    if not isinstance(source, Dataset) and Path(source).suffix == ".json":
        return Calibration(table=Path(source))
    images = calibration_images(source, spec.calib_num, spec.seed, force=force)
    return Calibration(images, {"method": spec.calib_method, "seed": spec.seed, "forced": force})
