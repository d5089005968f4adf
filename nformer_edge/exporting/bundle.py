"""What a bundle's files are called and how they are read. Loads neither torch nor onnx: a device uses this too."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nformer_edge.core.artifact import read_verified
from nformer_edge.core.errors import ArtifactError, NFormerEdgeError
from nformer_edge.core.spec import ModelSpec, from_dict
from nformer_edge.ops.contract import LANDMARK_RULE, OPSETS

KIND = "bundle"
BACKBONE = "backbone.onnx"
HEAD = "nformer.onnx"
GOLDEN = "golden.npz"

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
                f"{where}: {key}",
                repr(manifest.get(key)),
                " | ".join(map(str, known)),
                "Export the bundle again with this version.",
            )
    try:
        return from_dict(ModelSpec, manifest["model"])
    except (NFormerEdgeError, KeyError) as e:
        raise ArtifactError(f"{where}: model", f"an unreadable spec ({e})", "this version's", "Export it again.") from e


def read_graph(folder: str | Path, manifest: Mapping[str, Any], name: str) -> bytes:
    """The bytes of one ONNX file, verified, for a parser to take from memory.

    Raises:
        ArtifactError: if the file does not match the manifest, or names data outside itself.
    """
    data = read_verified(folder, manifest, name)
    if _EXTERNAL in data:
        raise ArtifactError(
            str(Path(folder) / name), "tensors stored in another file", "all of them inside", "Export the bundle again."
        )
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
            str(Path(folder) / GOLDEN), f"an unreadable file ({e})", "arrays", "Export it again."
        ) from e
