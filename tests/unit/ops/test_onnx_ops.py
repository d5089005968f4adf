"""The native kernels inside onnxruntime against the standard-operator bodies of the same file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.gated import FACTOR, gated_case

from nformer_edge.ops import native, onnx_ops

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.skipif(not onnx_ops.available(), reason="the kernels are not compiled in this tree")


def model(node: str, inputs: str, outputs: str, taken: int = 4) -> bytes:
    """One of our nodes in a file that also holds the bodies. `taken`: inputs of the attention."""
    from nformer_edge.ops.bodies import functions

    version = 1 if taken == 4 else 2
    text = f'<ir_version: 9, opset_import: ["": 18, "nformer": {version}]> g ({inputs}) => ({outputs}) {{ {node} }}'
    built = onnx.parser.parse_model(text)
    built.functions.extend(functions(18, taken))
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
GATED = model(
    "y = nformer.ReciprocalNeighborAttention <scale = 1.3> (a, b, v, n, t)",
    "float[H, N, R] a, float[H, N, R] b, float[H, N, D] v, int32[L, N, K] n, float[T, N] t",
    "float[H, N, D] y",
    5,
)
WITH_CAMERAS = model(
    "y = nformer.ReciprocalNeighborAttention <scale = 1.3, camera_factor = 0.5> (a, b, v, n, t, cameras)",
    "float[H, N, R] a, float[H, N, R] b, float[H, N, D] v, int32[L, N, K] n, float[T, N] t, int32[N] cameras",
    "float[H, N, D] y",
    6,
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


def gated_feeds(graph: bytes, *, lists: int, thresholds: int) -> dict[str, np.ndarray]:
    cameras = graph is WITH_CAMERAS
    a, b, v, n, _, t, known = gated_case(2, 60, 5, 33, 9, lists=lists, thresholds=thresholds, cameras=cameras)
    feeds = {"a": a, "b": b, "v": v, "n": n, "t": t, "cameras": known}
    return {name: x.numpy() for name, x in feeds.items() if x is not None}


@pytest.mark.parametrize("graph", [GATED, WITH_CAMERAS])
@pytest.mark.parametrize(("lists", "thresholds"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_the_gated_attention_in_onnxruntime_equals_the_library_and_the_body(
    graph: bytes, lists: int, thresholds: int
) -> None:
    feeds = gated_feeds(graph, lists=lists, thresholds=thresholds)
    (got,) = session(graph, ours=True).run(None, feeds)
    (body,) = session(graph, ours=False).run(None, feeds)
    arrays = [feeds.get(name) for name in ("t", "cameras")]
    want = native.reciprocal_neighbor_attention(*(feeds[x] for x in "abvn"), np.float32(1.3), *arrays, FACTOR)
    assert (got == want).all()
    assert np.abs(got - body).max() <= 2e-6


def test_a_gated_file_runs_natively_where_registered_and_as_its_body_elsewhere(tmp_path: Path) -> None:
    feeds = gated_feeds(WITH_CAMERAS, lists=1, thresholds=1)
    assert nodes_run(WITH_CAMERAS, feeds, ours=True, folder=tmp_path) == {"ReciprocalNeighborAttention"}
    assert "Scan" in nodes_run(WITH_CAMERAS, feeds, ours=False, folder=tmp_path)


def test_thresholds_and_cameras_of_another_set_are_an_error_not_a_crash() -> None:
    feeds = gated_feeds(WITH_CAMERAS, lists=1, thresholds=1)
    running = session(WITH_CAMERAS, ours=True)
    for name, what in (("t", "t must be"), ("cameras", "cameras must be")):
        shorter = feeds | {name: feeds[name][..., 1:]}
        with pytest.raises(Exception, match=what):
            running.run(None, shorter)


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
