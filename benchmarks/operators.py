"""The two operators on this CPU: every figure that the project claims for them, each beside a baseline of the same run.

    python benchmarks/operators.py -o runs/operators.json [--repeats 3]
        [--only head msmt17 top-k training onnxruntime long-rows rerank] [--features market1501.npz]

Each measurement runs in a process of its own, so that its peak memory is its own: the resident set's high-water mark
less what was resident when the inputs stood ready. Times are wall clock, and beside them what the CPUs spent (`cpu`);
what is compared runs in turn, and the ratio is the median over turns of one turn's ratio. Two baselines in plain torch
hold N x N: `published` does what the published code does (float masks, a sparse softmax at inference), `dense` is the
same mathematics with boolean masks and in place, the least that N x N needs. Features are clustered (an identity is a
center, its images are spread around it), but for those of `--features`: re-ranking runs on its query and gallery.
Re-ranking's baseline is the numpy code that the tests compare with.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nformer_edge.core.artifact import atomic_write_json
from nformer_edge.core.features import load_features
from nformer_edge.core.machine import machine
from nformer_edge.core.spec import HeadSpec
from nformer_edge.exporting.session import open_session
from nformer_edge.exporting.trace import trace_head
from nformer_edge.metrics.distance import unit_rows
from nformer_edge.metrics.rerank import k_reciprocal_distances
from nformer_edge.model.gated import LISTED, GatedHead, start_as_gates
from nformer_edge.model.nformer import NFormer, scaled
from nformer_edge.ops import native
from nformer_edge.ops.contract import draw_landmarks
from nformer_edge.ops.operators import using

MARKET, MSMT17, TRAINING = 19_281, 93_820, 7_000
QUERIES = 3_368  # of Market's
ONNXRUNTIME = (1_000, 2_000, 5_000, 10_000, 20_000)
RULES = ("affinity", "features")


class Dense:
    """Everything N x N, in place where that saves memory."""

    def row_top_k(self, a: Tensor, b: Tensor, k: int) -> Tensor:
        return (a @ b.transpose(1, 2)).topk(k, dim=2).indices.int()

    def reciprocal_neighbor_attention(
        self, a: Tensor, b: Tensor, v: Tensor, neighbors: Tensor, scale: float | None = None
    ) -> Tensor:
        lists = neighbors.long()
        mask = torch.zeros(neighbors.shape[0], a.shape[1], a.shape[1], dtype=torch.bool).scatter_(2, lists, True)
        mask = ~(mask & mask.transpose(1, 2))
        scores = (a @ b.transpose(1, 2)).div_(math.sqrt(v.shape[2]))
        return torch.softmax(scores.masked_fill_(mask, -1e9), dim=2) @ v


class Published(Dense):
    """Everything N x N, as the published code computes it: masks of floats, each step a matrix of its own."""

    def reciprocal_neighbor_attention(
        self, a: Tensor, b: Tensor, v: Tensor, neighbors: Tensor, scale: float | None = None
    ) -> Tensor:
        scores = a @ b.transpose(1, 2) / math.sqrt(v.shape[2])
        lists = neighbors.long().expand(a.shape[0], -1, -1)
        mask = torch.zeros_like(scores).scatter_(2, lists, torch.ones_like(lists, dtype=scores.dtype))
        mask = mask * mask.transpose(1, 2)
        if torch.is_grad_enabled():
            return torch.softmax(scores * mask + -1e9 * (1 - mask), dim=2) @ v
        return torch.bmm(torch.sparse.softmax((scores * mask).to_sparse(), 2), v)


BASELINES = {"dense": Dense, "published": Published}


def clustered(rows: int, size: int = 256, images: int = 25) -> Tensor:  # [N, D], unit length
    generator = torch.Generator().manual_seed(0)
    identity = torch.randint(0, max(1, rows // images), (rows,), generator=generator)
    centers = torch.randn(max(1, rows // images), size, generator=generator)
    return torch.nn.functional.normalize(centers[identity] + 0.7 * torch.randn(rows, size, generator=generator), dim=1)


def head_of(rule: str, rows: int) -> tuple[NFormer, Tensor, Tensor]:
    torch.manual_seed(0)
    head = NFormer(HeadSpec(rule=rule, input_scale="sqrt_dim")).eval()  # type: ignore[arg-type]
    return head, clustered(rows), torch.from_numpy(draw_landmarks(rows, 4, 5, 0))


Seconds = dict[str, list[float]]


def in_turn(repeats: int, **candidates: Callable[[], Any]) -> tuple[Seconds, Seconds]:
    """Seconds of each candidate by the clock and on the CPUs, one after the other, `repeats` times after a warm-up."""
    seconds: Seconds = {name: [] for name in candidates}
    cpu: Seconds = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        for name, run in candidates.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - cpu_start)
    return seconds, cpu


def ratio(seconds: Seconds, above: str, below: str) -> float:
    """The median over turns of one turn's ratio."""
    return statistics.median(a / b for a, b in zip(seconds[above], seconds[below], strict=True))


def _status_kib(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field + ":"))


def with_peak(run: Callable[[], Any]) -> tuple[float, float]:
    """Seconds and peak MB above the start of one run. The kernel's high-water mark starts anew (Linux, proc(5))."""
    ctypes.CDLL(None).malloc_trim(0)  # what the inputs' making left behind would hide what comes
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before, start = _status_kib("VmRSS"), time.perf_counter()
    run()
    return time.perf_counter() - start, (_status_kib("VmHWM") - before) / 1024


def linear_layers(head: NFormer, x: Tensor) -> None:
    for block in head.h:
        block.attn.c_attn(x)
        block.mlp.c_proj(block.mlp.c_fc(block.attn.c_proj(x)))


def head_time(rule: str, rows: int, repeats: int) -> dict[str, Any]:
    """The whole head against its linear layers (and one N x N x 256 product under the features rule)."""
    head, x, landmarks = head_of(rule, rows)
    with torch.inference_mode():
        parts = {"head": lambda: head(x, landmarks), "linear_layers": lambda: linear_layers(head, x)}
        if rule == "features":
            parts["product"] = lambda: x @ x.T
        seconds, _ = in_turn(repeats, **parts)
    bases = [sum(turn) for turn in zip(*(s for name, s in seconds.items() if name != "head"), strict=True)]
    found = {"rows": rows, "seconds": seconds, "at_most": 1.6}
    return found | {"ratio": ratio({"head": seconds["head"], "bases": bases}, "head", "bases")}


def head_peak(rule: str, rows: int, way: str) -> dict[str, Any]:
    head, x, landmarks = head_of(rule, rows)
    with torch.inference_mode():
        head(x[:512], landmarks % 512)  # libraries load and threads start before the count does
        if way == "native":
            _, peak = with_peak(lambda: head(x, landmarks))
            seconds = statistics.median(in_turn(3, head=lambda: head(x, landmarks))[0]["head"])
        else:  # long enough that what a first run costs more does not show
            with using(BASELINES[way]()):
                seconds, peak = with_peak(lambda: head(x, landmarks))
    return {"rows": rows, "seconds": seconds, "peak_mb": peak}


def training_step(rule: str, rows: int, way: str) -> dict[str, Any]:
    head, x, landmarks = head_of(rule, rows)
    head.train()
    optimizer = torch.optim.SGD(head.parameters(), lr=1e-4)

    def step(features: Tensor, marks: Tensor) -> None:
        optimizer.zero_grad()
        head(features, marks).square().mean().backward()
        optimizer.step()

    def measure() -> tuple[float, float]:
        step(x[:512], landmarks % 512)
        first, peak = with_peak(lambda: step(x, landmarks))
        return min(first, with_peak(lambda: step(x, landmarks))[0]), peak

    if way == "native":
        seconds, peak = measure()
    else:
        with using(BASELINES[way]()):
            seconds, peak = measure()
    return {"rows": rows, "seconds": seconds, "peak_mb": peak}


def top_k(rows: int, repeats: int) -> dict[str, Any]:
    head, x, landmarks = head_of("affinity", rows)
    with torch.inference_mode():
        a, b, _ = (t.contiguous().numpy() for t in head.h[0].attn.factors(scaled(x, head.spec), landmarks[0]))
    native.row_top_k(a[:, :512].copy(), b[:, :512].copy(), 20)
    first, peak = with_peak(lambda: native.row_top_k(a, b, 20))
    more = [with_peak(lambda: native.row_top_k(a, b, 20))[0] for _ in range(repeats - 1)]
    return {"rows": rows, "heads": 2, "length": 5, "k": 20, "seconds": min([first, *more]), "peak_mb": peak}


def whole_head(rule: str, rows: int, way: str, repeats: int) -> dict[str, Any]:
    """nformer.onnx in onnxruntime, with our kernels or by its bodies, and the same head in PyTorch."""
    head, x, landmarks = head_of(rule, rows)
    features, drawn = x.numpy(), landmarks.numpy()
    if way == "pytorch":
        run = lambda f, m: head(torch.from_numpy(f), torch.from_numpy(m))  # noqa: E731
    else:
        graph = trace_head(head, 18).SerializeToString()
        session = open_session(graph, "nformer.onnx", torch.get_num_threads(), native=way == "native")
        run = lambda f, m: session.run(None, {"features": f, "landmarks": m})  # noqa: E731
    with torch.inference_mode():
        run(features[:512], drawn % 512)
        first, peak = with_peak(lambda: run(features, drawn))
        more = [with_peak(lambda: run(features, drawn))[0] for _ in range(repeats - 1)]
    return {"rows": rows, "seconds": statistics.median([first, *more]), "peak_mb": peak}


def query_and_gallery(store: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Of a feature store, or as many as Market-1501 has, clustered."""
    if store:
        sets = load_features(store)
        return sets["query"].features, sets["gallery"].features
    rows = clustered(MARKET, 512).numpy()
    return rows[:QUERIES], rows[QUERIES:]


def rerank(store: str | None, repeats: int) -> dict[str, Any]:
    """k-reciprocal re-ranking by the native kernels and by numpy."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from helpers import numpy_reranking

    query, gallery = query_and_gallery(store)
    k_reciprocal_distances(query[:100], gallery[:900])
    _, peak = with_peak(lambda: k_reciprocal_distances(query, gallery))
    seconds, cpu = in_turn(
        repeats,
        native=lambda: k_reciprocal_distances(query, gallery),
        numpy=lambda: numpy_reranking.k_reciprocal_distances(query, gallery),
    )
    found = {"queries": len(query), "gallery": len(gallery), "seconds": seconds, "cpu_seconds": cpu, "peak_mb": peak}
    faster = {"times_faster": ratio(seconds, "numpy", "native"), "times_faster_cpu": ratio(cpu, "numpy", "native")}
    return found | faster | {"at_least": 3.5, "peak_mb_at_most": 1500}


def gated(store: str | None, repeats: int) -> dict[str, Any]:
    """The whole gated head, the lists that it needs alone, and k-reciprocal re-ranking of the same features."""
    query, gallery = query_and_gallery(store)
    features = np.concatenate([query, gallery])
    head = GatedHead(HeadSpec.gated(features.shape[1])).eval()
    start_as_gates(head, torch.zeros(1, features.shape[1]), None)
    x, landmarks = torch.from_numpy(features), torch.from_numpy(draw_landmarks(len(features), 2, 1024, 0))
    with torch.inference_mode():
        rows = head.mapped(x, landmarks).numpy()[None]
        head(x[:2048], landmarks % 2048)
        _, peak = with_peak(lambda: head(x, landmarks))
        _, lists_peak = with_peak(lambda: native.row_top_k(rows, rows, LISTED))
        seconds, cpu = in_turn(
            repeats,
            head=lambda: head(x, landmarks),
            lists=lambda: native.row_top_k(rows, rows, LISTED),
            k_reciprocal=lambda: k_reciprocal_distances(query, gallery),
        )
    found = {"rows": len(features), "seconds": seconds, "cpu_seconds": cpu}
    found |= {"peak_mb": {"head": peak, "lists": lists_peak}, "at_most": 1.3, "above": 1.0}
    for name, times in (("", seconds), ("_cpu", cpu)):
        found["by_its_lists" + name] = ratio(times, "head", "lists")
        found["k_reciprocal_by_head" + name] = ratio(times, "k_reciprocal", "head")
    return found


#: The same instruction set without integer products: RowTopK in float32 throughout.
FLOAT32 = {"avx512vnni": "avx512", "avx2vnni": "avx2", "neondot": "neon"}


def long_rows(store: str | None, rows: int, length: int, repeats: int) -> dict[str, Any]:
    """RowTopK over long rows, by integer products first and in float32 alone."""
    x = (unit_rows(np.concatenate(query_and_gallery(store))) if store else clustered(rows, length).numpy())[None]
    isa = native.instruction_sets()[0]
    plain = FLOAT32.get(isa, isa)
    ways = {"integers": isa, "float32": plain}
    threads = torch.get_num_threads()
    runs = {way: lambda isa=isa: native.row_top_k(x, x, 20, threads=threads, isa=isa) for way, isa in ways.items()}
    native.row_top_k(x[:, :512].copy(), x[:, :512].copy(), 20)
    peaks = {way: with_peak(run)[1] for way, run in runs.items()}
    seconds, cpu = in_turn(repeats, **runs)
    pairs = x.shape[1] * (x.shape[1] + 1) // 2
    return {
        "rows": x.shape[1], "length": x.shape[2], "k": 20, "instruction_sets": ways, "seconds": seconds,
        "cpu_seconds": cpu, "peak_mb": peaks,
        "confirmed_share": native.confirmed_scores(x, x, 20, threads=threads) / pairs,
        "times_faster": ratio(seconds, "float32", "integers"), "times_faster_cpu": ratio(cpu, "float32", "integers"),
        "at_least": 1.8,
    }  # fmt: skip


TASKS: dict[str, Callable[..., dict[str, Any]]] = {
    "head_time": head_time, "head_peak": head_peak, "training_step": training_step, "top_k": top_k,
    "whole_head": whole_head, "rerank": rerank, "gated": gated, "long_rows": long_rows,
}  # fmt: skip


def child(task: str, *arguments: Any) -> dict[str, Any]:
    """Runs one task in a fresh process."""
    print(f"  {task} {' '.join(map(str, arguments))} ...", file=sys.stderr, flush=True)
    command = [sys.executable, os.path.abspath(__file__), "--child", json.dumps([task, *arguments])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def compare(rule: str, task: str, rows: int, faster: float, **limits: float) -> dict[str, Any]:
    ours, *others = (child(task, rule, rows, way) for way in ("native", *BASELINES))
    against = {
        name: other | {
            "times_faster": other["seconds"] / ours["seconds"], "times_less_memory": other["peak_mb"] / ours["peak_mb"]
        }
        for name, other in zip(BASELINES, others, strict=True)
    }  # fmt: skip
    return {"native": ours, **against, "at_least_times_faster": faster, **limits}


def onnxruntime_row(rule: str, rows: int, repeats: int) -> dict[str, Any]:
    found = {way: child("whole_head", rule, rows, way, repeats) for way in ("native", "bodies", "pytorch")}
    times = {f"{way}_by_native": found[way]["seconds"] / found["native"]["seconds"] for way in ("bodies", "pytorch")}
    return {"rows": rows, **found, **times}


def measure(only: list[str], repeats: int, store: str | None) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for rule in RULES:
        if "head" in only:
            results[f"head_{rule}"] = child("head_time", rule, MARKET, repeats)
            results[f"head_dense_{rule}"] = compare(rule, "head_peak", MARKET, 25, peak_mb_at_most=600)
        if "msmt17" in only:
            results[f"msmt17_{rule}"] = child("head_peak", rule, MSMT17, "native") | {"peak_mb_at_most": 2500}
        if "training" in only:
            results[f"training_{rule}"] = compare(rule, "training_step", TRAINING, 5, at_least_times_less_memory=5)
        if "onnxruntime" in only:
            results[f"onnxruntime_{rule}"] = [onnxruntime_row(rule, rows, repeats) for rows in ONNXRUNTIME]
    if "top-k" in only:
        runs = {rows: child("top_k", rows, repeats if rows < 1_000_000 else 1) for rows in (25_000, 100_000, 1_000_000)}
        growth = runs[100_000]["seconds"] / runs[25_000]["seconds"]
        results["top_k"] = {"runs": list(runs.values()), "growth_25k_to_100k": growth, "at_most": 6.0}
    if "long-rows" in only:
        results["long_rows"] = [child("long_rows", None, MARKET, length, repeats) for length in (256, 512, 1024, 2048)]
        if store:
            results["long_rows"].append(child("long_rows", store, MARKET, 0, repeats))
    if "rerank" in only:
        results["k_reciprocal"] = child("rerank", store, repeats)
    if "gated" in only:
        results["gated"] = child("gated", store, repeats)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ["head", "msmt17", "top-k", "training", "onnxruntime", "long-rows", "rerank", "gated"]
    parser.add_argument("-o", "--out", default="runs/operators.json")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--features", metavar="STORE", help="feature store with the splits query and gallery")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        task, *rest = json.loads(arguments.child)
        print(json.dumps(TASKS[task](*rest)))
        return
    load = os.getloadavg()
    results = measure(arguments.only, arguments.repeats, arguments.features)
    report = {
        "machine": asdict(machine()), "threads": torch.get_num_threads(),
        "instruction_set": native.instruction_sets()[0],
        "load_average": {"before": load, "after": os.getloadavg()}, "results": results,
    }  # fmt: skip
    atomic_write_json(arguments.out, report)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
