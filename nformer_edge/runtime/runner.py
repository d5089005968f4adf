"""What every backend can do: open, embed images, relate features, close."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import TypeVar

import numpy as np

from nformer_edge.core.errors import UsageError
from nformer_edge.core.features import check_features
from nformer_edge.core.ops import draw_landmarks
from nformer_edge.core.spec import ModelSpec, Precision

R = TypeVar("R", bound="Runner")

#: Images in one forward pass where a backend sets no smaller limit; longer inputs are split.
MAX_BATCH = 256


class Runner(ABC):
    """A model on one backend. A context manager: nothing is loaded before it is entered, all is freed when it is left.

    Attributes:
        name: what the model is called in reports.
        backend: ``torch``, ``onnxruntime`` ...
        precision: as built, of ``backbone`` and, where there is one, ``head``.
        spec: the model and its preprocessing.
        landmark_seed: draws the landmarks where none are given.
    """

    name: str
    backend: str
    precision: dict[str, Precision]
    spec: ModelSpec
    landmark_seed: int = 0
    max_batch: int = MAX_BATCH

    @property
    def has_head(self) -> bool:
        """Whether the model holds an NFormer head."""
        return self.spec.head is not None

    def __enter__(self: R) -> R:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def open(self) -> None:
        """Loads the model."""

    @abstractmethod
    def close(self) -> None:
        """Frees it. Closing twice is no error."""

    @abstractmethod
    def _embed(self, images: np.ndarray) -> np.ndarray:
        """float32 [B, 3, H, W], 1 <= B <= max_batch -> float32 [B, D]."""

    @abstractmethod
    def _relate(self, features: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
        """float32 [N, D], int32 [layers, l], N >= 1 -> float32 [N, D]."""

    def embed(self, images: np.ndarray) -> np.ndarray:
        """Features of preprocessed images, each alone: any B, also 0 and more than the backend takes at once.

        Args:
            images: float32 [B, 3, H, W], as `core.preprocess` makes them.

        Returns:
            float32 [B, D], not normalised.

        Raises:
            UsageError: if the shape or type is another.
        """
        spec = self.spec.preprocess
        wanted = (3, spec.height, spec.width)
        if images.ndim != 4 or images.shape[1:] != wanted or images.dtype != np.float32:
            raise UsageError(
                "images", got=f"{images.dtype} {list(images.shape)}", expected=f"float32 [B, {str(list(wanted))[1:]}",
                mend="Prepare them with core.preprocess and this model's spec.",
            )  # fmt: skip
        if not len(images):
            return np.empty((0, self.spec.backbone.features), np.float32)
        return np.concatenate(
            [self._embed(images[i : i + self.max_batch]) for i in range(0, len(images), self.max_batch)]
        )

    def relate(self, features: np.ndarray, landmarks: np.ndarray | None = None) -> np.ndarray:
        """The NFormer head: features of N images that have seen each other.

        Args:
            features: float32 [N, D], as `embed` gave them.
            landmarks: int32 [layers, l], rows of `features`; drawn from `landmark_seed` if None.

        Returns:
            float32 [N, D].

        Raises:
            UsageError: if the model has no head, or landmarks do not fit.
            DataError: if a feature is NaN, infinite or all zeros, naming the first such row.
        """
        head = self.spec.head
        if head is None:
            raise UsageError(
                self.name,
                got="a backbone alone",
                expected="a model with a head",
                mend="Train one: leave out --no-head.",
            )
        check_features(features, dim=head.features)
        if not len(features):
            return features.astype(np.float32)
        if landmarks is None:
            landmarks = draw_landmarks(len(features), head.layers, head.landmarks, self.landmark_seed)
        within = landmarks.size and landmarks.min() >= 0 and landmarks.max() < len(features)
        if landmarks.ndim != 2 or len(landmarks) != head.layers or not within:
            raise UsageError(
                "landmarks", got=f"shape {list(landmarks.shape)}",
                expected=f"[{head.layers}, l], each in 0..{len(features) - 1}", mend="Use core.ops.draw_landmarks.",
            )  # fmt: skip
        return self._relate(np.ascontiguousarray(features, np.float32), landmarks.astype(np.int32))
