"""Checkpoint, bundle and engine behind one protocol; what is damaged is refused before anything opens it."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
import torch

from nformer_edge.backends.build import build_engine
from nformer_edge.backends.onnxruntime import run as onnxruntime_runner
from nformer_edge.backends.onnxruntime.run import OnnxRuntimeRunner
from nformer_edge.backends.open import open_model, self_test
from nformer_edge.backends.spec import EngineSpec
from nformer_edge.core.artifact import write_manifest
from nformer_edge.core.errors import ArtifactError, BackendError, DataError, UsageError
from nformer_edge.core.spec import BackboneSpec, HeadSpec, ModelSpec
from nformer_edge.exporting.bundle import open_bundle
from nformer_edge.metrics.agreement import ROUNDING, row_errors
from nformer_edge.model.checkpoint import save_checkpoint
from nformer_edge.model.gated import make_head, start_as_gates
from nformer_edge.ops import onnx_ops
from nformer_edge.ops.contract import draw_landmarks


@pytest.fixture(params=["checkpoint", "bundle"])
def runner(request, tiny_checkpoint, tiny_bundle):
    with open_model(
        {"checkpoint": tiny_checkpoint, "bundle": tiny_bundle}[request.param], intra_op_threads=1
    ) as opened:
        yield opened


@pytest.fixture
def copy(tiny_bundle, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, folder)
    return folder


def pictures(count):
    return np.random.default_rng(0).standard_normal((count, 3, 64, 32)).astype(np.float32)


def test_a_runner_says_what_it_is(runner):
    assert runner.name == "osnet_x0_25_64x32"
    assert runner.has_head
    assert runner.precision == {"backbone": "fp32", "head": "fp32"}
    assert len(runner.sha256) == 64
    assert runner.spec.head.k == 4


def test_a_runner_embeds_any_number_of_images(runner):
    images = pictures(3)
    features = runner.embed(images)
    assert (features.dtype, features.shape) == (np.float32, (3, 32))
    np.testing.assert_allclose(runner.embed(images[1:2]), features[1:2], rtol=1e-4, atol=1e-5)
    assert runner.embed(images[:0]).shape == (0, 32)


def test_a_runner_relates_any_number_of_images_even_fewer_than_k(runner):
    features = np.random.default_rng(0).standard_normal((9, 32)).astype(np.float32)
    for count in (0, 1, 3, 9):
        related = runner.relate(features[:count])
        assert (related.dtype, related.shape) == (np.float32, (count, 32))
        assert np.isfinite(related).all()


def test_a_runner_draws_landmarks_from_its_seed_where_none_are_given(runner):
    features = np.random.default_rng(0).standard_normal((30, 32)).astype(np.float32)
    landmarks = draw_landmarks(30, 2, 3, runner.landmark_seed)
    np.testing.assert_array_equal(runner.relate(features), runner.relate(features, landmarks))


def test_bad_features_are_refused_at_the_door(runner):
    features = np.ones((6, 32), np.float32)
    features[4, 2] = np.nan
    with pytest.raises(DataError, match="NaN or infinity in row 4"):
        runner.relate(features)
    with pytest.raises(DataError, match="all zeros in row 0"):
        runner.relate(np.zeros((2, 32), np.float32))
    with pytest.raises(DataError, match=r"shape \(6, 31\)"):
        runner.relate(np.ones((6, 31), np.float32))


def test_bad_images_are_refused_at_the_door(runner):
    with pytest.raises(UsageError, match="expected float32 "):
        runner.embed(np.zeros((1, 3, 64, 64), np.float32))
    with pytest.raises(UsageError, match="uint8"):
        runner.embed(np.zeros((1, 3, 64, 32), np.uint8))
    images = pictures(3)
    images[1, 0, 0, 0] = np.inf
    with pytest.raises(DataError, match="in image 1"):
        runner.embed(images)


def test_landmarks_that_do_not_fit_are_refused(runner):
    features = np.ones((6, 32), np.float32)
    with pytest.raises(UsageError, match=r"landmarks: got shape \(1, 3\)"):
        runner.relate(features, np.zeros((1, 3), np.int32))
    with pytest.raises(UsageError, match=r"landmarks: got 0..6"):
        runner.relate(features, np.full((2, 3), 6, np.int32) * np.array([[0], [1]], np.int32))


def test_onnxruntime_equals_pytorch(tiny_checkpoint, tiny_bundle):
    features = np.random.default_rng(5).standard_normal((150, 32)).astype(np.float32)
    landmarks = draw_landmarks(150, 2, 3, 1)
    with open_model(tiny_checkpoint) as reference, open_model(tiny_bundle) as runner:
        for found, expected in (
            (runner.embed(pictures(2)), reference.embed(pictures(2))),
            (runner.relate(features, landmarks), reference.relate(features, landmarks)),
        ):
            assert row_errors(found, expected).max() <= ROUNDING


def test_batches_above_the_limit_are_split_and_come_back_in_order(tiny_bundle):
    images = pictures(7)
    with OnnxRuntimeRunner(open_bundle(tiny_bundle), max_batch=3) as small, open_model(tiny_bundle) as large:
        np.testing.assert_allclose(small.embed(images), large.embed(images), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not onnx_ops.available(), reason="the kernels are not compiled in this tree")
def test_the_head_runs_in_the_native_kernels_and_by_its_bodies_with_the_same_result(tiny_bundle, monkeypatch):
    features = np.random.default_rng(3).normal(size=(90, 32)).astype(np.float32)
    registered = []
    register = onnx_ops.register
    monkeypatch.setattr(onnx_ops, "register", lambda *args: (registered.append(args), register(*args)))
    with open_model(tiny_bundle, native=False) as bodies:
        expected = bodies.relate(features)
        assert not bodies.native
        assert not registered
    with open_model(tiny_bundle) as runner:
        assert runner.native
        assert len(registered) == 1
        assert row_errors(runner.relate(features), expected).max() <= ROUNDING


def test_a_changed_byte_is_refused_before_onnxruntime_sees_the_file(copy, monkeypatch):
    seen = []
    monkeypatch.setattr(onnxruntime_runner, "open_session", lambda *args: seen.append(args))
    data = bytearray((copy / "backbone.onnx").read_bytes())
    data[100] ^= 1
    (copy / "backbone.onnx").write_bytes(data)
    with pytest.raises(ArtifactError, match=r"backbone.onnx: got sha256"), open_model(copy):
        pass
    assert not seen


def test_what_runs_is_what_was_verified_whatever_becomes_of_the_file(copy):
    runner = open_model(copy)
    (copy / "nformer.onnx").write_bytes(b"\0" * (copy / "nformer.onnx").stat().st_size)
    with runner:
        self_test(runner)


def rewrite(folder, **fields):
    manifest = json.loads((folder / "manifest.json").read_text()) | fields
    write_manifest(folder, manifest["kind"], {k: v for k, v in manifest.items() if k not in ("kind", "files")})


def test_an_engine_for_a_backend_that_is_not_there_is_refused_by_name(tiny_bundle, tmp_path):
    engine = build_engine(tiny_bundle, tmp_path / "engine", EngineSpec("onnxruntime"))
    rewrite(engine, backend="tensorcake")
    with pytest.raises(UsageError, match="backend: got 'tensorcake'"):
        open_model(engine)


def test_a_graph_that_onnxruntime_cannot_read_is_a_named_refusal(copy):
    (copy / "backbone.onnx").write_bytes(b"not a model")
    rewrite(copy)
    with pytest.raises(ArtifactError, match=r"backbone.onnx: got no readable ONNX file"):
        open_model(copy)
    (copy / "backbone.onnx").write_bytes(b"\x08\x09")  # an ONNX file of version 9 without a graph
    rewrite(copy)
    with pytest.raises(ArtifactError, match=r"backbone.onnx: got a graph that onnxruntime .* refuses"):
        open_model(copy).__enter__()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"opset": 99}, "opset: got 99"),
        ({"landmark_rule": "dice"}, "landmark_rule: got 'dice'"),
        ({"kind": "cake"}, "got a cake, expected a bundle or an engine"),
    ],
)
def test_what_this_version_does_not_know_is_refused_by_name(copy, fields, message):
    rewrite(copy, **fields)
    with pytest.raises((ArtifactError, BackendError), match=message):
        open_model(copy)


def test_a_head_without_its_file_is_refused(copy):
    (copy / "nformer.onnx").unlink()
    rewrite(copy)
    with pytest.raises(ArtifactError, match=r"nformer.onnx missing for a head"):
        open_model(copy)


@pytest.mark.parametrize("name", ["nothing", "notes.txt", "folder"])
def test_what_is_no_model_is_refused(tmp_path, name):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ArtifactError, match=r"expected a checkpoint|expected a bundle or an engine"):
        open_model(tmp_path / name)


def test_a_backend_that_does_not_run_this_model_is_refused(tiny_bundle, tiny_checkpoint):
    with pytest.raises(BackendError, match="a bundle that onnxruntime runs, expected one for tensorrt"):
        open_model(tiny_bundle, backend="tensorrt")
    with pytest.raises(UsageError, match="device: got cuda:0"):
        open_model(tiny_bundle, device="cuda:0")
    with pytest.raises(BackendError, match="device"):
        open_model(tiny_checkpoint, device="cuda:7")


@pytest.mark.parametrize("model", ["checkpoint", "bundle"])
def test_contexts_are_refused_where_there_are_none(model, tiny_checkpoint, tiny_bundle):
    path = {"checkpoint": tiny_checkpoint, "bundle": tiny_bundle}[model]
    with pytest.raises(UsageError, match=r"contexts: got 2, expected nothing for .* Set intra_op_threads"):
        open_model(path, contexts=2)
    with open_model(path, device="cpu") as runner:
        assert runner.embed(pictures(1)).shape == (1, 32)


def test_onnxruntime_that_is_missing_is_named_with_the_next_step(tiny_bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=r"no package onnxruntime.*nformer-edge\[cpu\]"):
        open_model(tiny_bundle).__enter__()


def test_a_self_test_runs_both_stages_and_fails_on_other_numbers(tiny_bundle, tiny_checkpoint, monkeypatch):
    with open_model(tiny_bundle) as runner:
        largest = self_test(runner)
        assert set(largest) == {"backbone", "head"}
        assert all(value <= 1e-5 for value in largest.values())
        real = runner.relate
        monkeypatch.setattr(runner, "relate", lambda *args: real(*args)[::-1])
        with pytest.raises(ArtifactError, match="head: got a golden vector"):
            self_test(runner)
    with open_model(tiny_checkpoint) as runner:
        assert self_test(runner) == {}


def test_a_closed_checkpoint_says_so(tiny_checkpoint):
    with open_model(tiny_checkpoint) as runner:
        pass
    with pytest.raises(BackendError, match="a closed runner"):
        runner.embed(pictures(1))


def test_plain_operators_are_used_where_asked_for(tiny_checkpoint, monkeypatch):
    from nformer_edge.ops import operators

    calls = []
    monkeypatch.setattr(operators, "supports", lambda *_: calls.append(1))
    features = np.random.default_rng(0).standard_normal((9, 32), dtype=np.float32)
    with open_model(tiny_checkpoint, native=False) as plain, open_model(tiny_checkpoint) as fast:
        reference = plain.relate(features)
        assert not calls
        np.testing.assert_allclose(fast.relate(features), reference, atol=1e-5)
        assert calls


@pytest.mark.parametrize("threads", [0, 10**6])
def test_thread_counts_are_bounded_before_anything_starts(threads, tiny_bundle, tiny_checkpoint):
    for model in (tiny_bundle, tiny_checkpoint):
        with pytest.raises(UsageError, match=f"intra_op_threads: got {threads}"):
            open_model(model, intra_op_threads=threads)


def test_what_onnxruntime_itself_refuses_is_one_line(tiny_bundle, monkeypatch):
    class Session:
        def run(self, *_):
            raise RuntimeError("bad node\nand its trace")

    with open_model(tiny_bundle) as runner:
        monkeypatch.setattr(runner, "_session", lambda name: Session())
        with pytest.raises(BackendError, match=r"backbone.onnx: got an error of onnxruntime \(bad node\), expected a"):
            runner.embed(pictures(1))


def test_the_float64_run_takes_equally_near_neighbors_in_the_order_that_is_asked_for(tmp_path):
    """Two rows are as near to row 0, to a ten-millionth, at rank 32 of its list, which its gates read."""
    spec = ModelSpec(BackboneSpec("osnet_x0_25", 32, "fc"), HeadSpec.gated(32))
    head = make_head(spec.head)
    rows = np.random.default_rng(0).standard_normal((100, 32))
    rows[1:] += 0.4 * rows[0]
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    tied = np.argsort(-rows @ rows[0])[32:34]
    near = (rows[tied] @ rows[0]).mean()
    for row in tied:
        across = rows[row] - rows[row] @ rows[0] * rows[0]
        rows[row] = near * rows[0] + np.sqrt(1 - near**2) * across / np.linalg.norm(across)
    rows = np.concatenate([rows, -rows])  # their mean, which the head takes off, is zero
    start_as_gates(head, torch.from_numpy(rows).float(), None)
    for gate in head.h:
        gate.log_slope.detach().zero_()  # no gate is quite open, and none quite shut
    save_checkpoint(tmp_path / "head.safetensors", spec, head=head)
    ways = []
    for nearer in tied:
        like = rows.copy()
        like[nearer] += 1e-5 * rows[0]
        ways.append(like.astype(np.float32))
    with open_model(tmp_path / "head.safetensors") as single:
        double = single.float64()
        landmarks = np.tile(np.arange(len(rows), dtype=np.int32), (spec.head.layers, 1))
        one, two = (double.relate(rows, landmarks, like) for like in ways)
        swapped = double.relate(rows, landmarks, ways[0], swap=1e-6)
    assert row_errors(one, two)[0] > 100 * ROUNDING
    assert row_errors(swapped, two)[0] < row_errors(one, two)[0] / 10
