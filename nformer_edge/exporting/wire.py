"""What an ONNX file refers to outside itself, read from the bytes: before any parser has seen them, and without onnx.

Only what can hold a tensor, a graph or a node is walked, by protobuf's wire format (onnx.proto's field numbers).
"""

from __future__ import annotations

from collections.abc import Iterator

from nformer_edge.core.errors import ArtifactError

#: Domains whose operators name no file. Others may: EPContext, tokenizers, custom libraries.
DOMAINS = frozenset((b"", b"ai.onnx", b"nformer"))

#: Of each message: field number -> message in it.
_FIELDS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
_DEPTH = 64  # graphs in attributes of graphs: more is no model


def refuse_outside(data: bytes, where: str) -> None:
    """Raises ArtifactError if the ONNX file `data` keeps tensors elsewhere, or has operators that may name files."""
    try:
        _walk(memoryview(data), "model", where, 0)
    except (IndexError, ValueError) as e:
        raise ArtifactError(where, f"no readable ONNX file ({e})", "one", "Export or copy it again.") from e


def _walk(data: memoryview, kind: str, where: str, depth: int) -> None:
    if depth > _DEPTH:
        raise ValueError("graphs nested too deep")
    for number, value in _fields(data):
        if kind == "tensor" and (number == 13 or (number == 14 and value == 1)):
            raise ArtifactError(where, "tensors stored in another file", "all of them inside", "Export it again.")
        if kind == "node" and number == 7 and isinstance(value, memoryview) and bytes(value) not in DOMAINS:
            got = f"an operator of the domain {bytes(value)[:40].decode(errors='replace')!r}"
            hint = "Use a graph that this package made: others' operators may open files."
            raise ArtifactError(where, got, "ONNX's own and nformer's", hint)
        inner = _FIELDS[kind].get(number)
        if inner is not None and isinstance(value, memoryview):
            _walk(value, inner, where, depth + 1)


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Field numbers with numbers, or with the bytes of what has a length."""
    at, end = 0, len(data)
    while at < end:
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield number, value
        elif kind == 2:
            size, at = _varint(data, at)
            if at + size > end:
                raise ValueError("a field longer than the file")
            yield number, data[at : at + size]
            at += size
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
