"""The gated head (`model.gated`) over a gallery that changes, without torch. Letters as in `gallery.live`."""

from __future__ import annotations

import math

import numpy as np

from nformer_edge.core.spec import GATED_MISSING, GATED_RANKS
from nformer_edge.gallery.live import BLOCK, STILL, LiveHead, scaled, unit
from nformer_edge.metrics.distance import row_blocks
from nformer_edge.ops import native

_TOP, _NEAR, _FAR = (GATED_RANKS.index(rank) for rank in (16, 32, 128))
_FALL = (np.log(32) - np.log(np.array(GATED_RANKS))) / np.log(128 / 32)

#: Places of a list whose scores a profile takes: its head stands in where a small set has no more.
_PLACES = np.array((0, *GATED_RANKS))

#: The same in a query's list that does not name the query.
_PLACES_BUT_ITSELF = np.maximum(_PLACES - 1, 0)


class GatedLive(LiveHead):
    """See `LiveHead`. A query that is not exact costs two products with all rows, and a few hundred rows."""

    def _shapes(self) -> dict[str, tuple[tuple[int, ...], type]]:
        row, ranks = (self.spec.features,), len(GATED_RANKS)
        shapes: dict[str, tuple[tuple[int, ...], type]] = {"moments": ((2 * ranks + 1,), np.float32)}
        for layer in range(self.spec.layers):
            shapes |= {f"profile{layer}": ((ranks,), np.float32), f"t{layer}": ((), np.float32)}
            shapes |= {f"x{layer}": (row, np.float32)} if layer else {}
        return {**super()._shapes(), **shapes, "length": ((), np.float32), "crowd": ((), np.float32)}

    def _entered(self, features: np.ndarray) -> np.ndarray:
        x, power = scaled(features, self.spec), self.numbers["map.power"]
        x = x if power == 1 else np.sign(x) * np.abs(x) ** power
        return x @ self.numbers["map.linear.w"] + self.numbers["map.linear.b"]

    def _held(self) -> np.ndarray:
        return self._rows["unit"][:-1] * self._rows["length"][:-1, None] + self._landmarks.get("center", 0)

    def _prepared(self, entered: np.ndarray) -> dict[str, np.ndarray]:
        centered = entered - self._landmarks["center"]
        return {"unit": unit(centered), "length": np.linalg.norm(centered, axis=1)}

    def _draw(self, entered: np.ndarray, drawn: np.ndarray) -> None:
        self._landmarks["center"] = entered[drawn[0]].mean(axis=0)

    def _draw_lists(self, drawn: np.ndarray) -> None:
        scores = _profile(self._rows["scores"][drawn[0]][:, _PLACES])
        spread = np.maximum((scores[:, _TOP] - scores[:, _FAR]).mean(), np.float32(1e-3))
        excess = _excess(scores, spread)
        self._landmarks |= {"spread": spread, "mean": excess.mean(axis=0), "deviation": excess.std(axis=0)}

    def _spread(self, size: int, moved: np.ndarray) -> None:
        names = self._rows["names"][:size]
        near, places = np.ascontiguousarray(names[:, : self.spec.k + 1]), names[:, _PLACES]
        rows = np.flatnonzero(moved)
        scores = _profile(self._rows["scores"][rows][:, _PLACES])
        self._put("profile0", rows, scores, size)
        self._put("moments", rows, self._moments(scores), size)
        rows = np.flatnonzero(moved | moved[near].any(axis=1))  # -1 reads the last row: one more to compute
        mixed = self._put("crowd", rows, self._crowd(rows, near), size, STILL)
        x, differs, profiles = self._rows["unit"][:size], np.zeros(size, bool), moved
        for layer in range(self.spec.layers):
            if layer:
                x, profiles = self._rows[f"x{layer}"][:size], moved | differs | differs[places].any(axis=1)
                rows = np.flatnonzero(profiles)
                scores = native.pair_scores(x[rows][None], x[None], np.ascontiguousarray(places[rows])[None])[0]
                self._put(f"profile{layer}", rows, _profile(scores.astype(np.float32)), size)
            rows = np.flatnonzero(profiles | mixed)
            t = self._thresholds(layer, self._rows[f"profile{layer}"][rows], self._rows["crowd"][rows])
            seen = differs | self._put(f"t{layer}", rows, t, size, STILL)
            rows = np.flatnonzero(moved | mixed | seen | seen[near].any(axis=1))
            differs = np.zeros(size, bool)
            for part in row_blocks(len(rows), BLOCK):
                differs |= self._pass(layer, x, rows[part], near)

    def _pass(self, layer: int, x: np.ndarray, rows: np.ndarray, near: np.ndarray) -> np.ndarray:
        """One layer of `rows` [P] from all of x [n, D]. Returns which of the n moved."""
        t, crowd = self._rows[f"t{layer}"][None, : len(x)], self._rows["crowd"][rows]
        one = x[None]
        y = native.reciprocal_neighbor_attention(one, one, one, near[None], self._slope(layer), t=t, rows=rows)[0]
        new = self._joined(layer, x[rows], y, crowd)
        if layer + 1 < self.spec.layers:
            return self._put(f"x{layer + 1}", rows, new, len(x), STILL)
        return self._put("out", rows, self._output(new, self._rows["unit"][rows], crowd), len(x))

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
        crowd = self._judge(profile, 0.5 * (self._rows["moments"][near] * counts[:, :, None]).sum(axis=1))
        query, place = np.nonzero(counts & (scores[:, : self.spec.k] > self._rows["scores"][near, self.spec.k]))
        image = near[query, place]  # gallery rows that hold the query for a neighbor, as it holds them
        rows, theirs = self._rows["unit"][near], self._rows["crowd"][image]  # [B, k, D], as each query changes them
        for layer in range(self.spec.layers):
            before = self._rows[f"x{layer}" if layer else "unit"][:size]
            if layer:
                profile = _profile(native.pair_scores(x[None], before[None], places[None], threads=1)[0])
            t = self._thresholds(layer, profile, crowd)
            weights = self._weights(layer, x, rows, t, near, counts)
            y = np.einsum("bk,bkd->bd", weights, rows)
            pulled = self._sums(layer, image, before) + weights[query, place, None] * x[query]
            joined = self._joined(layer, rows[query, place], pulled, theirs)
            if layer + 1 < self.spec.layers:
                rows = self._rows[f"x{layer + 1}"][near]
                rows[query, place] = joined
            x = self._joined(layer, x, y, crowd)
        x = self._output(x, asked["unit"], crowd)
        found = x @ self._rows["out"][:size].T
        moved = self._output(joined, self._rows["unit"][image], theirs)
        found[query, image] = np.einsum("pd,pd->p", moved, x[query])
        return found

    def _weights(
        self, layer: int, x: np.ndarray, rows: np.ndarray, t: np.ndarray, near: np.ndarray, counts: np.ndarray
    ) -> np.ndarray:  # [P, K], of `rows` [P, K, D], which are `near` [P, K], for x [P, D] with thresholds t [P]
        over = np.einsum("pd,pkd->pk", x, rows) - (t[:, None] + self._rows[f"t{layer}"][near]) / 2
        return (_sigmoid(self._slope(layer) * over) * counts).astype(np.float32)

    def _sums(self, layer: int, rows: np.ndarray, x: np.ndarray) -> np.ndarray:  # [P], [N, D] -> [P, D]
        """What the neighbors of few rows give them."""
        near = self._rows["names"][rows, : self.spec.k + 1]
        theirs, counts = x[near], (near >= 0) & (near != rows[:, None])
        weights = self._weights(layer, x[rows], theirs, self._rows[f"t{layer}"][rows], near, counts)
        return np.einsum("pk,pkd->pd", weights, theirs)

    # The head's numbers.

    def _moments(self, scores: np.ndarray) -> np.ndarray:  # [P, RANKS] -> [P, 2 RANKS + 1]
        x = _excess(scores, self._landmarks["spread"]) - self._landmarks["mean"]
        return np.hstack([x, x * x, np.ones_like(x[:, :1])])

    def _crowd(self, rows: np.ndarray, near: np.ndarray) -> np.ndarray:  # [P] -> [P]
        """What the gauge says."""
        scores, moments = self._rows["profile0"][None, : len(near)], self._rows["moments"][None, : len(near)]
        even = np.zeros((1, len(near)), np.float32)  # with a scale of 0 every neighbor weighs the same
        sums = native.reciprocal_neighbor_attention(scores, scores, moments, near[None], 0.0, even, rows=rows)[0]
        return self._judge(scores[0, rows], sums)

    def _judge(self, scores: np.ndarray, sums: np.ndarray) -> np.ndarray:  # [P, RANKS], [P, 2 RANKS + 1] -> [P]
        whole, ranks = self._landmarks, len(GATED_RANKS)
        means = sums[:, :-1] / np.maximum(sums[:, -1:], 0.5)
        mean, square = means[:, :ranks], means[:, ranks:]
        deviation = np.sqrt(np.maximum(square - mean * mean, 0) + 1e-6)
        around = np.broadcast_to(np.concatenate([whole["mean"], whole["deviation"]]), (len(scores), 2 * ranks))
        seen = np.hstack([_excess(scores, whole["spread"]) / 3, mean + whole["mean"], deviation, around])
        hidden = np.tanh(seen.astype(np.float32) @ self.numbers["gauge.hidden.w"] + self.numbers["gauge.hidden.b"])
        return _sigmoid(hidden @ self.numbers["gauge.out.w"] + self.numbers["gauge.out.b"])[:, 0].astype(np.float32)

    def _thresholds(self, layer: int, scores: np.ndarray, crowd: np.ndarray) -> np.ndarray:  # [P, RANKS], [P] -> [P]
        both = scores @ self.numbers[f"h.{layer}.profile"].T + self.numbers[f"h.{layer}.offset"]
        return _mixed(both, crowd).astype(np.float32)

    def _slope(self, layer: int) -> float:
        return math.exp(self.numbers[f"h.{layer}.log_slope"])

    def _joined(self, layer: int, x: np.ndarray, y: np.ndarray, crowd: np.ndarray) -> np.ndarray:
        return unit(x + np.exp(_mixed(self.numbers[f"h.{layer}.log_strength"], crowd))[:, None] * y)

    def _output(self, x: np.ndarray, own: np.ndarray, crowd: np.ndarray) -> np.ndarray:
        return unit(x + _mixed(self.numbers["own"], crowd)[:, None] * own)


def _mixed(numbers: np.ndarray, crowd: np.ndarray) -> np.ndarray:  # [2] or [P, 2], [P] -> [P]
    few, many = numbers[..., 0], numbers[..., 1]
    mixed: np.ndarray = few + crowd * (many - few)
    return mixed


def _profile(scores: np.ndarray) -> np.ndarray:  # [P, 1 + RANKS] -> [P, RANKS]
    """Scores at `_PLACES` to a profile: a place that is not there repeats the one before, less `GATED_MISSING`."""
    there = scores[:, 1:] > -np.inf
    if there.all():
        return scores[:, 1:].astype(np.float32)
    last = np.take_along_axis(scores, there.sum(axis=1)[:, None], axis=1)
    drop = GATED_MISSING * np.cumsum(~there, axis=1)
    return np.where(there, scores[:, 1:], last - drop).astype(np.float32)


def _excess(scores: np.ndarray, spread: float | np.ndarray) -> np.ndarray:  # [P, RANKS] -> [P, RANKS]
    near, far = scores[:, _NEAR, None], scores[:, _FAR, None]
    return ((scores - (near + (near - far) * _FALL)) / spread).astype(np.float32)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.tanh(0.5 * x)
