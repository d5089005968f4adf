"""Manifests that were changed on purpose, and whose digest holds: what a check behind the digest must catch."""

from __future__ import annotations

import json
from pathlib import Path

from nformer_edge.core.artifact import MANIFEST, digest_of


def reseal(folder: Path, **changes: object) -> None:
    """Writes a folder's manifest again with some fields changed; a change to None removes the field."""
    path = Path(folder) / MANIFEST
    manifest = json.loads(path.read_text()) | changes
    manifest = {key: value for key, value in manifest.items() if value is not None}
    path.write_text(json.dumps(manifest | {"sha256": digest_of(manifest)}))
