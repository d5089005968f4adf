"""Drawing in whole numbers: the same pixels on every machine, whatever the versions of numpy and Pillow.

Nothing here is a float, calls libm or draws from a library's generator, so there is no last bit to differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from math import isqrt
from typing import TypeVar

import numpy as np

Color = tuple[int, int, int]
T = TypeVar("T")

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15

#: sin(2 pi i / 16) * 256
SINE = (0, 98, 181, 237, 256, 237, 181, 98, 0, -98, -181, -237, -256, -237, -181, -98)


class Draw:
    """A stream of random whole numbers that belongs to `key` alone: SplitMix64 started at the key's sha256.

    Two streams never share state, so images can be drawn in any order or left out.
    """

    def __init__(self, *key: int | str) -> None:
        text = "/".join(str(part) for part in key)
        self._state = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")

    def _next(self) -> int:
        self._state = (self._state + _GOLDEN) & _MASK64
        z = self._state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
        return z ^ (z >> 31)

    def between(self, low: int, high: int) -> int:
        """A whole number in low..high, both ends included."""
        return low + ((self._next() * (high - low + 1)) >> 64)

    def chance(self, percent: int) -> bool:
        return self.between(0, 99) < percent

    def pick(self, choices: Sequence[T]) -> T:
        return choices[self.between(0, len(choices) - 1)]

    def shuffle(self, items: Sequence[T]) -> list[T]:
        """A copy of `items` in random order (Fisher-Yates)."""
        out = list(items)
        for i in range(len(out) - 1):
            j = self.between(i, len(out) - 1)
            out[i], out[j] = out[j], out[i]
        return out

    def noise(self, shape: tuple[int, ...], amplitude: int) -> np.ndarray:
        """int32 `shape`, each in -amplitude..amplitude, most often near 0 (the mean of two uniform draws)."""
        count = int(np.prod(shape))
        with np.errstate(over="ignore"):
            z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(self._next())
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        span = 2 * amplitude + 1
        first = ((z >> np.uint64(48)) * np.uint64(span)) >> np.uint64(16)
        second = (((z >> np.uint64(16)) & np.uint64(0xFFFF)) * np.uint64(span)) >> np.uint64(16)
        return ((first + second).astype(np.int32) // 2 - amplitude).reshape(shape)


class Canvas:
    """An RGB picture, uint8 [height, width, 3], that shapes are painted on. Coordinates are pixels, x right, y down."""

    def __init__(self, height: int, width: int) -> None:
        self.pixels = np.zeros((height, width, 3), dtype=np.uint8)

    def _window(self, x0: int, y0: int, x1: int, y1: int) -> tuple[np.ndarray, np.ndarray, tuple[slice, slice]] | None:
        height, width = self.pixels.shape[:2]
        x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1 + 1, width), min(y1 + 1, height)
        if x0 >= x1 or y0 >= y1:
            return None
        xs = np.arange(x0, x1, dtype=np.int32)[None, :]
        ys = np.arange(y0, y1, dtype=np.int32)[:, None]
        return xs, ys, (slice(y0, y1), slice(x0, x1))

    def polygon(self, points: Sequence[tuple[int, int]], color: Color, stripes: Stripes | None = None) -> None:
        """Fills a convex polygon. `stripes`, if any, paint over the part of it that they cover."""
        window = self._window(
            min(x for x, _ in points), min(y for _, y in points), max(x for x, _ in points), max(y for _, y in points)
        )
        if window is None:
            return
        xs, ys, area = window
        sides = [
            (bx - ax) * (ys - ay) - (by - ay) * (xs - ax)
            for (ax, ay), (bx, by) in zip(points, [*points[1:], points[0]], strict=True)
        ]
        mask = np.logical_and.reduce([s >= 0 for s in sides]) | np.logical_and.reduce([s <= 0 for s in sides])
        part = self.pixels[area]
        part[mask] = color
        if stripes is not None:
            part[mask & stripes.covers(xs, ys)] = stripes.color

    def box(self, x0: int, y0: int, x1: int, y1: int, color: Color, stripes: Stripes | None = None) -> None:
        """Fills an upright rectangle, both corners included, given in any order."""
        window = self._window(min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))
        if window is None:
            return
        xs, ys, area = window
        part = self.pixels[area]
        part[:] = color
        if stripes is not None:
            part[stripes.covers(xs, ys)] = stripes.color

    def ellipse(self, x: int, y: int, rx: int, ry: int, color: Color, below: int | None = None) -> None:
        """Fills an ellipse, or only its part above the line y = `below`."""
        if rx < 1 or ry < 1:
            return
        window = self._window(x - rx, y - ry, x + rx, y + ry if below is None else min(below, y + ry))
        if window is not None:
            xs, ys, area = window
            mask = (xs - x) ** 2 * (ry * ry) + (ys - y) ** 2 * (rx * rx) <= rx * rx * ry * ry
            self.pixels[area][mask] = color

    def limb(self, a: tuple[int, int], b: tuple[int, int], wide: int, narrow: int, color: Color) -> None:
        """A rounded bar from `a`, `wide` thick, to `b`, `narrow` thick."""
        dx, dy = b[0] - a[0], b[1] - a[1]
        length = max(isqrt(dx * dx + dy * dy), 1)
        ends = []
        for (x, y), thick in ((a, wide), (b, narrow)):
            r = thick // 2
            nx, ny = -dy * r // length, dx * r // length
            ends.append(((x + nx, y + ny), (x - nx, y - ny)))
            self.ellipse(x, y, r, r, color)
        self.polygon([ends[0][0], ends[1][0], ends[1][1], ends[0][1]], color)


class Stripes:
    """Which pixels of a garment take its second color. Offsets and periods are pixels."""

    def __init__(self, kind: str, color: Color, x: int, y: int, period: int) -> None:
        self.kind, self.color, self.x, self.y, self.period = kind, color, x, y, max(period, 2)

    def covers(self, xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
        """A boolean mask that broadcasts xs [1, W] and ys [H, 1]."""
        across = (xs - self.x) % self.period < self.period // 2
        down = (ys - self.y) % self.period < self.period // 2
        if self.kind == "rows":
            return np.broadcast_to(down, (len(ys), xs.shape[1]))
        if self.kind == "columns":
            return np.broadcast_to(across, (len(ys), xs.shape[1]))
        if self.kind == "checks":
            return across ^ down
        if self.kind == "lower half":
            return np.broadcast_to(ys >= self.y, (len(ys), xs.shape[1]))
        if self.kind == "badge":
            return (abs(xs - self.x) <= self.period // 2) & (abs(ys - self.y) <= self.period // 2)
        if self.kind == "open":
            return np.broadcast_to(abs(xs - self.x) <= self.period // 2, (len(ys), xs.shape[1]))
        raise AssertionError(self.kind)


def halve(pixels: np.ndarray) -> np.ndarray:
    """uint8 [2H, 2W, 3] to int32 [H, W, 3], the rounded mean of each 2 x 2."""
    p = pixels.astype(np.int32)
    return (p[::2, ::2] + p[1::2, ::2] + p[::2, 1::2] + p[1::2, 1::2] + 2) >> 2


def blur(pixels: np.ndarray, times: int) -> np.ndarray:
    """int32 [H, W, 3], smoothed `times` times by (1, 2, 1) / 4 along both axes; edges repeat."""
    for _ in range(times):
        for axis in (0, 1):
            pad = [(1, 1) if a == axis else (0, 0) for a in range(3)]
            p = np.pad(pixels, pad, mode="edge")
            a, b, c = (
                p[tuple(slice(i, i + pixels.shape[axis]) if x == axis else slice(None) for x in range(3))]
                for i in range(3)
            )
            pixels = (a + 2 * b + c + 2) >> 2
    return pixels
