"""Which node of an engine's graph is at fault: its graph and the float graph, tensor by tensor on the same inputs.

Both run in stock onnxruntime, each tensor compared as its readers see it (behind Q and DQ). Its error is the L2 norm of
the difference over that of the reference; of whole numbers, the share that differ. Its band is the larger of two:

- 1e-3: float32 itself may lose so much where sums cancel;
- `allowed` for the error of `graph.fake_quantized`, which is rounded like the engine and sound otherwise: three
  times as much, and more for a tensor of few numbers.

Where that says three, builds with nothing wrong stayed below 1.9, in every tensor: of a ResNet-18 trained on generated
data and of the published OSNet x0.25 on Market-1501, calibrated by minmax (16 and 128 images), percentile and entropy
(128), of a ResNet-50, and of an OSNet with three nodes left in float; four images compared. Averages over a channel
were furthest: there noise cancels and offsets stay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto
from tqdm import tqdm

from nformer_edge.backends.open import open_files
from nformer_edge.core.errors import ArtifactError
from nformer_edge.core.spec import Precision
from nformer_edge.core.terminal import PROGRESS
from nformer_edge.exporting.bundle import BACKBONE, HEAD
from nformer_edge.metrics import gates
from nformer_edge.ops.contract import OPSETS
from nformer_edge.report.diagnosis import FirstOutside, Layers, Node, NodeInput
from nformer_edge.report.graph import Graph, fake_quantized, is_rounded
from nformer_edge.report.part import PartName

#: How far beyond the fake-quantized reference's error a tensor may be: 10 dB.
FACTOR = 3.0

#: Bytes of tensors held at once, of each graph: a ResNet-50 at 256 x 128 makes some 100 MB an image in all.
HELD = 64 << 20

#: An error that is nobody's fault in any precision. Sums that cancel lose two digits of float32 on the way.
_CLOSE = 1e-3

FILES: dict[PartName, str] = {"backbone": BACKBONE, "head": HEAD}

Feed = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Difference:
    """How a tensor differs from the reference's; `error` is infinite for another shape, NaN or infinity."""

    error: float
    cosine: float

    @property
    def sqnr_db(self) -> float:
        """Signal to noise: 20 dB is an error of 0.1."""
        return -20 * math.log10(self.error) if self.error > 0 else math.inf


def difference(found: np.ndarray, reference: np.ndarray) -> Difference:
    """`found` against `reference`, of one shape; whole numbers and booleans by the share that differ."""
    if found.shape != reference.shape:
        return Difference(math.inf, math.nan)
    if reference.dtype.kind != "f":
        share = float((found != reference).mean()) if reference.size else 0.0
        return Difference(share, 1 - share)
    a, b = found.astype(np.float64).ravel(), reference.astype(np.float64).ravel()
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return Difference(math.inf, math.nan)
    distance, ours, theirs = (float(np.linalg.norm(v)) for v in (a - b, a, b))
    if not distance:
        return Difference(0.0, 1.0)
    cosine = float(a @ b) / (ours * theirs) if ours and theirs else 0.0
    return Difference(distance / theirs if theirs else math.inf, cosine)


def allowed(rounding: float, numbers: int) -> float:
    """How large an error may be where rounding alone costs `rounding`, over a tensor made of so many numbers.

    Two root mean squares of n numbers of the same noise differ by a factor of about exp(1 / sqrt(n)); three times that
    exponent leaves out one in a thousand. A channel gate can have as few as one number an image. If `rounding` is not
    finite nothing is allowed: an overflow is no rounding.
    """
    return FACTOR * math.exp(3 / math.sqrt(max(numbers, 1))) * rounding if math.isfinite(rounding) else 0.0


def read_graphs(path: Path, parts: tuple[PartName, ...]) -> dict[PartName, ModelProto]:
    """The ONNX graph of each of `parts` of a checkpoint (traced for this), bundle or engine.

    Of a TensorRT engine it is the graph that was parsed, where the build kept it.

    Raises:
        ArtifactError: if an engine's plans are all there is.
    """
    if path.is_dir():
        return _read_folder(path, parts)
    from nformer_edge.exporting.trace import trace_backbone, trace_head
    from nformer_edge.model.checkpoint import load_checkpoint

    loaded = load_checkpoint(path)
    found: dict[PartName, ModelProto] = {}
    size = (loaded.spec.preprocess.height, loaded.spec.preprocess.width)
    if "backbone" in parts and loaded.backbone is not None:
        found["backbone"] = trace_backbone(loaded.backbone, size, OPSETS[0])
    if "head" in parts and loaded.head is not None:
        found["head"] = trace_head(loaded.head, OPSETS[0])
    return found


def _read_folder(folder: Path, parts: tuple[PartName, ...]) -> dict[PartName, ModelProto]:
    model, found = open_files(folder), {}
    for part in parts:
        name = next((n for n in (FILES[part], f"prepared-{FILES[part]}") if n in model.files.files), None)
        if name is None:
            got = f"a plan for {getattr(model.manifest, 'backend', 'no backend')}, which shows no tensor inside"
            hint = "Build the engine with --keep-graphs, and run parity --layers again."
            raise ArtifactError(str(folder), got, f"the graph that was parsed, prepared-{FILES[part]}", hint)
        found[part] = onnx.load_from_string(model.files.files[name])
    return found


def compare_graphs(
    part: PartName, precision: Precision, reference_model: ModelProto, engine_model: ModelProto, feed: Feed
) -> Layers:
    """One part, tensor by tensor in the order of computation: the float32 graph and one in any precision.

    `feed` has the inputs of both, a few images' worth.
    """
    reference, engine = Graph(reference_model), Graph(engine_model, reference_model)
    known = reference.carried()
    shared = [n for n in (*feed, *known) if engine.has(n) and (n not in feed or n in engine.rounded)]
    nodes = _compared(part, precision, reference, engine, shared, feed)
    outputs = {o.name for o in reference_model.graph.output}
    # Where the output agrees nobody is at fault: a graph of another version may do in between as it likes.
    agreed = [n.error <= _CLOSE for n in nodes if n.tensor in outputs]
    first = None if agreed and all(agreed) else next((n for n in nodes if not n.inside), None)
    blamed = None if first is None else _blamed(reference, engine, first, nodes, feed)
    outside = sum(not n.inside for n in nodes)
    return Layers(part, _samples(feed), len(nodes), len(known), outside, tuple(nodes), blamed)


def _compared(
    part: PartName, precision: Precision, reference: Graph, engine: Graph, shared: list[str], feed: Feed
) -> list[Node]:
    sound = None
    if is_rounded(engine):
        sound = Graph(fake_quantized(reference, engine, _ranges(reference, engine, feed)), reference.model)
    loosest = 1.0 - (gates.rule(precision, "top10_overlap").bound or 0.0)
    measured: dict[str, tuple[Difference, float, float]] = {}
    counts: dict[str, int] = {}
    groups = reference.groups(shared, _samples(feed), HELD)
    for names in tqdm(groups, desc=f"layers ({part})", unit="group", **PROGRESS):
        ours, theirs = reference.values(names, feed), engine.values(names, feed)
        rounded = sound.values(names, feed) if sound is not None else ours
        for name in names:
            floor = _CLOSE if ours[name].dtype.kind == "f" else loosest
            counts[name] = int(np.count_nonzero(ours[name]))
            measured[name] = (difference(theirs[name], ours[name]), difference(rounded[name], ours[name]).error, floor)
    free = _freedom(reference, counts, feed)
    rows = []
    for name, (found, rounding, floor) in measured.items():
        maker, band = engine.maker(name) or engine.rounded[name][0], max(floor, allowed(rounding, free[name]))
        numbers = found.error, band, found.sqnr_db, found.cosine
        rows.append(Node(maker.name, maker.op_type, name, *numbers, inside=found.error <= band))
    return rows


def _freedom(reference: Graph, counts: Mapping[str, int], feed: Feed) -> dict[str, int]:
    """How many numbers a tensor's noise is made of: those that are not 0, and no more than what it is computed from."""
    free = {name: values.size for name, values in feed.items()}
    for name in reference.carried():
        maker = reference.maker(name)
        read = sum(free.get(n, 0) for n in reference.reads(maker)) if maker is not None else 0
        free[name] = min(counts.get(name, read), read)
    return free


def _ranges(reference: Graph, engine: Graph, feed: Feed) -> dict[str, tuple[float, float]]:
    """What the reference's tensors span, of those that the engine quantizes."""
    names = [n for n in engine.rounded if reference.has(n)]
    spans = {n: (float(feed[n].min()), float(feed[n].max())) for n in names if n in feed}
    computed = [n for n in names if n not in feed]
    for group in reference.groups(computed, _samples(feed), HELD):
        spans |= {n: (float(v.min()), float(v.max())) for n, v in reference.values(group, feed).items()}
    return spans


def _samples(feed: Feed) -> int:
    return len(next(iter(feed.values())))


def _blamed(reference: Graph, engine: Graph, first: Node, nodes: list[Node], feed: Feed) -> FirstOutside:
    """Whether what the first node out of its band reads was inside, and its error when it reads the reference's own."""
    name, maker = first.tensor, engine.maker(first.tensor)
    read = engine.reads(maker) if maker is not None else []
    inside = {n.tensor: n.inside for n in nodes} | {n: True for n in feed if n not in engine.rounded}
    given = reference.values([n for n in read if reference.has(n) and n not in feed], feed)
    own = None
    if maker is not None:
        (ours,) = reference.values([name], feed).values()
        own = difference(engine.alone(name, given, feed), ours).error
    return FirstOutside(**vars(first), own_error=own, inputs=tuple(NodeInput(n, inside.get(n)) for n in read))
