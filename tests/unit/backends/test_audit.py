"""Layers as TensorRT tells them, by version, and what the audit makes of them; a builder that dies is a named error."""

from __future__ import annotations

import json

import pytest

from nformer_edge.backends.engine import Counts
from nformer_edge.backends.tensorrt.audit import (
    Layer,
    audit_plan,
    layers_from_json,
    layers_from_listing,
    type_of,
    types_built,
)
from nformer_edge.backends.tensorrt.job import PlanJob, run_job, tail
from nformer_edge.core.errors import BackendError

LISTING = """Layers:
Name: __myl_Cast_myl0_1, LayerType: kgen, Inputs: [ { Name: images, Dimensions: [-1,3,128,64], Strides: [24576,8192,64,1], StrideOrder: [3,2,1,0], Datatype: Float, Format: (Linear) Row major linear format }], Constants: [ { Name: c, Dimensions: [1], Datatype: Half, Format: (Linear) Row major linear format }], Outputs: [ { Name: a, Dimensions: [-1,3,128,64], Datatype: Int8, Format: (NHWC) Channel major format }], TacticName: __myl_Cast_0xb3, StreamId: 0, Metadata: [ONNX Layer: images_int8/QuantizeLinear][ONNX Layer: /conv1/Conv]
Name: /conv1/Conv_myl0_2, LayerType: correlation, Inputs: [ { Name: a, Dimensions: [-1,3,128,64], Datatype: Int8, Format: (NHWC) Channel major format }], Constants: [], Outputs: [ { Name: b, Dimensions: [-1,64,64,32], Datatype: Float, Format: (NHWC) Channel major format }], TacticName: __myelin_CASK_STUB, StreamId: 0, Metadata: [ONNX Layer: /conv1/Conv]
Name: x^node_of_score_3, LayerType: gemm, Inputs: [ { Name: k, Dimensions: [1], Datatype: Float, Format: (Linear) Row major linear format }], Constants: [], Outputs: [], TacticName: t, StreamId: 0, Metadata: [ONNX Layer: node_of_score | /head/RowTopK (RowTopK)]
Name: __mye1057_0_myl0_0, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, Metadata: 
"""  # noqa: E501, W291


def test_a_builders_listing_is_read_layer_by_layer():
    cast, conv, score, shapes = layers_from_listing(LISTING)
    assert (cast.kind, cast.inputs, cast.outputs) == ("kgen", ("fp32",), ("int8",))
    assert (conv.kind, conv.inputs, conv.nodes) == ("correlation", ("int8",), ("/conv1/Conv",))
    assert score.nodes == ("node_of_score", "/head/RowTopK")
    assert (shapes.inputs, shapes.nodes) == ((), ("__mye1057_0_myl0_0",))


def test_a_multiplication_has_the_type_of_the_layer_that_computes_it_not_of_the_cast_before_it():
    built = types_built(layers_from_listing(LISTING), ["/conv1/Conv", "/head/RowTopK", "/absent"])
    assert built == {"/conv1/Conv": "int8", "/head/RowTopK": "fp32"}


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("Float", "fp32"), ("Half", "fp16"), ("Int8", "int8"), ("BFloat16", "bf16"), ("Int32", ""), ("Bool", ""),
        ("Row major linear FP32", "fp32"), ("Channel major FP16 format where channel % 8 == 0", "fp16"),
        ("Thirty-two wide channel vectorized row major Int8 format", "int8"), ("N/A due to dynamic shapes", ""),
    ],
)  # fmt: skip
def test_types_are_read_in_the_words_of_each_version(words, kind):
    assert type_of(words) == kind


def test_the_inspectors_json_is_read_with_and_without_details():
    plan = {
        "Layers": [
            {"Name": "conv1 + relu1", "LayerType": "CaskConvolution",
             "Inputs": [{"Name": "x", "Format/Datatype": "Row major linear FP32"}],
             "Outputs": [{"Name": "y", "Format/Datatype": "Row major linear FP32"}]},
            "just a name",
        ],
    }  # fmt: skip
    first, second = layers_from_json(json.dumps(plan))
    assert (first.kind, first.inputs, first.nodes) == ("CaskConvolution", ("fp32",), ("conv1", "relu1"))
    assert (second.name, second.inputs) == ("just a name", ())


def layer(node, kind, name="CaskConvolution"):
    return Layer(node, name, (kind,), (kind,), (node,))


def test_the_audit_counts_what_was_asked_built_and_not_known():
    layers = [layer("a", "int8"), layer("b", "int8"), layer("c", "fp16"), layer("neck", "fp32")]
    found = audit_plan("backbone", layers, {"a": "int8", "b": "int8", "c": "int8", "neck": "fp32", "lost": "fp32"})
    assert found.layers == {"int8": 2, "fp16": 1, "fp32": 1}
    assert found.multiplications == {"int8": Counts(3, 2, 0), "fp32": Counts(2, 1, 1)}
    assert found.other == {"c": "fp16"}


@pytest.mark.parametrize(
    ("asked", "built", "strict", "message"),
    [
        ("int8", ["int8", "fp32", "fp32"], True, "got 2 of 3 multiplications not in int8"),
        ("fp16", ["fp16", "fp16", "fp32"], True, "got 1 of 3 multiplications not in fp16"),
        ("fp32", ["fp16", "fp32", "fp32"], True, "got 1 of 3 multiplications not in fp32"),
        ("fp16", ["fp16", "fp32", "fp32"], False, "got 2 of 3 multiplications not in fp16"),
    ],
)
def test_a_plan_in_another_type_than_asked_is_refused(asked, built, strict, message):
    layers = [layer(f"{i}", kind) for i, kind in enumerate(built)]
    with pytest.raises(BackendError, match=message):
        audit_plan("backbone", layers, {f"{i}": asked for i in range(3)}, strict=strict)


def test_tensorrt_8_may_choose_float32_for_a_few():
    layers = [layer("0", "fp16"), layer("1", "fp16"), layer("2", "fp32")]
    assert audit_plan("b", layers, {f"{i}": "fp16" for i in range(3)}, strict=False).other == {"2": "fp32"}


def test_an_int8_plan_of_which_nothing_can_be_told_is_refused():
    hidden = layer("a", "fp32", "Myelin")
    with pytest.raises(BackendError, match="no layer that is known to be in INT8"):
        audit_plan("backbone", [hidden], {"a": "int8"}, strict=False)


# ---- the process ----


def job(tmp_path, package):
    graph = tmp_path / "g.onnx"
    graph.write_bytes(b"no graph")
    return PlanJob(
        package, "backbone", str(graph), str(tmp_path / "plan"), str(tmp_path / "log"), {}, capabilities=("8.9",)
    )


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Puts a Python module where the builder's process finds it."""

    def make(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))
        import os
        import sys

        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
        return name

    return make


def test_a_builder_that_aborts_is_a_named_error_with_its_last_words(tmp_path, package):
    name = package(
        "aborting", "import os, sys\nprint('assertion failed: myelin', file=sys.stderr, flush=True)\nos.abort()"
    )
    with pytest.raises(BackendError, match=r"killed by SIGABRT. Its last words: .*assertion failed: myelin"):
        run_job(job(tmp_path, name))
    assert not (tmp_path / "plan").exists()


def test_a_builder_that_cannot_be_imported_says_why(tmp_path, package):
    name = package("broken", "raise ImportError('libcudart.so.13: cannot open shared object file')")
    with pytest.raises(BackendError, match=r"broken: got a package that cannot be imported \(libcudart.so.13"):
        run_job(job(tmp_path, name))


def test_a_builder_that_fails_in_python_shows_the_end_of_its_trace(tmp_path, package):
    name = package("failing", "raise RuntimeError('surprise')")
    with pytest.raises(BackendError, match=r"exit code 1. Its last words: .*RuntimeError: surprise"):
        run_job(job(tmp_path, name))


def test_a_log_that_is_not_there_has_no_last_words(tmp_path):
    assert tail(tmp_path / "absent") == "none"
