"""What an interrupted stage goes on from: one file with its tensors, counters and random states. No pickle."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from nformer_edge.core.errors import UsageError
from nformer_edge.model.tensorfile import TensorFile

_FILE = TensorFile(
    "nformer-edge-training-state", "the state of an interrupted training", "Train again without --resume."
)


class StateFile:
    """The state of one stage on disk.

    Args:
        path: of the file.
        identity: JSON that says what is being trained, on what and how; another training's state is refused.
        minutes: between two writes, at least.
        resume: whether to read what lies there; otherwise it is overwritten by the first write.
        writes: False on ranks that only read.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        identity: dict[str, Any],
        minutes: float = 5.0,
        resume: bool = False,
        writes: bool = True,
    ) -> None:
        self.path, self.identity, self.resume, self.writes = Path(path), identity, resume, writes
        self.seconds = 60 * minutes
        self._last = time.monotonic()

    def due(self) -> bool:
        """Whether the last write is long enough ago."""
        return time.monotonic() - self._last >= self.seconds

    def write(self, tensors: dict[str, Tensor], counters: dict[str, Any]) -> None:
        """Replaces the state, atomically."""
        if self.writes:
            text = json.dumps({"identity": self.identity, "counters": counters}, sort_keys=True, allow_nan=False)
            _FILE.write(self.path, tensors, {"state": text})
        self._last = time.monotonic()

    def finish(self, result: dict[str, Any]) -> None:
        """The stage is done: all that a resumed run needs of it is `result`, JSON."""
        self.write({}, {"finished": result})

    def finished(self) -> dict[str, Any] | None:
        """What `finish` was given, if the stage came to its end. Raises as `read` does."""
        found = self._read()
        return found[1].get("finished") if found else None

    def read(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and counters of the interrupted stage; None if there is none to go on with.

        Raises:
            ArtifactError: if the file is damaged.
            UsageError: if it belongs to another training, naming the first difference.
        """
        found = self._read()
        return None if found is None or "finished" in found[1] else found

    def _read(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        if not self.resume or not self.path.exists():
            return None
        tensors, texts = _FILE.read(self.path)
        state = json.loads(texts["state"])
        for where, was, now in _differences(state["identity"], self.identity):
            raise UsageError(
                f"--resume with another {where}",
                now,
                f"{was}, as in {self.path}",
                "Pass what the interrupted run was given, or train again without --resume.",
            )
        return tensors, state["counters"]


def _differences(was: Any, now: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(was, dict) and isinstance(now, dict):
        for key in sorted(was.keys() | now.keys()):
            yield from _differences(was.get(key), now.get(key), f"{where}.{key}".lstrip("."))
    elif was != now:
        yield where, was, now
