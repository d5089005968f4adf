"""Where a failing engine goes wrong: at its input, or at which node. Loads onnx only where graphs are compared."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nformer_edge.core.errors import Error
from nformer_edge.core.features import Features
from nformer_edge.core.spec import ModelSpec, PreprocessSpec
from nformer_edge.data.batches import iter_batches
from nformer_edge.data.records import ImageRecord
from nformer_edge.data.spread import evenly
from nformer_edge.ops.contract import draw_landmarks
from nformer_edge.report.models import Source
from nformer_edge.report.part import PartName, PartParity
from nformer_edge.report.table import format_table

#: Images that the backbone is compared on, and rows of features for the head, whose neighbors need a crowd.
IMAGES = 4
ROWS = 256


@dataclass(frozen=True)
class InputDifference:
    """What two models make of the same image files, before anything is computed.

    Args:
        images: how many were compared.
        error: L2 norm of the difference over that of the reference's input; null where the sizes differ.
        preprocess: fields that differ, such as ``channels: BGR, the reference RGB``.
    """

    images: int
    error: float | None
    preprocess: tuple[str, ...]


@dataclass(frozen=True)
class Node:
    """A tensor of the engine's graph against the reference's; numbers that cannot be computed are null.

    Args:
        node: that makes it.
        op: its operator.
        tensor: its name.
        error: L2 norm of the difference over that of the reference; of whole numbers, the share that differ.
        band: what rounding alone may cost there; see `report.layers`.
        sqnr_db: signal to quantization noise.
        cosine: to the reference.
        inside: whether the error is at most the band.
    """

    node: str
    op: str
    tensor: str
    error: float
    band: float
    sqnr_db: float
    cosine: float
    inside: bool

    @property
    def shown(self) -> list[str]:
        """The four numbers as text."""
        numbers = ((self.error, ".2e"), (self.band, ".2e"), (self.sqnr_db, ",.1f"), (self.cosine, ".6f"))
        return [f"{value:{form}}" if math.isfinite(value) else "-" for value, form in numbers]


@dataclass(frozen=True)
class NodeInput:
    """A tensor that a node reads.

    Args:
        tensor: its name.
        inside: whether its error is at most its band; null where it was not compared.
    """

    tensor: str
    inside: bool | None


@dataclass(frozen=True)
class FirstOutside(Node):
    """The first node out of its band, in the order of computation. Fields as in `Node`, and two more.

    Args:
        own_error: its error when it reads the reference's own inputs; null where nobody computes the tensor.
        inputs: what it reads.
    """

    own_error: float | None
    inputs: tuple[NodeInput, ...]

    @property
    def inputs_inside(self) -> bool:
        """Whether all that it reads was inside its bands: then the node itself is at fault."""
        return all(i.inside for i in self.inputs)

    def __str__(self) -> str:
        own = self.own_error
        error = f"error {self.error:.3g}" if math.isfinite(self.error) else "no comparable number"
        alone = f", {own:.3g} from the reference's own inputs" if own is not None and math.isfinite(own) else ""
        inputs = "its inputs are inside" if self.inputs_inside else "not all of its inputs could be cleared"
        return f"{self.node} ({self.op}; {error}, band {self.band:.3g}{alone}; {inputs})"


@dataclass(frozen=True)
class Layers:
    """A part's graph against the reference's, tensor by tensor.

    Args:
        part: ``backbone`` or ``head``.
        samples: images or rows that were run.
        compared: tensors that both graphs have.
        tensors: of the reference's graph.
        outside: of those compared, how many are out of their bands.
        nodes: in the order of computation.
        first: the first node out of its band; null if none is, and where the part's output agrees all the same.
        note: why nothing was compared; null if it was.
    """

    part: PartName
    samples: int = 0
    compared: int = 0
    tensors: int = 0
    outside: int = 0
    nodes: tuple[Node, ...] = ()
    first: FirstOutside | None = None
    note: str | None = None

    @property
    def summary(self) -> str:
        """What the comparison came to, in a line."""
        if self.first is not None:
            return f"first node out of its band: {self.first}"
        if self.outside:
            return f"{self.outside} of {self.compared} tensors are out of their bands, but the output agrees"
        return f"every tensor compared ({self.compared}) is inside its band"

    @property
    def lines(self) -> list[str]:
        """The same, with how much was compared where it is little."""
        if self.note is not None:
            return [f"{self.part}: not compared layer by layer: {self.note}"]
        few = f"{self.part}: the engine's graph has {self.compared} of the reference's {self.tensors} tensors"
        return [*([few] if 2 * self.compared < self.tensors else []), f"{self.part}: {self.summary}"]

    def __str__(self) -> str:
        body = [[n.node, n.op, *n.shown, "" if n.inside else "out"] for n in self.nodes]
        unit = "images" if self.part == "backbone" else "rows"
        table = format_table(["node", "op", "error", "band", "SQNR dB", "cosine", ""], body, left=2)
        return f"\n{self.part}, {self.samples} {unit}\n{table}"


def _images(records: Sequence[ImageRecord], preprocess: PreprocessSpec) -> np.ndarray:
    paths = [records[i].path for i in evenly(IMAGES, len(records))]
    return np.concatenate(list(iter_batches(paths, preprocess, IMAGES)))


def compare_inputs(
    reference: PreprocessSpec, engine: PreprocessSpec, records: Sequence[ImageRecord]
) -> InputDifference:
    """What two models make of the first of these images, before a graph that takes pixels normalizes them."""
    reference, engine = (replace(spec, pixels=None) for spec in (reference, engine))
    ours, theirs = (_images(records, spec) for spec in (reference, engine))
    error = float(np.linalg.norm(theirs - ours) / np.linalg.norm(ours)) if ours.shape == theirs.shape else None
    pairs = [(f.name, getattr(engine, f.name), getattr(reference, f.name)) for f in dataclasses.fields(reference)]
    differs = tuple(f"{name}: {has}, the reference {had}" for name, has, had in pairs if has != had)
    return InputDifference(len(ours), error, differs)


def compare_layers(
    reference: Source,
    engine: Source,
    parts: Iterable[PartParity],
    spec: ModelSpec,
    records: Sequence[ImageRecord],
    features: Sequence[Features],
) -> tuple[Layers, ...]:
    """The float graph and the engine's graph of each of `parts`, node by node on the reference's own inputs.

    `spec` and `features` are the reference's: the backbone is compared on `records`, the head on `features`. A part
    that cannot be compared has a `note`.
    """
    wanted = {p.part: p.precision for p in parts}
    if not wanted:
        return ()
    if not (isinstance(reference, (str, os.PathLike)) and isinstance(engine, (str, os.PathLike))):
        return tuple(Layers(part, note="the models were given open, not as files") for part in wanted)
    try:
        from nformer_edge.report.layers import compare_graphs, read_graphs

        ours, theirs = (read_graphs(Path(p), tuple(wanted)) for p in (reference, engine))
        return tuple(
            compare_graphs(part, precision, ours[part], theirs[part], _feed(part, spec, records, features))
            for part, precision in wanted.items()
        )
    except (Error, ImportError) as e:
        return tuple(Layers(part, note=str(e)) for part in wanted)


def _feed(
    part: PartName, spec: ModelSpec, records: Sequence[ImageRecord], features: Sequence[Features]
) -> dict[str, np.ndarray]:
    if part == "backbone":
        return {"images": _images(records, spec.preprocess)}
    assert spec.head is not None, "the part is there"
    rows = np.concatenate([s.features for s in features])
    chosen = rows[evenly(ROWS, len(rows))]
    return {"features": chosen, "landmarks": draw_landmarks(len(chosen), spec.head.layers, spec.head.landmarks, 0)}
