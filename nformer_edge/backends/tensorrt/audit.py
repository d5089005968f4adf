"""What precision a plan really has, layer by layer, against what its graph asks for.

Layers are read from the inspector's JSON or a builder's listing. A multiplication is a convolution or a matrix
multiplication.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from nformer_edge.backends.engine import Counts, PartAudit
from nformer_edge.core.errors import BackendError

#: Words for types in both forms and all versions, narrowest type first; the first that is found counts. Others (Bool,
#: Int32) have no precision.
_WORDS = {"int8": r"\bint8\b", "fp16": r"\b(half|fp16)\b", "bf16": r"\b(bfloat16|bf16)\b", "fp32": r"\b(float|fp32)\b"}
TYPES = tuple(_WORDS)

#: Kinds of layers that move, cast or add, in TensorRT's words: a multiplication that is named by one of them and by
#: another layer too is computed in the other.
_POINTWISE = frozenset(
    ("kgen", "cast", "reformat", "pointwise", "elementwise", "noop", "shape_call", "copy", "scale", "add", "mul")
)

#: Kinds that tell nothing of what is inside.
_OPAQUE = ("myelin", "dla")

_ROW = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<kind>\S*?), Inputs: \[(?P<inputs>.*)\], Constants: \[.*\], "
    r"Outputs: \[(?P<outputs>.*)\], TacticName: .*?, Metadata: ?(?P<metadata>.*)$"
)
_NODE = re.compile(r"\[ONNX Layer: (.*?)\]")


@dataclass(frozen=True)
class Layer:
    """One layer of a plan: the types that it reads and writes, and the ONNX nodes that it computes."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[str, ...]


def type_of(text: str) -> str:
    """``int8``, ``fp16``, ``bf16`` or ``fp32`` by a type's or a format's words; "" for a type without precision."""
    return next((name for name, word in _WORDS.items() if re.search(word, text, re.IGNORECASE)), "")


def layers_from_listing(text: str) -> list[Layer]:
    """From the list that a verbose builder prints at its end, one line a layer."""
    rows = [row for row in map(_ROW.match, text.splitlines()) if row is not None]
    types = re.compile(r"Datatype: (\w+)").findall
    return [_layer(r["name"], r["kind"], types(r["inputs"]), types(r["outputs"]), r["metadata"]) for r in rows]


def layers_from_json(text: str) -> list[Layer]:
    """From `EngineInspector.get_engine_information` in JSON, as TensorRT 8.5 to 11 write it."""
    layers = []
    for layer in json.loads(text).get("Layers", ()):
        if isinstance(layer, str):  # a plan without details has names alone
            layers.append(_layer(layer))
            continue
        inputs, outputs = ([_type_words(tensor) for tensor in layer.get(key) or ()] for key in ("Inputs", "Outputs"))
        kind = str(layer.get("ParameterType") or layer.get("LayerType") or "")
        layers.append(_layer(str(layer.get("Name")), kind, inputs, outputs, str(layer.get("Metadata") or "")))
    return layers


def _type_words(tensor: Mapping[str, object]) -> str:
    return str(tensor.get("Datatype") or tensor.get("Format/Datatype") or tensor.get("Format") or "")


def _layer(
    name: str, kind: str = "", inputs: Sequence[str] = (), outputs: Sequence[str] = (), metadata: str = ""
) -> Layer:
    # A node of an inlined function is listed as "score | /head/RowTopK (RowTopK)".
    listed = [part for found in _NODE.findall(metadata) for part in found.split(" | ")]
    nodes = [part.partition(" (")[0] for part in listed] or name.split(" + ")
    read, written = (tuple(filter(None, map(type_of, words))) for words in (inputs, outputs))
    return Layer(name, kind, read, written, tuple(nodes))


def types_built(layers: Sequence[Layer], nodes: Iterable[str]) -> dict[str, str]:
    """The type in which each of `nodes` is computed; those that are not known are absent."""
    found = {}
    for node in nodes:
        naming = [layer for layer in layers if node in layer.nodes and layer.kind.lower() not in _OPAQUE]
        computing = [layer for layer in naming if layer.kind.lower() not in _POINTWISE] or naming
        types = {t for layer in computing for t in layer.inputs}
        if types:
            found[node] = min(types, key=TYPES.index)
    return found


def audit_plan(part: str, layers: Sequence[Layer], asked: Mapping[str, str], *, strict: bool = True) -> PartAudit:
    """Counts, and refuses a plan that is not what was asked for: the type of each multiplication and custom node.

    Where `strict`, every FP16 multiplication must be FP16. TensorRT 8 may choose FP32 where that is faster.

    Raises:
        BackendError: if less than half of the INT8 multiplications came out in INT8; or, where `strict`, one asked for
            in FP16 or FP32 came out in another type.
    """
    built = types_built(layers, asked)
    other = {name: kind for name, kind in built.items() if kind != asked[name]}
    wanted, fitting = Counter(asked.values()), Counter(asked[n] for n in built if n not in other)
    known = Counter(asked[name] for name in built)
    read = Counter(layer.inputs[0] if layer.inputs else "none" for layer in layers)
    for kind in TYPES:
        strictly = strict and kind != "int8"
        wrong = known[kind] - fitting[kind]
        if wrong and (strictly or 2 * wrong > known[kind]):
            names = ", ".join([f"{n} in {t}" for n, t in other.items() if asked[n] == kind][:5])
            got = f"{wrong} of {known[kind]} multiplications not in {kind} ({names})"
            expected = f"{'all' if strictly else 'at least half'} in {kind}, as asked"
            hint = "The builder chose otherwise: build another precision, or with another version of TensorRT."
            raise BackendError(f"{part}: precision", got, expected, hint)
    if wanted["int8"] and not known["int8"]:
        hint, expected = "Keep the build log, and build FP16.", f"{wanted['int8']} multiplications"
        raise BackendError(f"{part}: precision", "no layer that is known to be in INT8", expected, hint)
    return PartAudit(
        {kind: Counts(wanted[kind], fitting[kind], wanted[kind] - known[kind]) for kind in TYPES if wanted[kind]},
        other,
        {kind: read[kind] for kind in (*TYPES, "none") if read[kind]},
    )
