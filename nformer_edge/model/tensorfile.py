"""Tensors and a few texts in one `.safetensors` file that carries its own hash. No pickle, no code."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from nformer_edge.core.artifact import atomic_write, recover
from nformer_edge.core.errors import ArtifactError
from nformer_edge.core.filekind import file_kind


@dataclass(frozen=True)
class TensorFile:
    """One kind of file.

    Args:
        kind: stands in the file's metadata; another kind is refused.
        expected: what an error says should have been there.
        hint: what an error says to do where the file is none of this kind.
        version: of the layout; another one is refused.
    """

    kind: str
    expected: str
    hint: str
    version: str = "1"

    def write(self, path: str | os.PathLike[str], tensors: dict[str, Tensor], texts: dict[str, str]) -> None:
        """Writes the file atomically; the same contents give the same bytes.

        Raises:
            ArtifactError: if the disk is full or the folder cannot be written.
        """
        tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        metadata = {"kind": self.kind, "version": self.version, **texts}
        metadata["sha256"] = _digest(tensors, metadata)
        with atomic_write(path) as file:
            file.write(_ordered(safetensors.torch.save(tensors, metadata)))

    def read(self, path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors and texts of a file whose hash holds.

        Raises:
            ArtifactError: if it is missing, damaged, changed, of another kind or of another version.
        """
        tensors, metadata = self._open(Path(path))
        if _digest(tensors, metadata) != metadata["sha256"]:
            got, hint = "contents of another sha256", "Copy it again or train again."
            raise ArtifactError(str(path), got, "the file as it was written", hint)
        return tensors, metadata

    def _open(self, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
        recover(path)
        if not path.is_file():
            got = "a folder" if path.is_dir() else "no such file"
            raise ArtifactError(str(path), got, self.expected, self.hint)
        found = file_kind(path)
        if "nformer-edge" not in found.name:
            raise ArtifactError(str(path), found.name, self.expected, found.hint)
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                metadata = dict(file.metadata() or {})
                if metadata.get("kind") != self.kind or "sha256" not in metadata:
                    raise ArtifactError(str(path), found.name, self.expected, self.hint)
                if metadata.get("version") != self.version:
                    got, wanted = f"version {metadata.get('version')}", f"version {self.version}"
                    raise ArtifactError(str(path), got, wanted, "Update nformer-edge.")
                return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 - not a mapping
        except (safetensors.SafetensorError, OSError, ValueError, RuntimeError) as e:
            raise ArtifactError(str(path), f"a truncated or damaged file ({e})", self.expected, "Copy it again.") from e


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """Sha256 over every tensor's name, type, shape and bytes, and over the metadata but the hash itself."""
    digest = hashlib.sha256()
    for key in sorted(set(metadata) - {"sha256"}):
        _feed(digest, f"{key}={metadata[key]}".encode())
    for name in sorted(tensors):
        _feed(digest, f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        _feed(digest, tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _feed(digest: Any, data: bytes) -> None:
    digest.update(struct.pack("<Q", len(data)))  # lengths keep neighboring fields apart
    digest.update(data)


def _ordered(data: bytes) -> bytes:
    """The same file with its metadata in alphabetic order: safetensors writes it in a random one."""
    (size,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors stay aligned to 8 bytes
    return struct.pack("<Q", len(text)) + text + data[8 + size :]
