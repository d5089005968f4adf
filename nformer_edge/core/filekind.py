"""What a file is, by its first bytes, and what to do with it here: for errors that name the right command."""

from __future__ import annotations

import io
import os
import re
import stat
import zipfile
from dataclasses import dataclass

_IMPORT = "Import it: nformer-edge import {path} -o model.safetensors"
_WEIGHTS = "Import the PyTorch weights that it was made from: nformer-edge import WEIGHTS.pth -o model.safetensors"
_UNPACK = "Unpack it and pass the weights in it."
_HEAD, _LONGEST = 4096, 100_000_000
_AGAIN = "Download it again{}, and check its size."


@dataclass(frozen=True)
class FileKind:
    """What a file is.

    Args:
        name: ``weights``, ``safetensors``, ``checkpoint``, or what else, in words.
        hint: what to do with it, one sentence.
    """

    name: str
    hint: str

    @property
    def weights(self) -> bool:
        """Whether `nformer-edge import` reads it."""
        return self.name in ("PyTorch weights", "safetensors of another project")


#: Of each kind of file: what the first bytes look like, the name, and the hint.
_STARTS: tuple[tuple[bytes, str, str], ...] = (
    (
        rb"\s*<(!doctype html|html|head|body)",
        "an HTML page",
        _AGAIN.format(" from the page that it shows in a browser"),
    ),
    (rb"version https://git-lfs", "a git-lfs pointer, not the file itself", "Fetch the file: git lfs pull"),
    (rb"\s*(<\?xml[^>]*>\s*)?<net\b", "an OpenVINO model", _WEIGHTS),
    (rb"\s*<\?xml", "an XML text", "Pass the weights."),
    (rb"\s*[{\[]\s*[\"\]}{\[]", "a JSON text", "Pass the weights."),
    (
        rb"\x08[\x01-\x20](\x12|\x1a|\x22|\x2a|\x3a|\x42)",
        "an ONNX model",
        f"If it lies in a bundle, pass the bundle's folder. {_WEIGHTS}",
    ),
    (rb"ftrt", "a TensorRT engine", f"If it lies in an engine, pass the engine's folder. {_WEIGHTS}"),
    (rb"\x89HDF\r\n", "an HDF5 file (Keras)", _WEIGHTS),
    (rb".{4}TFL3", "a TensorFlow Lite model", _WEIGHTS),
    (rb"\x93NUMPY", "a NumPy array", "Pass the weights."),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd|.{257}ustar", "a packed archive", _UNPACK),
    (rb"\xff\xd8\xff|\x89PNG|GIF8|BM.{4}\0\0\0\0|RIFF.{4}WEBP|II\*\0|MM\0\*", "an image", "Pass the weights."),
    (rb"\x80[\x02-\x05]", "PyTorch weights", _IMPORT),
)


def file_kind(path: str | os.PathLike[str], data: bytes | None = None) -> FileKind:
    """What the file `path` is; of `data`, where its contents have been read. Nothing in it is parsed but an archive's
    list of entries.
    """
    if data is None and not stat.S_ISREG(os.stat(path).st_mode):  # it might never end
        return FileKind("a folder, a device or a FIFO", "Pass a plain file.")
    with io.BytesIO(data) if data is not None else open(path, "rb") as file:
        head = file.read(_HEAD)
        length = int.from_bytes(head[:8], "little")
        if head[8:9] == b"{":  # the header of a .safetensors file says how long it is
            head += file.read(max(0, min(length, _LONGEST) - _HEAD))
        size = file.seek(0, os.SEEK_END)
    name, hint = _kind(path, head, size, data)
    return FileKind(name, hint.replace("{path}", os.fspath(path)))


def _kind(path: str | os.PathLike[str], head: bytes, size: int, data: bytes | None) -> tuple[str, str]:
    if not head:
        return "an empty file", _AGAIN.format("")
    if head.startswith(b"PK"):
        return _archive(path, data)
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and length >= 2:
        if length + 8 > size:
            return "a truncated .safetensors file", "Copy or download it again."
        ours = re.search(rb'"kind"\s*:\s*"(nformer-edge-[a-z-]+)"', head)
        if ours is None:
            return "safetensors of another project", _IMPORT
        if ours[1] == b"nformer-edge-checkpoint":
            return "a checkpoint of nformer-edge", "Export it: nformer-edge export {path} -o bundle"
        return f"a file of nformer-edge ({ours[1].decode()})", "Pass a checkpoint, a bundle or an engine."
    for pattern, name, hint in _STARTS:
        if re.match(pattern, head, re.DOTALL | re.IGNORECASE):
            return name, hint
    return "a file of an unknown kind", "Check that it is the weights, and whole."


def _archive(path: str | os.PathLike[str], data: bytes | None) -> tuple[str, str]:
    try:
        with zipfile.ZipFile(path if data is None else io.BytesIO(data)) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, NotImplementedError):
        return "a truncated or damaged archive", "Copy or download it again."
    if any(name.endswith("constants.pkl") or "/code/" in name for name in names):
        return "a TorchScript program, which is code", "Save its weights: torch.save(model.state_dict(), 'weights.pth')"
    if any(name == "data.pkl" or name.endswith("/data.pkl") for name in names):
        return "PyTorch weights", _IMPORT
    if names and all(name.endswith(".npy") for name in names):
        return "NumPy arrays (.npz)", "Pass the weights."
    return "a packed archive", _UNPACK
