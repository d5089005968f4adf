"""What a bundle's files are called and how they are read. Loads neither torch nor onnx: a device uses this too."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from nformer_edge.core.artifact import Artifact, open_artifact
from nformer_edge.core.errors import ArtifactError
from nformer_edge.core.features import UNREADABLE
from nformer_edge.core.spec import InputScale, ModelSpec, Precision, PreprocessSpec
from nformer_edge.core.values import JSON, from_json
from nformer_edge.exporting.wire import refuse_outside
from nformer_edge.metrics.composition import Composition
from nformer_edge.ops.contract import LANDMARK_RULE, OPSETS

KIND = "bundle"
BACKBONE = "backbone.onnx"
HEAD = "nformer.onnx"
PORTABLE = "nformer.portable.onnx"  # the head again, of standard operators alone: for runtimes of others
GOLDEN = "golden.npz"
LIVE = "live.npz"

_GOLDEN_BACKBONE, _GOLDEN_HEAD = {"images", "features"}, {"head_input", "landmarks", "embeddings"}


@dataclass(frozen=True)
class Normalization:
    """Where features are brought to a length: the manifest says it for whoever writes a runtime of their own."""

    input_scale: InputScale | None
    where: str


@dataclass(frozen=True, kw_only=True)
class ModelManifest:
    """What a bundle's manifest says of the model, and an engine's repeats.

    Args:
        model: what the model is.
        preprocess: how an image becomes the backbone's input; the model's own.
        normalization: where features are brought to a length.
        landmark_rule: how landmarks follow from N and the seed (`ops.contract.draw_landmarks`).
        landmark_seed: the seed.
        opset: of the standard ONNX domain.
        checkpoint_sha256: of the checkpoint it was exported from.
        precision: by part; ``fp32`` where a part is not named.
        accuracy: of the checkpoint, in FP32, by the number of gallery images a person; null where nobody measured it.
        images_per_person: of the galleries that the gated head's graph is for; null: of any.
    """

    model: ModelSpec
    preprocess: PreprocessSpec
    normalization: Normalization
    landmark_rule: str
    landmark_seed: int
    opset: int
    checkpoint_sha256: str
    precision: Mapping[str, Precision] = field(default_factory=dict)
    accuracy: Composition | None = None
    images_per_person: float | None = None


@dataclass(frozen=True, kw_only=True)
class BundleManifest(ModelManifest):
    """What a bundle's manifest says besides its files.

    Args:
        ir_version: of the ONNX files.
        versions: of the packages that made it.
        self_check: of each file, the worst error of stock onnxruntime in units of the FP32 tolerance.
        calibration: what another tool that changed the backbone calibrated with.
        made_by: that tool, its version and its settings.
        made_from: sha256 of the backbone's file before.
    """

    ir_version: int
    versions: Mapping[str, str]
    self_check: Mapping[str, Mapping[str, float]]
    calibration: JSON = None
    made_by: Mapping[str, str] = field(default_factory=dict)
    made_from: str = ""


@dataclass(frozen=True)
class ModelFiles:
    """A verified folder that holds a model: opened once, and handed on whole.

    Args:
        files: the folder and the bytes of its files.
        manifest: what its manifest says.
    """

    files: Artifact
    manifest: ModelManifest

    @property
    def folder(self) -> Path:
        """Where it was read."""
        return self.files.folder

    @property
    def sha256(self) -> str:
        """Of the manifest, which stands for the whole."""
        return self.files.sha256

    @property
    def spec(self) -> ModelSpec:
        """What the model is."""
        return self.manifest.model

    @property
    def has_head(self) -> bool:
        """Whether there is an NFormer head beside the backbone."""
        return self.spec.head is not None

    @property
    def calibrated_on(self) -> tuple[str, ...]:
        """Beginnings of the sha256 of the images whose activations set its INT8 ranges, as far as they are known."""
        return ()

    @property
    def parts(self) -> tuple[str, ...]:
        """``backbone``, and ``head`` where there is one."""
        return ("backbone", "head") if self.has_head else ("backbone",)

    @property
    def precision(self) -> Mapping[str, Precision]:
        """Of each part."""
        return {part: self.manifest.precision.get(part, "fp32") for part in self.parts}

    @property
    def backbone(self) -> bytes:
        """The backbone's ONNX file."""
        return self.files.files[BACKBONE]

    @property
    def head(self) -> bytes:
        """The head's ONNX file; KeyError where there is none."""
        return self.files.files[HEAD]

    @cached_property
    def golden(self) -> dict[str, np.ndarray]:
        """The self-test's arrays: ``images`` and ``features`` of the backbone; ``head_input``, ``landmarks`` and
        ``embeddings`` of the head, where its profile admits them.

        Raises:
            ArtifactError: if there is no such file, or it holds something else.
        """
        if GOLDEN not in self.files.files:
            got, hint = "no such file in the manifest", "Export it again."
            raise ArtifactError(str(self.folder / GOLDEN), got, "the self-test's arrays", hint)
        arrays = self._arrays(GOLDEN)
        if set(arrays) not in (_GOLDEN_BACKBONE, _GOLDEN_BACKBONE | _GOLDEN_HEAD):
            got = f"the arrays {', '.join(sorted(arrays)) or 'none'}"
            expected = "images and features of a self-test"
            raise ArtifactError(str(self.folder / GOLDEN), got, expected, "Export it again.")
        return arrays

    @property
    def head_numbers(self) -> dict[str, np.ndarray]:
        """The head's weights in FP32, by their names in the checkpoint: for a gallery that changes (`gallery.live`).
        Empty where there is no head, or it was exported by an earlier version.

        Raises:
            ArtifactError: if the file cannot be read.
        """
        return self._arrays(LIVE) if LIVE in self.files.files else {}

    def _arrays(self, name: str) -> dict[str, np.ndarray]:
        try:
            with np.load(io.BytesIO(self.files.files[name]), allow_pickle=False) as z:
                return {key: z[key] for key in z.files}
        except UNREADABLE as e:
            got = f"an unreadable file ({e})"
            raise ArtifactError(str(self.folder / name), got, "arrays", "Export it again.") from e


@dataclass(frozen=True)
class Bundle(ModelFiles):
    """A verified bundle. Fields as in `ModelFiles`."""

    manifest: BundleManifest

    @cached_property
    def backbone_sha256(self) -> str:
        """Of the backbone's file: what calibration ranges belong to."""
        return self.files.digest(BACKBONE)

    @property
    def backbone_precision(self) -> Precision:
        """What the backbone's graph is in: ``fp32`` unless another tool has changed that (`quantize.modelopt`)."""
        return self.precision["backbone"]


def open_bundle(path: str | os.PathLike[str] | Bundle) -> Bundle:
    """Verifies a bundle; an open one comes back as it is. The one place where a bundle's files are opened.

    Raises:
        ArtifactError: naming what does not hold: a file, the manifest's fields, tensors stored outside a graph, or a
            head without its file.
    """
    if isinstance(path, Bundle):
        return path
    files = open_artifact(path, KIND)
    manifest = from_json(BundleManifest, files.fields, str(files.folder), error=ArtifactError)
    check_model(str(files.folder), manifest)
    bundle = Bundle(files, manifest)
    check_graphs(bundle)
    return bundle


def check_model(where: str, manifest: ModelManifest) -> None:
    """Raises ArtifactError for an opset or a landmark rule that this version does not know."""
    known = {"opset": (manifest.opset, OPSETS), "landmark_rule": (manifest.landmark_rule, (LANDMARK_RULE,))}
    for key, (found, choices) in known.items():
        if found not in choices:
            expected = " | ".join(map(str, choices))
            raise ArtifactError(f"{where}: {key}", repr(found), expected, "Export the bundle again with this version.")


def check_graphs(model: ModelFiles) -> None:
    """Raises ArtifactError where a graph is missing or names data outside itself, or there is a head too many."""
    files, hint = model.files.files, "Export the bundle again."
    if (HEAD in files) != model.has_head:
        got = f"{HEAD} {'missing for' if model.has_head else 'without'} a head in its spec"
        raise ArtifactError(str(model.folder), got, "both or neither", hint)
    for name in (BACKBONE, HEAD) if model.has_head else (BACKBONE,):
        if name not in files:
            raise ArtifactError(str(model.folder / name), "no such file", "it in the manifest", hint)
    for name in files.keys() & {BACKBONE, HEAD, PORTABLE}:
        refuse_outside(files[name], str(model.folder / name))
