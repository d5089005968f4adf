from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from nformer_edge.core.filekind import file_kind

SAFE = b'{"__metadata__":{"extra":"%s","kind":"%s"},"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'


def header(kind: bytes, extra: bytes = b"") -> bytes:
    text = SAFE % (extra, kind)
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("data", "name", "hint"),
    [
        (b"", "an empty file", "Download it again"),
        (b"<!DOCTYPE html><html>", "an HTML page", "browser"),
        (b"\n <HTML><head>", "an HTML page", "browser"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a git-lfs pointer", "git lfs pull"),
        (b'<?xml version="1.0"?>\n<net name="x">', "an OpenVINO model", "nformer-edge import WEIGHTS.pth"),
        (b"<net/>", "an OpenVINO model", "nformer-edge import"),
        (b'{"message": "Not Found"}', "a JSON text", "Pass the weights"),
        (b"\x08\x08\x12\x07pytorch", "an ONNX model", "nformer-edge import"),
        (b"ftrt\0\0\0\0", "a TensorRT engine", "nformer-edge import"),
        (b"\x1f\x8b\x08", "a packed archive", "Unpack it"),
        (b"\x80\x02\x8a\nl\xfc\x9cF", "PyTorch weights", "nformer-edge import x.bin -o model.safetensors"),
        (header(b"pt"), "safetensors of another project", "nformer-edge import x.bin"),
        (header(b"nformer-edge-checkpoint"), "a checkpoint of nformer-edge", "nformer-edge export x.bin"),
        (header(b"nformer-edge-checkpoint", b"x" * 5000), "a checkpoint of nformer-edge", "nformer-edge export"),
        (header(b"pt")[:40], "a truncated .safetensors file", "again"),
        (b"no weights at all", "a file of an unknown kind", "Check"),
    ],
)
def test_a_file_is_told_by_its_first_bytes(
    data: bytes, name: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.bin").write_bytes(data)
    for found in (file_kind("x.bin"), file_kind("x.bin", data)):
        assert found.name.startswith(name)
        assert hint in found.hint


@pytest.mark.parametrize(
    ("entries", "name"),
    [
        (["m/data.pkl", "m/constants.pkl"], "a TorchScript program"),
        (["m/data.pkl", "m/data/0"], "PyTorch weights"),
        (["a.npy", "b.npy"], "NumPy arrays"),
        (["weights.pth"], "a packed archive"),
    ],
)
def test_an_archive_is_told_by_its_entries(entries: list[str], name: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        for entry in entries:
            archive.writestr(entry, b"")
    assert file_kind(tmp_path / "x.pth").name.startswith(name)
    (tmp_path / "x.pth").write_bytes((tmp_path / "x.pth").read_bytes()[:-30])
    assert file_kind(tmp_path / "x.pth").name == "a truncated or damaged archive"
