"""What a bundle's files are called and how they are read. Loads neither torch nor onnx: a device uses this too."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from nformer_edge import __version__
from nformer_edge.core.artifact import read_verified
from nformer_edge.core.errors import ArtifactError, NFormerEdgeError
from nformer_edge.core.ops import LANDMARK_RULE
from nformer_edge.core.spec import ModelSpec, from_dict

KIND = "bundle"
BACKBONE = "backbone.onnx"
HEAD = "nformer.onnx"
GOLDEN = "golden.npz"

#: Opsets of the standard domain that a bundle may use; `operators` says why these.
OPSETS = (18, 19, 20)

# The key of ONNX's external data, as it stands in the file: field 1, eight bytes, then field 2.
_EXTERNAL = b"\x0a\x08location\x12"


def model_spec(where: str, manifest: Mapping[str, Any]) -> ModelSpec:
    """The model that a bundle's or an engine's manifest describes.

    Raises:
        ArtifactError: if the manifest needs an opset, a landmark rule or a spec that this version does not know.
    """
    for key, known in (("opset", OPSETS), ("landmark_rule", (LANDMARK_RULE,))):
        if manifest.get(key) not in known:
            raise ArtifactError(
                f"{where}: {key}", got=repr(manifest.get(key)), expected=" | ".join(map(str, known)),
                mend="Export the bundle again with this version.",
            )  # fmt: skip
    try:
        return from_dict(ModelSpec, manifest["model"])
    except (NFormerEdgeError, KeyError) as e:
        raise ArtifactError(
            f"{where}: model", got=f"an unreadable spec ({e})", expected="this version's", mend="Export it again."
        ) from e


def read_graph(folder: str | Path, manifest: Mapping[str, Any], name: str) -> bytes:
    """The bytes of one ONNX file, verified, for a parser to take from memory.

    Raises:
        ArtifactError: if the file does not match the manifest, or names data outside itself.
    """
    data = read_verified(folder, manifest, name)
    if _EXTERNAL in data:
        raise ArtifactError(
            str(Path(folder) / name), got="tensors stored in another file", expected="all of them inside",
            mend="Export the bundle again.",
        )  # fmt: skip
    return data


def read_golden(folder: str | Path, manifest: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The self-test's arrays: ``images`` and ``features`` of the backbone; ``head_input``, ``landmarks`` and
    ``embeddings`` of the head.

    Raises:
        ArtifactError: if the file does not match the manifest, or holds something else.
    """
    data = read_verified(folder, manifest, GOLDEN)
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as z:
            return {name: z[name] for name in z.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as e:
        raise ArtifactError(
            str(Path(folder) / GOLDEN), got=f"an unreadable file ({e})", expected="arrays", mend="Export it again."
        ) from e


def versions(*packages: str) -> dict[str, str]:
    """Our version and those of the `packages` that are installed."""
    found = {"nformer_edge": __version__}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
