"""Proves the kernels on a GPU: builds them, compares them with a float64 reference, times them, runs compute-sanitizer.

    python plugins/gpu_check.py                 everything; table on standard output
    python plugins/gpu_check.py --json out.json the same as data too
    python plugins/gpu_check.py --quick         no large sizes

Needs nvcc, a GPU and torch with CUDA; neither TensorRT nor this package. The exit code is 1 where a check fails.

Floors are arithmetic over what the device itself reports or shows in the same run:
  arithmetic: H * N * M * R fused multiply-adds over (multiprocessors * lanes * the clock that torch reports).
  memory: bytes that must move once, over the bandwidth of a device-to-device copy timed in the same run.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import compile_kernels
import torch
from torch import Tensor

#: Float32 lanes of one multiprocessor by compute capability times ten (CUDA programming guide, throughput table).
LANES = {72: 64, 75: 64, 80: 64, 86: 128, 87: 128, 88: 128, 89: 128, 90: 128, 100: 128, 103: 128, 110: 128, 120: 128}
TYPES = {torch.float32: 0, torch.float16: 1}
DEVICE = "cuda"
SHAPES = ((1, 1), (70, 9), (65, 700), (130, 9001))  # N and M; from 8,192 columns on the kernels sample first


class Kernels:
    """The C functions of ``nformer/kernels.h`` on torch tensors; every argument and return is checked."""

    def __init__(self, library: Path) -> None:
        self.lib = ctypes.CDLL(str(library))

    def row_top_k(
        self,
        a: Tensor,  # [H, N, R]
        b: Tensor,  # [H, M, R]
        k: int,
        out: Tensor | None = None,  # int32 [H, N, k]
    ) -> Tensor:
        (heads, rows, factors), columns = a.shape, b.shape[1]
        assert b.shape == (heads, columns, factors)
        assert a.is_contiguous()
        assert b.is_contiguous()
        assert a.dtype == b.dtype
        out = torch.empty((heads, rows, k), dtype=torch.int32, device=a.device) if out is None else out
        sizes = [ctypes.c_int64(n) for n in (heads, rows, columns, factors, k)]
        code = self.lib.nformer_row_top_k(
            _pointer(a), _pointer(b), _pointer(out), *sizes, ctypes.c_int32(TYPES[a.dtype]), _stream()
        )
        assert code == 0, f"row_top_k: CUDA error {code}"
        return out

    def attention(
        self,
        a: Tensor,  # [H, N, R]
        b: Tensor,  # [H, N, R]
        v: Tensor,  # [H, N, D]
        neighbors: Tensor,  # int32 [H or 1, N, K]
        scale: float,
        out: Tensor | None = None,  # [H, N, D]
    ) -> Tensor:
        (heads, rows, factors), size = a.shape, v.shape[2]
        assert b.shape == a.shape
        assert v.shape[:2] == a.shape[:2]
        assert all(x.is_contiguous() for x in (a, b, v, neighbors))
        assert a.dtype == b.dtype == v.dtype
        assert neighbors.dtype == torch.int32
        out = torch.empty_like(v) if out is None else out
        sizes = [ctypes.c_int64(n) for n in (heads, rows, factors, size, neighbors.shape[0], neighbors.shape[2])]
        code = self.lib.nformer_reciprocal_neighbor_attention(
            *(_pointer(x) for x in (a, b, v, neighbors, out)), *sizes,
            ctypes.c_float(scale), ctypes.c_int32(TYPES[a.dtype]), _stream(),
        )  # fmt: skip
        assert code == 0, f"reciprocal_neighbor_attention: CUDA error {code}"
        return out


def _pointer(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def _stream() -> ctypes.c_void_p:
    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)


# ---- reference in float64 ----


def scores_of(a: Tensor, b: Tensor) -> Tensor:  # float64 [H, N, M]
    return a.double() @ b.double().transpose(1, 2)


def reference_top_k(
    scores: Tensor,  # float64 [H, N, M]
    k: int,
) -> Tensor:  # int32 [H, N, k]
    ranked = scores.masked_fill(~scores.isfinite(), -math.inf)
    values, order = ranked.sort(dim=2, descending=True, stable=True)
    chosen = order[:, :, :k].masked_fill(values[:, :, :k] == -math.inf, -1)
    out = torch.full((*scores.shape[:2], k), -1, dtype=torch.int32, device=scores.device)
    out[:, :, : chosen.shape[2]] = chosen.to(torch.int32)
    return out


def reference_attention(a: Tensor, b: Tensor, v: Tensor, neighbors: Tensor, scale: float) -> Tensor:
    heads, rows, _ = v.shape
    mask = torch.zeros((neighbors.shape[0], rows, rows + 1), dtype=torch.bool, device=v.device)
    mask.scatter_(2, neighbors.long().masked_fill(neighbors < 0, rows), True)
    mask = mask[:, :, :rows].expand(heads, rows, rows)
    scores = scores_of(a, b)
    mask = mask & mask.transpose(1, 2) & scores.isfinite()
    scaled = (scores * scale).masked_fill(~mask, -math.inf)
    weights = scaled.softmax(dim=2).masked_fill(~mask, 0.0)  # a row without a neighbour is NaN before the mask
    return weights @ v.double()


# ---- checks ----


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def integers(seed: int, low: int, high: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator).to(DEVICE, dtype)


def check_exact_top_k(kernels: Kernels, shapes: Sequence[tuple[int, int]] = SHAPES) -> list[tuple[str, bool]]:
    """Small integers make every sum exact in float32, so ties and order must agree bit for bit."""
    done = []
    for dtype in TYPES:
        for factors in (1, 2, 4, 5, 7, 8, 13, 16, 17, 64, 256, 300):
            for k in (1, 20, 32, 33, 128):
                for rows, columns in shapes:
                    a = integers(factors, -3, 4, 2, rows, factors, dtype=dtype)
                    b = integers(k, -3, 4, 2, columns, factors, dtype=dtype)
                    same = bool((kernels.row_top_k(a, b, k) == reference_top_k(scores_of(a, b), k)).all())
                    done.append((f"RowTopK {dtype} R={factors} k={k} N={rows} M={columns} exact", same))
    return done


def check_edges(kernels: Kernels, columns: int = 9000) -> list[tuple[str, bool]]:
    done = []
    for factors in (5, 24):
        a, b = draw(1, 1, 40, factors), draw(2, 1, columns, factors)
        empty = kernels.row_top_k(a, b[:, :0].contiguous(), 20)
        done.append((f"RowTopK R={factors} no columns", bool((empty == -1).all())))
        done.append((f"RowTopK R={factors} no rows", kernels.row_top_k(a[:, :0].contiguous(), b, 20).numel() == 0))
        bad = b.clone()
        bad[0, ::3, 0], bad[0, 1::3, 0] = math.nan, math.inf
        got = kernels.row_top_k(a, bad, 20)
        sound = bool(scores_of(a, bad).isfinite().gather(2, got.clamp_min(0).long()).all())
        done.append((f"RowTopK R={factors} never a score that is not finite", sound))
        poisoned = a.clone()
        poisoned[0, 7] = math.nan
        other = torch.arange(40, device=DEVICE) != 7
        alone = kernels.row_top_k(poisoned, b, 20)[0]
        same = torch.equal(alone[other], kernels.row_top_k(a, b, 20)[0][other])
        done.append((f"RowTopK R={factors} a bad row stays alone", same and bool((alone[7] == -1).all())))
        again = [kernels.row_top_k(a, b, 20) for _ in range(5)]
        done.append((f"RowTopK R={factors} the same five times", all(torch.equal(again[0], x) for x in again)))
    return done


def check_attention(kernels: Kernels, rows: int = 333) -> list[tuple[str, bool]]:
    """At most twice the error of plain torch in the same precision, against float64."""
    done = []
    for dtype in TYPES:
        for factors, size, k in ((5, 128, 20), (1, 3, 1), (16, 130, 33), (256, 64, 128), (5, 260, 64)):
            a, b = draw(3, 2, rows, factors, dtype=dtype), draw(4, 2, rows, factors, dtype=dtype)
            v = draw(5, 2, rows, size, dtype=dtype)
            neighbors = reference_top_k(scores_of(a, a), k)
            scale = 1 / math.sqrt(size)
            for lists in (neighbors, neighbors[:1].contiguous()):
                expected = reference_attention(a, b, v, lists, scale)
                got = kernels.attention(a, b, v, lists, scale)
                ours = float((got.double() - expected).abs().max())
                plain = float((plain_attention(a, b, v, lists, scale).double() - expected).abs().max())
                name = f"Attention {dtype} R={factors} D={size} K={k} lists={len(lists)}"
                done.append((f"{name}: error {ours:.1e}, torch {plain:.1e}", ours <= max(2 * plain, 1e-6)))
                again = kernels.attention(a, b, v, lists, scale)
                done.append((f"{name} the same twice", torch.equal(got, again)))
    alone = torch.full((1, 9, 4), -1, dtype=torch.int32, device=DEVICE)
    zero = kernels.attention(draw(6, 1, 9, 5), draw(7, 1, 9, 5), draw(8, 1, 9, 32), alone, 1.0)
    done.append(("Attention of rows without neighbours is exactly zero", bool((zero == 0).all())))
    return done


def plain_attention(a: Tensor, b: Tensor, v: Tensor, neighbors: Tensor, scale: float) -> Tensor:
    """Dense torch in the precision of the input, scores in float32."""
    heads, rows, _ = v.shape
    mask = torch.zeros((neighbors.shape[0], rows, rows + 1), dtype=torch.bool, device=v.device)
    mask.scatter_(2, neighbors.long().masked_fill(neighbors < 0, rows), True)
    mask = mask[:, :, :rows].expand(heads, rows, rows)
    mask = mask & mask.transpose(1, 2)
    scores = (a.float() @ b.float().transpose(1, 2) * scale).masked_fill(~mask, -math.inf)
    return (scores.softmax(dim=2).masked_fill(~mask, 0.0) @ v.float()).to(v.dtype)


# ---- times ----


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
    source = torch.empty(mib << 20, dtype=torch.uint8, device=DEVICE)
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
    found = shutil.which("nvidia-smi")
    if found is None:
        return math.nan
    command = [found, "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits", "--id=0"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    try:
        return float(answer)
    except ValueError:  # a Jetson answers [N/A]
        return math.nan


def time_top_k(kernels: Kernels, rows: int, factors: int, heads: int, k: int, dtype: torch.dtype) -> dict[str, Any]:
    a, b = draw(9, heads, rows, factors, dtype=dtype), draw(10, heads, rows, factors, dtype=dtype)
    out = torch.empty((heads, rows, k), dtype=torch.int32, device=DEVICE)
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
    got = median_ms(lambda: kernels.attention(a, b, v, neighbors, 0.1, out))
    moved = sum(x.numel() * x.element_size() for x in (a, b, v, neighbors, out))
    floor = moved / copy_bytes_per_ms()
    row = {"what": f"Attention N={rows} R=5 H={heads} D={size} K={k} {dtype}", "ms": got, "memory_floor_ms": floor}
    return {**row, "times_the_floor": got / floor}


def time_against_dense(kernels: Kernels, rows: int, heads: int, size: int, k: int) -> dict[str, Any]:
    """Both operators of one layer against torch with the N x N matrix, a head at a time."""
    a, b, v = draw(14, heads, rows, 5), draw(15, heads, rows, 5), draw(16, heads, rows, size)

    def ours() -> None:
        kernels.attention(a, b, v, kernels.row_top_k(a, b, k), 0.1)

    def dense() -> None:
        for h in range(heads):
            neighbors = (a[h] @ b[h].T).topk(k, dim=1).indices.to(torch.int32)[None]
            plain_attention(a[h : h + 1], b[h : h + 1], v[h : h + 1], neighbors, 0.1)

    sparse_ms, dense_ms = median_ms(ours), median_ms(dense, 5)
    return {"what": f"one layer N={rows} H={heads}", "ms": sparse_ms, "dense_torch_ms": dense_ms,
            "times_faster": dense_ms / sparse_ms}  # fmt: skip


def complete(kernels: Kernels, rows: int) -> dict[str, Any]:
    """One run at a size whose dense matrix would fill any GPU; rows drawn at random are compared with float64."""
    a, b = draw(17, 1, rows, 5), draw(18, 1, rows, 5)
    out = torch.empty((1, rows, 20), dtype=torch.int32, device=DEVICE)
    ms = median_ms(lambda: kernels.row_top_k(a, b, 20, out), 1)
    some = integers(19, 0, rows, 64, dtype=torch.int64)
    scores = scores_of(a[:, some], b)
    best = scores.topk(20, dim=2).values
    worst = float((scores.gather(2, out[:, some].long()) - best).abs().max())
    return {"what": f"RowTopK N={rows} R=5 H=1 k=20 once", "ms": ms, "largest_score_error": worst, "ok": worst <= 1e-4}


# ---- the whole ----


def sanitize(library: Path) -> str:
    """compute-sanitizer over the checks in a second process; what it lacks where it is absent."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        return "skipped: no compute-sanitizer"
    for kind in ("memcheck", "racecheck", "initcheck", "synccheck"):
        command = [tool, "--tool", kind, "--error-exitcode", "3", "--launch-timeout", "0"]
        command += [sys.executable, __file__, "--only-smoke", str(library)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return f"failed: {kind}\n{(done.stdout + done.stderr)[-4000:]}"
    return "passed"


def smoke(kernels: Kernels) -> None:
    """Each kernel a few times, small: for compute-sanitizer, which is slow."""
    for dtype in TYPES:
        for factors in (1, 5, 8, 16, 40):
            for k in (3, 100):
                a, b = draw(1, 1, 70, factors, dtype=dtype), draw(2, 1, 8300, factors, dtype=dtype)
                kernels.row_top_k(a, b, k)
        for size, k in ((64, 8), (33, 70)):
            a, v = draw(3, 2, 90, 5, dtype=dtype), draw(4, 2, 90, size, dtype=dtype)
            kernels.attention(a, a, v, kernels.row_top_k(a, a, k), 0.2)
    torch.cuda.synchronize()


def run(library: Path, quick: bool) -> dict[str, Any]:
    kernels = Kernels(library)
    checks = check_exact_top_k(kernels) + check_edges(kernels) + check_attention(kernels)
    times = []
    for dtype in TYPES:
        times.append(time_top_k(kernels, 19_281, 5, 2, 20, dtype))
        times.append(time_attention(kernels, 19_281, 2, 128, 20, dtype))
    if not quick:
        times.append(time_top_k(kernels, 19_281, 256, 1, 20, torch.float32))
        times.append(time_against_dense(kernels, 19_281, 2, 128, 20))
        times.append(complete(kernels, 1_000_000))
    checks += [(t["what"], t["ok"]) for t in times if "ok" in t]
    device = torch.cuda.get_device_properties(0)
    return {
        "kind": "gpu-check",
        "machine": {"gpu": device.name, "arch": f"sm_{device.major}{device.minor}", "torch": torch.__version__},
        "checks": {"passed": sum(ok for _, ok in checks), "failed": [name for name, ok in checks if not ok]},
        "times": times,
        "sanitizer": sanitize(library),
    }


def show(result: dict[str, Any]) -> None:
    machine, checks = result["machine"], result["checks"]
    print(f"{machine['gpu']} ({machine['arch']}), torch {machine['torch']}")
    print(f"checks: {checks['passed']} passed, {len(checks['failed'])} failed; compute-sanitizer {result['sanitizer']}")
    for name in checks["failed"]:
        print(f"  FAILED {name}")
    for row in result["times"]:
        rest = ", ".join(f"{k} {v:.3g}" for k, v in row.items() if isinstance(v, float) and k != "ms")
        print(f"  {row['what']}: {row['ms']:.3f} ms ({rest})")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--quick", action="store_true", help="leave the large sizes out")
    parser.add_argument("--only-smoke", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "gpu-check: got no GPU that torch can use, expected one. Run it on a machine with a GPU.", file=sys.stderr
        )
        return 2
    if args.only_smoke:
        smoke(Kernels(args.only_smoke))
        return 0
    nvcc = compile_kernels.find_nvcc()
    if nvcc is None:
        print("gpu-check: got no nvcc, expected one. Install the CUDA toolkit or set NVCC.", file=sys.stderr)
        return 2
    major, minor = torch.cuda.get_device_capability()
    with tempfile.TemporaryDirectory() as build:
        objects, figures = compile_kernels.compile_all(nvcc, [major * 10 + minor], Path(build))
        library = Path(build) / "libnformer_kernels.so"
        compile_kernels.link_shared(nvcc, objects, library)
        print(compile_kernels.table(figures), flush=True)
        result = run(library, args.quick)
    show(result)
    if args.json:
        temporary = args.json.with_suffix(".tmp")
        temporary.write_text(json.dumps(result, indent=1) + os.linesep)
        temporary.replace(args.json)
    return 1 if result["checks"]["failed"] or result["sanitizer"].startswith("failed") else 0


if __name__ == "__main__":
    sys.exit(main())
