"""Bundles and engines of the first manifest format, brought to this one: verified, run, and only then written."""

from __future__ import annotations

import json
import os
from pathlib import Path

from nformer_edge.backends.open import open_model
from nformer_edge.core.artifact import MANIFEST, atomic_folder, read_manifest, read_verified, write_manifest
from nformer_edge.core.errors import ArtifactError
from nformer_edge.core.values import Written


def upgrade(path: str | os.PathLike[str]) -> Written:
    """Gives a bundle's or an engine's folder a manifest of this version, after its golden vectors gave what they gave.

    The folder is replaced whole, or stays as it is.

    Raises:
        ArtifactError: for a folder of another kind or version, a file that does not match its sha256, fields that this
            version does not know, or golden vectors that give something else.
        BackendError: for an engine that does not run on this machine: upgrade it where it runs.
    """
    folder = Path(path)
    try:
        kind = str(json.loads((folder / MANIFEST).read_text())["kind"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        hint = "Pass the folder of a bundle or an engine."
        raise ArtifactError(str(folder), f"no readable manifest ({e})", "one of the first format", hint) from e
    if kind not in ("bundle", "engine"):
        raise ArtifactError(str(folder), f"a {kind}", "a bundle or an engine", "Make it again with this version.")
    manifest = read_manifest(folder, kind, version=1)
    files = {name: read_verified(folder, manifest, name) for name in manifest["files"]}
    with atomic_folder(folder, kind) as new:
        for name, data in files.items():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            (new / name).write_bytes(data)
        write_manifest(new, kind, manifest)
        with open_model(new):
            pass  # it has been verified, and its golden vectors run
    return Written(folder)
