"""FP16 without surprises: the search for numbers that FP16 does not hold, over real images, and what is told of it.

Calibration images go through the float backbone, and what comes out through the float head; `quantize.overflow`
measures how far each node's numbers reach. What FP16 would not hold is added to what the policy keeps in FP32 (`fp16`).
Without images the policy stands alone, and the build says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from nformer_edge.core.terminal import PROGRESS
from nformer_edge.data.batches import iter_batches
from nformer_edge.data.calibration import calibration_sha256
from nformer_edge.exporting.bundle import BACKBONE, HEAD, read_graph
from nformer_edge.exporting.session import open_session
from nformer_edge.ops.contract import draw_landmarks
from nformer_edge.quantize.spec import OpenBundle

if TYPE_CHECKING:
    from nformer_edge.quantize.overflow import Reach

#: Images searched at most, spread evenly over those given: `quantize.overflow.MARGIN` stands for the others.
IMAGES = 64

#: Images whose activations are held at once.
_BATCH = 4

#: How many of the nodes that the policy keeps are named in the log.
_NAMED = 5


@dataclass(frozen=True)
class OverflowSearch:
    """What was found.

    Args:
        images: how many were searched.
        sha256: of their contents.
        reach: of each stage, of each node, how far its numbers went.
    """

    images: int
    sha256: str
    reach: Mapping[str, Mapping[str, Reach]] = field(default_factory=dict)

    def unfit(self, stage: str) -> dict[str, str]:
        """Of the stage's nodes that FP16 would not hold, why; the policy's own among them."""
        from nformer_edge.quantize.overflow import unfit_nodes

        return unfit_nodes(self.reach.get(stage, {}))


def search_overflow(bundle: OpenBundle, images: Sequence[str]) -> OverflowSearch:
    """Runs at most `IMAGES` of `images` (paths) through both stages of the float bundle, on the CPU.

    Raises:
        DataError: for an image that cannot be read.
    """
    import onnx

    from nformer_edge.quantize.overflow import measure_reach

    chosen = [images[i] for i in np.linspace(0, len(images) - 1, min(IMAGES, len(images))).astype(int)]
    backbone = read_graph(bundle.folder, bundle.manifest, BACKBONE)
    features: list[np.ndarray] = []
    reach = {"backbone": measure_reach(onnx.load_from_string(backbone), _embedding(bundle, backbone, chosen, features))}
    if bundle.has_head and bundle.spec.head is not None:
        head, rows = bundle.spec.head, np.concatenate(features)
        seed = int(bundle.manifest["landmark_seed"])
        landmarks = draw_landmarks(len(rows), head.layers, head.landmarks, seed)
        model = onnx.load_from_string(read_graph(bundle.folder, bundle.manifest, HEAD))
        reach["head"] = measure_reach(model, [{"features": rows, "landmarks": landmarks}])
    return OverflowSearch(len(chosen), calibration_sha256(chosen, {"search": "overflow"}), reach)


def _embedding(
    bundle: OpenBundle, graph: bytes, images: Sequence[str], features: list[np.ndarray]
) -> Iterator[dict[str, np.ndarray]]:
    """The backbone's inputs, batch by batch; what it makes of them is appended to `features`."""
    session = open_session(graph, BACKBONE)
    with tqdm(total=len(images), desc="searching for FP16's limits", unit="img", **PROGRESS) as bar:
        for batch in iter_batches(images, bundle.spec.preprocess, _BATCH):
            features.extend(session.run(["features"], {"images": batch}))
            yield {"images": batch}
            bar.update(len(batch))


def fp16_fields(search: OverflowSearch | None, beyond: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """The manifest's field ``fp16``: what was searched, or null, and the nodes in FP32 beyond the policy, with why."""
    searched = {"images": search.images, "sha256": search.sha256} if search is not None else None
    return {"searched": searched, "kept": {stage: dict(nodes) for stage, nodes in beyond.items()}}


def fp16_lines(found: Mapping[str, Any]) -> list[str]:
    """The same in words, for a summary."""
    searched = found["searched"]
    lines = [
        f"FP16: overflow searched on {searched['images']} images"
        if searched
        else "FP16: overflow was not searched, the policy stands alone; --calib-data DIR searches it on real images"
    ]
    for stage, nodes in found["kept"].items():
        lines += [f"{stage}: {name} stays FP32: {why}" for name, why in nodes.items()]
    return lines


def write_log(log: Path, stage: str, search: OverflowSearch | None, beyond: Mapping[str, str]) -> None:
    """Appends to the build log what was found in a stage, and what the policy alone would have let through."""
    lines = []
    if search is None:
        lines.append(f"fp16: {stage}: overflow was not searched")
    else:
        unfit = search.unfit(stage)
        policy = [f"{name} ({why})" for name, why in unfit.items() if name not in beyond]
        lines.append(f"fp16: {stage}: searched {search.images} images; {len(beyond)} nodes stay FP32 beyond the policy")
        if policy:
            lines.append(f"fp16: {stage}: kept by policy, and FP16 would not hold: {', '.join(policy[:_NAMED])}")
    lines += [f"fp16: {stage}: {name} stays FP32: {why}" for name, why in beyond.items()]
    with open(log, "a") as file:
        file.writelines(f"{line}\n" for line in lines)
