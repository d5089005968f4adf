"""What a gallery holds in memory: one value, replaced whole, so that searches go on while images come and go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from nformer_edge.core.features import Features
from nformer_edge.gallery.codes import Code
from nformer_edge.metrics.composition import typical_images
from nformer_edge.metrics.distance import unit_rows
from nformer_edge.metrics.ranking import DISTRACTOR

#: Columns that label an image, and the type of each. ``batch`` is where a store keeps it; ``key`` is the image's own.
LABELS: Mapping[str, type] = {
    "ids": object,
    "pids": np.int64,
    "cameras": np.int64,
    "times": np.float64,
    "paths": object,
    "meta": object,
    "key": np.int64,
    "batch": np.int64,
}


@dataclass(frozen=True, eq=False)
class Held:
    """N images: their codes and labels, each a column.

    Args:
        code: of the features.
        buffers: of each column an array of N rows or more; what stands behind belongs to later values.
        count: N.
    """

    code: Code
    buffers: Mapping[str, np.ndarray]
    count: int

    @staticmethod
    def of(code: Code, columns: Mapping[str, np.ndarray]) -> Held:
        """A value that holds exactly these columns, and those that a search needs besides."""
        return Held(code, {**columns, **code.complete(columns)}, len(columns["codes"]))

    @staticmethod
    def of_features(features: Features) -> Held:
        """Features to rank, at L2 norm 1, of any range.

        Raises:
            DataError: for a row that is not finite or is all zeros.
        """
        ones = np.ones(len(features), np.float32)
        columns = {"codes": unit_rows(features.features, "gallery features"), "scale": ones, "inverse": ones}
        return Held(Code(), columns | label_columns(features), len(features))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, column: str) -> np.ndarray:
        return self.buffers[column][: self.count]

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """All columns, [N] or [N, ...]."""
        return {name: self[name] for name in self.buffers}

    @property
    def labels(self) -> dict[str, np.ndarray]:
        """The columns that label an image."""
        return {name: self[name] for name in LABELS}

    def extended(self, more: Held) -> Held:
        """With more images at the end. Where the buffers have room, only these are written."""
        total, buffers = len(self) + len(more), {}
        for name, old in self.buffers.items():
            if len(old) < total:
                grown = np.empty((max(total, len(self) + len(self) // 4 + 256), *old.shape[1:]), old.dtype)
                grown[: len(self)] = old[: len(self)]
                old = grown
            old[len(self) : total] = more[name]
            buffers[name] = old
        return replace(self, buffers=buffers, count=total)

    def take(self, rows: np.ndarray) -> Held:
        """The images at `rows` (indices or a boolean mask), copied."""
        buffers = {name: column[rows] for name, column in self.columns.items()}
        return Held(self.code, buffers, len(buffers["codes"]))

    def first(self, count: int) -> Held:
        """The first `count` images."""
        return self if count >= len(self) else replace(self, count=count)

    def with_labels(self, **columns: np.ndarray) -> Held:
        """The same images under other labels."""
        return replace(self, buffers={**self.columns, **columns})

    @cached_property
    def features(self) -> Features:
        """What `Features` holds of the images, as near as the code keeps it; which model made them is not in it."""
        paths, ids = (tuple(self[name].tolist()) for name in ("paths", "ids"))
        return Features(self.code.decode(self.columns), self["pids"], self["cameras"], paths, ids=ids)

    @cached_property
    def images_a_person(self) -> tuple[np.ndarray, str]:
        """`images_a_person` of the images."""
        return images_a_person(self["pids"], self["ids"].tolist(), named=True)

    @cached_property
    def told_images(self) -> float | None:
        """Images a person that the ids tell a head of, in steps of half a doubling, so that one image more or less
        rarely changes it. None where no id has two images: then it may be that nobody named them."""
        counts, _ = self.images_a_person
        return None if counts.max() == 1 else float(2 ** (round(2 * np.log2(typical_images(counts))) / 2))

    @property
    def bytes_per_image(self) -> int:
        """Memory an image, labels excluded."""
        arrays = (column for name, column in self.buffers.items() if name not in LABELS)
        return sum(int(np.prod(column.shape[1:], dtype=int)) * column.itemsize for column in arrays)


def label_columns(
    features: Features,
    times: np.ndarray | None = None,
    meta: Sequence[object] | None = None,
    keys: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """The label columns of new images, named as `features` names them; times in seconds since 1970, or NaN."""
    count = len(features)
    keys = np.arange(count) if keys is None else keys
    found: dict[str, np.ndarray] = {"pids": features.pids, "cameras": features.camids, "key": keys}
    found["batch"] = np.full(count, -1)
    found["times"] = np.full(count, np.nan) if times is None else times
    given = {"ids": features.names, "paths": features.paths, "meta": [None] * count if meta is None else meta}
    for name, values in given.items():
        found[name] = np.empty(count, object)
        found[name][:] = [*values]
    return found


def images_a_person(pids: np.ndarray, names: Sequence[str], named: bool) -> tuple[np.ndarray, str]:
    """Of each person or id, how many images; and how that is known. Distractors are nobody.

    Args:
        named: the caller gave the names, so they tell people apart.
    """
    labeled = pids != DISTRACTOR if named else pids > DISTRACTOR
    if not labeled.any():
        return np.array([1]), "n = 1 image a person (the worst case: the gallery has no labels)"
    counts = np.unique(np.array(names, np.str_)[labeled], return_counts=True)[1]
    return counts, f"n = {counts.mean():.3g} images a person (the gallery's labels)"
