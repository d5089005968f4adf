"""Times of the kernels on a GPU, against floors that the device itself sets and against dense torch.

Floors are arithmetic over what the device reports or shows in the same run:
  arithmetic: H * N * M * R fused multiply-adds over (multiprocessors * lanes * the highest clock).
  memory: bytes that must move once, over the bandwidth of a device-to-device copy timed in the same run.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_operators
import torch
from gpu_operators import Kernels, draw, integers, plain_attention, scores_of
from torch import Tensor

#: Float32 lanes of one multiprocessor by compute capability times ten (CUDA programming guide, throughput table).
LANES = {
    72: 64,
    75: 64,
    80: 64,
    86: 128,
    87: 128,
    88: 128,
    89: 128,
    90: 128,
    100: 128,
    103: 128,
    110: 128,
    120: 128,
    121: 128,
}


def median_ms(run: Callable[[], Any], repeats: int = 20) -> float:
    """Median time on the device after three warm-up runs."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return float(sorted(times)[len(times) // 2])


def copy_bytes_per_ms(mib: int = 512) -> float:
    """Bytes read plus written in a millisecond by a device-to-device copy."""
    source = torch.empty(mib << 20, dtype=torch.uint8, device=gpu_operators.DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / median_ms(lambda: target.copy_(source))


def multiply_adds_per_ms() -> tuple[float, str]:
    """Float32 fused multiply-adds in a millisecond at the highest clock that the driver reports."""
    device = torch.cuda.get_device_properties(0)
    arch = device.major * 10 + device.minor
    if arch not in LANES:
        return math.nan, f"unknown: lanes of sm_{arch} are not in the table"
    clock = _clock_mhz()
    lanes = device.multi_processor_count * LANES[arch]
    return lanes * clock * 1e3, f"{device.multi_processor_count} x {LANES[arch]} lanes at {clock:.0f} MHz"


def _clock_mhz() -> float:
    told = getattr(torch.cuda.get_device_properties(0), "clock_rate", 0)  # kHz; some versions of torch have it
    found = shutil.which("nvidia-smi")
    if told or found is None:
        return told / 1e3 if told else math.nan
    command = [found, "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits", "--id=0"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    try:
        return float(answer)
    except ValueError:  # a Jetson answers [N/A]
        return math.nan


def time_top_k(kernels: Kernels, rows: int, factors: int, heads: int, k: int, dtype: torch.dtype) -> dict[str, Any]:
    a, b = draw(9, heads, rows, factors, dtype=dtype), draw(10, heads, rows, factors, dtype=dtype)
    out = torch.empty((heads, rows, k), dtype=torch.int32, device=gpu_operators.DEVICE)
    got = median_ms(lambda: kernels.row_top_k(a, b, k, out), 20 if rows < 100_000 else 3)
    rate, how = multiply_adds_per_ms()
    floor = heads * rows * rows * factors / rate
    row = {"what": f"RowTopK N={rows} R={factors} H={heads} k={k} {dtype}", "ms": got, "arithmetic_floor_ms": floor}
    return {**row, "times_the_floor": got / floor, "floor": how}


def time_attention(kernels: Kernels, rows: int, heads: int, size: int, k: int, dtype: torch.dtype) -> dict[str, Any]:
    """The memory floor: factors, lists and values read once and the result written once."""
    a, b = draw(11, heads, rows, 5, dtype=dtype), draw(12, heads, rows, 5, dtype=dtype)
    v = draw(13, heads, rows, size, dtype=dtype)
    neighbors = kernels.row_top_k(a, a, k)
    out = torch.empty_like(v)
    got = median_ms(lambda: kernels.attention(a, b, v, neighbors, 0.1, out=out))
    moved = sum(x.numel() * x.element_size() for x in (a, b, v, neighbors, out))
    floor = moved / copy_bytes_per_ms()
    row = {"what": f"Attention N={rows} R=5 H={heads} D={size} K={k} {dtype}", "ms": got, "memory_floor_ms": floor}
    return {**row, "times_the_floor": got / floor}


class KernelOperators:
    """The kernels as `nformer_edge.ops.operators` wants them."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels

    def row_top_k(self, a: Tensor, b: Tensor, k: int) -> Tensor:
        return self.kernels.row_top_k(a.contiguous(), b.contiguous(), k)

    def reciprocal_neighbor_attention(
        self, a: Tensor, b: Tensor, v: Tensor, neighbors: Tensor, scale: float | None = None
    ) -> Tensor:
        scale = 1 / math.sqrt(v.shape[2]) if scale is None else scale
        return self.kernels.attention(a.contiguous(), b.contiguous(), v.contiguous(), neighbors.contiguous(), scale)


class DenseOperators:
    """The same in torch with the N x N matrix, a head at a time."""

    def row_top_k(self, a: Tensor, b: Tensor, k: int) -> Tensor:
        return torch.stack([(x @ y.T).topk(k, dim=1).indices.to(torch.int32) for x, y in zip(a, b, strict=True)])

    def reciprocal_neighbor_attention(
        self, a: Tensor, b: Tensor, v: Tensor, neighbors: Tensor, scale: float | None = None
    ) -> Tensor:
        scale = 1 / math.sqrt(v.shape[2]) if scale is None else scale
        lists = neighbors.expand(len(a), -1, -1)
        heads = [slice(h, h + 1) for h in range(len(a))]
        return torch.cat([plain_attention(a[h], b[h], v[h], lists[h], scale) for h in heads])


def time_head(kernels: Kernels, rows: int, rule: str) -> dict[str, Any]:
    """A whole NFormer head, projections and all, with the kernels and with dense torch; outputs are compared."""
    what = f"head N={rows}, 4 layers, 2 heads, k=20, {rule} rule"
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    try:
        from nformer_edge.core.spec import HeadSpec
        from nformer_edge.model.nformer import NFormer
        from nformer_edge.ops.contract import draw_landmarks
        from nformer_edge.ops.operators import using
    except ImportError as e:
        return {"what": what, "skipped": f"no package {e.name}"}
    finally:
        sys.path.pop(0)
    torch.manual_seed(0)
    spec = HeadSpec(rule=rule)  # type: ignore[arg-type]
    head = NFormer(spec).eval().to(gpu_operators.DEVICE)
    x = draw(20, rows, spec.features)
    landmarks = torch.from_numpy(draw_landmarks(rows, spec.layers, spec.landmarks, 0)).to(gpu_operators.DEVICE)

    def run(chosen: Any) -> Tensor:
        with torch.inference_mode(), using(chosen):
            return head(x, landmarks)

    ours, dense = KernelOperators(kernels), DenseOperators()
    row = {"what": what, "ms": median_ms(lambda: run(ours), 5)}
    try:
        row["dense_torch_ms"] = median_ms(lambda: run(dense), 3)
        cosine = torch.nn.functional.cosine_similarity(run(ours), run(dense))
    except torch.cuda.OutOfMemoryError:
        return {**row, "skipped": "dense torch: out of memory"}
    # Float32 cannot tell some k-th neighbors apart, so single rows may differ; most must not.
    agree = float(cosine.quantile(0.01))
    return {**row, "times_faster": row["dense_torch_ms"] / row["ms"], "cosine_to_dense_p1": agree, "ok": agree >= 0.999}


def complete(kernels: Kernels, rows: int) -> dict[str, Any]:
    """Both operators once at a size whose dense matrix would fill any GPU; rows drawn at random against float64."""
    a, b = draw(17, 1, rows, 5), draw(18, 1, rows, 5)
    out = torch.empty((1, rows, 20), dtype=torch.int32, device=gpu_operators.DEVICE)
    ms = median_ms(lambda: kernels.row_top_k(a, b, 20, out), 1)
    some = integers(19, 0, rows, 64, dtype=torch.int64)
    scores = scores_of(a[:, some], b)
    best = scores.topk(20, dim=2).values
    worst = float((scores.gather(2, out[:, some].long()) - best).abs().max())
    del scores, best
    v = draw(21, 1, rows, 128)
    attention_ms = median_ms(lambda: kernels.attention(a, b, v, out, 0.1), 1)
    y = kernels.attention(a, b, v, out, 0.1)
    row = {"what": f"N={rows} R=5 H=1 k=20 D=128 once", "ms": ms + attention_ms, "row_top_k_ms": ms}
    return {**row, "largest_score_error": worst, "ok": worst <= 1e-4 and bool(y.isfinite().all())}


#: What issue-sized runs are measured against: a row's name begins so, its figure, and the bound.
GOALS = (
    ("RowTopK N=19281 R=5", "times_the_floor", "at most", 3.0),
    ("Attention N=19281", "times_the_floor", "at most", 2.0),
    ("head N=19281", "times_faster", "at least", 20.0),
)


def judge(times: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each goal that a row speaks to: what, figure, bound, and ``met``, which is None where it could not be told."""
    judged = []
    for row in times:
        for start, key, how, bound in GOALS:
            if row["what"].startswith(start):
                value = row.get(key, math.nan)
                met = None if math.isnan(value) else (value <= bound if how == "at most" else value >= bound)
                judged.append(
                    {"what": row["what"], "figure": key, "value": value, "bound": f"{how} {bound:g}", "met": met}
                )
    return judged


def measure(kernels: Kernels, quick: bool) -> list[dict[str, Any]]:
    """Every row; `quick` leaves the large sizes out."""
    times = []
    for dtype in gpu_operators.TYPES:
        times.append(time_top_k(kernels, 19_281, 5, 2, 20, dtype))
        times.append(time_attention(kernels, 19_281, 2, 128, 20, dtype))
    if not quick:
        times.append(time_top_k(kernels, 19_281, 256, 1, 20, torch.float32))
        times += [time_head(kernels, 19_281, rule) for rule in ("features", "affinity")]
        times.append(complete(kernels, 1_000_000))
    return times
