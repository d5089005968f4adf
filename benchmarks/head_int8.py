"""The head on a CPU with its linear layers in INT8, against itself in FP32: time of the whole head, in turn.

    python benchmarks/head_int8.py --images 19281 --rounds 3
    python benchmarks/head_int8.py head.safetensors --images 19281

Every linear layer quantizes what it reads anew in each run (dynamic INT8, weights with one scale a channel); the two
operators run in our kernels, in float. Without a checkpoint the paper's head with random weights, affinity rule.
Features are generated: people of 20 images. Cosines are between the two outputs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping

import numpy as np
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from nformer_edge.core.errors import Error
from nformer_edge.core.spec import HeadSpec
from nformer_edge.exporting.session import open_session
from nformer_edge.exporting.trace import trace_head
from nformer_edge.metrics.agreement import cosines
from nformer_edge.model.checkpoint import load_checkpoint
from nformer_edge.model.nformer import NFormer
from nformer_edge.ops.bodies import DEFAULT_OPSET
from nformer_edge.ops.contract import draw_landmarks
from nformer_edge.quantize.fp16 import drop_unused


def quantize_linear_layers(model: ModelProto) -> ModelProto:
    """A copy whose multiplications with a constant weight are dynamic INT8, in the form that onnxruntime fuses."""
    result = ModelProto()
    result.CopyFrom(model)
    nodes, graph = list(model.graph.node), result.graph
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    del graph.node[:]
    done: set[str] = set()
    for node in nodes:
        if node.op_type not in ("Gemm", "MatMul") or node.input[1] not in weights:
            graph.node.append(node)
            continue
        read = node.input[0]
        if read not in done:
            done.add(read)
            names = [f"{read}/{what}" for what in ("int8", "scale", "zero")]
            graph.node.append(helper.make_node("DynamicQuantizeLinear", [read], names))
        graph.node.extend(_in_int8(node, weights, graph))
    drop_unused(result)
    return result


def _in_int8(node: NodeProto, weights: Mapping[str, np.ndarray], graph: object) -> list[NodeProto]:
    transposed = any(a.name == "transB" and a.i for a in node.attribute)
    weight = weights[node.input[1]].T if transposed else weights[node.input[1]]
    scale = np.maximum(np.abs(weight).max(axis=0), np.finfo(np.float32).tiny).astype(np.float32) / np.float32(127)
    made, read = node.output[0], node.input[0]
    constants = {
        "weight": np.clip(np.rint(weight / scale), -127, 127).astype(np.int8),
        "weight_scale": scale,
        "weight_zero": np.zeros(len(scale), np.int8),
    }
    for what, values in constants.items():
        graph.initializer.append(numpy_helper.from_array(values, f"{made}/{what}"))  # type: ignore[attr-defined]
    product = f"{made}/product" if len(node.input) > 2 else made
    inputs = [f"{read}/int8", f"{made}/weight", f"{read}/zero", f"{made}/weight_zero"]
    found = [
        helper.make_node("MatMulInteger", inputs, [f"{made}/sum"]),
        helper.make_node("Cast", [f"{made}/sum"], [f"{made}/float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{read}/scale", f"{made}/weight_scale"], [f"{made}/scale"]),
        helper.make_node("Mul", [f"{made}/float", f"{made}/scale"], [product]),
    ]
    return [*found, *([helper.make_node("Add", [product, node.input[2]], [made])] if product != made else [])]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--images", type=int, default=19281)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    found = load_checkpoint(args.checkpoint).head if args.checkpoint else None
    head = found or NFormer(HeadSpec(features=512, rule="affinity"))
    spec, rng = head.spec, np.random.default_rng(0)
    people = np.repeat(rng.normal(size=(args.images // 20 + 1, spec.features)), 20, axis=0)[: args.images]
    features = (people + 0.7 * rng.normal(size=people.shape)).astype(np.float32)
    feed = {"features": features, "landmarks": draw_landmarks(args.images, spec.layers, spec.landmarks, 0)}
    plain = trace_head(head, DEFAULT_OPSET)
    graphs = {"FP32": plain, "INT8": quantize_linear_layers(plain)}
    sessions = {
        name: open_session(graph.SerializeToString(), name, args.threads, native=True) for name, graph in graphs.items()
    }
    taken: dict[str, list[float]] = {name: [] for name in sessions}
    outputs = {name: session.run(None, feed)[0] for name, session in sessions.items()}
    for _ in range(args.rounds):
        for name, session in sessions.items():
            begun = time.perf_counter()
            session.run(None, feed)
            taken[name].append(time.perf_counter() - begun)
    ratios = [a / b for a, b in zip(taken["FP32"], taken["INT8"], strict=True)]
    same = cosines(outputs["FP32"], outputs["INT8"])
    for name, seconds in taken.items():
        print(f"{name}: {statistics.median(seconds):.2f} s")
    print(f"{statistics.median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f}), {args.images} images")
    print(f"cosine: lowest {same.min():.4f}, mean {same.mean():.4f}")


if __name__ == "__main__":
    try:
        main()
    except Error as e:
        raise SystemExit(str(e)) from e
