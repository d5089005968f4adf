"""What low precision is asked for: precision and calibration, an accuracy budget, nodes to leave in float."""

from __future__ import annotations

import json
import os
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nformer_edge.core.artifact import MANIFEST, read_manifest, read_verified, sha256_file
from nformer_edge.core.errors import ArtifactError, UsageError
from nformer_edge.core.spec import Backend, CalibrationChoice, ModelSpec, Precision, check_at_least, check_choice
from nformer_edge.exporting.bundle import HEAD, KIND, model_spec

if TYPE_CHECKING:
    from nformer_edge.quantize.values import Score

#: What `--calib-method` calls the choice by held-out people.
AUTO = "auto"

#: Whose features are scored: the backbone's, and, where there is a head, what it makes of them.
SCOPES = ("backbone", "end_to_end")


@dataclass(frozen=True)
class QuantizeSpec:
    """How a backbone is brought to low precision. Fields as in `backends.spec.EngineSpec`."""

    precision: Precision = "fp32"
    calib_method: CalibrationChoice = "percentile"
    calib_num: int = 256
    seed: int = 0
    reduce_range: bool | None = None
    exclude_nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class BudgetSpec:
    """How much accuracy INT8 may cost.

    Args:
        max_map_drop: percentage points of mAP, against FP32 on held-out training identities; None does not ask.
        min_overlap: share of each image's ten nearest that must stay: tells where mAP is saturated and does not.
        images: held-out images at most.
        scope: whose mAP counts: the ``backbone``'s, or ``end_to_end`` with the head; ``auto`` is the latter where there
            is a head.
    """

    max_map_drop: float | None = None
    min_overlap: float = 0.0
    images: int = 600
    scope: Literal["auto", "backbone", "end_to_end"] = "auto"

    def __post_init__(self) -> None:
        if self.max_map_drop is not None:
            check_at_least("max_map_drop", self.max_map_drop, 0.0)
        if not 0 <= self.min_overlap <= 1 or (self.max_map_drop is None and not self.min_overlap):
            hint = "Such as --max-map-drop 0.5, or --min-overlap 0.95."
            raise UsageError("min_overlap", self.min_overlap, "a share, or max_map_drop", hint)
        check_at_least("budget_images", self.images, 8)
        check_choice("budget_scope", self.scope, (AUTO, *SCOPES))

    def counts(self, scopes: tuple[str, ...]) -> str:
        """Which of the model's scopes counts.

        Raises:
            UsageError: for one that the model does not have.
        """
        if self.scope == AUTO:
            return scopes[-1]
        check_choice("budget_scope", self.scope, scopes)
        return self.scope

    def holds(self, score: Score) -> bool:
        """Whether a score keeps within it; a drop counts by its 95 % bound."""
        enough = score.overlap_at_10 >= self.min_overlap
        return enough and (self.max_map_drop is None or 100 * score.map_drop_upper <= self.max_map_drop)

    def __str__(self) -> str:
        drop = [] if self.max_map_drop is None else [f"at most {self.max_map_drop:g} points of mAP lost"]
        return " and ".join(drop + ([f"overlap@10 at least {self.min_overlap:g}"] if self.min_overlap else []))


def read_exclude(sources: Iterable[str]) -> tuple[str, ...]:
    """Names of ONNX nodes to leave in float, each once, in order.

    Args:
        sources: names; or files: an engine's `budget.json` (what it chose), a JSON list, or text with a name a line and
            comments after ``#``.

    Raises:
        UsageError: for JSON that is neither, or a search that chose nothing.
    """
    names: list[str] = []
    for source in sources:
        names += _from_file(Path(source)) if Path(source).is_file() else [source]
    return tuple(dict.fromkeys(names))


def _from_file(path: Path) -> list[str]:
    from nformer_edge.quantize.values import BudgetSearch

    text = path.read_text()
    if path.suffix != ".json":
        lines = (line.partition("#")[0].strip() for line in text.splitlines())
        return [line for line in lines if line]
    try:
        found = json.loads(text)
        if isinstance(found, dict):
            search = BudgetSearch.from_json(found, str(path))
            found = None if search.chosen is None else list(search.float_nodes)
        if not (isinstance(found, list) and all(isinstance(name, str) for name in found)):
            raise ValueError("something else")
    except (ValueError, ArtifactError) as e:
        expected = "a list of node names, or an engine's budget.json that chose a set"
        raise UsageError("exclude_nodes", f"{path}: {e}", expected, "Write the names into a file, one a line.") from e
    return found


HardwareCompat = Literal["none", "same_compute_capability", "ampere_plus"]


@dataclass(frozen=True)
class EngineSpec:
    """What to build.

    Args:
        backend: who will run it; ``auto`` takes the best that this machine has.
        precision: of the backbone. The head stays FP32 on onnxruntime.
        calib_method: for INT8, how ranges follow from activations; ``auto`` takes the method that ranks held-out
            training people best.
        calib_num: for INT8, calibration images at most.
        batch: images the backbone sees at once: fewest, tuned for, most; onnxruntime runs any number.
        gallery_size: images the head sees together, likewise; queries count among them.
        workspace: GiB that a builder may use; its own choice if None.
        device: where it will run.
        seed: of the choice of calibration images.
        reduce_range: for INT8 on onnxruntime, 7-bit weights; None decides by this machine's CPU.
        timing_cache: for TensorRT, a file of measured kernels: read if it is there, written afterwards.
        hardware_compat: for TensorRT, ``none``, ``same_compute_capability`` or ``ampere_plus``: the plan runs on more
            GPUs, and slower.
        version_compat: for TensorRT, the plan carries a runtime that later versions open.
        dla: for TensorRT on Jetson, the core that runs the backbone.
        capabilities: for TensorRT-RTX, compute capabilities to compile for; all that it knows if empty.
        verbose: keep all that the builder says in `build.log`.
        exclude_nodes: for INT8, names of the backbone's ONNX nodes that stay in float, beside those that always do.
        keep_graphs: for TensorRT, leave the ONNX files that were parsed in the engine's folder, to look into.
    """

    backend: Backend = "auto"
    precision: Precision = "fp32"
    calib_method: CalibrationChoice = "percentile"
    calib_num: int = 256
    batch: tuple[int, ...] = (1, 8, 32)
    gallery_size: tuple[int, ...] = (20, 2000, 50000)
    workspace: float | None = None
    device: str | None = None
    seed: int = 0
    reduce_range: bool | None = None
    timing_cache: str = ""
    hardware_compat: HardwareCompat = "none"
    version_compat: bool = False
    dla: int | None = None
    capabilities: tuple[str, ...] = ()
    verbose: bool = False
    keep_graphs: bool = False
    exclude_nodes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_choice("backend", self.backend, ("auto", "onnxruntime", "tensorrt", "tensorrt-rtx"))
        check_choice("precision", self.precision, ("fp32", "fp16", "int8"))
        check_choice("calib_method", self.calib_method, typing.get_args(CalibrationChoice))
        check_at_least("calib_num", self.calib_num, 1)
        check_choice("hardware_compat", self.hardware_compat, typing.get_args(HardwareCompat))
        check_sizes("batch", self.batch)
        check_sizes("gallery_size", self.gallery_size)
        check_at_least("seed", self.seed, 0)
        if self.workspace is not None:
            check_at_least("workspace", self.workspace, 0.0)
        if self.dla is not None:
            check_at_least("dla", self.dla, 0)
        if self.exclude_nodes and self.precision != "int8":
            raise UsageError("exclude_nodes", f"names with {self.precision}", "int8", "Add --int8, or leave it out.")

    @property
    def workspace_bytes(self) -> int | None:
        """`workspace` in bytes."""
        return None if self.workspace is None else int(self.workspace * (1 << 30))


def check_sizes(name: str, sizes: tuple[int, ...]) -> None:
    """Raises UsageError unless `sizes` are fewest, best and most, in order."""
    if not (len(sizes) == 3 and 1 <= sizes[0] <= sizes[1] <= sizes[2]):
        raise UsageError(
            name,
            ":".join(map(str, sizes)),
            "fewest:best:most, each at least 1",
            f"Such as --{name.replace('_', '-')} 1:8:32",
        )


def parse_sizes(text: str) -> tuple[int, ...]:
    """``1:8:32``, or ``32`` for 1 to 32, tuned for 32.

    Raises:
        UsageError: for anything else.
    """
    try:
        sizes = tuple(int(part) for part in text.split(":"))
    except ValueError:
        sizes = ()
    if len(sizes) == 1:
        sizes = (1, *sizes, *sizes)
    if not (len(sizes) == 3 and 1 <= sizes[0] <= sizes[1] <= sizes[2]):
        raise UsageError("sizes", repr(text), "fewest:best:most or one number", "Such as 1:8:32")
    return sizes


@dataclass(frozen=True)
class OpenBundle:
    """A verified bundle: its folder, manifest and model."""

    folder: Path
    manifest: Mapping[str, Any]
    spec: ModelSpec
    sha256: str

    @property
    def has_head(self) -> bool:
        """Whether there is an NFormer head beside the backbone."""
        return HEAD in self.manifest["files"]

    @property
    def backbone_precision(self) -> str:
        """What the backbone's graph is in: ``fp32`` unless another tool has changed that (`quantize.modelopt`)."""
        return str((self.manifest.get("precision") or {}).get("backbone", "fp32"))

    def copy(self, name: str, folder: Path) -> None:
        """Writes one of the bundle's files, verified once more, into `folder`."""
        (folder / name).write_bytes(read_verified(self.folder, self.manifest, name))


def open_bundle(path: str | os.PathLike[str]) -> OpenBundle:
    """Verifies a bundle.

    Raises:
        ArtifactError: naming what does not hold.
    """
    folder = Path(path)
    manifest = read_manifest(folder, KIND)
    return OpenBundle(folder, manifest, model_spec(str(folder), manifest), sha256_file(folder / MANIFEST))
