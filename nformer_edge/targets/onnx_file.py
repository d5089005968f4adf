"""Whether an ONNX file that left this package is still what it was, for files that another tool has been at.

Tools that rewrite graphs end with exit code 0 also where they dropped the bodies of the head's operators, turned INT8
into float, or wrote over the file that they read (docs/deploy.md).
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from nformer_edge.core.artifact import MANIFEST, open_plain, read_json
from nformer_edge.core.errors import ArtifactError, Error
from nformer_edge.core.filekind import file_kind
from nformer_edge.core.values import JSON
from nformer_edge.exporting.session import open_session
from nformer_edge.exporting.wire import refuse_outside
from nformer_edge.ops.contract import DOMAIN
from nformer_edge.targets.doctor import Check

#: What both files of a bundle take and give; the names survive every tool seen so far.
_PARTS = {("images",): "a backbone", ("features", "landmarks"): "a head"}
_AGAIN = "Copy or export it again, and give tools a copy."


def checks_of(path: str | os.PathLike[str]) -> list[Check]:
    """What is still right with the ONNX file at `path`, and what a tool did to it. Changes nothing.

    Raises:
        ArtifactError: if it is no ONNX file, keeps tensors elsewhere, or has operators of other domains.
        BackendError: if a package that reads it is missing.
    """
    where = os.fspath(path)
    with open_plain(path, "an ONNX file") as file:
        data = file.read()
    kind = file_kind(path, data)
    if kind.name != "an ONNX model":
        raise ArtifactError(where, kind.name, "an ONNX file", "Pass one that `export` or `build-engine` wrote.")
    refuse_outside(data, where)
    return list(_checks(Path(path), data))


def _checks(path: Path, data: bytes) -> Iterator[Check]:
    import onnx

    from nformer_edge.quantize.fp16 import multiplication_types

    try:
        model = onnx.load_from_string(data)
    except Exception as e:  # protobuf's own, of several classes
        raise ArtifactError(str(path), f"no readable ONNX file ({e})", "one", _AGAIN) from e
    constants = {t.name for t in model.graph.initializer}
    inputs = tuple(i.name for i in model.graph.input if i.name not in constants)
    part = _PARTS.get(inputs, "neither a backbone nor a head")
    yield Check("file", f"{part}: {', '.join(inputs)} -> {', '.join(o.name for o in model.graph.output)}", "")
    makers = [p.value for p in model.metadata_props if p.key == "made_by"]
    last = f"{model.producer_name or 'a tool that does not say'}, metadata gone"
    yield Check("written by", makers[0] if makers else last, "")
    manifest = _manifest(path.parent)
    yield from _unchanged(path.name, data, manifest)
    yield from _bodies({n.op_type for n in model.graph.node if n.domain == DOMAIN}, {f.name for f in model.functions})
    if part == "a backbone":
        quantizing = any(n.op_type == "DequantizeLinear" for n in model.graph.node)
        yield _int8(Counter(multiplication_types(model).values()), quantizing or _says_int8(manifest))
    try:
        open_session(data, path.name)
        yield Check("onnxruntime", "reads it", "")
    except ArtifactError as e:
        yield Check("onnxruntime", "", f"{e.got}. {_AGAIN}")


def _manifest(folder: Path) -> dict[str, JSON]:
    """Of the bundle or engine that the file lies in; its files are not verified here."""
    try:
        found = read_json(folder / MANIFEST, "a manifest", _AGAIN) if (folder / MANIFEST).is_file() else {}
    except Error:
        found = {}
    return found if isinstance(found, dict) else {}


def _unchanged(name: str, data: bytes, manifest: dict[str, JSON]) -> Iterator[Check]:
    files = manifest.get("files")
    entry = files.get(name) if isinstance(files, dict) else None
    if isinstance(entry, dict):
        same = hashlib.sha256(data).hexdigest() == entry.get("sha256")
        yield Check("manifest", "same sha256" if same else "", f"other bytes: a tool wrote over the file. {_AGAIN}")


def _bodies(operators: set[str], bodies: set[str]) -> Iterator[Check]:
    if operators or bodies:
        lost = sorted(operators - bodies)
        hint = (
            f"{' and '.join(lost)} without a body: a tool dropped the file's functions, and other runtimes refuse it. "
        )
        hint += "Give the tool a copy of nformer.portable.onnx: nformer-edge export --portable."
        yield Check("operators", "" if lost else f"{', '.join(sorted(operators))}, with bodies", hint)


def _says_int8(manifest: dict[str, JSON]) -> bool:
    precision = manifest.get("precision")
    return isinstance(precision, dict) and precision.get("backbone") == "int8"


def _int8(types: Counter[str], wanted: bool) -> Check:
    int8, total = types["int8"], sum(types.values())
    if wanted and not int8:
        return Check("INT8", "", f"gone: Q/DQ is no longer at any of its {total} multiplications. {_AGAIN}")
    return Check("INT8", f"{int8} of {total} multiplications" if wanted else "none: FP32", "")
