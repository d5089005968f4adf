"""A backbone that learns as its INT8 engine computes: the placed graph itself, run by PyTorch with gradients.

Fake quantization stands exactly where the export puts Q/DQ, because it is that graph which is run: `placement_cpu` or
`placement_tensorrt`, with the same nodes left in float. Batch norms of the trunk are folded, as they are in the
export. Each range begins as calibrated and is learned: rounding passes the gradient straight through, and the ends get
that of LSQ (Esser et al., ICLR 2020). A weight's scale follows from the weight, as in the export.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import NodeProto, helper, numpy_helper
from torch import Tensor, nn

from nformer_edge.core.errors import UsageError
from nformer_edge.exporting.trace import trace_backbone
from nformer_edge.model.backbone import Backbone
from nformer_edge.quantize.fp16 import makers
from nformer_edge.quantize.placement_cpu import place_for_cpu
from nformer_edge.quantize.placement_tensorrt import half_scale, place_for_tensorrt
from nformer_edge.quantize.values import Ranges

Where = Literal["cpu", "tensorrt"]

#: Ends move by so many times the learning rate, relative to where they began.
_PACE = 10.0


class QuantizedBackbone(Backbone):
    """`backbone` with fake quantization in its trunk; the neck stays float, as in every INT8 engine.

    Args:
        backbone: trained, float.
        size: height and width of its images.
        opset: of the bundle that it will be exported to.
        ranges: of its tensors, as calibrated.
        where: whose placement.
        reduce_range: for the CPU, 7-bit weights.
        exclude: nodes that stay in float beside those that always do.

    Raises:
        UsageError: for a graph with a node that is not known here.
    """

    def __init__(
        self,
        backbone: Backbone,
        size: tuple[int, int],
        opset: int,
        ranges: Ranges,
        where: Where = "cpu",
        *,
        reduce_range: bool = False,
        exclude: tuple[str, ...] = (),
    ) -> None:
        nn.Module.__init__(self)
        self.spec = backbone.spec
        model = trace_backbone(backbone, size, opset)
        if where == "cpu":
            placement = place_for_cpu(model.SerializeToString(), ranges, reduce_range=reduce_range)
            plain, placed = placement.plain, placement.without(exclude)
        else:
            plain, placed = model, place_for_tensorrt(model, ranges, exclude)
        self.trunk = PlacedTrunk(plain, placed, ranges, 64 if reduce_range and where == "cpu" else 127)
        self.pool = nn.Identity()  # type: ignore[assignment]
        self.neck = backbone.neck
        self._float, self._ranges = [backbone], ranges  # in a list: no part of this module
        self._folded = _convolutions(backbone, size, plain)

    def train(self, mode: bool = True) -> QuantizedBackbone:
        """Batch norms keep the statistics that they have: those of the trunk are folded into what is learned."""
        super().train(mode)
        self.neck.eval()
        return self

    @torch.no_grad()
    def learned(self) -> tuple[Backbone, Ranges]:
        """The float backbone with the weights that were learned, and the ranges: their INT8 export is this module."""
        trunk: Any = self.trunk
        for name, parameter in trunk.named():
            for convolution, norm, is_bias in self._folded.get(name, []):
                factor = torch.ones(()) if norm is None else norm.weight / (norm.running_var + norm.eps).sqrt()
                if not is_bias:
                    convolution.weight.copy_(parameter / factor.reshape(-1, 1, 1, 1) - _identity(convolution))
                elif norm is None:
                    convolution.bias.copy_(parameter)
                else:
                    own = 0.0 if convolution.bias is None else convolution.bias
                    norm.bias.copy_(parameter - (own - norm.running_mean) * factor)
        table = {**self._ranges.table, **trunk.table()}
        return self._float[0].eval(), replace(self._ranges, table=table, backbone_sha256="", calibration=None)


class PlacedTrunk(nn.Module):
    """A graph with Q/DQ up to the flattened feature, as a module. Images float32 [B, 3, H, W] to [B, C].

    Args:
        plain: the float graph.
        placed: the same with Q/DQ.
        ranges: that Q/DQ came of.
        steps: of a weight's scale, from 0 to its largest value.
    """

    def __init__(self, plain: onnx.ModelProto, placed: onnx.ModelProto, ranges: Ranges, steps: int) -> None:
        super().__init__()
        self._steps = steps
        self._constants = {t.name: numpy_helper.to_array(t) for t in placed.graph.initializer}
        numbers = {t.name: numpy_helper.to_array(t) for t in plain.graph.initializer}
        before = {node.name: node for node in plain.graph.node}
        made_by = makers(placed)
        self.parameters_by_index = nn.ParameterList()
        self._index: dict[str, int] = {}
        self.ranges = nn.ModuleDict()
        self._range_of: dict[str, str] = {}
        self._nodes: list[NodeProto] = []
        self._convolutions: dict[str, tuple[str, str | None]] = {}
        for node in placed.graph.node:
            if node.op_type == "Flatten":
                self._result = node.input[0]
                break
            if node.op_type == "DequantizeLinear" and node.input[0] in self._constants:
                continue
            if node.op_type not in _KNOWN:
                known = ", ".join(sorted(_KNOWN))
                raise UsageError(f"qat: {node.name}", node.op_type, f"one of {known}", "Leave the step qat out.")
            if node.op_type == "Conv":
                weight, *bias = before[node.name].input[1:]
                for name in (weight, *bias):
                    if name not in self._index:
                        self._index[name] = len(self.parameters_by_index)
                        self.parameters_by_index.append(nn.Parameter(torch.from_numpy(numbers[name].copy())))
                self._convolutions[node.name] = weight, bias[0] if bias else None
            if node.op_type == "QuantizeLinear":
                tensor = node.input[1].removesuffix("_scale")
                if tensor not in self._range_of:
                    self._range_of[tensor] = str(len(self.ranges))
                    symmetric = self._constants[node.input[2]].dtype == np.int8
                    self.ranges[self._range_of[tensor]] = LearnedRange(*ranges.table[tensor], symmetric=symmetric)
            self._nodes.append(node)
        self._int8 = {n.name: n for n in self._nodes if n.op_type == "Conv" and n.input[1] in made_by}

    def named(self) -> list[tuple[str, Tensor]]:
        """The float weights and biases that are learned, by their names in the plain graph."""
        return [(name, self.parameters_by_index[i]) for name, i in self._index.items()]

    def table(self) -> dict[str, tuple[float, float]]:
        """The ranges as learned, by the tensor's name."""
        return {tensor: self.ranges[key].ends() for tensor, key in self._range_of.items()}  # type: ignore[operator]

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        values: dict[str, Tensor] = {"images": images}
        scales: dict[str, Tensor] = {}
        for node in self._nodes:
            if node.op_type == "QuantizeLinear":
                found: Any = self.ranges[self._range_of[node.input[1].removesuffix("_scale")]]
                values[node.output[0]], scales[node.output[0]] = found(values[node.input[0]])
            elif node.op_type == "DequantizeLinear":
                values[node.output[0]] = values[node.input[0]]
                scales[node.output[0]] = scales[node.input[0]]
            elif node.op_type == "Conv":
                values[node.output[0]] = self._conv(node, values[node.input[0]], scales.get(node.input[0]))
            else:
                values[node.output[0]] = _KNOWN[node.op_type](node, *(self._value(n, values) for n in node.input))
        return values[self._result]

    def _value(self, name: str, values: Mapping[str, Tensor]) -> Tensor:
        return values[name] if name in values else torch.from_numpy(self._constants[name].copy())

    def _conv(self, node: NodeProto, read: Tensor, scale: Tensor | None) -> Tensor:
        weight_name, bias_name = self._convolutions[node.name]
        weight = self.parameters_by_index[self._index[weight_name]]
        bias = None if bias_name is None else self.parameters_by_index[self._index[bias_name]]
        if node.name in self._int8:
            largest = weight.detach().abs().amax(dim=(1, 2, 3))
            symmetric = next(iter(self.ranges.values())).symmetric
            step = largest / self._steps
            step = _half(step) if symmetric else torch.where(step < torch.finfo(torch.float32).tiny, 1.0, step)
            by_channel = step.reshape(-1, 1, 1, 1)
            weight = _straight(weight, (weight / by_channel).round().clamp(-self._steps, self._steps) * by_channel)
            if bias is not None and scale is not None and not symmetric:
                fine = scale.detach() * step
                bias = _straight(bias, (bias / fine).round() * fine)
        settings = _settings(node)
        top, left, bottom, right = settings.get("pads", [0, 0, 0, 0])
        if (top, left) != (bottom, right):
            read, top, left = F.pad(read, (left, right, top, bottom)), 0, 0
        stride, dilation = settings.get("strides", 1), settings.get("dilations", 1)
        return F.conv2d(read, weight, bias, stride, (top, left), dilation, settings.get("group", 1))


class LearnedRange(nn.Module):
    """The range of an activation: 256 levels from `low` to `high`, one of which is 0; or symmetric, with 0 in the
    middle. An end that begins at 0 stays there: a ReLU may have been left to it.
    """

    def __init__(self, low: float, high: float, *, symmetric: bool) -> None:
        super().__init__()
        self.symmetric = symmetric
        low, high = min(low, 0.0), max(high, 0.0)
        self.signed = low < 0
        ends = [max(-low, high)] * 2 if symmetric else [-low, high]
        self.register_buffer("start", torch.tensor(ends))
        self.moved = nn.Parameter(torch.zeros(1 if symmetric else 2))

    def _ends(self) -> Tensor:
        """Distances of the two ends from 0."""
        return self.get_buffer("start") * (_PACE * self.moved).exp()

    def ends(self) -> tuple[float, float]:
        """Lowest and highest value."""
        below, above = self._ends().tolist()
        return (-below if self.signed else 0.0), above

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x` as 8 bits represent it, and the step."""
        below, above = self._ends()
        if self.symmetric:
            step = _straight(above / 127, _half(above / 127))
            zero, low, high = torch.zeros_like(step), -128, 127
        else:
            step = (below + above) / 255
            zero, low, high = _straight(below / step, (below / step).round()), 0, 255
        return _FakeQuantize.apply(x, step, zero, low, high), step  # type: ignore[no-untyped-call]


class _FakeQuantize(torch.autograd.Function):
    """Rounding to levels, clipped; gradients as LSQ has them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
        result = torch.fake_quantize_per_tensor_affine(x, step, zero.int(), low, high)
        ctx.save_for_backward(x, step, result)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, step, result = ctx.saved_tensors
        (grad,) = grads
        through = grad * ((result - x).abs_() <= 0.5001 * step)  # not clipped
        by_step = ((result * grad).sum() - (x * through).sum()) / step
        by_zero = -step * (grad.sum() - through.sum())
        return through, by_step, by_zero, None, None


def _straight(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with the gradient of `x`."""
    return x + (rounded - x).detach()


def _half(scale: Tensor) -> Tensor:
    return torch.from_numpy(np.asarray(half_scale(scale.detach().numpy()))).reshape(scale.shape)


def _settings(node: NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _pool(node: NodeProto, x: Tensor) -> Tensor:
    s = _settings(node)
    top, left, bottom, right = s.get("pads", [0, 0, 0, 0])
    if (top, left) != (bottom, right) or set(s.get("dilations", [1])) != {1}:
        raise UsageError(f"qat: {node.name}", "unequal padding or dilation", "a plain pooling", "Leave the step out.")
    size, stride, ceil = s["kernel_shape"], s["strides"], bool(s.get("ceil_mode", 0))
    if node.op_type == "MaxPool":
        return F.max_pool2d(x, size, stride, (top, left), ceil_mode=ceil)
    return F.avg_pool2d(x, size, stride, (top, left), ceil, bool(s.get("count_include_pad", 0)))


#: What is computed of nodes whose inputs have no constants that are learned.
_KNOWN: dict[str, Callable[..., Tensor]] = {
    "Conv": lambda node, *_: NotImplemented,
    "QuantizeLinear": lambda node, *_: NotImplemented,
    "DequantizeLinear": lambda node, *_: NotImplemented,
    "Relu": lambda node, x: F.relu(x),
    "Sigmoid": lambda node, x: x.sigmoid(),
    "Add": lambda node, a, b: a + b,
    "Mul": lambda node, a, b: a * b,
    "MaxPool": _pool,
    "AveragePool": _pool,
    "GlobalAveragePool": lambda node, x: x.mean((2, 3), keepdim=True),
}


def _identity(convolution: nn.Conv2d) -> Tensor:
    """What is added to its weight, such as a shortcut that the export folds away (`model.plain.DiracConv`)."""
    return dict(convolution.named_buffers()).get("identity", torch.zeros(()))


def _convolutions(
    backbone: Backbone, size: tuple[int, int], plain: onnx.ModelProto
) -> dict[str, list[tuple[Any, Any, bool]]]:
    """Of each constant of a convolution in the graph: the module, the batch norm folded into it, whether it is a bias.

    Modules are called in the order of the graph's nodes; each pair is checked by its numbers.
    """
    called: list[list[Any]] = []
    outputs: dict[int, list[Any]] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            called.append([module, None, output])
            outputs[id(output)] = called[-1]
        elif id(inputs[0]) in outputs:
            outputs[id(inputs[0])][1] = module

    hooks = [m.register_forward_hook(note) for m in backbone.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]
    try:
        with torch.no_grad():
            backbone.eval()(torch.zeros(1, 3, *size))
    finally:
        for hook in hooks:
            hook.remove()
    nodes = [n for n in plain.graph.node if n.op_type == "Conv"]
    numbers = {t.name: numpy_helper.to_array(t) for t in plain.graph.initializer}
    found: dict[str, list[tuple[Any, Any, bool]]] = {}
    for node, (convolution, norm, _) in zip(nodes, called, strict=True):
        factor = 1.0 if norm is None else (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().numpy()
        expected = (convolution.weight + _identity(convolution)).detach().numpy() * np.reshape(factor, (-1, 1, 1, 1))
        if not np.allclose(numbers[node.input[1]], expected, rtol=1e-3, atol=1e-6):
            got = "other weights than its module's"
            raise UsageError(f"qat: {node.name}", got, "a convolution and its batch norm", "Leave the step qat out.")
        for is_bias, name in enumerate(node.input[1:]):
            found.setdefault(name, []).append((convolution, norm, bool(is_bias)))
    return found
