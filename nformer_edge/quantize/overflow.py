"""Where FP16 would not hold: how far a float graph's numbers reach on real inputs, node by node, and inside each node.

FP16 ends at 65504, and below 2**-14 it loses bits until nothing is left. A tensor that fits is not enough: a kernel may
keep partial sums in FP16, a norm squares what it reads, and the score of two images under a landmark affinity is of the
fourth power of their features. So for every node that sums, the largest that any partial sum in any order can reach is
measured too: the sum of the magnitudes of its terms. What FP16 would not hold is added to what the policy keeps in FP32
(`fp16`). Without images the policy stands alone, and the build says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from tqdm import tqdm

from nformer_edge.core.terminal import PROGRESS
from nformer_edge.data.batches import iter_batches
from nformer_edge.data.calibration import calibration_sha256
from nformer_edge.data.spread import evenly
from nformer_edge.exporting.bundle import BACKBONE, Bundle
from nformer_edge.exporting.session import open_session
from nformer_edge.ops.contract import DOMAIN, draw_landmarks
from nformer_edge.quantize.fp16 import MULTIPLICATIONS, tensor_types
from nformer_edge.quantize.values import Overflow, Reach, Searched

#: Images searched at most, spread evenly over those given: `MARGIN` stands for the others.
IMAGES = 64

#: Images whose activations are held at once.
_BATCH = 4

#: Nodes that sum squares: over these axes where neither an input nor an attribute names them.
_SQUARING: dict[str, list[int]] = {"ReduceL2": [], "ReduceSumSquare": [], "InstanceNormalization": [2, 3]}
_SQUARING |= {"LpNormalization": [-1], "LayerNormalization": [-1]}

#: Nodes that sum as they are, likewise.
_SUMMING: dict[str, list[int]] = {"ReduceSum": [], "ReduceMean": [], "ReduceL1": [], "GlobalAveragePool": [2, 3]}


def search_overflow(bundle: Bundle, images: Sequence[str]) -> Overflow:
    """Runs at most `IMAGES` of `images` (paths) through the float backbone, and what comes out through the float head.

    Raises:
        DataError: for an image that cannot be read.
    """
    chosen = [images[i] for i in evenly(IMAGES, len(images))]
    features: list[np.ndarray] = []
    model = onnx.load_from_string(bundle.backbone)
    reach = {"backbone": measure_reach(model, _embedding(bundle, chosen, features))}
    head = bundle.spec.head
    if head is not None:
        rows = np.concatenate(features)
        landmarks = draw_landmarks(len(rows), head.layers, head.landmarks, bundle.manifest.landmark_seed)
        model = onnx.load_from_string(bundle.head)
        reach["head"] = measure_reach(model, [{"features": rows, "landmarks": landmarks}])
    return Overflow(Searched(len(chosen), calibration_sha256(chosen, {"search": "overflow"})), reach)


def _embedding(bundle: Bundle, images: Sequence[str], features: list[np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """The backbone's inputs, batch by batch; what it makes of them is appended to `features`."""
    session = open_session(bundle.backbone, BACKBONE)
    with tqdm(total=len(images), desc="searching for FP16's limits", unit="img", **PROGRESS) as bar:
        for batch in iter_batches(images, bundle.spec.preprocess, _BATCH):
            features.extend(session.run(["features"], {"images": batch}))
            yield {"images": batch}
            bar.update(len(batch))


def measure_reach(model: ModelProto, feeds: Iterable[Mapping[str, np.ndarray]]) -> dict[str, Reach]:
    """Runs `feeds` through a float graph, in onnxruntime on the CPU.

    Args:
        model: float32, without Q/DQ; local functions are run and not looked into, but for the scores of our operators.
        feeds: of each run, its inputs by name.

    Returns:
        Of each node of the main graph that writes float32, by its name, its reach.
    """
    watched = _Watched(model)
    session = open_session(watched.model.SerializeToString(), "watched graph")
    names = [output.name for output in session.get_outputs()]
    largest = dict.fromkeys(names, 0.0)
    faintest = dict.fromkeys(names, math.inf)
    for feed in feeds:
        for name, rows in zip(names, session.run(names, dict(feed)), strict=True):
            largest[name] = float(np.maximum(largest[name], rows.max(initial=0.0)))  # NaN stays NaN
            faintest[name] = min(faintest[name], float(rows[rows > 0].min(initial=math.inf)))
    return watched.by_node(largest, faintest)


class _Watched:
    """A copy of a graph whose outputs are the reach of its tensors and sums, one number a row."""

    def __init__(self, model: ModelProto) -> None:
        self._original = model
        self._constants = {t.name: t for t in model.graph.initializer}
        fixed = {name for node in model.graph.node if node.op_type == "Constant" for name in node.output}
        self._ranks = {
            name: len(found.shape.dim) if found.HasField("shape") else 0
            for name, found in tensor_types(model).items()
            if found.elem_type == TensorProto.FLOAT and name not in fixed
        }
        self.model = ModelProto()
        self.model.CopyFrom(model)
        graph = self.model.graph
        del graph.output[:], graph.value_info[:]
        self._magnitudes: dict[str, str] = {}
        self._tensors: dict[str, str] = {}
        self._sums: dict[str, str] = {}
        self._constant("watch/axis_1", np.array([1], np.int64))
        self._constant("watch/one_row", np.array([1, -1], np.int64))
        for name, rank in sorted(self._ranks.items()):
            self._tensors[name] = self._watch(self._magnitude(name), name, rank)
        for node in model.graph.node:
            total = self._sum(node)
            if total:
                self._sums[node.name] = self._watch(total, f"{node.name}/sum", self._ranks.get(node.output[0], 0))

    def by_node(self, largest: Mapping[str, float], faintest: Mapping[str, float]) -> dict[str, Reach]:
        """What was measured, by node."""
        found = {}
        for node in self._original.graph.node:
            watched = [self._tensors[t] for t in (*node.input, *node.output) if t in self._tensors]
            total = self._sums.get(node.name, "")
            squares = [total] if node.op_type in _SQUARING else []
            if any(name in self._tensors for name in node.output):
                found[node.name] = Reach(
                    node.op_type,
                    float(np.max([largest[t] for t in watched])),
                    largest[total] if total else 0.0,
                    min(faintest[t] for t in (*watched, *squares)),
                )
        return found

    def _watch(self, tensor: str, name: str, rank: int) -> str:
        """Makes the largest number of each row an output; a tensor of unknown rank, or of none, is one row."""
        if rank:
            flat = self._add("Flatten", [tensor], f"{name}/flat", axis=1)
        else:
            flat = self._add("Reshape", [tensor, "watch/one_row"], f"{name}/flat")
        made = self._add("ReduceMax", [flat, "watch/axis_1"], f"{name}/reach", keepdims=0)
        self.model.graph.output.append(helper.make_tensor_value_info(made, TensorProto.FLOAT, None))
        return made

    def _magnitude(self, name: str) -> str:
        if name not in self._magnitudes:
            made = f"{name}/magnitude"
            if name in self._constants:
                self._constant(made, np.abs(numpy_helper.to_array(self._constants[name])))
            else:
                self._add("Abs", [name], made)
            self._magnitudes[name] = made
        return self._magnitudes[name]

    def _sum(self, node: NodeProto) -> str:
        """The tensor that holds what the node's sums can reach, or "" if it sums nothing."""
        made = f"{node.name}/sums"
        if node.domain == DOMAIN:
            return self._scores(node, made)
        if node.output[0] not in self._ranks:
            return ""
        if node.op_type in MULTIPLICATIONS:
            inputs = [self._magnitude(name) for name in node.input]
            copy = helper.make_node(node.op_type, inputs, [made], name=made)
            copy.attribute.extend(node.attribute)
            self.model.graph.node.append(copy)
            return made
        for table, reduce in ((_SQUARING, "ReduceSumSquare"), (_SUMMING, "ReduceSum")):
            if node.op_type in table:
                return self._reduced(node, reduce, table[node.op_type], made)
        return ""

    def _reduced(self, node: NodeProto, reduce: str, axes: list[int], made: str) -> str:
        inputs = [self._magnitude(node.input[0])]
        given = next((list(a.ints) or [a.i] for a in node.attribute if a.name in ("axes", "axis")), axes)
        if node.op_type.startswith("Reduce") and len(node.input) > 1 and node.input[1]:
            inputs.append(node.input[1])
        elif given:
            inputs.append(self._constant(f"{made}/axes", np.array(given, np.int64)))
        return self._add(reduce, inputs, made, keepdims=1)

    def _scores(self, node: NodeProto, made: str) -> str:
        """No score, nor a part of one, is above the longest row of one factor times the longest of the other."""
        axes = self._constant(f"{made}/axes", np.array([2], np.int64))
        rows = self._constant(f"{made}/rows", np.array([1], np.int64))
        longest = []
        for i, factor in enumerate(node.input[:2]):
            lengths = self._add("ReduceL2", [factor, axes], f"{made}/lengths_{i}", keepdims=0)
            longest.append(self._add("ReduceMax", [lengths, rows], f"{made}/longest_{i}", keepdims=0))
        return self._add("Mul", longest, made)

    def _add(self, kind: str, inputs: list[str], made: str, **attributes: int) -> str:
        self.model.graph.node.append(helper.make_node(kind, inputs, [made], name=f"{made}/{kind}", **attributes))
        return made

    def _constant(self, name: str, values: np.ndarray) -> str:
        self.model.graph.initializer.append(numpy_helper.from_array(values, name))
        return name
