"""What calibration measures: of each tensor, between which values it lies. Measured once, used by every placement."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, get_args

import numpy as np
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
from onnxruntime.quantization.calibrate import HistogramCollector, TensorData, TensorsData, create_calibrator
from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry
from tqdm import tqdm

from nformer_edge.core.errors import ArtifactError
from nformer_edge.core.spec import CalibrationMethod as Method
from nformer_edge.core.spec import PreprocessSpec
from nformer_edge.core.terminal import PROGRESS
from nformer_edge.data.batches import iter_batches
from nformer_edge.quantize.mse import mse_range

#: Images whose activations are held at once. All of them are kept while a histogram is taken: ResNet-50 at 256 x 128
#: makes some 100 MB an image.
CALIBRATION_BATCH = 4

KIND = "calibration"

METHODS: tuple[Method, ...] = get_args(Method)

#: Bins of a histogram, as onnxruntime has them by default: entropy merges a histogram's bins into as many levels.
_FINE_BINS, _COARSE_BINS = 2048, 128

#: Per cent of the values that a range holds by the method percentile, onnxruntime's default.
_PERCENTILE = 99.999

#: Types of nodes whose tensors are measured: all that onnxruntime's quantizer knows.
CALIBRATED = sorted({*QLinearOpsRegistry, *QDQRegistry})


@dataclass(frozen=True)
class Ranges:
    """Lowest and highest value of each tensor by its name, as `method` makes them of what was measured."""

    method: Method
    table: dict[str, tuple[float, float]]

    def largest(self, tensor: str) -> float:
        """The range of `tensor` when it is symmetric about 0.

        Raises:
            ArtifactError: if the tensor was not measured.
        """
        if tensor not in self.table:
            raise ArtifactError(
                f"calibration: {tensor}",
                "no range",
                "one for every tensor that is quantized",
                "Calibrate again, with this bundle.",
            )
        return max(abs(value) for value in self.table[tensor])

    def for_onnxruntime(self) -> TensorsData:
        """The same as onnxruntime's quantizer takes it."""
        data = {
            name: TensorData(lowest=np.float32(low), highest=np.float32(high))
            for name, (low, high) in self.table.items()
        }
        return TensorsData(CalibrationMethod.MinMax, data)

    def to_json(self) -> dict[str, Any]:
        """Plain data, for the engine's `calibration.json`."""
        return {"kind": KIND, "method": self.method, "ranges": {name: list(r) for name, r in self.table.items()}}


def read_ranges(data: bytes, where: str) -> Ranges:
    """What `Ranges.to_json` wrote.

    Raises:
        ArtifactError: if it is something else.
    """
    try:
        found = json.loads(data)
        table = {str(name): (float(low), float(high)) for name, (low, high) in found["ranges"].items()}
        if found["kind"] != KIND or found["method"] not in METHODS or not np.isfinite(list(table.values())).all():
            raise ValueError("not a calibration table")
        return Ranges(found["method"], table)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ArtifactError(
            where, f"no readable table of ranges ({e})", "an engine's calibration.json", "Calibrate again."
        ) from e


class BatchReader(CalibrationDataReader):  # type: ignore[misc]
    """Feeds the calibrator one batch at a time and tells it how many there are, so that it never holds two."""

    def __init__(self, paths: Sequence[str], spec: PreprocessSpec, batch: int = CALIBRATION_BATCH) -> None:
        self._count = math.ceil(len(paths) / batch)
        self._batches: Iterator[np.ndarray] = iter_batches(paths, spec, batch)
        self._left = 0
        self._bar = tqdm(total=len(paths), desc="calibrating", unit="img", **PROGRESS)

    def __len__(self) -> int:
        return self._count

    def set_range(self, start_index: int, end_index: int) -> None:
        """The next `end_index` - `start_index` batches may be taken."""
        self._left = end_index - start_index

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch, or None at the end of the range."""
        if self._left == 0:
            return None
        self._left -= 1
        images = next(self._batches)
        self._bar.update(len(images))
        return {"images": images}


def calibrate(
    model: Path, paths: Sequence[str], spec: PreprocessSpec, methods: Sequence[Method] = ("percentile",)
) -> dict[Method, Ranges]:
    """Runs the calibration images through a float backbone, once whatever the number of methods.

    Args:
        model: a file that `quant_pre_process` wrote, the same that Q/DQ will be placed in.
        paths: calibration images.
        spec: their preprocessing.
        methods: how ranges follow from activations.

    Returns:
        Each method's ranges.

    Raises:
        DataError: for an image that cannot be read.
    """
    extremes_alone = set(methods) == {"minmax"}  # they are reduced inside the graph: no histogram is needed
    kind = CalibrationMethod.MinMax if extremes_alone else CalibrationMethod.Percentile
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):  # onnxruntime prints
        calibrator = create_calibrator(
            model,
            CALIBRATED,
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            calibrate_method=kind,
            extra_options={"symmetric": False},
        )
        histograms = _Histograms(methods)
        if not extremes_alone:
            calibrator.collector = histograms
        reader = BatchReader(paths, spec)
        for start in range(len(reader)):  # one batch at a time, for every method
            reader.set_range(start, start + 1)
            calibrator.collect_data(reader)
        if extremes_alone:
            return {"minmax": Ranges("minmax", _plain(_lows_and_highs(calibrator.compute_data())))}
        return {method: Ranges(method, _plain(histograms.ranges(method))) for method in methods}


def _lows_and_highs(measured: TensorsData) -> dict[str, Any]:
    return {name: data.range_value for name, data in measured.items()}


def _plain(table: Mapping[str, Sequence[Any]]) -> dict[str, tuple[float, float]]:
    return {name: (float(np.asarray(r[0]).item()), float(np.asarray(r[1]).item())) for name, r in table.items()}


class _Histograms:
    """Stands where onnxruntime's calibrator has one collector, and feeds all that the methods need."""

    def __init__(self, methods: Sequence[Method]) -> None:
        rest = {"num_quantized_bins": _COARSE_BINS, "percentile": _PERCENTILE, "scenario": "same", "symmetric": False}
        self._fine = HistogramCollector(method="percentile", num_bins=_FINE_BINS, **rest)
        self._coarse = HistogramCollector(method="entropy", num_bins=_COARSE_BINS, **rest)
        self._fed = [
            c for c, of in ((self._fine, set(METHODS) - {"entropy"}), (self._coarse, {"entropy"})) if of & set(methods)
        ]

    def collect(self, activations: Mapping[str, Any]) -> None:
        """Takes one batch's activations, by the tensors' names."""
        for collector in self._fed:
            collector.collect(activations)

    def ranges(self, method: Method) -> Mapping[str, Sequence[Any]]:
        """Of each tensor lowest and highest value, then whatever onnxruntime adds."""
        if method == "entropy":
            return self._coarse.compute_entropy()
        if method == "percentile":
            return self._fine.compute_percentile()
        found = self._fine.get_histogram_dict()
        if method == "minmax":
            return {name: (low, high) for name, (_, _, low, high, _) in found.items()}
        return {name: mse_range(counts, edges, low, high) for name, (counts, edges, low, high, _) in found.items()}
