"""Batches of features that an interrupted run has finished, so that the next one goes on where it stopped.

One file of records: a batch's key, the features' sha256 and shape, and the features. The key is a hash of all that they
depend on, so the file may outlive a model, its images or the batch size: what nobody asks for is passed over.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nformer_edge.core.errors import ArtifactError

#: Key, sha256 of the features, rows, columns.
_HEAD = struct.Struct("<32s32sII")


class BatchJournal:
    """Remembers float32 [B, D] by what it depends on.

    Args:
        path: the file, made by the first batch; None remembers nothing.

    Raises:
        ArtifactError: if the file is there and cannot be read.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._known: dict[bytes, np.ndarray] = {}
        try:
            data = path.read_bytes() if path is not None and path.exists() else b""
        except OSError as e:
            raise self._failed(e) from e
        self._whole = self._read(data)

    def recall(self, facts: Any, embed: Callable[[], np.ndarray]) -> np.ndarray:
        """The batch that belongs to `facts`, plain JSON data: remembered, or embedded now and kept.

        Raises:
            ArtifactError: if the file cannot be written.
        """
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()
        found = self._known.pop(key, None)
        if found is None:
            found = embed()
            if self._path is not None:
                self._append(self._path, key, found)
        return found

    def remove(self) -> None:
        """Deletes the file: its features are in their store."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _read(self, data: bytes) -> int:
        """Takes in what is whole; the length of that."""
        at = 0
        while at + _HEAD.size <= len(data):
            key, digest, rows, columns = _HEAD.unpack_from(data, at)
            end = at + _HEAD.size + 4 * rows * columns
            held = data[at + _HEAD.size : end]
            if hashlib.sha256(held).digest() != digest:
                break
            self._known[key] = np.frombuffer(held, np.float32).reshape(rows, columns)
            at = end
        return at

    def _append(self, path: Path, key: bytes, found: np.ndarray) -> None:
        held = found.tobytes()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "ab") as file:
                file.truncate(self._whole)  # what a killed run left half-written
                file.write(_HEAD.pack(key, hashlib.sha256(held).digest(), *found.shape) + held)
        except OSError as e:
            raise self._failed(e) from e
        self._whole += _HEAD.size + len(held)

    def _failed(self, error: OSError) -> ArtifactError:
        return ArtifactError(
            str(self._path),
            error.strerror,
            "a file to keep finished batches in",
            "Free some space, or choose another -o.",
        )
