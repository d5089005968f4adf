"""What calibration measures: of each tensor, between which values it lies. Measured once, used by every placement."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
from onnxruntime.quantization.calibrate import TensorData, TensorsData, create_calibrator
from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry
from tqdm import tqdm

from nformer_edge.core.errors import ArtifactError
from nformer_edge.core.spec import CalibrationMethod as Method
from nformer_edge.core.spec import PreprocessSpec
from nformer_edge.core.terminal import PROGRESS
from nformer_edge.data.batches import iter_batches

#: Images whose activations are held at once. All of them are kept while a histogram is taken: ResNet-50 at 256 x 128
#: makes some 100 MB an image.
CALIBRATION_BATCH = 4

KIND = "calibration"

METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
}

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
                f"calibration: {tensor}", got="no range", expected="one for every tensor that is quantised",
                mend="Calibrate again, with this bundle.",
            )  # fmt: skip
        return max(abs(value) for value in self.table[tensor])

    def for_onnxruntime(self) -> TensorsData:
        """The same as onnxruntime's quantizer takes it."""
        data = {
            name: TensorData(lowest=np.float32(low), highest=np.float32(high))
            for name, (low, high) in self.table.items()
        }
        return TensorsData(METHODS[self.method], data)

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
            where, got=f"no readable table of ranges ({e})", expected="an engine's calibration.json",
            mend="Calibrate again.",
        ) from e  # fmt: skip


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


def calibrate(model: Path, paths: Sequence[str], spec: PreprocessSpec, method: Method = "percentile") -> Ranges:
    """Runs the calibration images through a float backbone.

    Args:
        model: a file that `quant_pre_process` wrote, the same that Q/DQ will be placed in.
        paths: calibration images.
        spec: their preprocessing.
        method: how ranges follow from activations.

    Raises:
        DataError: for an image that cannot be read.
    """
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):  # onnxruntime prints
        calibrator = create_calibrator(
            model, CALIBRATED, augmented_model_path=str(Path(folder) / "augmented.onnx"),
            calibrate_method=METHODS[method], extra_options={"symmetric": False},
        )  # fmt: skip
        reader = BatchReader(paths, spec)
        for start in range(len(reader)):  # one batch at a time, for every method
            reader.set_range(start, start + 1)
            calibrator.collect_data(reader)
        measured = calibrator.compute_data()
        table = {name: tuple(float(np.asarray(v).item()) for v in data.range_value) for name, data in measured.items()}
    return Ranges(method, table)  # type: ignore[arg-type]
