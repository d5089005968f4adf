"""The gated head (`model.gated`) over a gallery that changes, without torch. Letters as in `gallery.live`."""

from __future__ import annotations

import math
from functools import cached_property, partial

import numpy as np

from nformer_edge.core.spec import GATED_MISSING, GATED_RANKS
from nformer_edge.gallery.live import BLOCK, STILL, LiveHead, scaled, unit
from nformer_edge.metrics.distance import row_blocks
from nformer_edge.ops import native
from nformer_edge.ops.contract import NO_NEIGHBOR

#: Places of a list whose scores a profile takes: its head stands in where a small set has no more.
_PLACES = np.array((0, *GATED_RANKS))

#: The same in a query's list that does not name the query.
_PLACES_BUT_ITSELF = np.maximum(_PLACES - 1, 0)


class GatedLive(LiveHead):
    """See `LiveHead`. A query that is not exact costs two products with all rows, and a few hundred rows."""

    def _shapes(self) -> dict[str, tuple[tuple[int, ...], type]]:
        row, ranks = (self.spec.features,), len(GATED_RANKS)
        shapes: dict[str, tuple[tuple[int, ...], type]] = {"length": ((), np.float32)}
        for layer in range(self.spec.layers):
            shapes |= {f"profile{layer}": ((ranks,), np.float32), f"t{layer}": ((), np.float32)}
            shapes |= {f"x{layer}": (row, np.float32)} if layer else {}
            shapes[f"exponents{layer}"] = (self.spec.k + 1,), np.float32  # of the weights of neighbors
        shapes["seen"] = (len(self._seen),), np.int32  # what layers read of a list, side by side
        return {**super()._shapes(), **shapes}

    @cached_property
    def _seen(self) -> np.ndarray:
        """Places of a list that layers read: neighbors, and those of a profile."""
        return np.union1d(np.arange(self.spec.k + 1), _PLACES)

    @cached_property
    def _placed(self) -> np.ndarray:
        """Where among them those of a profile are."""
        return np.searchsorted(self._seen, _PLACES)

    def _entered(self, features: np.ndarray) -> np.ndarray:
        x, power = scaled(features, self.spec), self.numbers["map.power"]
        x = x if power == 1 else np.sign(x) * np.abs(x) ** power
        # One row without BLAS, whose threads would spin on cores that the kernels need.
        times = partial(np.einsum, "bd,de->be") if len(x) == 1 else np.matmul
        return times(x, self.numbers["map.linear.w"]) + self.numbers["map.linear.b"]

    def compared(
        self,
        features: np.ndarray,  # [N, D]
        landmarks: np.ndarray,  # int32 [layers, l]
    ) -> np.ndarray:  # [N, D]
        """What the head compares in a set: unit rows, mapped, less their center."""
        entered = self._entered(features)
        return unit(entered - entered[landmarks[0]].mean(axis=0))

    def _held(self) -> np.ndarray:
        return self._rows["unit"][:-1] * self._rows["length"][:-1, None] + self._landmarks.get("center", 0)

    def _prepared(self, entered: np.ndarray) -> dict[str, np.ndarray]:
        centered = entered - self._landmarks["center"]
        return {"unit": unit(centered), "length": np.linalg.norm(centered, axis=1)}

    def _draw(self, entered: np.ndarray, drawn: np.ndarray) -> None:
        self._landmarks["center"] = entered[drawn[0]].mean(axis=0)

    def _gave(self, drawn: np.ndarray) -> np.ndarray | slice:
        return drawn[0]

    @property
    def _given(self) -> tuple[str, ...]:
        return ("center",)

    def _unlist(self, place: np.ndarray, head: str = "") -> None:
        super()._unlist(place)
        seen = self._rows["seen"]
        seen[:] = np.where(seen >= 0, place[seen], np.int32(NO_NEIGHBOR))

    def _spread(self, size: int, moved: np.ndarray) -> None:
        seen, near = self._rows["seen"][:size], np.arange(self.spec.k + 1)
        rows = np.flatnonzero(moved)
        self._put("seen", rows, self._rows["names"][rows[:, None], self._seen], size)
        self._put("profile0", rows, _profile(self._rows["scores"][rows[:, None], _PLACES]), size)
        x, differs, profiles = self._rows["unit"][:size], np.zeros(size, bool), moved
        for layer in range(self.spec.layers):
            if layer:
                x, profiles = self._read(f"x{layer}", slice(size)), moved | differs
                profiles |= native.reached(differs, seen, self._placed)
                rows = np.flatnonzero(profiles)
                self._put(f"profile{layer}", rows, self._reprofiled(layer, x, rows, moved, differs), size)
            rows = np.flatnonzero(profiles)
            t = self._thresholds(layer, self._rows[f"profile{layer}"][rows])
            before = self._rows[f"t{layer}"][:size].copy()
            risen = self._put(f"t{layer}", rows, t, size, STILL)
            either = differs + 2 * risen.astype(np.uint8)
            reached = either | native.reached(either, seen, near)
            surely = moved | (reached & 1 > 0)
            rows = np.flatnonzero(~surely & (reached > 0))
            surely[rows[self._reweighed(layer, x, rows, before)]] = True
            rows, differs = np.flatnonzero(surely), np.zeros(size, bool)
            for part in row_blocks(len(rows), 4 * BLOCK):
                differs |= self._pass(layer, x, rows[part])

    def _reprofiled(
        self, layer: int, x: np.ndarray, rows: np.ndarray, moved: np.ndarray, differs: np.ndarray
    ) -> np.ndarray:  # [P, RANKS]
        """Profiles of `rows` [P], whose lists `moved` or which `differ` in x [n, D], or whose neighbors do."""
        wanted = self._rows["seen"][rows[:, None], self._placed]
        there = wanted.min(initial=0) >= 0  # a set large enough: a score that no change touches stays as it is
        if there:
            wanted[~((moved | differs)[rows, None] | differs[wanted])] = NO_NEIGHBOR
        scores = native.pair_scores(x[None], x[None], wanted[None], rows=rows)[0].astype(np.float32)
        if there:
            return np.where(wanted[:, 1:] >= 0, scores[:, 1:], self._rows[f"profile{layer}"][rows])
        return _profile(scores)

    def _reweighed(self, layer: int, x: np.ndarray, rows: np.ndarray, before: np.ndarray) -> np.ndarray:  # bool [P]
        """Which of `rows` [P], whose neighbors stay, weigh them otherwise than with the thresholds [n] before."""
        slope, kept = self._slope(layer), self._rows[f"exponents{layer}"]
        near = self._rows["seen"][:, : self.spec.k + 1]
        stale = rows[np.isnan(kept[rows, 0])]
        over = native.pair_scores(x[None], x[None], near[None, stale], rows=stale)[0]
        over -= (before[stale, None] + before[near[stale]]) / 2
        over[near[stale] == stale[:, None]] = -np.inf
        kept[stale] = slope * over
        rise, exponents = self._rows[f"t{layer}"][: len(x)] - before, kept[rows]
        new = exponents - np.float32(slope / 2) * (rise[rows, None] + rise[near[rows]])
        if self._undo is None:
            kept[rows] = new
        changes = np.abs(_sigmoid(new) - _sigmoid(exponents)).sum(axis=1)
        moved: np.ndarray = changes * np.exp(self.numbers[f"h.{layer}.log_strength"]) > STILL
        return moved

    def _pass(self, layer: int, x: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """One layer of `rows` [P] from all of x [n, D]. Returns which of the n moved."""
        if self._undo is None:  # a query that is taken back leaves none behind, and reads none of these
            self._rows[f"exponents{layer}"][rows] = np.nan  # computed when they are asked for
        size, last = len(x), layer + 1 == self.spec.layers
        seen, t, slope = self._rows["seen"][:size], self._rows[f"t{layer}"][:size], self._slope(layer)
        strength = float(np.exp(self.numbers[f"h.{layer}.log_strength"]))
        own, share = (self._rows["unit"][:size], float(self.numbers["own"])) if last else (None, 0.0)
        new = native.gated_layer(x, seen, t, rows, self.spec.k + 1, slope, strength, own, share)
        return self._leave(rows, new, size) if last else self._put(f"x{layer + 1}", rows, new, size, STILL)

    def _quick(self, asked: dict[str, np.ndarray]) -> np.ndarray:
        size, x = len(self), asked["unit"]
        products = x @ self._rows["unit"][:size].T
        lists = np.full((len(x), GATED_RANKS[-1]), -1, np.int32)
        scores = np.full(lists.shape, -np.inf, np.float32)
        for i, query in enumerate(x):
            names, found = self._nearest(query, products[i], lists.shape[1], self._rows["unit"][:size])
            lists[i, : len(names)], scores[i, : len(names)] = names, found
        near = lists[:, : self.spec.k]
        counts, places = near >= 0, np.ascontiguousarray(lists[:, _PLACES_BUT_ITSELF])
        profile = _profile(scores[:, _PLACES_BUT_ITSELF])
        query, place = np.nonzero(counts & (scores[:, : self.spec.k] > self._rows["scores"][near, self.spec.k]))
        image = near[query, place]  # gallery rows that hold the query for a neighbor, as it holds them
        rows = self._rows["unit"][near]  # [B, k, D], as each query changes them
        for layer in range(self.spec.layers):
            if layer:
                theirs = np.einsum("bd,bpd->bp", x, self._read(f"x{layer}", places))
                profile = _profile(np.where(places >= 0, theirs, -np.float32(np.inf)))
            t = self._thresholds(layer, profile)
            weights = self._weights(layer, x, rows, t, near, counts)
            y = np.einsum("bk,bkd->bd", weights, rows)
            pulled = self._sums(layer, image) + weights[query, place, None] * x[query]
            joined = self._joined(layer, rows[query, place], pulled)
            if layer + 1 < self.spec.layers:
                rows = self._read(f"x{layer + 1}", near)
                rows[query, place] = joined
            x = self._joined(layer, x, y)
        x = self._output(x, asked["unit"])
        found = self._scored(x, size)
        moved = self._output(joined, self._rows["unit"][image])
        found[query, image] = np.einsum("pd,pd->p", moved, x[query])
        return found

    def _weights(
        self, layer: int, x: np.ndarray, rows: np.ndarray, t: np.ndarray, near: np.ndarray, counts: np.ndarray
    ) -> np.ndarray:  # [P, K], of `rows` [P, K, D], which are `near` [P, K], for x [P, D] with thresholds t [P]
        over = np.einsum("pd,pkd->pk", x, rows) - (t[:, None] + self._rows[f"t{layer}"][near]) / 2
        return (_sigmoid(self._slope(layer) * over) * counts).astype(np.float32)

    def _sums(self, layer: int, rows: np.ndarray) -> np.ndarray:  # [P] -> [P, D]
        """What the neighbors of few rows give them."""
        x = f"x{layer}" if layer else "unit"
        near = self._rows["names"][rows, : self.spec.k + 1]
        theirs, counts = self._read(x, near), (near >= 0) & (near != rows[:, None])
        weights = self._weights(layer, self._read(x, rows), theirs, self._rows[f"t{layer}"][rows], near, counts)
        return np.einsum("pk,pkd->pd", weights, theirs)

    # The head's numbers.

    def _thresholds(self, layer: int, scores: np.ndarray) -> np.ndarray:  # [P, RANKS] -> [P]
        t = np.einsum("pr,r->p", scores, self.numbers[f"h.{layer}.profile"]) + self.numbers[f"h.{layer}.offset"]
        return t.astype(np.float32)

    def _slope(self, layer: int) -> float:
        return math.exp(self.numbers[f"h.{layer}.log_slope"])

    def _joined(self, layer: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return unit(x + np.exp(self.numbers[f"h.{layer}.log_strength"]) * y)

    def _output(self, x: np.ndarray, own: np.ndarray) -> np.ndarray:
        return unit(x + self.numbers["own"] * own)


def _profile(scores: np.ndarray) -> np.ndarray:  # [P, 1 + RANKS] -> [P, RANKS]
    """Scores at `_PLACES` to a profile: a place that is not there repeats the one before, less `GATED_MISSING`."""
    there = scores[:, 1:] > -np.inf
    if there.all():
        return scores[:, 1:].astype(np.float32)
    last = np.take_along_axis(scores, there.sum(axis=1)[:, None], axis=1)
    drop = GATED_MISSING * np.cumsum(~there, axis=1)
    return np.where(there, scores[:, 1:], last - drop).astype(np.float32)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.tanh(0.5 * x)
