"""The step ``qat``: trained with fake quantization exactly where the INT8 export puts Q/DQ."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from nformer_edge.compress.distil import Distil
from nformer_edge.compress.step import Work, exported
from nformer_edge.core.errors import UsageError
from nformer_edge.core.machine import saturates_int8
from nformer_edge.core.spec import CalibrationMethod, ModelSpec, check_at_least
from nformer_edge.exporting.bundle import open_bundle
from nformer_edge.exporting.trace import trace_backbone
from nformer_edge.model.backbone import Backbone
from nformer_edge.ops.bodies import DEFAULT_OPSET
from nformer_edge.quantize.calibrate import measure_ranges
from nformer_edge.quantize.learned import QuantizedBackbone, Where
from nformer_edge.quantize.values import TABLE
from nformer_edge.training.config import BackboneConfig
from nformer_edge.training.history import Epoch

_TRAIN = BackboneConfig(epochs=1, p=8, lr=5e-5, weight_decay=0.0, schedule="cosine", warmup=0)


@dataclass(frozen=True)
class Qat:
    """The last step: weights and ranges learn to lose less in INT8.

    Ranges are calibrated on training images first, then learned. They are left in ``<stem>.calibration.json``:
    ``build-engine BUNDLE --int8 --calib-data`` with that file makes the engine that was trained, of a bundle exported
    without further options.

    Args:
        where: whose Q/DQ, ``cpu`` or ``tensorrt``.
        calib_method: of the start.
        calib_num: training images that it is calibrated with.
        reduce_range: for the CPU, 7-bit weights; this machine's CPU decides by default.
        distil: how it learns what the teacher says.
    """

    where: Where = "cpu"
    calib_method: CalibrationMethod = "percentile"
    calib_num: int = 256
    reduce_range: bool | None = None
    distil: Distil = field(default_factory=lambda: Distil(train=_TRAIN))

    def __post_init__(self) -> None:
        check_at_least("calib_num", self.calib_num, 1)
        if self.distil.maps:
            raise UsageError("distil.maps", self.distil.maps, "0", "The quantized trunk pools its maps: leave it out.")

    def run(self, backbone: Backbone, work: Work) -> tuple[Backbone, list[Epoch]]:
        """See `Step.run`."""
        spec = work.spec.preprocess
        records = work.lessons.images.records
        chosen = np.random.default_rng(work.seed).permutation(len(records))[: self.calib_num]
        size, paths = (spec.height, spec.width), [records[i].path for i in chosen]
        graph = trace_backbone(backbone, size, DEFAULT_OPSET).SerializeToString()
        ranges = measure_ranges(graph, paths, spec, [self.calib_method])[self.calib_method]
        reduced = saturates_int8() if self.reduce_range is None else self.reduce_range
        module = QuantizedBackbone(backbone, size, DEFAULT_OPSET, ranges, self.where, reduce_range=reduced)
        _, rows = self.distil.run(module, work)
        learned, table = module.learned()
        if work.compute.leads:
            replace(table, backbone_sha256=_exported_sha256(learned, work.spec)).save(work.beside(TABLE))
        return learned, rows


def _exported_sha256(backbone: Backbone, spec: ModelSpec) -> str:
    """Of the backbone's file in a bundle of this model."""
    with tempfile.TemporaryDirectory() as folder:
        return open_bundle(exported(backbone, spec, Path(folder))).backbone_sha256
