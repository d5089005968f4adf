"""Nodes to leave in float, as they stand on the command line: names, or a file that a search or a hand wrote."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nformer_edge.core.errors import UsageError


def read_exclude(sources: Iterable[str]) -> tuple[str, ...]:
    """Names of ONNX nodes, each once, in order.

    Args:
        sources: names; or files: an engine's `budget.json` (what it chose), a JSON list, or text with a name a line and
            comments after ``#``.

    Raises:
        UsageError: for JSON that is neither, or a search that chose nothing.
    """
    names: list[str] = []
    for source in sources:
        names += _from_file(Path(source)) if Path(source).is_file() else [source]
    return tuple(dict.fromkeys(names))


def _from_file(path: Path) -> list[str]:
    text = path.read_text()
    if path.suffix != ".json":
        lines = (line.partition("#")[0].strip() for line in text.splitlines())
        return [line for line in lines if line]
    try:
        found: Any = json.loads(text)
        if isinstance(found, dict):
            found = found["frontier"][found["chosen"]]["float_nodes"]
        if not (isinstance(found, list) and all(isinstance(name, str) for name in found)):
            raise ValueError("something else")
    except (ValueError, KeyError, TypeError, IndexError) as e:
        raise UsageError(
            "exclude_nodes",
            f"{path}: {e or type(e).__name__}",
            "a list of node names, or an engine's budget.json that chose a set",
            "Write the names into a file, one a line.",
        ) from e
    return found
