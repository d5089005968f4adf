"""What was measured, kept line by line, so that an interrupted search goes on and a finished one costs nothing.

Each line is JSON: a key, which is a hash of everything that the value depends on, the value, and the seconds that it
took to measure. A line that a killed run left half-written is passed over, and so are lines whose key nobody asks for:
the file may outlive the settings.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nformer_edge.core.errors import ArtifactError


def hash_of(facts: Any) -> str:
    """Sha256 of plain JSON data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class Journal:
    """Remembers results by what they depend on.

    Args:
        path: the file, made by the first result; None remembers nothing beyond this object.

    Raises:
        ArtifactError: if the file is there and cannot be read.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._known: dict[str, dict[str, Any]] = {}
        self._asked: set[str] = set()
        self.measured = 0
        try:
            lines = path.read_bytes().splitlines() if path is not None and path.exists() else []
        except OSError as e:
            raise ArtifactError(
                str(path), e.strerror, "what an earlier search measured", "Remove it, or choose -o."
            ) from e
        for line in lines:
            try:
                entry = json.loads(line)
                self._known[str(entry["key"])] = {"value": entry["value"], "seconds": float(entry["seconds"])}
            except (ValueError, TypeError, KeyError):
                continue

    def recall(self, facts: Any, measure: Callable[[], Any]) -> Any:
        """The value that belongs to `facts`: remembered, or measured now and kept. Both are plain JSON data."""
        key = hash_of(facts)
        if key not in self._known:
            start = time.perf_counter()
            value = json.loads(json.dumps(measure(), allow_nan=False))
            self._known[key] = {"value": value, "seconds": time.perf_counter() - start}
            self.measured += 1
            self._append(key)
        self._asked.add(key)
        return self._known[key]["value"]

    @property
    def reused(self) -> int:
        """How many values were asked for that an earlier run had measured."""
        return len(self._asked) - self.measured

    @property
    def seconds(self) -> float:
        """What all values that were asked for took to measure, whoever did it."""
        return sum(self._known[key]["seconds"] for key in self._asked)

    def _append(self, key: str) -> None:
        if self._path is None:
            return
        line = json.dumps({"key": key, **self._known[key]}).encode() + b"\n"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "a+b") as file:
                if file.tell() and not _ends_line(file.fileno()):
                    line = b"\n" + line  # a killed run's last line must not swallow this one
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as e:
            raise ArtifactError(
                str(self._path), e.strerror, "a file to keep measurements in", "Choose another -o."
            ) from e


def _ends_line(descriptor: int) -> bool:
    return os.pread(descriptor, 1, os.fstat(descriptor).st_size - 1) == b"\n"
