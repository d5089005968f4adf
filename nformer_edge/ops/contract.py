"""The two custom operators as data, what they refuse, the rule that draws landmarks, and the sets that a head sees.

`docs/operators.md` is the contract; every backend reads names, domain and attributes from here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Protocol

import numpy as np

from nformer_edge.core.errors import UsageError
from nformer_edge.core.features import Features
from nformer_edge.core.spec import GATED_IMAGES, HeadSpec, check_at_least

DOMAIN = "nformer"
OPSET_VERSION = 1

#: Of files in which an attention has the input `t`.
GATED_OPSET_VERSION = 2

#: Opsets of the standard domain that a bundle may use; `ops.bodies` says why these.
OPSETS = (18, 19, 20)

ROW_TOP_K = "RowTopK"
RECIPROCAL_NEIGHBOR_ATTENTION = "ReciprocalNeighborAttention"

#: What stands in a neighbor list where there are fewer than k columns.
NO_NEIGHBOR = -1

#: The only rule there is so far; a bundle's manifest names it so that another can be told apart.
LANDMARK_RULE = "splitmix64-fisher-yates-v1"

_MASK64 = (1 << 64) - 1


def _splitmix64(state: int) -> tuple[int, int]:
    """One step of SplitMix64 (Steele, Lea, Flood 2014). Returns (next state, output), both 64-bit."""
    state = (state + 0x9E3779B97F4A7C15) & _MASK64
    z = state
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return state, z ^ (z >> 31)


def draw_landmarks(num_images: int, layers: int, count: int, seed: int) -> np.ndarray:
    """Draws the landmark images of every layer by a rule that any language can repeat.

    Layer t starts SplitMix64 at ``seed + t * 2**32 + num_images`` (mod 2**64) and runs the first `count` steps of a
    Fisher-Yates shuffle over 0..N-1; step i swaps place i with place ``i + (output * (N - i) >> 64)``. Where
    `count` exceeds N the drawn order repeats, so every image serves before any serves twice.

    Args:
        num_images: N, images seen together, >= 1.
        layers: number of NFormer layers.
        count: l, landmarks per layer, >= 1.
        seed: non-negative; stands in the bundle's manifest.

    Returns:
        int32 [layers, count], indices into the N images.

    Raises:
        UsageError: if a number is out of range.
    """
    for name, value, least in (("num_images", num_images, 1), ("layers", layers, 1), ("count", count, 1)):
        if value < least:
            raise UsageError(name, value, f"at least {least}", "Give more images or a larger number.")
    if seed < 0:
        raise UsageError("seed", seed, "a non-negative integer", "Choose a seed of 0 or more.")
    landmarks = np.empty((layers, count), dtype=np.int32)
    for layer in range(layers):
        state = (seed + (layer << 32) + num_images) & _MASK64
        places: dict[int, int] = {}  # only the places that a swap has touched: O(count), not O(N)
        order = []
        for i in range(min(count, num_images)):
            state, output = _splitmix64(state)
            j = i + ((output * (num_images - i)) >> 64)
            order.append(places.get(j, j))
            places[j] = places.get(i, i)
        landmarks[layer] = [order[i % len(order)] for i in range(count)]
    return landmarks


def relate_jointly(
    relate: Callable[[np.ndarray, np.ndarray], np.ndarray],
    head: HeadSpec,
    query: Features,
    gallery: Features,
    seed: int,
) -> tuple[Features, Features]:
    """Query and gallery through a head in one set, as the published code evaluates: every image sees every other.

    Args:
        relate: the head: features [N, D] and landmarks int32 [layers, l] in, embeddings [N, D] out.
        seed: of the landmarks.
    """
    rows = np.concatenate([query.features, gallery.features])
    if not len(rows):
        return query, gallery
    related = relate(rows, draw_landmarks(len(rows), head.layers, head.landmarks, seed))
    return query.with_features(related[: len(query)]), gallery.with_features(related[len(query) :])


def check_images(images: float) -> None:
    """Raises UsageError unless a person can have so many images."""
    check_at_least("images_per_person", images, 1)
    if images > 1e9:
        raise UsageError("images_per_person", f"{images!r:.40}", "at most 1e9", "Lower images_per_person.")


def gate_shares(images: float) -> np.ndarray:
    """What gates for so many images a person take of those for each of `core.spec.GATED_IMAGES`: linear in log n; what
    is below or above takes the first or the last.

    Raises:
        UsageError: for less than one image, or more than a gallery can hold.
    """
    check_images(images)
    stops = np.log2(GATED_IMAGES)
    return np.array([np.interp(np.log2(images), stops, one) for one in np.eye(len(stops))])


def gates_for(numbers: Mapping[str, np.ndarray], images: float) -> dict[str, np.ndarray]:
    """The gates of a head for a gallery with so many images a person.

    Args:
        numbers: the head's weights, by their names in the checkpoint; those under ``told`` are read.

    Returns:
        The numbers to compute with, by name; none for a head of another rule.

    Raises:
        UsageError: for less than one image.
    """
    shares = gate_shares(images)
    stacks = {name.removeprefix("told."): stack for name, stack in numbers.items() if name.startswith("told.")}
    return {name: np.tensordot(shares, stack, 1).astype(np.float32) for name, stack in stacks.items()}


class Array(Protocol):
    """What the checks read of a numpy array or a tensor."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> object: ...


def check_factors(a: Array, b: Array, types: Collection[object], named: str) -> None:
    """Raises UsageError unless `a` is [H, N, R], `b` [H, M, R], and both of one of the `types`, in words `named`."""
    if a.dtype not in types:
        raise UsageError("a", a.dtype, named, "Convert it first.")
    if len(a.shape) != 3 or len(b.shape) != 3:
        got = f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
        raise UsageError("a, b", got, "[H, N, R] and [H, M, R]", "Add the head axis: a[None].")
    if a.shape[0] != b.shape[0] or a.shape[2] != b.shape[2] or a.dtype != b.dtype:
        got, expected = f"shape {tuple(b.shape)} {b.dtype}", f"[{a.shape[0]}, M, {a.shape[2]}] {a.dtype}"
        raise UsageError("b", got, expected, "Give both factors the same heads, length and type.")


def check_values(a: Array, b: Array, v: Array) -> None:
    """Raises UsageError unless factors [H, N, R] and values [H, N, D] are of one set of images and one type."""
    heads, rows, _ = a.shape
    if b.shape[1] != rows:
        raise UsageError("b", f"{b.shape[1]} rows", f"{rows}, as a", "Pass factors of the same set.")
    if len(v.shape) != 3 or tuple(v.shape[:2]) != (heads, rows) or v.dtype != a.dtype:
        got, hint = f"shape {tuple(v.shape)} {v.dtype}", "Give values for the same heads and images, of the same type."
        raise UsageError("v", got, f"[{heads}, {rows}, D] {a.dtype}", hint)


def check_neighbors(neighbors: Array, a: Array, int32: object) -> None:
    """Raises UsageError unless `neighbors` is [H or 1, N, K] of the type `int32`, for factors `a` [H, N, R]."""
    heads, rows, _ = a.shape
    shape = tuple(neighbors.shape)
    if len(shape) != 3 or shape[0] not in (1, heads) or shape[1] != rows or neighbors.dtype != int32:
        got, expected = f"shape {shape} {neighbors.dtype}", f"[{heads} or 1, {rows}, K] int32"
        raise UsageError("neighbors", got, expected, "Pass what row_top_k gave.")


def check_gate(t: Array | None, cameras: Array | None, a: Array, wide: object, int32: object) -> None:
    """Raises UsageError unless `t`, if given, is [H or 1, N] of the type `wide`, for factors `a` [H, N, R].

    `cameras` are [N] of the type `int32`, and only given with `t`.
    """
    heads, rows, _ = a.shape
    if t is None:
        if cameras is not None:
            raise UsageError("cameras", "no t", "t as well", "Only the gated attention reads cameras. Pass t.")
        return
    if tuple(t.shape) not in ((heads, rows), (1, rows)) or t.dtype != wide:
        got, expected = f"shape {tuple(t.shape)} {t.dtype}", f"[{heads} or 1, {rows}] {wide}"
        raise UsageError("t", got, expected, "Give one threshold an image, for each head or for all.")
    if cameras is not None and (tuple(cameras.shape) != (rows,) or cameras.dtype != int32):
        got, expected = f"shape {tuple(cameras.shape)} {cameras.dtype}", f"[{rows}] int32"
        raise UsageError("cameras", got, expected, "Give one camera number an image, -1 where it is unknown.")
