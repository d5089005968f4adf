"""How ranges are measured: calibration images run through a float backbone once, for every method that is asked for.

onnxruntime measures minmax, entropy and percentile. ``mse`` is ours, as NVIDIA's pytorch-quantization and ModelOpt have
it, for unsigned activations with a zero point: the ends of the range are drawn in until clipping costs more than finer
steps gain.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
from onnxruntime.quantization.calibrate import HistogramCollector, create_calibrator
from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry
from onnxruntime.quantization.shape_inference import quant_pre_process
from tqdm import tqdm

from nformer_edge.core.spec import CalibrationMethod as Method
from nformer_edge.core.spec import PreprocessSpec
from nformer_edge.core.terminal import PROGRESS
from nformer_edge.data.batches import iter_batches
from nformer_edge.quantize.placement import as_exported
from nformer_edge.quantize.values import Ranges

#: Images whose activations are held at once. All of them are kept while a histogram is taken: ResNet-50 at 256 x 128
#: makes some 100 MB an image.
CALIBRATION_BATCH = 4

METHODS: tuple[Method, ...] = get_args(Method)

#: Bins of a histogram, as onnxruntime has them by default: entropy merges a histogram's bins into as many levels.
_FINE_BINS, _COARSE_BINS = 2048, 128

#: Per cent of the values that a range holds by the method percentile, onnxruntime's default.
_PERCENTILE = 99.999

#: Types of nodes whose tensors are measured: all that onnxruntime's quantizer knows.
CALIBRATED = sorted({*QLinearOpsRegistry, *QDQRegistry})

#: For mse: steps between the lowest and the highest of 256 levels, and the shares of an end that are tried.
_STEPS, _SHARES = 255, np.linspace(0.1, 1.0, 91)

#: For mse: the two ends depend on each other, a second round settles them.
_ROUNDS = 2


def measure_ranges(
    backbone: bytes, paths: Sequence[str], spec: PreprocessSpec, methods: Sequence[Method]
) -> dict[Method, Ranges]:
    """Runs the calibration images through a float backbone, once whatever the number of methods.

    Args:
        backbone: its ONNX file, as `export` wrote it.
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
            with_shapes(backbone, Path(folder)),
            CALIBRATED,
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            calibrate_method=kind,
            extra_options={"symmetric": False},
        )
        histograms = _Histograms(methods)
        if not extremes_alone:
            calibrator.collector = histograms
        reader = _BatchReader(paths, spec)
        for start in range(len(reader)):  # one batch at a time, for every method
            reader.set_range(start, start + 1)
            calibrator.collect_data(reader)
        if extremes_alone:
            lows_and_highs = {name: data.range_value for name, data in calibrator.compute_data().items()}
            return {"minmax": Ranges("minmax", _plain(lows_and_highs))}
        return {method: Ranges(method, _plain(histograms.ranges(method))) for method in methods}


def with_shapes(backbone: bytes, folder: Path) -> Path:
    """A file in `folder`, with the types and shapes of all tensors, which calibrator and quantizer look up."""
    source, prepared = folder / "backbone.onnx", folder / "prepared.onnx"
    onnx.save(as_exported(onnx.load_from_string(backbone)), source)
    quant_pre_process(source, prepared, skip_optimization=True, skip_symbolic_shape=True)
    return prepared


def _plain(table: Mapping[str, Sequence[Any]]) -> dict[str, tuple[float, float]]:
    """By name: onnxruntime collects tensors in a set, whose order is another in each process."""
    return {name: (float(np.asarray(r[0]).item()), float(np.asarray(r[1]).item())) for name, r in sorted(table.items())}


class _BatchReader(CalibrationDataReader):  # type: ignore[misc]
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


def mse_range(
    counts: np.ndarray,  # int64 [bins]
    edges: np.ndarray,  # float [bins + 1]
    low: float,
    high: float,
) -> tuple[float, float]:
    """The ends, within `low` and `high`, whose 8 bits have the least squared error over a histogram.

    Args:
        counts: values in each bin.
        edges: of the bins, ascending.
        low: the least value seen.
        high: the greatest.

    Returns:
        Least and greatest value that is represented; 0 lies between them.
    """
    values = (edges[:-1] + edges[1:]).astype(np.float64) / 2
    values[(edges[:-1] <= 0) & (edges[1:] > 0)] = 0.0  # ReLU's zeros: they are represented exactly
    used = counts > 0
    values, counts = np.clip(values[used], low, high), counts[used]
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    if low == high:
        return low, high
    ends = _best(values, counts, low * _SHARES, high * _SHARES)  # together first: the longer end hides the other's gain
    for _ in range(_ROUNDS):
        if ends[1] > 0:
            ends = ends[0], _best(values, counts, ends[0], high * _SHARES)[1]
        if ends[0] < 0:
            ends = _best(values, counts, low * _SHARES, ends[1])[0], ends[1]
    return ends


def _best(
    values: np.ndarray, counts: np.ndarray, low: np.ndarray | float, high: np.ndarray | float
) -> tuple[float, float]:
    low, high = np.broadcast_arrays(low, high)
    errors = ((quantized(values[None], low[:, None], high[:, None]) - values) ** 2 * counts).sum(axis=1)
    best = len(errors) - 1 - int(np.argmin(errors[::-1]))  # of equal ones the widest
    return float(low[best]), float(high[best])


def quantized(values: np.ndarray, low: np.ndarray | float, high: np.ndarray | float) -> np.ndarray:
    """`values` as 8 bits represent them: rounded to 256 levels, one of which is 0, and clipped."""
    step = (np.asarray(high, np.float64) - low) / _STEPS
    zero = np.rint(-low / step)
    return (np.clip(np.rint(values / step) + zero, 0, _STEPS) - zero) * step
