"""The range of a tensor that errs least in 8 bits, by a histogram of its values. Needs numpy alone.

onnxruntime has no such method. This is what NVIDIA's pytorch-quantization and ModelOpt call ``mse``, for unsigned
activations with a zero point: the ends of the range are drawn in until clipping costs more than finer steps gain.
"""

from __future__ import annotations

import numpy as np

#: Steps between the lowest and the highest of 256 levels.
_STEPS = 255

#: Shares of an end that are tried.
_SHARES = np.linspace(0.1, 1.0, 91)

#: The two ends depend on each other: a second round settles them.
_ROUNDS = 2


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
