"""FP16 types and TensorRT's Q/DQ: where they are, where they are not, and that onnxruntime still computes the same."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from nformer_edge.core.errors import ArtifactError
from nformer_edge.core.preprocess import SUFFIXES
from nformer_edge.core.spec import PreprocessSpec
from nformer_edge.exporting.session import open_session
from nformer_edge.metrics.agreement import cosines
from nformer_edge.ops.contract import DOMAIN
from nformer_edge.quantize.calibrate import measure_ranges
from nformer_edge.quantize.fp16 import backbone_float32, head_float16, multiplication_types, to_half
from nformer_edge.quantize.placement_cpu import channel_gates
from nformer_edge.quantize.placement_tensorrt import half_scale, place_for_tensorrt, quantized_sums
from nformer_edge.quantize.values import Ranges, read_ranges


@pytest.fixture(scope="module")
def backbone(tiny_bundle):
    return onnx.load(tiny_bundle / "backbone.onnx")


@pytest.fixture(scope="module")
def head(tiny_bundle):
    return onnx.load(tiny_bundle / "nformer.onnx")


@pytest.fixture(scope="module")
def golden(tiny_bundle):
    with np.load(tiny_bundle / "golden.npz") as z:
        return dict(z)


@pytest.fixture(scope="module")
def ranges(tiny_bundle, tiny_market):
    images = [str(p) for p in sorted((tiny_market / "bounding_box_train").iterdir())[:6] if p.suffix in SUFFIXES]
    return measure_ranges((tiny_bundle / "backbone.onnx").read_bytes(), images, PreprocessSpec(64, 32), ["minmax"])[
        "minmax"
    ]


def run(model, feed):
    """Each node for itself: onnxruntime's INT8 kernels saturate on some CPUs, which is no property of the graph."""
    session = open_session(model.SerializeToString(), "graph", threads=1, optimize=False)
    return session.run(None, feed)[0]


def halved(backbone):
    return to_half(backbone, {n.name for n in backbone.graph.node} - backbone_float32(backbone))


def test_a_backbone_in_fp16_keeps_float32_inputs_outputs_pooling_and_neck(backbone, golden):
    model = halved(backbone)
    onnx.checker.check_model(model, full_check=True)
    types = multiplication_types(model)
    assert {types[n.name] for n in model.graph.node if n.op_type == "Conv"} == {"fp16"}
    assert {types[n.name] for n in model.graph.node if n.op_type == "Gemm"} == {"fp32"}
    ends = (*model.graph.input, *model.graph.output)
    assert all(end.type.tensor_type.elem_type == TensorProto.FLOAT for end in ends)
    features = run(model, {"images": golden["images"]})
    assert cosines(features, golden["features"]).min() >= 0.9995
    assert not np.array_equal(features, golden["features"])


def test_a_head_in_fp16_has_its_projections_there_and_everything_else_in_float32(head, golden):
    model = to_half(head, head_float16(head))
    onnx.checker.check_model(model, full_check=True)
    types = multiplication_types(model)
    projections = {n for n in types if n.endswith("/Gemm")}
    assert len(projections) == 8
    assert {types[n] for n in projections} == {"fp16"}
    assert {types[n] for n in set(types) - projections} == {"fp32"}
    assert {n.op_type for n in model.graph.node if n.domain == DOMAIN} == {"RowTopK", "ReciprocalNeighborAttention"}
    found = run(model, {"features": golden["head_input"], "landmarks": golden["landmarks"]})
    assert cosines(found, golden["embeddings"]).min() >= 0.9995


def test_a_weight_beyond_fp16_is_refused():
    weights = numpy_helper.from_array(np.full((2, 2), 1e6, np.float32), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="m")
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 2]) for n in "xy"]
    model = helper.make_model(helper.make_graph([node], "g", ends[:1], ends[1:], [weights]))
    with pytest.raises(ArtifactError, match="w: got a weight of 1e"):
        to_half(model, {"m"})


def test_an_fp16_tensor_that_is_also_an_output_is_cast_once_for_all_float32_readers():
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="half"),
        helper.make_node("Abs", ["a"], ["b"], name="one"),
        helper.make_node("Neg", ["a"], ["c"], name="two"),
    ]
    ends = {n: helper.make_tensor_value_info(n, TensorProto.FLOAT, [2]) for n in "xabc"}
    graph = helper.make_graph(nodes, "g", [ends["x"]], [ends["a"], ends["b"], ends["c"]])
    model = to_half(helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 18)]), {"half"})
    onnx.checker.check_model(model, full_check=True)
    x = np.array([1.5, -2], np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    a, b, c = session.run(None, {"x": x})
    assert (a.tolist(), b.tolist(), c.tolist()) == ([1.5, 0], [1.5, 0], [-1.5, 0])


def test_q_dq_for_tensorrt_is_symmetric_signed_and_leaves_biases_alone(backbone, ranges):
    model = place_for_tensorrt(backbone, ranges)
    onnx.checker.check_model(model, full_check=True)
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    made_by = {name: n for n in model.graph.node for name in n.output}
    quantizers = [n for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    zeros = [constants[n.input[2]] for n in quantizers]
    assert all(zero.dtype == np.int8 and not zero.any() for zero in zeros)
    conv = next(n for n in model.graph.node if n.op_type == "Conv")
    weights = made_by[conv.input[1]]
    assert constants[weights.input[0]].dtype == np.int8
    assert constants[weights.input[1]].shape == (constants[weights.input[0]].shape[0],)
    assert constants[conv.input[2]].dtype == np.float32
    assert list(multiplication_types(model).values()).count("int8") == 139


def test_both_branches_of_a_residual_sum_are_quantized_and_no_products_own_output(backbone, ranges):
    model = place_for_tensorrt(backbone, ranges)
    made_by = {name: n for n in model.graph.node for name in n.output}
    sums = [n for n in model.graph.node if n.name in quantized_sums(backbone)]
    assert len(sums) == 6
    assert all(made_by[name].op_type == "DequantizeLinear" for n in sums for name in n.input)
    inputs_of_sums = {made_by[made_by[name].input[0]].input[0] for n in sums for name in n.input}
    quantized = {n.input[0] for n in model.graph.node if n.op_type == "QuantizeLinear"}
    outputs = {n.output[0] for n in backbone.graph.node if n.op_type == "Conv"}
    followed_by_conv = {name for n in backbone.graph.node if n.op_type == "Conv" for name in n.input[:1]}
    assert not (quantized & outputs) - inputs_of_sums - followed_by_conv


def test_channel_gates_and_neck_have_no_q_dq(backbone, ranges):
    model = place_for_tensorrt(backbone, ranges)
    made_by = {name: n.op_type for n in model.graph.node for name in n.output}
    kept = set(channel_gates(backbone)) | {n.name for n in backbone.graph.node if n.op_type == "Gemm"}
    for node in model.graph.node:
        if node.name in kept:
            assert all(made_by.get(name) != "DequantizeLinear" for name in node.input)


def test_an_int8_backbone_of_fp16_types_agrees_with_float32(backbone, ranges, golden, tiny_market):
    from nformer_edge.data.batches import iter_batches

    placed = place_for_tensorrt(backbone, ranges)
    model = to_half(placed, {n.name for n in placed.graph.node} - backbone_float32(backbone))
    onnx.checker.check_model(model, full_check=True)
    assert set(multiplication_types(model).values()) == {"int8", "fp16", "fp32"}
    paths = [str(p) for p in sorted((tiny_market / "query").iterdir())]
    images = np.concatenate(list(iter_batches(paths, PreprocessSpec(64, 32), 8)))
    assert cosines(run(model, {"images": images}), run(backbone, {"images": images})).min() >= 0.95


def test_scales_are_numbers_of_fp16_and_never_too_small():
    wanted = np.abs(np.random.default_rng(0).standard_normal(1000)) * 10.0 ** np.arange(-7, 3).repeat(100)
    scales = half_scale(np.array([0.0, *wanted]))
    assert (scales[1:] >= wanted).all()
    assert (scales > 0).all()
    np.testing.assert_array_equal(scales, scales.astype(np.float16).astype(np.float32))


def test_a_tensor_without_a_range_is_refused(backbone):
    with pytest.raises(ArtifactError, match="calibration: images: got no range"):
        place_for_tensorrt(backbone, Ranges("minmax", {}))


def test_ranges_survive_being_written_and_read(ranges, tmp_path):
    ranges.save(tmp_path / "t.json")
    again = read_ranges(tmp_path / "t.json")
    assert again == ranges
    for ends in ((0.0, float("nan")), (0.0, float("inf"))):
        with pytest.raises(ArtifactError, match=r"table\[x\]: got .*, expected two finite ends"):
            Ranges("minmax", {"x": ends})
    text = (tmp_path / "t.json").read_text()
    (tmp_path / "t.json").write_text(text.replace('"method": "minmax"', '"method": "entropy"'))
    with pytest.raises(ArtifactError, match="contents that do not match their sha256"):
        read_ranges(tmp_path / "t.json")


def gated(gate: list[onnx.NodeProto], scaled: str = "x") -> onnx.ModelProto:
    """``x`` of a convolution, times what `gate` makes of it as ``g``."""
    nodes = [onnx.helper.make_node("Conv", ["image", "w"], ["x"], name="conv"), *gate]
    nodes.append(onnx.helper.make_node("Mul", [scaled, "g"], ["y"], name="scale"))
    value = onnx.helper.make_tensor_value_info
    ends = [value("image", 1, [1, 3, 4, 4])], [value("y", 1, None)]
    arrays = {"w": np.zeros((3, 3, 1, 1), np.float32), "axes": np.array([2, 3]), "channels": np.array([1])}
    return onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "g", *ends, [onnx.numpy_helper.from_array(a, n) for n, a in arrays.items()])
    )


def node(kind, inputs, output):
    return onnx.helper.make_node(kind, inputs, [output], name=output)


@pytest.mark.parametrize("last", ["HardSigmoid", "Sigmoid", "Clip", "Tanh"])
@pytest.mark.parametrize("pooling", [("GlobalAveragePool", ["x"]), ("ReduceMean", ["x", "axes"])])
def test_a_channel_gate_is_found_by_its_structure(last, pooling):
    branch = [node(*pooling, "pool"), node("Conv", ["pool", "w"], "fc"), node(last, ["fc"], "g")]
    assert set(channel_gates(gated(branch))) == {"pool", "fc", "g", "scale"}


def test_a_gate_with_a_hard_swish_inside_is_one_too():
    swish = [node("HardSigmoid", ["fc"], "hard"), node("Mul", ["fc", "hard"], "swish")]
    branch = [node("GlobalAveragePool", ["x"], "pool"), node("Conv", ["pool", "w"], "fc"), *swish]
    found = channel_gates(gated([*branch, node("Sigmoid", ["swish"], "g")]))
    assert set(found) == {"pool", "fc", "hard", "swish", "g", "scale"}


def test_a_swish_a_spatial_gate_and_a_gate_of_another_tensor_are_none():
    assert channel_gates(gated([node("Sigmoid", ["x"], "g")])) == []
    assert channel_gates(gated([node("ReduceMean", ["x", "channels"], "m"), node("Sigmoid", ["m"], "g")])) == []
    assert channel_gates(gated([node("GlobalAveragePool", ["image"], "p"), node("Sigmoid", ["p"], "g")])) == []


def test_gem_pooling_stays_fp32_with_its_powers():
    pytest.importorskip("torch", reason="the graph is traced")
    from nformer_edge.core.spec import BackboneSpec
    from nformer_edge.exporting.trace import trace_backbone
    from nformer_edge.model.backbone import Backbone

    model = trace_backbone(Backbone(BackboneSpec("resnet18", 512, "bnneck", pooling="gem")).eval(), (64, 32), 18)
    pool = {n.name for n in model.graph.node if n.name.startswith("/pool/") and n.op_type != "Constant"}
    assert len(pool) == 5
    assert pool <= backbone_float32(model)
    assert not any("trunk" in name for name in backbone_float32(model))
