"""What was measured or computed, kept line by line, so that an interrupted run goes on where it stopped.

Each line is JSON: a key, which is a hash of everything that the value depends on, the value, a hash of both, and the
seconds that it took. A line that a killed run left half-written is passed over, and so are lines whose key nobody asks
for: the file may outlive the settings.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

import numpy as np

from nformer_edge.core.errors import ArtifactError
from nformer_edge.core.values import JSON

T = TypeVar("T")


class Journal:
    """Remembers results by what they depend on.

    Args:
        path: the file, made by the first result; None remembers nothing beyond this object, and no array.

    Raises:
        ArtifactError: if the file is there and cannot be read.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._known: dict[str, tuple[JSON, float]] = {}
        self._asked: dict[str, float] = {}
        self.measured = 0
        try:
            lines = path.read_bytes().splitlines() if path is not None and path.exists() else []
        except OSError as e:
            raise self._failed(e) from e
        for line in lines:
            try:
                entry = json.loads(line)
                if entry["sha256"] == _sha256([entry["key"], entry["value"]]):
                    self._known[entry["key"]] = entry["value"], float(entry["seconds"])
            except (ValueError, TypeError, KeyError):
                continue

    def recall(self, facts: JSON, measure: Callable[[], T]) -> T:
        """The value, plain JSON data, that belongs to `facts`: remembered, or measured now and kept.

        Raises:
            ArtifactError: if the file cannot be written.
        """
        key = _sha256(facts)
        if key not in self._known:
            start = time.perf_counter()
            value = json.loads(json.dumps(measure(), allow_nan=False))
            self._known[key] = value, time.perf_counter() - start
            self.measured += 1
            self._append(key)
        value, self._asked[key] = self._known[key]
        return cast(T, value)

    def recall_array(self, facts: JSON, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """The float32 array that belongs to `facts`, likewise. Once asked for it is not held any longer."""
        if self._path is None:
            return compute()

        def encoded() -> JSON:
            found = compute()
            return [list(found.shape), base64.b64encode(found.astype(np.float32).tobytes()).decode()]

        try:
            return _decoded(self.recall(facts, encoded))
        except (ValueError, TypeError):  # a line whose hash holds, and that is no array
            del self._known[_sha256(facts)]
            return _decoded(self.recall(facts, encoded))
        finally:  # nothing is there where `compute` raised
            self._known.pop(_sha256(facts), None)

    def remove(self) -> None:
        """Deletes the file: what it holds stands elsewhere."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    @property
    def reused(self) -> int:
        """How many values were asked for that an earlier run had measured."""
        return len(self._asked) - self.measured

    @property
    def seconds(self) -> float:
        """What all values that were asked for took to measure, whoever did it."""
        return sum(self._asked.values())

    def _append(self, key: str) -> None:
        if self._path is None:
            return
        value, seconds = self._known[key]
        entry = {"key": key, "seconds": seconds, "sha256": _sha256([key, value]), "value": value}
        line = json.dumps(entry).encode() + b"\n"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "a+b") as file:
                if file.tell() and not _ends_line(file.fileno()):
                    line = b"\n" + line  # a killed run's last line must not swallow this one
                file.write(line)
        except OSError as e:
            raise self._failed(e) from e

    def _failed(self, error: OSError) -> ArtifactError:
        hint = "Free some space, or choose another -o."
        return ArtifactError(str(self._path), error.strerror, "a writable file for finished work", hint)


def _decoded(value: JSON) -> np.ndarray:
    shape, data = cast("tuple[list[int], str]", value)
    if min(shape) < 0:
        raise ValueError("a negative length")
    return np.frombuffer(base64.b64decode(data), np.float32).reshape(shape)


def _sha256(data: JSON) -> str:
    """Of plain JSON data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _ends_line(descriptor: int) -> bool:
    return os.pread(descriptor, 1, os.fstat(descriptor).st_size - 1) == b"\n"
