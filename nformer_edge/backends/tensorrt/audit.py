"""What precision a plan really has, layer by layer, against what its graph asks for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nformer_edge.backends.tensorrt.layers import Layer
from nformer_edge.core.errors import BackendError

#: Narrowest first.
TYPES = ("int8", "fp16", "bf16", "fp32")

#: Kinds of layers that move, cast or add, in TensorRT's words: a product that is named by one of them and by another
#: layer too is computed in the other.
_POINTWISE = (
    "kgen",
    "cast",
    "reformat",
    "pointwise",
    "elementwise",
    "noop",
    "shape_call",
    "copy",
    "scale",
    "add",
    "mul",
)

#: Kinds that tell nothing of what is inside.
_OPAQUE = ("myelin", "dla")


def product_types_built(layers: Sequence[Layer], products: Iterable[str]) -> dict[str, str]:
    """The type in which each of `products` (names of ONNX nodes) is computed; those that cannot be told are absent."""
    found = {}
    for product in products:
        naming = [layer for layer in layers if product in layer["nodes"] and layer["kind"].lower() not in _OPAQUE]
        computing = [layer for layer in naming if layer["kind"].lower() not in _POINTWISE] or naming
        types = {t for layer in computing for t in layer["inputs"]}
        if types:
            found[product] = min(types, key=TYPES.index)
    return found


def audit_plan(stage: str, layers: Sequence[Layer], asked: Mapping[str, str], *, strict: bool = True) -> dict[str, Any]:
    """Counts, and refuses a plan that is not what was asked for.

    Args:
        stage: for messages.
        layers: by `backends.tensorrt.layers`.
        asked: type of each product and custom node, as the graph has it (`quantize.fp16.product_types`).
        strict: every FP16 product must be FP16. Not so for TensorRT 8, which may choose FP32 where that is faster.

    Returns:
        ``layers``: number of layers by the type of what they read; ``products``: of the ONNX graph's products, how many
        were asked for in each type, how many were built so, how many cannot be told; ``other``: names of those that
        came out in another type, such as ``{"/conv": "fp16"}``.

    Raises:
        BackendError: if less than half of the INT8 products came out in INT8; or, where `strict`, a product asked for
            in FP16 or FP32 came out in another type.
    """
    built = product_types_built(layers, asked)
    other = {name: kind for name, kind in built.items() if kind != asked[name]}
    wanted, fitting = Counter(asked.values()), Counter(asked[n] for n in built if n not in other)
    told = Counter(asked[name] for name in built)
    read = Counter(layer["inputs"][0] if layer["inputs"] else "none" for layer in layers)
    result = {
        "layers": {kind: read[kind] for kind in (*TYPES, "none") if read[kind]},
        "products": {
            kind: {"asked": wanted[kind], "built": fitting[kind], "untold": wanted[kind] - told[kind]}
            for kind in TYPES
            if wanted[kind]
        },
        "other": other,
    }
    for kind in TYPES:
        strictly = strict and kind != "int8"
        missing = told[kind] - fitting[kind]
        if missing and (strictly or 2 * missing > told[kind]):
            names = [f"{n} in {t}" for n, t in other.items() if asked[n] == kind]
            raise BackendError(
                f"{stage}: precision",
                f"{missing} of {told[kind]} products not in {kind} ({', '.join(names[:5])})",
                f"{'all' if strictly else 'at least half'} in {kind}, as asked",
                "The builder chose otherwise: build another precision, or with another version of TensorRT.",
            )
    if wanted["int8"] and not told["int8"]:
        raise BackendError(
            f"{stage}: precision",
            "no layer that is known to be in INT8",
            f"{wanted['int8']} products",
            "Nothing tells that INT8 was built: keep the build log, and build FP16.",
        )
    return result
