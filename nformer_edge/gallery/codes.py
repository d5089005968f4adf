"""How many bytes an image takes in a gallery: codes of its features, from four bytes a number to one bit."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from nformer_edge.core.errors import DataError
from nformer_edge.core.features import Features
from nformer_edge.core.spec import GalleryCode, check_choice
from nformer_edge.metrics.distance import cosine_distances, row_blocks, unit_rows
from nformer_edge.metrics.ranking import evaluate

#: From the most exact to the smallest.
CODES: Final[tuple[GalleryCode, ...]] = typing.get_args(GalleryCode)

_DTYPES: Final[Mapping[str, type[np.generic]]] = {"fp32": np.float32, "fp16": np.float16, "int8": np.int8}

#: Images that a code of one bit a number leaves to be scored by their INT8 codes.
RESCORED = 1000

#: Images whose codes are widened to float32 at once, 4 MiB of 512 numbers.
_BLOCK = 2048

#: Scores of queries and images that are held at once.
_SCORES = 1 << 24

#: Images that directions are learned from.
_FITTED = 8192

#: Rounds of the rotation that brings the signs near to the numbers; it changes little after these.
_ROUNDS = 20


@dataclass(frozen=True)
class Code:
    """What stands for an image's features.

    Args:
        name: numbers of four, two or one byte, with a scale an image; ``pca128-int8``: of the features' first 128
            principal directions; ``binary-int8``: all directions, rotated, and a search that compares one bit of each
            first and re-scores the `RESCORED` nearest.
        directions: float32 [W, D], orthonormal; None: the features' own.
        center: float32 [W], where a number's bit changes; None: no bits.
    """

    name: GalleryCode = "fp32"
    directions: np.ndarray | None = None
    center: np.ndarray | None = None

    @staticmethod
    def fit(name: GalleryCode, features: np.ndarray) -> Code:
        """The code of this name, its directions learned from float32 [N, D].

        Raises:
            DataError: for fewer images than directions.
        """
        check_choice("code", name, CODES)
        if name in _DTYPES:
            return Code(name)
        size = features.shape[1]
        width = size if name == "binary-int8" else min(size, int(name[3:].partition("-")[0]))
        if len(features) < width:
            hint = "Choose int8, or add more images first."
            raise DataError("code", f"{len(features)} images for {name}", f"{width} or more", hint)
        chosen = np.random.default_rng(0).permutation(len(features))[:_FITTED]
        unit = unit_rows(features[chosen]).astype(np.float64)
        directions = np.linalg.svd(unit.T @ unit, hermitian=True)[0].T[:width]
        if name != "binary-int8":
            return Code(name, directions.astype(np.float32))
        directions = _toward_signs((unit - unit.mean(axis=0)) @ directions.T).T @ directions
        return Code(name, directions.astype(np.float32), (unit.mean(axis=0) @ directions.T).astype(np.float32))

    @property
    def dtype(self) -> type[np.generic]:
        """Of the numbers that are kept."""
        return _DTYPES[self.name.rpartition("-")[2]]

    def width(self, features: int) -> int:
        """W, the numbers an image, where the model gives D `features`."""
        return features if self.directions is None else len(self.directions)

    def project(self, features: np.ndarray) -> np.ndarray:
        """Features float32 [N, D] in the code's directions, [N, W]."""
        return features if self.directions is None else features @ self.directions.T

    def encode(self, features: np.ndarray) -> dict[str, np.ndarray]:
        """The columns ``codes`` [N, W] and ``scale`` float32 [N] of features [N, D]: codes * scale is the row."""
        rows = self.project(features)
        if self.dtype is np.float32:
            return {"codes": rows.astype(np.float32), "scale": np.ones(len(rows), np.float32)}
        largest = np.abs(rows).max(axis=1, keepdims=True, initial=0.0)
        scale = np.maximum(largest / (127 if self.dtype is np.int8 else 1), np.finfo(np.float32).tiny)
        codes = rows / scale
        codes = np.rint(codes).astype(np.int8) if self.dtype is np.int8 else codes.astype(np.float16)
        return {"codes": codes, "scale": scale[:, 0].astype(np.float32)}

    def complete(self, columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What a search needs besides and nothing stores: ``inverse`` float32 [N], 1 / norm of the codes; ``bits``."""
        codes = columns["codes"]
        wide = codes.astype(np.float64)
        inverse = 1.0 / np.maximum(np.linalg.norm(wide, axis=1), np.finfo(np.float32).tiny)
        found = {"inverse": inverse.astype(np.float32)}
        return found if self.center is None else found | {"bits": _bits(wide * inverse[:, None] > self.center)}

    def decode(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """Features float32 [N, D], as near as the code keeps them."""
        rows: np.ndarray = columns["codes"].astype(np.float32) * columns["scale"][:, None]
        return rows if self.directions is None else rows @ self.directions


@dataclass(frozen=True)
class CodeScore:
    """What a code is worth.

    Args:
        code: its name.
        bytes_per_image: of memory, labels excluded.
        mAP: mean average precision, 0 to 1.
        rank1: share of queries whose first match is right.
    """

    code: GalleryCode
    bytes_per_image: int
    mAP: float
    rank1: float


def measure_codes(query: Features, gallery: Features) -> tuple[CodeScore, ...]:
    """Each of `CODES` that there are images enough for, on these labels by Market-1501's protocol; FP32 first.

    Raises:
        DataError: if no query has a match.
    """
    scores = []
    for name in CODES:
        if name not in _DTYPES and len(gallery) < gallery.features.shape[1]:
            continue
        code = Code.fit(name, gallery.features)
        columns = code.encode(gallery.features)
        columns |= code.complete(columns)
        asked = query.with_features(code.project(unit_rows(query.features)))
        decoded = gallery.with_features(columns["codes"].astype(np.float32))
        distances = None
        if code.center is not None:
            rows, cosines = nearest_rows(code, columns, query.features, RESCORED)
            distances = np.full((len(query), len(gallery)), 2.0, np.float32)
            np.put_along_axis(distances, rows, 1.0 - cosines, axis=1)
        found = evaluate(asked, decoded, distances=distances)
        size = sum(int(np.prod(c.shape[1:], dtype=int)) * c.itemsize for c in columns.values())
        scores.append(CodeScore(name, size, found.mAP, found.rank(1)))
    return tuple(scores)


def _toward_signs(rows: np.ndarray) -> np.ndarray:
    """The rotation [W, W] after which the signs of [N, W] are nearest to the rows (Gong and Lazebnik, ITQ, 2011)."""
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((rows.shape[1], rows.shape[1])))[0]
    for _ in range(_ROUNDS):
        left, _, right = np.linalg.svd(np.sign(rows @ rotation).T @ rows)
        rotation = (left @ right).T
    return rotation


def _bits(signs: np.ndarray) -> np.ndarray:
    """bool [N, W] as uint64 [N, ceil(W / 64)]."""
    packed = np.packbits(signs, axis=1)
    short = -packed.shape[1] % 8
    return np.pad(packed, ((0, 0), (0, short))).view(np.uint64)


def nearest_rows(
    code: Code,
    columns: Mapping[str, np.ndarray],
    query: np.ndarray,
    top: int,
    allowed: np.ndarray | None = None,
    names: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Of each query the `top` nearest images by cosine, best first; ties by name where there are names, then by row.

    Scores in float32 leave a few images a query, whose cosines are then summed in float64: the order is that of exact
    scores, whatever BLAS computes.

    Args:
        columns: ``codes`` [N, W], ``inverse`` [N] and, for a code with bits, ``bits``.
        query: features [Q, D].
        allowed: bool [N], the images that are ranked; all if None.
        names: [N] strings.

    Returns:
        int64 [Q, k] and float32 [Q, k] cosines, k = min(top, images allowed).

    Raises:
        DataError: for a query that is not finite or is all zeros.
    """
    among = None if allowed is None or allowed.all() else np.flatnonzero(allowed)
    total = len(columns["codes"]) if among is None else len(among)
    found = min(top, total)
    indices, scores = np.empty((len(query), found), np.int64), np.empty((len(query), found), np.float32)
    # a float32 sum of W products is within W * 2^-24 of the exact cosine; two such, and the rounding of a distance
    slack, count = 2 * columns["codes"].shape[1] * 2.0**-24 + 2.0**-22, found
    if code.center is not None:
        slack, count = 0.0, min(total, max(found, RESCORED))
    asked = unit_rows(code.project(unit_rows(query, "query features")), "query features")
    for block in row_blocks(len(query), max(1, min(256, _SCORES // max(total, 1)))) if found else ():
        rough = _rough_scores(code, columns, asked[block], allowed if among is not None else None)
        for i, row in enumerate(rough, block.start):
            near = _candidates(row, count, slack)
            unit = unit_rows(columns["codes"][near].astype(np.float32), "gallery features")
            distances = cosine_distances(asked[i : i + 1], unit)[0]
            order = _order(distances, near, found, names)
            indices[i], scores[i] = near[order], 1.0 - distances[order]
    return indices, scores


def best_scored(
    scores: np.ndarray, top: int, allowed: np.ndarray | None, names: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Of each row of float32 [Q, N] the `top` highest, best first; ties by name, then by row.

    Returns:
        int64 [Q, k] and float32 [Q, k], k = min(top, images allowed).
    """
    rows = np.arange(scores.shape[1]) if allowed is None else np.flatnonzero(allowed)
    found = min(top, len(rows))
    best = [rows[_order(-row[rows], rows, found, names)] for row in scores if found]
    indices = np.array(best, np.int64).reshape(len(scores), found)
    return indices, np.take_along_axis(scores, indices, axis=1)


def _rough_scores(
    code: Code, columns: Mapping[str, np.ndarray], unit: np.ndarray, allowed: np.ndarray | None
) -> np.ndarray:
    """float32 [Q, N] scores of unit rows, cosines or minus the bits that differ; -inf where not allowed."""
    if code.center is not None:
        bits = _bits(unit > code.center)
        scores = np.stack([-_differing(columns["bits"], row) for row in bits])
    elif code.dtype is np.float32:
        scores = unit @ columns["codes"].T
    else:
        scores = np.empty((len(unit), len(columns["codes"])), np.float32)
        for rows in row_blocks(scores.shape[1], _BLOCK):
            np.matmul(unit, columns["codes"][rows].astype(np.float32).T, out=scores[:, rows])
    if code.center is None:
        scores *= columns["inverse"]
    if allowed is not None:
        scores[:, ~allowed] = -np.inf
    return scores


def _differing(bits: np.ndarray, row: np.ndarray) -> np.ndarray:
    """float32 [N], the bits of each row of uint64 [N, L] that differ from one row."""
    differ = bits ^ row
    numpy_1 = not hasattr(np, "bitwise_count")
    counts = np.unpackbits(differ.view(np.uint8), axis=1) if numpy_1 else np.bitwise_count(differ)
    return counts.sum(axis=1, dtype=np.uint16).astype(np.float32)


def _candidates(scores: np.ndarray, count: int, slack: float) -> np.ndarray:
    """Rows, ascending, whose scores are among the `count` highest or less than `slack` below."""
    last = np.partition(scores, len(scores) - count)[len(scores) - count]
    return np.flatnonzero(scores >= last - slack)


def _order(distances: np.ndarray, rows: np.ndarray, found: int, names: np.ndarray | None) -> np.ndarray:
    """The `found` smallest distances, ascending; ties by name where there are names, then by row, ascending."""
    if names is None:
        return np.argsort(distances, kind="stable")[:found]
    near = np.flatnonzero(distances <= np.partition(distances, found - 1)[found - 1])
    ordered = sorted(near.tolist(), key=lambda i: (distances[i], names[rows[i]], i))
    return np.array(ordered[:found], np.int64)
