"""Channels filled up with zeros to whole blocks: kernels of CPUs compute in blocks of 16, so 24 cost what 32 cost.

A plain transformation of a float graph, before Q/DQ is placed. Tensors keep their names, so ranges that were measured
stay valid. What stands in an added channel does not matter: whatever reads it has a weight of zero for it.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from onnx import ModelProto, NodeProto, numpy_helper

from nformer_edge.quantize.fp16 import drop_unused
from nformer_edge.quantize.placement import as_exported

#: Channels of one block, and the fewest that are filled up: of fewer, most of the work would be added.
BLOCK, _FEWEST = 16, 9

#: Nodes that compute each channel for itself, however many there are: what they read and make has the same ones.
_CHANNELWISE = (
    *("Relu", "LeakyRelu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Identity", "Add", "Sub", "Mul"),
    *("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"),
)


def pad_channels(model: ModelProto) -> ModelProto | None:
    """A copy of a float backbone in which channels between convolutions are whole blocks; None if all are already.

    It computes the same but for the order in which a kernel adds up: to each sum zeros are added.
    """
    model = as_exported(model)
    sizes = {t.name: tuple(t.dims) for t in model.graph.initializer}
    tied = _tied(model, sizes)
    added = _added(model, sizes, tied)
    if not added:
        return None
    constants, made = {t.name: t for t in model.graph.initializer}, {}
    for node in model.graph.node:
        if node.op_type != "Conv":
            continue
        read, written = (added.get(tied[name], 0) for name in (node.input[0], node.output[0]))
        group = _group(node)
        if group > 1 and written:  # depthwise
            next(a for a in node.attribute if a.name == "group").i, read = group + written, 0
        for i, widths in enumerate([(written, read, 0, 0), (written,)][: len(node.input) - 1], start=1):
            if any(widths):
                name = f"{node.input[i]}/padded/{'x'.join(map(str, widths))}"
                values = numpy_helper.to_array(constants[node.input[i]])
                made[name] = numpy_helper.from_array(np.pad(values, [(0, width) for width in widths]), name)
                node.input[i] = name
    model.graph.initializer.extend(made.values())
    del model.graph.value_info[:]
    drop_unused(model)
    return model


def _tied(model: ModelProto, sizes: dict[str, tuple[int, ...]]) -> dict[str, str]:
    """Of each tensor one that stands for all that must have as many channels; "" where that number is fixed."""
    parent: dict[str, str] = defaultdict(str)

    def root(name: str) -> str:
        while parent.setdefault(name, name) not in (name, ""):
            name = parent[name]
        return name if parent[name] else ""

    def tie(*names: str) -> None:
        roots = {root(name) for name in names}
        first = "" if "" in roots else min(roots)
        for name in roots - {first}:
            parent[name] = first

    parent[""] = ""
    tie("", *(value.name for value in (*model.graph.input, *model.graph.output)))
    for node in model.graph.node:
        if node.op_type == "Conv" and node.input[1] in sizes and set(node.input[1:]) <= sizes.keys():
            tie(node.input[0])
            tie(node.output[0])
            if _group(node) > 1:
                depthwise = _group(node) == sizes[node.input[1]][0] and sizes[node.input[1]][1] == 1
                tie(node.input[0], node.output[0], *([] if depthwise else [""]))
        elif node.op_type in _CHANNELWISE and not set(node.input) & sizes.keys():
            tie(*node.input, *node.output)
        else:
            tie("", *node.input, *node.output)
    return {name: root(name) for name in parent}


def _added(model: ModelProto, sizes: dict[str, tuple[int, ...]], tied: dict[str, str]) -> dict[str, int]:
    """Channels to add to the tensors that each one stands for, where there are any."""
    counts: dict[str, set[int]] = defaultdict(set)
    for node in model.graph.node:
        if node.op_type == "Conv" and node.input[1] in sizes:
            counts[tied[node.output[0]]].add(sizes[node.input[1]][0])
    one = {key: found.pop() for key, found in counts.items() if key and len(found) == 1}  # no broadcast among them
    return {key: -count % BLOCK for key, count in one.items() if count % BLOCK and count >= _FEWEST}


def _group(node: NodeProto) -> int:
    return next((a.i for a in node.attribute if a.name == "group"), 1)
