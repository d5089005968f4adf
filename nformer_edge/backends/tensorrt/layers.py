"""A plan's layers and their types, from what TensorRT tells of them: the inspector's JSON or a builder's listing."""

from __future__ import annotations

import json
import re
from typing import Any

Layer = dict[str, Any]

#: Words for types in both forms and all versions, the first that is found counting. Others (Bool, Int32) are no matter
#: of precision.
_WORDS = {"int8": r"\bint8\b", "fp16": r"\b(half|fp16)\b", "bf16": r"\b(bfloat16|bf16)\b", "fp32": r"\b(float|fp32)\b"}

_ROW = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<kind>\S*?), Inputs: \[(?P<inputs>.*)\], Constants: \[.*\], "
    r"Outputs: \[(?P<outputs>.*)\], TacticName: .*?, Metadata: ?(?P<metadata>.*)$"
)
_NODE = re.compile(r"\[ONNX Layer: (.*?)\]")


def type_of(text: str) -> str:
    """``int8``, ``fp16``, ``bf16`` or ``fp32`` by a type's or a format's words; "" for a type without precision."""
    return next((name for name, word in _WORDS.items() if re.search(word, text, re.IGNORECASE)), "")


def layers_from_listing(text: str) -> list[Layer]:
    """From the list that a verbose builder prints at its end, one line a layer."""
    layers = []
    for line in text.splitlines():
        row = _ROW.match(line)
        if row is not None:
            types = {key: _listed_types(row[key]) for key in ("inputs", "outputs")}
            layers.append(_layer(row["name"], row["kind"], types["inputs"], types["outputs"], row["metadata"]))
    return layers


def layers_from_json(text: str) -> list[Layer]:
    """From `EngineInspector.get_engine_information` in JSON, as TensorRT 8.5 to 11 write it."""
    found = json.loads(text)
    layers = []
    for layer in found.get("Layers", ()):
        if isinstance(layer, str):  # a plan without details has names alone
            layers.append(_layer(layer, "", [], [], ""))
            continue
        types = {
            key: [t for tensor in layer.get(key) or () if (t := type_of(_said(tensor)))]
            for key in ("Inputs", "Outputs")
        }
        kind = str(layer.get("ParameterType") or layer.get("LayerType") or "")
        layers.append(
            _layer(str(layer.get("Name")), kind, types["Inputs"], types["Outputs"], str(layer.get("Metadata") or ""))
        )
    return layers


def _said(tensor: dict[str, Any]) -> str:
    return str(tensor.get("Datatype") or tensor.get("Format/Datatype") or tensor.get("Format") or "")


def _listed_types(text: str) -> list[str]:
    return [t for word in re.findall(r"Datatype: (\w+)", text) if (t := type_of(word))]


def _layer(name: str, kind: str, inputs: list[str], outputs: list[str], metadata: str) -> Layer:
    # A node of an inlined function is told as "score | /head/RowTopK (RowTopK)".
    told = [part for found in _NODE.findall(metadata) for part in found.split(" | ")]
    nodes = [part.partition(" (")[0] for part in told] or name.split(" + ")
    return {"name": name, "kind": kind, "inputs": inputs, "outputs": outputs, "nodes": nodes}
