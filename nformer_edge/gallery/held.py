"""What a gallery holds in memory: one value, replaced whole, so that searches go on while images come and go."""

from __future__ import annotations

import re
import time
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import cached_property
from typing import TypeAlias

import numpy as np

from nformer_edge.core.errors import DataError, UsageError
from nformer_edge.core.features import Features, labels_of
from nformer_edge.gallery.codes import Code
from nformer_edge.metrics.composition import typical_images
from nformer_edge.metrics.distance import unit_rows
from nformer_edge.metrics.ranking import DISTRACTOR

#: Seconds since 1970, or a date and time.
Time: TypeAlias = "float | str | datetime"

#: Bytes of an id in UTF-8 that a new image may have. Older galleries may hold longer ones.
MAX_ID = 512

#: A time that is not known, before all times that are, where NaN cannot stand.
NEVER = -1e15

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


def each(name: str, values: object, count: int) -> list[object]:
    """One value an image: those given, or the one for all.

    Raises:
        DataError: for another number of them.
    """
    if isinstance(values, (str, bytes, dict)) or not isinstance(values, (Sequence, np.ndarray)) or np.ndim(values) == 0:  # type: ignore[arg-type]
        return [values] * count
    if len(values) != count:
        hint = f"Pass one of the {name} for each image, or one for all."
        raise DataError(name, f"{len(values)} for {count} images", f"{count}", hint)
    return [*values]


def id_of(name: object) -> str:
    """An id as text.

    Raises:
        DataError: for what is neither text nor a whole number, or empty text.
    """
    if isinstance(name, (str, int, np.integer)) and not isinstance(name, bool) and str(name):
        return str(name)
    got = "an empty name" if name == "" else f"{type(name).__name__} {name!r:.60}"
    raise DataError("ids", got, "text or a whole number, one an image or one for all", "Pass a list, or leave ids out.")


def new_id(name: object) -> str:
    """`id_of` a new image.

    Raises:
        DataError: as `id_of`; for more than `MAX_ID` bytes.
    """
    text = id_of(name)
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_ID:
        raise DataError("ids", f"{size} bytes, {text!r:.40}", f"at most {MAX_ID} bytes in UTF-8", "Shorten the id.")
    return text


def ids_of(names: object) -> set[str]:
    """`id_of` of one name, or of each of several."""
    several = isinstance(names, (Collection, np.ndarray)) and not isinstance(names, (str, bytes))
    return {id_of(name) for name in (typing.cast(Iterable[object], names) if several else [names])}


def seen_by(
    count: int, cameras: int | Sequence[int] | None, times: Time | Sequence[Time] | None
) -> tuple[np.ndarray | None, np.ndarray]:
    """Of N images cameras int64 [N], None if None, and times float64 [N] in seconds since 1970, now if None.

    Raises:
        Error: for labels that are not one an image or one for all, or cannot be read.
    """
    camids = None if cameras is None else labels_of("cameras", each("cameras", cameras, count))
    seen = [seconds_of("times", t) for t in each("times", time.time() if times is None else times, count)]
    return camids, np.array(seen, np.float64)


@dataclass(frozen=True)
class Where:
    """Which images a search ranks. One whose camera or time is not known passes no filter that asks for it.

    Args:
        cameras: only these; all if None.
        exclude_camera: not this one.
        since: seen then or later, seconds since 1970.
        until: seen then or earlier.
    """

    cameras: tuple[int, ...] | None = None
    exclude_camera: int | None = None
    since: float | None = None
    until: float | None = None

    @staticmethod
    def of(
        cameras: int | Sequence[int] | None, exclude_camera: int | None, since: Time | None, until: Time | None
    ) -> Where:
        """As a caller of `search` says it.

        Raises:
            Error: for a camera or a time that cannot be read.
        """
        if exclude_camera is not None:
            if not isinstance(exclude_camera, (int, np.integer)) or isinstance(exclude_camera, bool):
                got = f"{type(exclude_camera).__name__} {exclude_camera!r:.60}"
                raise UsageError("exclude_camera", got, "a camera's number", "Pass one whole number.")
            exclude_camera = int(exclude_camera)
        return Where(
            None if cameras is None else tuple(labels_of("cameras", cameras).ravel().tolist()),
            exclude_camera,
            None if since is None else seconds_of("since", since),
            None if until is None else seconds_of("until", until),
        )

    @property
    def times(self) -> tuple[float, float] | None:
        """Both bounds; None where there is none."""
        if self.since is None and self.until is None:
            return None
        return NEVER / 2 if self.since is None else self.since, -NEVER if self.until is None else self.until

    def allowed(self, cameras: np.ndarray, times: np.ndarray) -> np.ndarray:
        """bool [N], which images these are; a time that is not known is NaN or `NEVER`."""
        kept = np.ones(len(cameras), bool)
        if self.cameras is not None:
            kept &= np.isin(cameras, self.cameras)
        if self.exclude_camera is not None:
            kept &= cameras != self.exclude_camera
        if self.times is not None:
            kept &= (times >= self.times[0]) & (times <= self.times[1])
        return kept


#: The year 10,000 in seconds: what is beyond was counted in milliseconds.
_LATEST = 253_402_300_800


def seconds_of(name: str, value: object) -> float:
    """Seconds since 1970 of a time: those seconds, a `datetime`, or ISO text. Where no zone is named it is UTC.

    Raises:
        UsageError: for anything else.
    """
    try:
        if isinstance(value, str):
            text = value.strip().replace("Z", "+00:00")
            seconds = len(text) > len("20261128") and text.replace(".", "", 1).isdecimal()
            value = float(text) if seconds else datetime.fromisoformat(text)
        if isinstance(value, (bool, np.bool_)):
            raise ValueError
        if isinstance(value, datetime):
            value = (value if value.tzinfo else value.replace(tzinfo=timezone.utc)).timestamp()
        if abs(since := float(value)) < _LATEST:  # type: ignore[arg-type]
            return since
    except (ValueError, TypeError, OverflowError):
        pass
    hint = "Write it like 2026-11-28T12:00Z."
    if isinstance(value, str) and re.fullmatch(r"[0-9]{4}(-[0-9]{2})?", value.strip()):
        hint = f"Name the day, too: {value.strip() + '-01-01':.10}."
    raise UsageError(name, repr(value), "seconds since 1970, a datetime or ISO 8601 text", hint) from None


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
