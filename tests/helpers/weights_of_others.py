"""Weights in the layouts of other projects: drawn values under the names and shapes that each project's code lists."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

LAYOUTS = Path(__file__).parents[1] / "unit" / "model" / "layouts"


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of ``layouts/NAME.txt``; a `-` is a scalar."""
    lines = (line.split(" ") for line in (LAYOUTS / f"{name}.txt").read_text().splitlines())
    return {tensor: () if shape == "-" else tuple(int(n) for n in shape.split("x")) for tensor, shape in lines}


def drawn(layout: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Values that follow from each tensor's name alone, sized so that signals neither die nor grow through the layers.

    NumPy's PCG64, seeded by the first 8 bytes of the name's sha256, gives uniform numbers u in [0, 1). Filters have
    mean 0: what is the same in all images would drown what tells them apart.
    """
    state = {}
    for name, shape in layout.items():
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
        u = np.random.default_rng(seed).random(shape, dtype=np.float64)
        inputs = prod(shape[1:])
        if name.endswith("pool_layer.p"):
            value = 2.5 + u
        elif name.endswith("running_var"):
            value = 0.5 + u
        elif len(shape) == 1:
            value = 0.35 + 0.7 * u if name.endswith("weight") else 0.1 * u - 0.05
        else:
            value = (2 * u - 1) * (6 / inputs) ** 0.5  # variance 2 / inputs
            if inputs > 1:
                value = value - value.mean(axis=tuple(range(1, value.ndim)), keepdims=True)
        state[name] = torch.from_numpy(np.asarray(value, np.float32)) if shape else torch.tensor(0)
    return state


def images() -> Tensor:
    """Three drawn images of coarse patches under noise, float32 [3, 3, 96, 48]."""
    rng = np.random.default_rng(0)
    patches = rng.standard_normal((3, 3, 6, 3)).repeat(16, axis=2).repeat(16, axis=3)
    return torch.from_numpy((patches + 0.3 * rng.standard_normal((3, 3, 96, 48))).astype(np.float32))
