"""Bundles and engines of the first manifest format, brought to this one: verified, run, and only then written."""

from __future__ import annotations

import json
import os
from pathlib import Path

from nformer_edge.backends.engine import KIND as ENGINE
from nformer_edge.backends.open import open_model
from nformer_edge.core.artifact import atomic_folder, kind_of, read_manifest, read_verified, write_manifest
from nformer_edge.core.errors import ArtifactError
from nformer_edge.core.signature import check_private_key, sign_folder
from nformer_edge.core.values import Result, Written, digest_of, dumps
from nformer_edge.exporting.bundle import KIND as BUNDLE
from nformer_edge.quantize.values import BUDGET, TABLE, BudgetSearch, Ranges


def upgrade(path: str | os.PathLike[str], *, sign: str | os.PathLike[str] | None = None) -> Written:
    """Gives a bundle's or an engine's folder a manifest of this version, after its golden vectors gave what they gave.

    The folder is replaced whole, or stays as it is.

    Args:
        path: the folder.
        sign: PEM file of an Ed25519 private key: the new folder carries its signature (`core.signature`).

    Raises:
        ArtifactError: for a folder of another kind or version, a file that does not match its sha256, fields that this
            version does not know, or golden vectors that give something else.
        BackendError: for an engine that does not run on this machine: upgrade it where it runs.
    """
    folder = Path(path)
    check_private_key(sign)
    kind = kind_of(folder, BUNDLE, ENGINE)
    manifest = read_manifest(folder, kind, version=1)
    files = {name: read_verified(folder, manifest, name) for name in manifest["files"]}
    for name, result in ((TABLE, Ranges), (BUDGET, BudgetSearch)):
        if name in files:
            files[name] = _sealed(files[name], result, str(folder / name))
    with atomic_folder(folder, kind) as new:
        for name, data in files.items():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            (new / name).write_bytes(data)
        write_manifest(new, kind, manifest)
        sign_folder(new, kind, sign)
        with open_model(new):
            pass  # it has been verified, and its golden vectors run
    return Written(folder)


def _sealed(data: bytes, result: type[Result], where: str) -> bytes:
    """A result of the version before this one, which had the same fields and no digest."""
    try:
        fields = {**json.loads(data), "version": result.version}
    except (ValueError, TypeError, RecursionError) as e:
        raise ArtifactError(where, f"no readable JSON ({e})", result.kind, "Make it again.") from e
    sealed = {**fields, "sha256": digest_of(fields)}
    result.from_json(sealed, where)
    return dumps(sealed).encode() + b"\n"
