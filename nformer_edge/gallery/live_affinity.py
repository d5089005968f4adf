"""The published head under the affinity rule over a gallery that changes. Letters as in `gallery.live_nformer`.

Every layer and head has lists of its own, by what the layer before made of the rows. A query, an addition or a removal
may change any row and, as measured, changes few: those are followed. A row whose factors changed is compared with all
others again; it leaves or enters their lists, and who attends otherwise then goes on to the next layer.
"""

from __future__ import annotations

import numpy as np

from nformer_edge.gallery.live_nformer import NFormerLive
from nformer_edge.ops import native
from nformer_edge.ops.contract import NO_NEIGHBOR

#: Names that a list has beyond those the head reads: each of the head's layers has lists, so fewer than `live.RESERVE`.
_SPARE = 8

#: One row in so many has other factors, and all lists are chosen anew.
_MANY = 8

#: Rows whose lists are chosen from their products with all rows: the kernel's start takes as long as these.
_FEW = 128


class AffinityLive(NFormerLive):
    """See `LiveHead`."""

    def _shapes(self) -> dict[str, tuple[tuple[int, ...], type]]:
        shapes = super()._shapes()
        lists = {name: shapes.pop(name) for name in ("names", "scores")}
        del shapes["mutual"]
        return {**shapes, **{f"{name}{head}": shape for name, shape in lists.items() for head in self._heads}}

    @property
    def _width(self) -> int:
        return self.spec.k + _SPARE

    @property
    def _computed(self) -> tuple[str, ...]:
        return ("out", *(f"v{head}" for head in self._heads))  # lists follow from all else

    def _search(self, rows: np.ndarray, size: int) -> None:
        """Lists are chosen layer by layer."""

    def _search_few(self, size: int) -> None:
        """Likewise."""

    def _list_new(self, start: int, stop: int) -> None:
        """Likewise."""

    def _join(self, query: np.ndarray) -> np.ndarray:
        return np.zeros(0, np.int64)

    def _unlist(self, place: np.ndarray, head: str = "") -> None:
        for one in self._heads:
            super(NFormerLive, self)._unlist(place, one)

    def _quick(self, asked: dict[str, np.ndarray]) -> np.ndarray:
        def met(layer: int, h: int, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            head = f"{layer}.{h}"
            return self._met(a, b, self._rows[f"b{head}"][: len(self)], self._rows[f"a{head}"], f"scores{head}")

        return self._alone(asked, met)

    def _spread(self, size: int, moved: np.ndarray) -> None:
        def reached(layer: int, differs: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
            found = [self._listed(f"{layer}.{h}", size, moved, differs) for h in range(self.spec.heads)]
            return [near for near, _ in found], np.any([attends for _, attends in found], axis=0)

        self._relate(size, moved, reached)

    def _listed(self, head: str, size: int, moved: np.ndarray, differs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A head's lists [size, k], and which rows attend otherwise, bool [size].

        Args:
            moved: rows that are new, or whose lists lost a name.
            differs: rows whose factors or values are not what they were.
        """
        k, names = self.spec.k, self._rows[f"names{head}"][:size]
        differs = differs | (names[:, 0] == NO_NEIGHBOR)
        before = names[:, :k].copy()
        if _MANY * np.count_nonzero(differs) > size:
            self._choose(head, np.arange(size), size)
        else:
            self._choose_among(head, differs, size)
            short = names[:, min(k, size) - 1] == NO_NEIGHBOR
            self._choose(head, np.flatnonzero(differs | short), size)
        near = np.ascontiguousarray(names[:, :k])
        attends = moved | differs | (near != before).any(axis=1)
        rows = np.flatnonzero(attends)
        theirs = np.hstack([before[rows], near[rows]])  # who chose them, or did, attends otherwise, too
        mutual = (near[theirs] == rows[:, None, None]).any(axis=2) & (theirs != NO_NEIGHBOR)
        attends[theirs[mutual]] = True
        return near, attends

    def _choose(self, head: str, rows: np.ndarray, size: int) -> None:
        """Lists of `rows` [P] among the first `size`, as `row_top_k` has them."""
        if not len(rows):
            return
        a, b = (self._rows[f"{name}{head}"][:size] for name in "ab")
        own, width = (a if len(rows) == size else a[rows]), self._width
        if len(rows) > _FEW:
            names = native.row_top_k(own[None], b[None], width)
            scores = native.pair_scores(own[None], b[None], names)[0].astype(np.float32)
        else:
            products = own @ b.T
            near = np.ones(products.shape, bool)
            if size > width:
                kth = np.partition(products, size - width, axis=1)[:, size - width, None]
                near = products >= kth - _slack(products, a.shape[1])
            at, columns = np.nonzero(near)
            counts = near.sum(axis=1)
            names = np.full((1, len(rows), max(counts.max(), width)), NO_NEIGHBOR, np.int32)
            names[0, at, np.arange(len(at)) - (np.cumsum(counts) - counts)[at]] = columns
            scores = native.pair_scores(own[None], b[None], names)[0]
            best = np.argsort(-scores, axis=1, kind="stable")[:, :width]
            names, scores = (np.take_along_axis(x, best, axis=1) for x in (names[0], scores))
            names = names[None]
        self._put(f"names{head}", rows, names[0], size)
        self._put(f"scores{head}", rows, scores.astype(np.float32), size)

    def _choose_among(self, head: str, differs: np.ndarray, size: int) -> None:
        """Lists of all other rows, which rows that differ leave or enter."""
        columns = np.flatnonzero(differs)
        if not len(columns):
            return
        a, b, names, scores = (self._rows[f"{name}{head}"][:size] for name in ("a", "b", "names", "scores"))
        left = np.zeros(names.shape, bool)
        if (names[columns, 0] != NO_NEIGHBOR).any():  # a new row is in no list
            left = np.append(differs, False)[names]
        others, last = size - len(columns), scores[:, -1].copy()
        part = np.flatnonzero(names[:, -1] == NO_NEIGHBOR)
        counts = (names[part] != NO_NEIGHBOR).sum(axis=1)
        last[part] = np.where(counts < others, scores[part, counts - 1], -np.inf)
        products = a @ b[columns].T
        near = products >= last[:, None] - _slack(products, a.shape[1])
        rows = np.flatnonzero((left.any(axis=1) | near.any(axis=1)) & ~differs)
        if not len(rows):
            return
        new = np.where(near[rows], columns.astype(np.int32), np.int32(NO_NEIGHBOR))
        found = native.pair_scores(a[rows][None], b[None], new[None])[0].astype(np.float32)
        stays = ~left[rows] & (names[rows] != NO_NEIGHBOR)
        old, theirs = np.where(stays, names[rows], np.int32(NO_NEIGHBOR)), np.where(stays, scores[rows], -np.inf)
        # Behind the last name that stays may be one that no list has, unless it has everybody.
        at = names.shape[1] - 1 - np.argmax(stays[:, ::-1], axis=1)[:, None]
        end, end_name = (np.take_along_axis(x, at, axis=1) for x in (theirs, old))
        everybody = stays.sum(axis=1, keepdims=True) >= others
        enters = everybody | ((end_name != NO_NEIGHBOR) & ((found > end) | ((found == end) & (new < end_name))))
        enters &= new != NO_NEIGHBOR
        every = np.hstack([old, np.where(enters, new, np.int32(NO_NEIGHBOR))])
        theirs = np.hstack([theirs, np.where(enters, found, -np.inf)])
        best = np.lexsort((every, -theirs), axis=1)[:, : names.shape[1]]
        self._put(f"names{head}", rows, np.take_along_axis(every, best, axis=1), size)
        self._put(f"scores{head}", rows, np.take_along_axis(theirs, best, axis=1).astype(np.float32), size)


def _slack(products: np.ndarray, length: int) -> np.ndarray:
    """What float32 products of factors of this length may be off: more, rather than less."""
    return np.float32(2.0**-22 * length * max(np.abs(products).max(), 1))
