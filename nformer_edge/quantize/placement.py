"""A backbone with Q/DQ nodes for the CPU, of which any nodes can be left in float without placing them again.

onnxruntime places Q/DQ in the whole graph once, which takes seconds. What is left of it when some nodes are to stay in
float follows from the graph alone: the weights of those nodes are the float ones again, and an activation keeps its
Q/DQ as long as the node that makes it or one that reads it is in INT8, because a CPU's INT8 kernel reads and writes
INT8. onnxruntime's own quantizer gives the same when it is told to exclude these nodes, but for the range of what a
pooling passes on (here it stays that of the whole graph), and for one thing more. From 1.21 on onnxruntime's optimizer
quantizes the float weights of a convolution between DQ and Q by itself, with one scale for all channels
(`WeightBiasQuantization`): a node that was left in float would come out worse than in INT8. It does so where the
input's scale is a single number, so a node that is left out reads its input through a DQ of its own, with that number
once a channel.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from difflib import get_close_matches

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from nformer_edge.core.errors import UsageError
from nformer_edge.quantize.fp16 import drop_unused, makers

#: Nodes that are in INT8 when what they read is: they only pass it on.
FOLLOWERS = (
    "Relu",
    "Clip",
    "MaxPool",
    "AveragePool",
    "Flatten",
    "Reshape",
    "Squeeze",
    "Unsqueeze",
    "Transpose",
    "Slice",
)


class Placement:
    """Q/DQ in every node that is quantized, and the graph with fewer of them.

    Args:
        plain: the float backbone that `placed` was made of.
        placed: with Q/DQ, nodes under the same names; a ReLU whose work a quantized range does may be gone.
        quantized: names of the nodes that are in INT8 in `placed`.
    """

    def __init__(self, plain: ModelProto, placed: ModelProto, quantized: Iterable[str]) -> None:
        self.plain, self.placed = plain, placed
        self._quantized = frozenset(quantized)
        self._after = {n.name: n for n in placed.graph.node}
        self._makers = makers(plain)
        self._readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in plain.graph.node:
            for name in node.input:
                self._readers[name].append(node)
        made_by, constants = makers(placed), {t.name for t in placed.graph.initializer}
        self._weights: dict[str, NodeProto] = {}  # what a node reads of a constant -> the DQ node that makes it
        self._pairs: dict[str, tuple[NodeProto, NodeProto]] = {}  # an activation -> its Q and DQ
        for node in placed.graph.node:
            if node.op_type == "DequantizeLinear" and node.input[0] in constants:
                self._weights[node.output[0]] = node
            elif node.op_type == "DequantizeLinear":
                quantizer = made_by[node.input[0]]
                self._pairs[quantizer.input[0]] = quantizer, node

    def without(self, excluded: Collection[str] = ()) -> ModelProto:
        """The graph in which the nodes named are in float, beside those that are in float anyway.

        Nodes of FOLLOWERS follow what they read, named or not.

        Raises:
            UsageError: for a name that no node has.
        """
        require_nodes(self.plain, excluded)
        excluded = frozenset(excluded)
        int8 = self._int8(excluded)
        kept = {name for name in self._pairs if self._touched(name, int8)}
        nodes: list[NodeProto] = []
        for value in self.plain.graph.input:
            nodes += self._pairs[value.name] if value.name in kept else ()
        for node in self.plain.graph.node:
            nodes += self._rewritten(node, int8, kept)
        result = ModelProto()
        result.CopyFrom(self.placed)
        del result.graph.node[:], result.graph.initializer[:], result.graph.value_info[:]
        result.graph.node.extend({id(node): node for node in nodes}.values())  # a weight that two nodes read, once
        used = {name for node in nodes for name in node.input} - {name for node in nodes for name in node.output}
        constants = {t.name: t for model in (self.plain, self.placed) for t in model.graph.initializer}
        result.graph.initializer.extend(t for name, t in constants.items() if name in used)
        _shield(result, excluded)
        return result

    def _int8(self, excluded: Collection[str]) -> set[str]:
        """Names of the nodes that are in INT8."""
        found: set[str] = set()
        for node in self.plain.graph.node:
            source = self._makers.get(node.input[0]) if node.op_type in FOLLOWERS else None
            chosen = source.name in found if source is not None else node.name not in excluded
            if chosen and node.name in self._quantized:
                found.add(node.name)
        return found

    def _touched(self, activation: str, int8: Collection[str]) -> bool:
        maker = self._makers.get(activation)
        if maker is not None and maker.name in int8:
            return True
        return any(n.name in int8 for n in self._readers[activation] if n.op_type not in FOLLOWERS)

    def _rewritten(self, node: NodeProto, int8: Collection[str], kept: Collection[str]) -> list[NodeProto]:
        """`node` as it stands in the result, after the weights it reads and before the Q/DQ of what it makes."""
        after = self._after.get(node.name)
        if after is None and node.name in int8:
            return []  # a ReLU that is gone: the node before it makes what it made
        copy = NodeProto()
        copy.CopyFrom(after if after is not None and node.name in int8 else node)
        weights: list[NodeProto] = []
        for i, name in enumerate(node.input):
            if node.name in int8 and copy.input[i] in self._weights:
                weights.append(self._weights[copy.input[i]])
            else:
                copy.input[i] = self._pairs[name][1].output[0] if name in kept else name
        pairs = [n for name in copy.output if name in kept for n in self._pairs[name]]
        return [*weights, copy, *pairs]


def _shield(model: ModelProto, excluded: Collection[str]) -> None:
    """Gives each excluded convolution that reads a DQ one of its own, with its scale once a channel."""
    made_by = makers(model)
    constants = {t.name: t for t in model.graph.initializer}
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        source = made_by.get(node.input[0])
        alone = node.op_type == "Conv" and node.name in excluded
        if alone and source is not None and source.op_type == "DequantizeLinear":
            groups = next((a.i for a in node.attribute if a.name == "group"), 1)
            channels = constants[node.input[1]].dims[1] * groups
            own = [f"{node.name}/{what}" for what in ("scale", "zero_point", "dequantized")]
            for shared, name in zip(source.input[1:], own, strict=False):
                values = np.full(channels, numpy_helper.to_array(constants[shared]))
                model.graph.initializer.append(numpy_helper.from_array(values, name))
            inputs = [source.input[0], *own[:2]]
            nodes.append(helper.make_node("DequantizeLinear", inputs, own[2:], name=f"{node.name}/DQ", axis=1))
            node.input[0] = own[2]
        nodes.append(node)
    used = {name for node in nodes for name in node.input} | {value.name for value in model.graph.output}
    del model.graph.node[:]  # without the DQ that nobody reads any more
    model.graph.node.extend(n for n in nodes if n.op_type != "DequantizeLinear" or n.output[0] in used)


def as_exported(model: ModelProto) -> ModelProto:
    """A copy of a graph that others wrote, in the form of our own export: constants are initializers, and batch norms
    are folded into the convolution or the linear layer before them."""
    result = ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    given = {node.name or node.output[0]: value for node in graph.node if (value := _constant(node)) is not None}
    graph.initializer.extend(given.values())
    kept = [node for node in graph.node if (node.name or node.output[0]) not in given]
    readers = Counter(name for node in kept for name in node.input) + Counter(o.name for o in graph.output)
    made_by, constants = {node.output[0]: node for node in kept if node.output}, {t.name: t for t in graph.initializer}
    folded: list[NodeProto] = []
    for node in kept:
        before = made_by.get(node.input[0]) if node.op_type == "BatchNormalization" else None
        if before is not None and readers[node.input[0]] == 1 and _fold(before, node, constants):
            graph.initializer.extend(constants[name] for name in before.input[1:])
            folded.append(node)
    del graph.node[:], graph.value_info[:]
    graph.node.extend(node for node in kept if not any(node is one for one in folded))
    drop_unused(result)
    return result


def _constant(node: NodeProto) -> TensorProto | None:
    """What a Constant node gives; None for another node, and for text and sparse tensors."""
    if node.op_type != "Constant" or not node.attribute:
        return None
    name, value = node.attribute[0].name, helper.get_attribute_value(node.attribute[0])
    if name == "value":
        tensor = TensorProto()
        tensor.CopyFrom(value)
        tensor.name = node.output[0]
        return tensor
    kinds = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
    return numpy_helper.from_array(np.array(value, kinds[name]), node.output[0]) if name in kinds else None


def _fold(node: NodeProto, norm: NodeProto, constants: dict[str, TensorProto]) -> bool:
    """Folds a batch norm into a convolution or a linear layer, whose constants become its own."""
    settings = {a.name: helper.get_attribute_value(a) for a in (*node.attribute, *norm.attribute)}
    plain = node.op_type == "Conv" or (node.op_type == "Gemm" and settings.get("alpha", 1.0) == 1.0)
    plain = plain and settings.get("beta", 1.0) == 1.0 and not settings.get("transA") and len(norm.output) == 1
    if not plain or not set((*node.input[1:], *norm.input[1:])) <= constants.keys():
        return False
    scale, shift, mean, variance = (numpy_helper.to_array(constants[name]) for name in norm.input[1:5])
    factor = scale / np.sqrt(variance + settings.get("epsilon", 1e-5))
    weight = numpy_helper.to_array(constants[node.input[1]])
    axis = 0 if node.op_type == "Conv" or settings.get("transB") else 1
    bias = numpy_helper.to_array(constants[node.input[2]]) if len(node.input) > 2 else np.zeros_like(mean)
    shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
    made = {"weight": weight * factor.reshape(shape), "bias": (bias - mean) * factor + shift}
    names = [f"{norm.output[0]}/{what}" for what in made]
    for name, values in zip(names, made.values(), strict=True):
        constants[name] = numpy_helper.from_array(values.astype(weight.dtype), name)
    del node.input[1:]
    node.input.extend(names)
    node.output[0] = norm.output[0]
    return True


def require_nodes(model: ModelProto, names: Iterable[str]) -> None:
    """Raises UsageError, with the nearest spelling, for a name that no node of `model` has."""
    known = {node.name for node in model.graph.node}
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = (
                f"Did you mean {near[0]!r}?" if near else "Open the bundle's backbone.onnx in a viewer, such as Netron."
            )
            raise UsageError("exclude_nodes", repr(name), "names of the backbone's nodes", hint)


def node_groups(model: ModelProto, quantized: Collection[str]) -> dict[str, tuple[str, ...]]:
    """The quantized nodes to judge one by one, nodes in a row of one kind together, by the first one's name.

    In a row are nodes of which each is the only reader of the one before, such as the two convolutions of OSNet's
    light 3 x 3 or a sum of several branches. FOLLOWERS are in no group: they have no choice of their own.
    """
    readers: dict[str, list[NodeProto]] = defaultdict(list)
    for node in model.graph.node:
        for name in node.input:
            readers[name].append(node)
    first: dict[str, str] = {}
    groups: dict[str, tuple[str, ...]] = {}
    for node in model.graph.node:
        if node.name not in quantized or node.op_type in FOLLOWERS:
            continue
        head = first.setdefault(node.name, node.name)
        groups[head] = (*groups.get(head, ()), node.name)
        following = readers[node.output[0]]
        if len(following) == 1 and following[0].op_type == node.op_type:
            first.setdefault(following[0].name, head)
    return groups
