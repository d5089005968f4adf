"""Features with their labels: what the backbone hands to the head, the search and the evaluation."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nformer_edge.core.artifact import atomic_write
from nformer_edge.core.errors import ArtifactError, DataError

_FORMAT = "nformer-edge-features-1"


@dataclass(frozen=True)
class Features:
    """N images' features and labels.

    Args:
        features: float32 [N, D], as the backbone gave them (not normalized).
        pids: int64 [N], person identity; -1 is junk, 0 a distractor, unknown is -1.
        camids: int64 [N], camera; unknown is -1.
        paths: N image paths, in the same order.
        model: sha256 of the model file that made the features, or "".
        hashes: sha256 of each image file, in the same order; empty where nobody took them.
        augmented: float32 [V - 1, N, D], further views of the same images, each augmented otherwise; None for none.
        augmentation: JSON that says how the views were drawn, or "".
        spec: JSON of the `ModelSpec` that made the features, its head left out, or "": a head trained on the features
            alone goes into a checkpoint with it.
    """

    features: np.ndarray
    pids: np.ndarray
    camids: np.ndarray
    paths: tuple[str, ...]
    model: str = ""
    hashes: tuple[str, ...] = ()
    augmented: np.ndarray | None = None
    augmentation: str = ""
    spec: str = ""

    def __post_init__(self) -> None:
        rows = len(self.features)
        if self.features.ndim != 2:
            raise DataError("features", f"shape {self.features.shape}", "[N, D]", "Pass one row an image.")
        for name in ("pids", "camids", "paths"):
            if len(getattr(self, name)) != rows:
                raise DataError(
                    name,
                    f"{len(getattr(self, name))} entries",
                    f"{rows}, one for each feature",
                    "Pass labels for exactly these images.",
                )
        if self.hashes and len(self.hashes) != rows:
            raise DataError(
                "hashes",
                f"{len(self.hashes)} entries",
                f"{rows}, one for each feature, or none",
                "Pass the hashes of exactly these images.",
            )
        if self.augmented is not None and (self.augmented.ndim != 3 or self.augmented.shape[1:] != self.features.shape):
            raise DataError(
                "augmented",
                f"shape {self.augmented.shape}",
                f"[V - 1, {rows}, {self.features.shape[1]}]",
                "Pass each view's features of exactly these images.",
            )

    def __len__(self) -> int:
        return len(self.features)

    def take(self, rows: np.ndarray) -> Features:
        """The images at `rows` (indices or a boolean mask), in that order."""
        rows = np.flatnonzero(rows) if np.asarray(rows).dtype == bool else np.asarray(rows, dtype=np.int64)
        return replace(
            self,
            features=self.features[rows],
            pids=self.pids[rows],
            camids=self.camids[rows],
            paths=tuple(self.paths[i] for i in rows),
            hashes=tuple(self.hashes[i] for i in rows) if self.hashes else (),
            augmented=None if self.augmented is None else self.augmented[:, rows],
        )

    def with_features(self, features: np.ndarray) -> Features:
        """The same images under other features, such as the head's output; augmented views are not kept."""
        return replace(self, features=features, augmented=None, augmentation="")

    @property
    def views(self) -> int:
        """V: how many views of each image there are, the plain one among them."""
        return 1 if self.augmented is None else 1 + len(self.augmented)

    def view(self, number: int) -> Features:
        """One view alone: 0 is the plain one, 1 to `views` - 1 the augmented ones."""
        if not 0 <= number < self.views:
            raise DataError("view", number, f"0..{self.views - 1}", "Embed the images again with more --views.")
        return self.with_features(
            self.features if self.augmented is None or number == 0 else self.augmented[number - 1]
        )


def check_features(features: np.ndarray, subject: str = "features", dim: int | None = None) -> None:
    """The door: finite, non-zero rows of the right length, or a DataError that names the first bad row."""
    if features.ndim != 2 or (dim is not None and features.shape[1] != dim):
        raise DataError(
            subject,
            f"shape {features.shape}",
            f"[N, {dim if dim is not None else 'D'}]",
            "Embed the images with the model that this head was trained on.",
        )
    bad = ~np.isfinite(features).all(axis=1)
    if bad.any():
        raise DataError(
            subject,
            f"NaN or infinity in row {int(bad.argmax())} ({int(bad.sum())} such rows)",
            "finite numbers",
            "Embed these images again and look at what they show.",
        )
    zero = ~features.any(axis=1)
    if zero.any():
        raise DataError(
            subject,
            f"all zeros in row {int(zero.argmax())} ({int(zero.sum())} such rows)",
            "a direction in every row",
            "Embed these images again.",
        )


def save_features(path: str | os.PathLike[str], sets: dict[str, Features]) -> None:
    """Writes a feature store, one `.npz` without pickles, atomically. Keys are split names such as ``query``."""
    arrays: dict[str, np.ndarray] = {"format": np.array(_FORMAT), "splits": np.array(list(sets))}
    for split, s in sets.items():
        arrays |= {
            f"{split}/features": s.features,
            f"{split}/pids": s.pids,
            f"{split}/camids": s.camids,
            f"{split}/paths": np.array(s.paths, dtype=np.str_),
            f"{split}/model": np.array(s.model),
        }
        if s.hashes:
            arrays[f"{split}/sha256"] = np.array(s.hashes, dtype=np.str_)
        if s.augmented is not None:
            arrays |= {f"{split}/augmented": s.augmented, f"{split}/augmentation": np.array(s.augmentation)}
        if s.spec:
            arrays[f"{split}/spec"] = np.array(s.spec)
    with atomic_write(path) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def load_features(path: str | os.PathLike[str]) -> dict[str, Features]:
    """Reads a feature store that `save_features` wrote, of this version or an earlier one (without hashes and views).

    Raises:
        ArtifactError: if the file is missing, damaged or something else.
    """
    if not Path(path).is_file():
        raise ArtifactError(str(path), "no such file", "a feature store", "Make one with `nformer-edge embed`.")
    try:
        with np.load(path, allow_pickle=False) as z:
            if "format" not in z or str(z["format"]) != _FORMAT:
                raise ArtifactError(str(path), "another kind of .npz", _FORMAT, "Make one with `nformer-edge embed`.")
            return {str(split): _read_split(z, str(split)) for split in z["splits"]}
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as e:
        raise ArtifactError(
            str(path), f"an unreadable file ({e})", "a feature store", "Make it again with `nformer-edge embed`."
        ) from e


def _read_split(z: Mapping[str, np.ndarray], split: str) -> Features:
    with_views = f"{split}/augmented" in z
    return Features(
        z[f"{split}/features"],
        z[f"{split}/pids"],
        z[f"{split}/camids"],
        tuple(str(p) for p in z[f"{split}/paths"]),
        str(z[f"{split}/model"]),
        hashes=tuple(str(h) for h in z[f"{split}/sha256"]) if f"{split}/sha256" in z else (),
        augmented=z[f"{split}/augmented"] if with_views else None,
        augmentation=str(z[f"{split}/augmentation"]) if with_views else "",
        spec=str(z[f"{split}/spec"]) if f"{split}/spec" in z else "",
    )
