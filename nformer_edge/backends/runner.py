"""What every backend's runner is: opened once, asked many times, closed. Arrays in, arrays out."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from nformer_edge.core.errors import DataError, UsageError
from nformer_edge.core.features import check_features, check_range
from nformer_edge.core.spec import HeadSpec, ModelSpec, PreprocessSpec
from nformer_edge.metrics.composition import Composition
from nformer_edge.ops.contract import draw_landmarks


class Runner(Protocol):
    """A model that runs. Entering the context loads it; leaving gives its memory back.

    Args:
        name: the model, for tables: architecture and image size.
        backend: who computes, such as ``onnxruntime``.
        precision: as built, by part: ``backbone`` and, where there is one, ``head``.
        spec: what the model is.
        landmark_seed: landmarks are drawn from it where none are given.
        sha256: of the file that features of this model cite.
        checkpoint: sha256 of the checkpoint that it was made from, or is; "" where that is not known.
        has_head: whether `relate` is there.
        native: whether the two operators run in our CPU kernels, which choose neighbors by exact scores.
        accuracy: of the checkpoint, by images a person; None where nobody measured it.
        images_per_person: of the galleries that its head's gates are for; None: of any.
        calibrated_on: beginnings of the sha256 of the images that its INT8 ranges come from; empty for none.
    """

    name: str
    backend: str
    precision: Mapping[str, str]
    spec: ModelSpec
    landmark_seed: int
    sha256: str
    checkpoint: str
    has_head: bool
    native: bool
    accuracy: Composition | None
    images_per_person: float | None
    calibrated_on: tuple[str, ...]

    def __enter__(self) -> Runner: ...

    def __exit__(self, *exception: object) -> None: ...

    def golden(self) -> dict[str, np.ndarray]:
        """Inputs and outputs for `self_test`, as `exporting.bundle.ModelFiles.golden` has them; empty if none."""
        ...

    def head_numbers(self) -> dict[str, np.ndarray]:
        """The head's weights, as `exporting.bundle.ModelFiles.head_numbers` has them; empty if none."""
        ...

    def embed(
        self,
        images: np.ndarray,  # float32 [B, 3, H, W] as a rule, as core.preprocess makes them
    ) -> np.ndarray:  # float32 [B, D]
        """Images to features."""
        ...

    def relate(
        self,
        features: np.ndarray,  # [N, D]
        landmarks: np.ndarray | None = None,  # int32 [layers, l]
    ) -> np.ndarray:  # float32 [N, D]
        """Features of N images seen together to features that know their neighbors."""
        ...


def model_name(spec: ModelSpec) -> str:
    """Such as ``osnet_x0_25_256x128``."""
    return f"{spec.backbone.arch}_{spec.preprocess.height}x{spec.preprocess.width}"


def check_images(images: np.ndarray, spec: ModelSpec) -> np.ndarray:
    """The door of `embed`. Returns them contiguous: float32 [B, 3, H, W], or pixels where the graph takes these.

    Warns, once, where the numbers look like pixels that nobody normalized. Channels in the wrong order cannot be told.

    Raises:
        UsageError: if shape or type do not fit.
        DataError: if a number is NaN or infinite, naming the first such image.
    """
    shape, dtype = spec.preprocess.shape, spec.preprocess.dtype
    if images.ndim != 4 or images.shape[1:] != shape or images.dtype != dtype:
        hint = "Bring images through core.preprocess with the model's own spec."
        raise UsageError("images", f"{images.dtype} {images.shape}", f"{dtype} [B, {str(shape)[1:-1]}]", hint)
    if spec.preprocess.pixels is not None:
        return np.ascontiguousarray(images)
    bad = ~np.isfinite(images).all(axis=(1, 2, 3))
    if bad.any():
        got = f"NaN or infinity in image {int(bad.argmax())}"
        raise DataError("images", got, "finite numbers", "Look at the image that it was made from.")
    _question_range(images, spec.preprocess)
    return np.ascontiguousarray(images)


def _question_range(images: np.ndarray, spec: PreprocessSpec) -> None:
    """Warns of pixels in 0..255 or 0..1 where the model takes others."""
    low, high = (float(images.min()), float(images.max())) if images.size else (0.0, 0.0)
    darkest = min(-mean / std for mean, std in zip(spec.mean, spec.std, strict=True))
    brightest = max((1 - mean) / std for mean, std in zip(spec.mean, spec.std, strict=True))
    looks = "0..255" if high > max(20.0, 4 * brightest) and low >= 0 else ""
    if darkest < -0.5 and 0 <= low < high <= 1:
        looks = "0..1"
    if looks:
        told = (
            f"images: numbers from {low:.3g} to {high:.3g} look like pixels in {looks}; this model takes pixels / 255, "
        )
        told += f"minus mean {spec.mean}, over std {spec.std}, in {spec.channels}: see core.preprocess"
        warnings.warn(told, stacklevel=3)


def check_head_input(
    features: np.ndarray, landmarks: np.ndarray | None, spec: ModelSpec, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The door of `relate`. Returns float32 [N, D] and int32 [layers, l], drawn from `seed` if none were given.

    Raises:
        UsageError: if the model has no head, or the landmarks do not fit.
        DataError: if a feature is no real number, NaN, infinite, all zeros or out of range, naming the first such row.
    """
    head = require_head(spec)
    check_features(features, dim=head.features)
    check_range(features)
    rows = np.ascontiguousarray(features, dtype=np.float32)
    if landmarks is None:
        landmarks = draw_landmarks(max(len(rows), 1), head.layers, head.landmarks, seed)
    if landmarks.dtype.kind not in "iu":
        hint = "Draw them with ops.contract.draw_landmarks."
        raise UsageError("landmarks", f"type {landmarks.dtype}", "whole numbers", hint)
    if landmarks.ndim != 2 or landmarks.shape[0] != head.layers or landmarks.shape[1] < 1:
        hint = "Draw them with ops.contract.draw_landmarks."
        raise UsageError("landmarks", f"shape {landmarks.shape}", f"[{head.layers}, l]", hint)
    if len(rows) and not (landmarks.min() >= 0 and landmarks.max() < len(rows)):
        got = f"{landmarks.min()}..{landmarks.max()}"
        raise UsageError("landmarks", got, f"0..{len(rows) - 1}", "Draw them for this number of images.")
    return rows, np.ascontiguousarray(landmarks, dtype=np.int32)


def require_head(spec: ModelSpec) -> HeadSpec:
    """The head's spec, or UsageError where the model is a backbone alone."""
    if spec.head is None:
        hint = "Train the head, or rank by the backbone's features."
        raise UsageError("model", "a backbone alone", "one with an NFormer head", hint)
    return spec.head
