"""The native kernels inside onnxruntime against the standard-operator bodies of the same file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nformer_edge.ops import native, onnx_ops

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.skipif(not onnx_ops.available(), reason="the kernels are not compiled in this tree")


def model(node: str, inputs: str, outputs: str) -> bytes:
    """One of our nodes in a file that also holds the bodies."""
    from nformer_edge.ops.bodies import functions

    text = f'<ir_version: 9, opset_import: ["": 18, "nformer": 1]> g ({inputs}) => ({outputs}) {{ {node} }}'
    built = onnx.parser.parse_model(text)
    built.functions.extend(functions(18))
    return built.SerializeToString()


TOP_K = model(
    "n = nformer.RowTopK <k = 7> (a, b)", "float[H, N, R] a, float[H, M, R] b", "int32[H, N, K] n"
)  # fmt: skip
ATTENTION = model(
    "y = nformer.ReciprocalNeighborAttention (a, b, v, n)",
    "float[H, N, R] a, float[H, N, R] b, float[H, N, D] v, int32[L, N, K] n",
    "float[H, N, D] y",
)
SCALED = model(
    "y = nformer.ReciprocalNeighborAttention <scale = -0.5> (a, b, v, n)",
    "float[H, N, R] a, float[H, N, R] b, float[H, N, D] v, int32[L, N, K] n",
    "float[H, N, D] y",
)


def session(graph: bytes, *, ours: bool, threads: int | None = 2, profile: Path | None = None):  # type: ignore[no-untyped-def]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    if ours:
        onnx_ops.register(options, threads)
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def nodes_run(graph: bytes, feeds: dict[str, np.ndarray], *, ours: bool, folder: Path) -> set[str]:
    running = session(graph, ours=ours, profile=folder / "profile")
    running.run(None, feeds)
    events = json.loads(Path(running.end_profiling()).read_text())
    return {e["args"]["op_name"] for e in events if e.get("cat") == "Node" and "op_name" in e.get("args", {})}


def test_one_file_runs_natively_where_registered_and_as_bodies_elsewhere(tmp_path: Path) -> None:
    feeds = {"a": normal(2, 30, 5), "b": normal(2, 40, 5)}
    assert nodes_run(TOP_K, feeds, ours=True, folder=tmp_path) == {"RowTopK"}
    assert "Scan" in nodes_run(TOP_K, feeds, ours=False, folder=tmp_path)


@pytest.mark.parametrize("columns", [0, 1, 5, 200])
@pytest.mark.parametrize("rows", [0, 1, 70])
@pytest.mark.parametrize("length", [5, 64])
def test_row_top_k_in_onnxruntime_equals_the_library(rows: int, columns: int, length: int) -> None:
    a, b = normal(2, rows, length), normal(2, columns, length, seed=1)
    (got,) = session(TOP_K, ours=True).run(None, {"a": a, "b": b})
    assert (got == native.row_top_k(a, b, 7)).all()


@pytest.mark.parametrize("graph", [ATTENTION, SCALED])
@pytest.mark.parametrize("lists", [1, 2])
def test_attention_in_onnxruntime_equals_the_library_and_the_bodies(graph: bytes, lists: int) -> None:
    a, b, v = normal(2, 60, 5), normal(2, 60, 5, seed=1), normal(2, 60, 33, seed=2)
    n = native.row_top_k(a[:lists], b[:lists], 9)
    feeds = {"a": a, "b": b, "v": v, "n": n}
    (got,) = session(graph, ours=True).run(None, feeds)
    (body,) = session(graph, ours=False).run(None, feeds)
    scale = -0.5 if graph is SCALED else None
    assert (got == native.reciprocal_neighbor_attention(a, b, v, n, scale)).all()
    assert np.abs(got - body).max() <= 1e-5


def test_a_bad_row_chooses_nobody_and_is_chosen_by_nobody_natively_and_in_the_bodies() -> None:
    a, b = normal(2, 30, 5), normal(2, 30, 5, seed=1)
    a[0, 4, 1], b[0, 9, 0], b[1, 2, 2] = np.nan, np.inf, np.nan
    (got,) = session(TOP_K, ours=True).run(None, {"a": a, "b": b})
    (body,) = session(TOP_K, ours=False).run(None, {"a": a, "b": b})
    assert (got[0, 4] == -1).all()
    assert not (got[0] == 9).any()
    assert not (got[1] == 2).any()
    assert (got == body).all()


def test_a_neighbor_out_of_range_is_an_error_not_a_crash() -> None:
    a, v, n = normal(1, 6, 2), normal(1, 6, 3), np.full((1, 6, 2), 6, dtype=np.int32)
    with pytest.raises(Exception, match="out of range"):
        session(ATTENTION, ours=True).run(None, {"a": a, "b": a, "v": v, "n": n})


@pytest.mark.parametrize("threads", [1, 3, None])
def test_the_number_of_threads_changes_nothing(threads: int | None) -> None:
    a = normal(1, 500, 40)
    (got,) = session(TOP_K, ours=True, threads=threads).run(None, {"a": a, "b": a})
    assert (got == native.row_top_k(a, a, 7)).all()
