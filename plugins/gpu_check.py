"""Proves the kernels on a GPU: builds them, compares them with a float64 reference, times them, runs compute-sanitizer.

    python plugins/gpu_check.py                 everything; table on standard output
    python plugins/gpu_check.py --json out.json the same as data too
    python plugins/gpu_check.py --quick         no large sizes

Needs nvcc, a GPU and torch with CUDA; neither TensorRT nor this package. Where TensorRT is there too, engines are built
and judged (gpu_engines.py). The exit code is 1 where a check fails; a goal that is not met is told, not failed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import compile_kernels
import gpu_engines
import gpu_operators
import gpu_times
import torch
from gpu_operators import (
    TYPES,
    Kernels,
    draw,
    integers,
    plain_attention,
    reference_attention,
    reference_gate,
    reference_top_k,
    scores_of,
)

SHAPES = ((1, 1), (70, 9), (65, 700), (130, 9001))  # N and M; from 8,192 columns on the kernels sample first


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
        other = torch.arange(40, device=gpu_operators.DEVICE) != 7
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
    alone = torch.full((1, 9, 4), -1, dtype=torch.int32, device=gpu_operators.DEVICE)
    zero = kernels.attention(draw(6, 1, 9, 5), draw(7, 1, 9, 5), draw(8, 1, 9, 32), alone, 1.0)
    done.append(("Attention of rows without neighbors is exactly zero", bool((zero == 0).all())))
    return done


def check_gate(kernels: Kernels, rows: int = 333) -> list[tuple[str, bool]]:
    """The gated attention: at most twice the error of plain torch in float32, against float64."""
    done = []
    cameras = integers(9, -1, 3, rows, dtype=torch.int32)
    for dtype in TYPES:
        for factors, size, k in ((5, 128, 20), (1, 3, 1), (256, 65, 128)):
            a, b, v = (draw(seed, 2, rows, d, dtype=dtype) for seed, d in ((3, factors), (4, factors), (5, size)))
            neighbors, scale = reference_top_k(scores_of(a, a), k), 1 / math.sqrt(factors)
            for t, known in ((integers(6, -2, 3, 2, rows), None), (integers(7, -2, 3, 1, rows), cameras)):
                for lists in (neighbors, neighbors[:1].contiguous()):
                    given = (a, b, v, lists, scale, t, known, 0.5)
                    expected, got = reference_gate(*given), kernels.attention(*given)
                    ours = float((got.double() - expected).abs().max())
                    plain = float((reference_gate(*given, torch.float32).to(dtype).double() - expected).abs().max())
                    name = f"Gate {dtype} R={factors} D={size} K={k} lists={len(lists)} cameras={known is not None}"
                    done.append((f"{name}: error {ours:.1e}, torch {plain:.1e}", ours <= max(2 * plain, 1e-5)))
                    done.append((f"{name} the same twice", torch.equal(got, kernels.attention(*given))))
    return done


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
            lists, t, cameras = kernels.row_top_k(a, a, k), draw(5, 1, 90), integers(6, -1, 3, 90, dtype=torch.int32)
            kernels.attention(a, a, v, lists, 0.2)
            kernels.attention(a, a, v, lists, 0.2, t)
            kernels.attention(a, a, v, lists, 0.2, t, cameras, 0.5)
    torch.cuda.synchronize()


def run(library: Path, quick: bool, engines: bool) -> dict[str, Any]:
    kernels = Kernels(library)
    checks = check_exact_top_k(kernels) + check_edges(kernels) + check_attention(kernels) + check_gate(kernels)
    times = gpu_times.measure(kernels, quick)
    checks += [(t["what"], t["ok"]) for t in times if "ok" in t]
    device = torch.cuda.get_device_properties(0)
    result = {
        "kind": "gpu-check",
        "machine": {"gpu": device.name, "arch": f"sm_{device.major}{device.minor}", "torch": torch.__version__},
        "checks": {"passed": sum(ok for _, ok in checks), "failed": [name for name, ok in checks if not ok]},
        "times": times,
        "goals": gpu_times.judge(times),
        "sanitizer": sanitize(library),
    }
    if not engines:
        return {**result, "engines": {"skipped": "as asked"}}
    with tempfile.TemporaryDirectory() as folder:
        return {**result, "engines": gpu_engines.check_engines(Path(folder))}


def failed(result: dict[str, Any]) -> bool:
    """Whether anything that must hold does not."""
    wrong = result["checks"]["failed"] or gpu_engines.failures(result["engines"])
    return bool(wrong) or result["sanitizer"].startswith("failed")


def show(result: dict[str, Any]) -> None:
    machine, checks = result["machine"], result["checks"]
    print(f"{machine['gpu']} ({machine['arch']}), torch {machine['torch']}")
    print(f"checks: {checks['passed']} passed, {len(checks['failed'])} failed; compute-sanitizer {result['sanitizer']}")
    for name in checks["failed"]:
        print(f"  FAILED {name}")
    for row in result["times"]:
        told = f"{row['ms']:.3f} ms" if "ms" in row else ""
        rest = ", ".join(f"{k} {v:.3g}" for k, v in row.items() if isinstance(v, float) and k != "ms")
        print(f"  {row['what']}: {told} ({rest}) {row.get('skipped', '')}".rstrip())
    for goal in result["goals"]:
        word = {True: "met", False: "NOT MET", None: "could not be told"}[goal["met"]]
        print(f"  goal: {goal['what']}: {goal['figure']} {goal['value']:.3g}, {goal['bound']}: {word}")
    gpu_engines.show(result["engines"])


def _plain(value: Any) -> Any:
    """Without NaN and infinity, which JSON has not: None stands for what could not be told."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--quick", action="store_true", help="leave the large sizes out")
    parser.add_argument("--no-engines", action="store_true", help="leave TensorRT out even where it is there")
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
        result = run(library, args.quick, not args.no_engines)
    show(result)
    if args.json:
        temporary = args.json.with_suffix(".tmp")
        temporary.write_text(json.dumps(_plain(result), indent=1, allow_nan=False) + os.linesep)
        temporary.replace(args.json)
    return int(failed(result))


if __name__ == "__main__":
    sys.exit(main())
