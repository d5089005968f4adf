"""What a vector store must do to hold a gallery: few words, so that an adapter is short, and numpy's own.

A store holds rows as the head compares them, and gives back the rows themselves. Scores are computed here from those
rows, so no store's metric, rounding, sign or order of ties reaches an answer.

Letters: N rows, B queries, D features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nformer_edge.core.errors import BackendError
from nformer_edge.gallery.held import Where

#: Rows that go to a store, or come from it by name, in one call: 1,000 of 2,048 bytes stay under every message limit.
BATCH = 1000


@dataclass(frozen=True, eq=False)
class Rows:
    """N images as a store holds them.

    Args:
        keys: int64 [N], 0 or more, each image's own.
        unit: float32 [N, D] at L2 norm 1.
        length: float32 [N], the norm before.
        ids: who each image shows.
        paths: files, or "".
        cameras: int64 [N], -1 is unknown.
        times: float64 [N], seconds since 1970, `held.NEVER` is unknown.
        models: of each row, what made it: a hash over model and landmarks.
    """

    keys: np.ndarray
    unit: np.ndarray
    length: np.ndarray
    ids: tuple[str, ...]
    paths: tuple[str, ...]
    cameras: np.ndarray
    times: np.ndarray
    models: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, at: np.ndarray) -> Rows:
        """The rows at these places (indices or a boolean mask)."""
        places = np.flatnonzero(at) if at.dtype == bool else at

        def taken(column: Any) -> Any:
            return tuple(column[i] for i in places) if isinstance(column, tuple) else column[places]

        return Rows(*(taken(getattr(self, f.name)) for f in fields(self)))

    @staticmethod
    def joined(parts: Sequence[Rows]) -> Rows:
        """All rows of one or more parts."""

        def joined(columns: list[Any]) -> Any:
            return tuple(chain(*columns)) if isinstance(columns[0], tuple) else np.concatenate(columns)

        return Rows(*(joined([getattr(part, f.name) for part in parts]) for f in fields(Rows)))

    @staticmethod
    def none(features: int) -> Rows:
        """No row."""
        return Rows.of_records((), (), (), features)

    def records(self) -> list[dict[str, object]]:
        """Of each row everything but key and vector, as plain numbers and text."""
        columns = (self.length, self.cameras, self.times)
        numbers = zip(*(x.tolist() for x in columns), strict=True)
        texts = zip(self.ids, self.paths, self.models, map(person, self.ids), strict=True)
        return [dict(zip(RECORD, (*n, *t), strict=True)) for n, t in zip(numbers, texts, strict=True)]

    @staticmethod
    def of_records(keys: Sequence[int], unit: Sequence[object], records: Sequence[dict], features: int) -> Rows:
        """Rows from what `records` gave and a store gave back."""
        column = {name: [record[name] for record in records] for name in RECORD}
        texts = (tuple(map(str, column[name])) for name in ("id", "path", "model"))
        ids, paths, models = texts
        return Rows(
            np.array(keys, np.int64),
            np.array(unit, np.float32).reshape(len(keys), features),
            np.array(column["length"], np.float32),
            ids,
            paths,
            np.array(column["camera"], np.int64),
            np.array(column["time"], np.float64),
            models,
        )


#: Fields of a row beside key and vector. ``person`` is a number of the id, which filters name instead of its text.
RECORD = ("length", "camera", "time", "id", "path", "model", "person")


def person(name: str) -> int:
    """A number of 63 bits that stands for an id in a store's filters."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


class Shortlist(Protocol):
    """A store. Its owner hands it rows that are whole, and checks what it gives back (`gallery.ShortlistGallery`)."""

    #: For errors, such as ``milvus http://host:19530``.
    name: str

    def put(self, rows: Rows) -> None:
        """Adds up to `BATCH` rows whose keys it does not hold. When it returns they are found."""

    def nearest(self, unit: np.ndarray, count: int, where: Where) -> list[Rows]:
        """Of each unit row [B, D] up to `count` rows with the largest product, in any order."""

    def find(self, ids: Sequence[str]) -> Rows:
        """Up to `BATCH` rows of these ids."""

    def holds(self, keys: np.ndarray) -> np.ndarray:
        """bool [N], which of up to `BATCH` keys it holds."""

    def drop(self, keys: np.ndarray) -> None:
        """Deletes up to `BATCH` rows. When it returns they are not found."""

    def erase(self) -> None:
        """Takes what was deleted out of its files, as far as it can."""

    def count(self, where: Where) -> int:
        """How many rows there are."""

    def traces(self, row: np.ndarray) -> tuple[list[Path], bytes]:
        """The files where the bytes of a unit row [D] would be, and those bytes; no file where none can be read."""

    def close(self) -> None:
        """Gives it back."""


def required(module: str, extra: str) -> BackendError:
    """The error where a store's client is not installed."""
    return BackendError(extra, f"no {module} here", "its client", f"pip install 'nformer-edge[{extra}]'")


class NumpyShortlist:
    """All rows in this process's memory, compared one by one."""

    name = "numpy"

    def __init__(self, features: int) -> None:
        self._parts, self._keys = [Rows.none(features)], set[int]()

    @property
    def _rows(self) -> Rows:
        if len(self._parts) > 1:
            self._parts = [Rows.joined(self._parts)]
        return self._parts[0]

    def put(self, rows: Rows) -> None:
        self._parts.append(rows)
        self._keys.update(rows.keys.tolist())

    def nearest(self, unit: np.ndarray, count: int, where: Where) -> list[Rows]:
        rows = self._rows
        at = np.flatnonzero(where.allowed(rows.cameras, rows.times))
        scores = unit @ (rows.unit if len(at) == len(rows) else rows.unit[at]).T
        found = min(count, len(at))
        return [rows.take(at[np.argpartition(-row, found - 1)[:found]] if found else at) for row in scores]

    def find(self, ids: Sequence[str]) -> Rows:
        wanted = set(ids)
        return self._rows.take(np.flatnonzero([name in wanted for name in self._rows.ids])[:BATCH])

    def holds(self, keys: np.ndarray) -> np.ndarray:
        return np.array([key in self._keys for key in keys.tolist()], bool)

    def drop(self, keys: np.ndarray) -> None:
        self._parts = [self._rows.take(~np.isin(self._rows.keys, keys))]
        self._keys.difference_update(keys.tolist())

    def erase(self) -> None: ...

    def count(self, where: Where) -> int:
        return int(where.allowed(self._rows.cameras, self._rows.times).sum())

    def traces(self, row: np.ndarray) -> tuple[list[Path], bytes]:
        return [], row.tobytes()

    def close(self) -> None: ...
