"""PyTorch modules to ONNX graphs, the operators as nodes of our domain with their bodies attached.

The tracing exporter is used (``dynamo=False``) and not the newer one. Measured on OSNet x0.25, two cores: 4 s of CPU
time against 13; it needs no further package; node names follow the module path (``/trunk/conv1/Conv``), by which
later stages choose what to keep in higher precision; global pooling stays one node, which the INT8 kernels know; and
it is there in every PyTorch from 2.5 on. The model has no data-dependent control flow that a trace could miss.
"""

from __future__ import annotations

import copy
import math
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.inliner import inline_local_functions
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_linear_bn_eval

from nformer_edge import __version__
from nformer_edge.core.preprocess import scale_and_shift
from nformer_edge.core.spec import PreprocessSpec
from nformer_edge.model.backbone import Backbone, BNNeck, FCNeck
from nformer_edge.model.gated import Head
from nformer_edge.model.plain import fold_identities
from nformer_edge.ops import reference
from nformer_edge.ops.bodies import IR_VERSION, check_opset, functions
from nformer_edge.ops.contract import (
    DOMAIN,
    GATED_OPSET_VERSION,
    OPSET_VERSION,
    RECIPROCAL_NEIGHBOR_ATTENTION,
    ROW_TOP_K,
)
from nformer_edge.ops.operators import using


class _RowTopK(torch.autograd.Function):
    """Stands for the operator while a trace is taken: only shape and type matter."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, k: int) -> Tensor:
        return a.new_zeros((a.shape[0], a.shape[1], k), dtype=torch.int32)

    @staticmethod
    def symbolic(g: Any, a: Any, b: Any, k: int) -> Any:
        out = g.op(f"{DOMAIN}::{ROW_TOP_K}", a, b, k_i=k)
        out.setType(a.type().with_dtype(torch.int32).with_sizes([None, None, k]))
        return out


class _ReciprocalNeighborAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, v: Tensor, *others: Any) -> Tensor:
        return v.clone()

    @staticmethod
    def symbolic(
        g: Any, a: Any, b: Any, v: Any, neighbors: Any, t: Any, cameras: Any, scale: float, factor: float, *sizes: int
    ) -> Any:
        gate = [x for x in (t, cameras) if x is not None]
        attributes = {"scale_f": scale} if cameras is None else {"scale_f": scale, "camera_factor_f": factor}
        out = g.op(f"{DOMAIN}::{RECIPROCAL_NEIGHBOR_ATTENTION}", a, b, v, neighbors, *gate, **attributes)
        heads, size = sizes
        out.setType(v.type().with_sizes([heads, None, size]))  # the traced N must not be taken for a constant
        return out


class _Nodes:
    """The operators that an export records. `scale` is always written out, so no runtime needs our default for it."""

    def row_top_k(self, a: Tensor, b: Tensor, k: int) -> Tensor:
        return _RowTopK.apply(a, b, k)  # type: ignore[no-untyped-call]

    def pair_scores(self, a: Tensor, b: Tensor, names: Tensor) -> Tensor:
        return reference.pair_scores(a, b, names)

    def reciprocal_neighbor_attention(
        self,
        a: Tensor,
        b: Tensor,
        v: Tensor,
        neighbors: Tensor,
        scale: float | None = None,
        t: Tensor | None = None,
        cameras: Tensor | None = None,
        camera_factor: float = 1.0,
    ) -> Tensor:
        heads, size = int(v.shape[0]), int(v.shape[2])  # a trace gives tensors
        attributes = (1.0 / math.sqrt(size) if scale is None else scale, camera_factor, heads, size)
        return _ReciprocalNeighborAttention.apply(a, b, v, neighbors, t, cameras, *attributes)  # type: ignore[no-untyped-call]


class ExportedHead(nn.Module):
    """The head as it leaves: its operators are nodes. Its only job is to be exported."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = copy.deepcopy(head).eval()

    def forward(
        self,
        features: Tensor,  # [N, D]
        landmarks: Tensor,  # int32 [layers, l]
    ) -> Tensor:  # [N, D]
        with using(_Nodes()):
            out: Tensor = self.head(features, landmarks)
        return out


def trace_backbone(backbone: Backbone, size: tuple[int, int], opset: int) -> ModelProto:
    """`backbone` for images of `size` (height, width): input "images" [B, 3, H, W], output "features" [B, D].

    Batch norms that follow a convolution or the neck's linear layer are folded into it.
    """
    axes = {"images": {0: "B"}, "features": {0: "B"}}
    return _trace(folded_neck(backbone), (torch.zeros(2, 3, *size),), ("images",), "features", axes, opset)


def take_pixels(model: ModelProto, spec: PreprocessSpec) -> None:
    """Lets a backbone's graph normalize pixels by itself: its input becomes uint8, as `spec.pixels` says.

    The numbers are those of `core.preprocess.normalize`, operation by operation in float32.
    """
    assert spec.pixels is not None, "asked for"
    scale, shift = (values.reshape(1, 3, 1, 1) for values in scale_and_shift(spec))
    images, rest = model.graph.input[0], list(model.graph.node)
    inner = "/pixels/normalized"
    for node in rest:
        for i, name in enumerate(node.input):
            node.input[i] = inner if name == images.name else name
    steps: list[tuple[str, dict[str, object], list[tuple[str, np.ndarray]]]] = []
    if spec.pixels.layout == "NHWC":
        steps.append(("Transpose", {"perm": [0, 3, 1, 2]}, []))
    if spec.pixels.channels != spec.channels:
        steps.append(("Gather", {"axis": 1}, [("/pixels/order", np.array([2, 1, 0]))]))
    steps += [("Cast", {"to": TensorProto.FLOAT}, []), ("Mul", {}, [("/pixels/scale", scale)])]
    steps.append(("Sub", {}, [("/pixels/shift", shift)]))
    made, nodes = images.name, []
    for kind, attributes, constants in steps:
        model.graph.initializer.extend(numpy_helper.from_array(values, name) for name, values in constants)
        output = inner if kind == "Sub" else f"/pixels/{kind}_output"
        inputs = [made, *(name for name, _ in constants)]
        nodes.append(helper.make_node(kind, inputs, [output], name=f"/pixels/{kind}", **attributes))
        made = output
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *rest])
    images.CopyFrom(helper.make_tensor_value_info(images.name, TensorProto.UINT8, ["B", *spec.shape]))


def bring_to_unit_length(model: ModelProto) -> None:
    """Lets a backbone's graph divide each feature by its L2 norm."""
    output, inner = model.graph.output[0].name, "/unit/features"
    for node in model.graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                names[i] = inner if name == output else name
    model.graph.node.append(
        helper.make_node("LpNormalization", [inner], [output], name="/unit/LpNormalization", axis=1)
    )


def folded_neck(backbone: Backbone) -> Backbone:
    """A copy for inference. The exporter folds batch norm into convolutions by itself, but not into linear layers."""
    folded = copy.deepcopy(backbone).eval()
    fold_identities(folded)
    if isinstance(folded.neck, BNNeck):
        folded.neck.projection = fuse_linear_bn_eval(folded.neck.projection, folded.neck.bn)
        folded.neck.bn = nn.Identity()  # type: ignore[assignment]
    elif isinstance(folded.neck, FCNeck):
        fc = folded.neck.fc
        fc[0] = fuse_linear_bn_eval(cast(nn.Linear, fc[0]), cast(nn.BatchNorm1d, fc[1]))
        fc[1] = nn.Identity()
    return folded


def trace_head(head: Head, opset: int) -> ModelProto:
    """`head`: inputs "features" [N, D] and "landmarks" int32 [layers, l], output "embeddings" [N, D]."""
    spec = head.spec
    torch_in = (torch.ones(spec.k + 2, spec.features), torch.zeros(spec.layers, spec.landmarks, dtype=torch.int32))
    axes = {"features": {0: "N"}, "landmarks": {1: "l"}, "embeddings": {0: "N"}}
    model = _trace(ExportedHead(head), torch_in, ("features", "landmarks"), "embeddings", axes, opset)
    [taken] = {len(n.input) for n in model.graph.node if n.op_type == RECIPROCAL_NEIGHBOR_ATTENTION}
    model.functions.extend(functions(opset, taken))
    imported = next(o for o in model.opset_import if o.domain == DOMAIN)
    imported.version = OPSET_VERSION if taken == 4 else GATED_OPSET_VERSION
    return model


def portable_head(model: ModelProto) -> ModelProto:
    """What `trace_head` gave, with the bodies in the place of our nodes: for runtimes that know no local functions.

    Every constant is a `value` tensor, and nothing imports our domain. No kernel of ours can take part in it.
    """
    inlined = inline_local_functions(model)
    _constants_as_tensors(inlined.graph.node)
    standard = [o for o in inlined.opset_import if o.domain != DOMAIN]
    del inlined.opset_import[:]
    inlined.opset_import.extend(standard)
    return inlined


def _constants_as_tensors(nodes: Iterable[NodeProto]) -> None:
    types = {"value_int": np.int64, "value_float": np.float32}
    for node in nodes:
        for attribute in node.attribute:
            _constants_as_tensors(attribute.g.node)
        if node.op_type == "Constant" and node.attribute[0].name in types:
            [given] = node.attribute
            value = np.array(helper.get_attribute_value(given), types[given.name])
            given.CopyFrom(helper.make_attribute("value", numpy_helper.from_array(value)))


def _trace(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    names: Sequence[str],
    output: str,
    axes: Mapping[str, Mapping[int, str]],
    opset: int,
) -> ModelProto:
    check_opset(opset)
    custom = {DOMAIN: OPSET_VERSION} if isinstance(module, ExportedHead) else None
    with warnings.catch_warnings(), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        warnings.simplefilter("ignore")  # on traced Python numbers (all are fixed shapes), and on this exporter's age
        torch.onnx.export(
            module,
            inputs,
            file,
            input_names=list(names),
            output_names=[output],
            dynamic_axes=dict(axes),
            opset_version=opset,
            custom_opsets=custom,
            do_constant_folding=True,
            dynamo=False,
        )
        model = onnx.load(file)
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "nformer-edge", __version__
    model.doc_string = ""
    _drop_shared_initializers(model)
    return model


def _drop_shared_initializers(model: ModelProto) -> None:
    """Reads initializers directly: the exporter puts an Identity after those that happen to be equal."""
    constants = {t.name for t in model.graph.initializer}
    source = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "Identity" and n.input[0] in constants}
    source = {name: constant for name, constant in source.items() if name not in {o.name for o in model.graph.output}}
    kept = [n for n in model.graph.node if not (n.op_type == "Identity" and n.output[0] in source)]
    for node in kept:
        for i, name in enumerate(node.input):
            node.input[i] = source.get(name, name)
    del model.graph.node[:]
    model.graph.node.extend(kept)
