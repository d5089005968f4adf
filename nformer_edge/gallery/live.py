"""The head over a gallery that changes: images come and go, and each query is answered alone, in milliseconds.

A whole pass compares all images with each other. What it finds is kept here, row by row: neighbor lists with their
scores, and what every layer saw. A new image enters some lists, a removed one leaves some, and what this
reaches is computed anew, layer by layer, and nothing else. An `exact` query is an image that is added, asked and taken
back; a quick one moves nothing but its closest neighbors.

What the landmarks give (the gated head's center, the published head's agents) is taken when they are drawn,
and stays the gallery's own until `rebuild`. Needs numpy and the native kernels alone.

Letters: N images, B new ones or queries, D features, K names in a list, P rows.
"""

from __future__ import annotations

import copy
import threading
import typing
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from nformer_edge.backends.runner import Runner, check_head_input, require_head
from nformer_edge.core.errors import ArtifactError, DataError, UsageError
from nformer_edge.core.spec import HeadSpec, HeadState, ModelSpec, check_choice
from nformer_edge.metrics.distance import row_blocks
from nformer_edge.ops import native
from nformer_edge.ops.contract import NO_NEIGHBOR, draw_landmarks, gates_for

#: Names that a list has beyond those the head reads, so that few removals make it search anew.
RESERVE = 31

#: A number of a row (a threshold, a unit row's coordinate) that moved less is as it was, and is not followed on.
STILL = 1e-6

#: Rows that go through a layer at once: what lies between stays in cache.
BLOCK = 1024

#: Queries or new rows whose scores are computed in one product.
_BATCH = 32

#: Rows whose products with each other are held: 64 MiB.
_FEW = 4096


class LiveHead:
    """A head and a gallery's state under it; `open` makes the one for a model's rule.

    Positions are places in the order in which rows were added, less those removed. `ask` may be called from
    several threads, of which one at a time is answered; a call that changes the gallery must be alone.

    Args:
        spec: of the model.
        numbers: the head's weights, by their names in the checkpoint.
        seed: of the landmarks.
        kept: what layers computed of each row is kept in four, two or one byte a number (INT8: with a scale a row).
            Lists, and what they are chosen by, are FP32.
    """

    #: Per-row arrays that `state` has; the others follow from them and the features.
    KEPT: ClassVar[tuple[str, ...]] = ("gave", "names", "scores")

    def __init__(self, spec: ModelSpec, numbers: Mapping[str, np.ndarray], seed: int, kept: HeadState = "fp32") -> None:
        check_choice("head_state", kept, typing.get_args(HeadState))
        self.model, self.spec, self.seed, self.kept = spec, require_head(spec), seed, kept
        self.numbers = self._made = {name: np.array(x, np.float32) for name, x in numbers.items()}
        self._rows: dict[str, np.ndarray] = {}  # of each N + 1 rows: the last is a query's, while it is asked exactly
        self._room: dict[str, np.ndarray] = {}  # what they are the first rows of, so that few additions copy nothing
        self._landmarks: dict[str, np.ndarray] = {}
        self._moved = np.zeros(0, bool)  # rows whose lists changed since the layers were computed
        self._drawn = 0  # N when landmarks were drawn
        self._lost = False  # whether a row that landmarks were drawn from is gone
        self._undo: list[tuple[str, np.ndarray, np.ndarray, float]] | None = None  # while a query is asked exactly
        self._left: list[tuple[np.ndarray, np.ndarray]] = []  # what the head makes of rows then
        self._lock = threading.RLock()
        self._allocate(0)

    @classmethod
    def open(cls, model: Runner, seed: int | None = None, kept: HeadState = "fp32") -> LiveHead:
        """The live form of an open model's head, without rows; `seed` of the landmarks, the model's own if None.

        Raises:
            UsageError: if the model has no head.
            ArtifactError: for a bundle or an engine that was exported without the head's numbers.
        """
        from nformer_edge.gallery.live_affinity import AffinityLive
        from nformer_edge.gallery.live_gated import GatedLive
        from nformer_edge.gallery.live_nformer import NFormerLive

        head, numbers = require_head(model.spec), model.head_numbers()
        if not numbers:
            hint = "Export it again: nformer-edge export CHECKPOINT -o BUNDLE; an engine is then built from that."
            raise ArtifactError(model.name, "no live form of its head", "one, to keep a gallery", hint)
        rules: dict[str, type[LiveHead]] = {"gated": GatedLive, "features": NFormerLive, "affinity": AffinityLive}
        return rules[head.rule](model.spec, numbers, model.landmark_seed if seed is None else seed, kept)

    def __len__(self) -> int:
        return len(self._moved)

    @property
    def outdated(self) -> bool:
        """Whether landmarks should be drawn anew: the gallery has doubled or halved since, or `lost`."""
        return self.lost or len(self) >= 2 * max(self._drawn, 1) or 2 * len(self) <= self._drawn

    @property
    def lost(self) -> bool:
        """Whether an image was removed that gave something to the landmarks: its share is still in what they gave."""
        return self._lost

    def build(self, features: np.ndarray, landmarks: Mapping[str, np.ndarray] | None = None) -> None:
        """Starts anew from rows [N, D], as the backbone gave them.

        Args:
            landmarks: what another gallery of this model has under `landmarks`; drawn from the rows if None.

        Raises:
            UsageError: if a shape does not fit.
            DataError: for a row that is not finite or is all zeros.
        """
        self._start(self._entered(self._checked(features)), landmarks)

    def rebuild(self) -> None:
        """Draws landmarks anew for the rows that are there."""
        self._start(self._held(), None)

    def tell(self, images: float | None) -> None:
        """Says how many images a person the gallery has; None: as the model was made. Nothing for a published head.

        Where that changes the head's numbers, the layers of all rows are computed anew at the next `ask`; lists stay.

        Raises:
            UsageError: for less than one image.
        """
        numbers = self._made if images is None else {**self._made, **gates_for(self._made, images)}
        if any(not np.array_equal(numbers[name], x) for name, x in self.numbers.items()):
            with self._lock:
                self.numbers = numbers
                self._moved[:] = True

    @property
    def landmarks(self) -> dict[str, np.ndarray]:
        """What the landmarks gave, and of how many rows they were drawn."""
        return {**self._landmarks, "drawn": np.array(self._drawn)}

    def add(self, features: np.ndarray) -> None:
        """Appends rows [B, D]. Raises as `build`; nothing is added then. The first rows draw the landmarks."""
        rows, held = self._entered(self._checked(features)), len(self)
        if not held:
            return self._start(rows, None)
        self._allocate(held + len(rows))
        self._moved[held:] = True
        for name, x in self._prepared(rows).items():
            self._rows[name][held:-1] = x
        for part in row_blocks(len(rows), _BATCH):
            self._list_new(held + part.start, held + part.stop)

    def remove(self, positions: np.ndarray) -> None:
        """Takes rows away; those that stay keep their order.

        Raises:
            UsageError: for a position that is not there.
        """
        kept = np.ones(len(self) + 1, bool)
        kept[self._positions(positions)] = False
        if not kept[:-1].any():
            return self._start(np.zeros((0, self.spec.features), np.float32), None)
        self._lost |= bool((self._rows["gave"] & ~kept).any())
        place = np.where(kept, np.cumsum(kept) - 1, NO_NEIGHBOR).astype(np.int32)
        stay, first = np.flatnonzero(kept), int(kept.argmin())
        for name, x in self._rows.items():
            x[first : len(stay)] = x[stay[first:]]
            self._rows[name] = x[: len(stay)]
        self._moved = self._moved[kept[:-1]]
        self._unlist(place)

    def ask(
        self,
        features: np.ndarray,  # [B, D]
        exact: bool = False,
        among: int | np.ndarray | None = None,
    ) -> np.ndarray:  # float32 [B, N]
        """The cosine of each query, alone, to every row, as the head relates them.

        Args:
            features: queries as the backbone gave them.
            exact: the gallery's rows change as the query changes them, as in a whole pass over gallery and query. If
                False they stay as they are without the query, but for its neighbors that hold it for one, under the
                gated rule.
            among: a shortlist: positions [M], or how many rows, nearest by what the head compares. The query is related
                with these rows alone, by a pass over them; all others score -infinity. It takes time by M squared.

        Raises:
            UsageError: if a shape does not fit or a position is not there.
            DataError: for a query that is not finite or is all zeros, or an empty gallery.
        """
        if not len(self):
            raise DataError("gallery", "zero images", "at least one", "Add images first.")
        queries = self.prepare(features)
        count = len(next(iter(queries.values())))
        found = np.empty((count, len(self)), np.float32)
        with self._lock:
            if among is None:
                self.settle()
            for part in row_blocks(count, _BATCH if among is None and not exact else 1):
                asked = {name: x[part] for name, x in queries.items()}
                if among is not None:
                    found[part] = self._among(asked, among)
                else:
                    found[part] = self._exact(asked) if exact else self._quick(asked)
        return found

    def prepare(self, features: np.ndarray) -> dict[str, np.ndarray]:
        """Rows [B, D] as `relate` takes them: ``unit`` [B, D] as the head compares them, and ``length`` [B].

        Raises:
            UsageError: if a shape does not fit.
            DataError: for a row that is not finite or is all zeros.
        """
        return self._prepared(self._entered(self._checked(features)))

    def relate(self, query: Mapping[str, np.ndarray], rows: Mapping[str, np.ndarray]) -> np.ndarray:  # float32 [M]
        """One query and M rows alone, wherever they come from, in one pass over them with this gallery's landmarks.

        Args:
            query: of `prepare`, [1, ...].
            rows: likewise, [M, ...].
        """
        few, size = copy.copy(self), len(rows["unit"]) + 1
        few.kept = "fp32"
        few._rows, few._room, few._moved = {}, {}, np.zeros(0, bool)
        few._allocate(size)
        for name, x in query.items():
            few._rows[name][:size] = np.concatenate([rows[name], x])
        few._search_few(size)
        few._spread(size, np.ones(size, bool))
        return native.row_scores(few._rows["out"][: size - 1], few._rows["out"][size - 1])

    def settle(self) -> None:
        """Computes the rows that were added, and those that additions and removals reach. `ask` does it first."""
        with self._lock:
            if self._moved.any():
                self._spread(len(self), self._moved)
                self._moved[:] = False

    def related(self) -> np.ndarray:  # float32 [N, D]
        """The rows as the head relates them with each other: what a whole pass over them gives."""
        with self._lock:
            self.settle()
            return self._read("out", slice(len(self))).copy()

    def state(self) -> dict[str, np.ndarray]:
        """What `restore` takes with the same features: lists of N rows, and what the landmarks gave."""
        return {**{name: self._rows[name][:-1] for name in self.KEPT if name in self._rows}, **self.landmarks}

    def restore(self, features: np.ndarray, state: Mapping[str, np.ndarray]) -> None:
        """Starts from rows [N, D] and a `state` of the same model and rows; the layers are computed at the next `ask`.

        Raises:
            DataError: if arrays are missing or do not fit; for features as `build`.
        """
        entered, names = self._entered(self._checked(features)), {*self.KEPT} & {*self._rows}
        size, listed = len(entered), state.get("names", np.zeros((1, 1), np.int32))
        fit = names | {"drawn", *self._given} == {*state} and all(
            state[name].shape == (size, *self._rows[name].shape[1:]) for name in names
        )
        if not fit or not ((listed >= NO_NEIGHBOR) & (listed < size)).all():
            got = f"arrays {', '.join(f'{name} {x.shape}' for name, x in sorted(state.items())) or 'none'}"
            expected = f"{', '.join(sorted(names))} of {size} rows, {', '.join(sorted(self._given))}"
            raise DataError("state", got, expected, "Build the gallery anew.")
        landmarks = {name: np.asarray(x) for name, x in state.items() if name not in names}
        self._begin(entered, landmarks)
        for name in names:
            self._rows[name][:-1] = state[name]
        self._moved[:] = True

    # What a head's rule adds.

    def _shapes(self) -> dict[str, tuple[tuple[int, ...], type]]:
        """Of every per-row array, its shape after N and its type."""
        row, lists = (self.spec.features,), (self._width,)
        floats = {"unit": row, "scores": lists, "out": row}
        found: dict[str, tuple[tuple[int, ...], type]] = {name: (shape, np.float32) for name, shape in floats.items()}
        return {**found, "names": (lists, np.int32), "gave": ((), np.bool_)}

    @property
    def _computed(self) -> tuple[str, ...]:
        """Names of the per-row arrays that layers computed and no list is chosen by, of numbers of like size a row."""
        return ("out", *(f"x{layer}" for layer in range(1, self.spec.layers)))

    @property
    def _given(self) -> tuple[str, ...]:
        """Names of what the landmarks give."""
        raise NotImplementedError

    def _entered(self, features: np.ndarray) -> np.ndarray:  # [B, D] -> [B, D]
        """Features as far as they go without landmarks."""
        raise NotImplementedError

    def _held(self) -> np.ndarray:  # [N, D]
        """The same, of the rows that are there."""
        raise NotImplementedError

    def _prepared(self, entered: np.ndarray) -> dict[str, np.ndarray]:
        """Per-row arrays of new rows that need no other row."""
        raise NotImplementedError

    def _draw(self, entered: np.ndarray, drawn: np.ndarray) -> None:  # [N, D], int32 [layers, l]
        """Takes from the landmarks what `_prepared` needs."""

    def _gave(self, drawn: np.ndarray) -> np.ndarray | slice:  # int32 [layers, l]
        """Rows that have a share in what the landmarks give."""
        return slice(0, -1)

    def _draw_lists(self, drawn: np.ndarray) -> None:
        """Takes from the landmarks what needs lists or layers."""

    def _spread(self, size: int, moved: np.ndarray) -> None:
        """Computes of rows 0..size - 1 what changes where `moved` says that a list did."""
        raise NotImplementedError

    def _quick(self, asked: dict[str, np.ndarray]) -> np.ndarray:  # [B, N]
        raise NotImplementedError

    # Rows.

    def _start(self, entered: np.ndarray, landmarks: Mapping[str, np.ndarray] | None) -> None:
        size = len(entered)
        drawn = draw_landmarks(size, self.spec.layers, self.spec.landmarks, self.seed) if size else None
        self._begin(entered, landmarks, drawn)
        if drawn is None:
            return
        self._search(np.arange(size), size)
        self._moved[:] = True
        if landmarks is None:
            self._draw_lists(drawn)

    def _begin(
        self, entered: np.ndarray, landmarks: Mapping[str, np.ndarray] | None, drawn: np.ndarray | None = None
    ) -> None:
        """Rows without lists, and the landmarks: given, or those `drawn`."""
        size = len(entered)
        self._rows, self._room, self._moved, self._lost = {}, {}, np.zeros(0, bool), False
        self._landmarks = dict(landmarks or {})
        self._drawn = int(self._landmarks.pop("drawn", size))
        self._allocate(size)
        if not size:
            return
        if landmarks is None and drawn is not None:
            self._draw(entered, drawn)
            self._rows["gave"][self._gave(drawn)] = True
        for name, x in self._prepared(entered).items():
            self._rows[name][:-1] = x

    def _checked(self, features: np.ndarray) -> np.ndarray:
        landmarks = np.zeros((self.spec.layers, 1), np.int32)
        return check_head_input(np.asarray(features), landmarks, self.model, self.seed)[0]

    def _positions(self, positions: np.ndarray) -> np.ndarray:
        at = np.asarray(positions, np.int64).reshape(-1)
        if at.size and not (at.min() >= 0 and at.max() < len(self)):
            got = f"{at.min()}..{at.max()}"
            raise UsageError("positions", got, f"0..{len(self) - 1}", "Pass places in the gallery's order.")
        return at

    def _allocate(self, size: int) -> None:
        """Room for `size` rows and a query; rows that are there stay."""
        held = len(self)
        shapes = self._shapes()
        if self.kept != "fp32":
            small: type = np.float16 if self.kept == "fp16" else np.int8
            shapes |= {name: (shapes[name][0], small) for name in self._computed}
            shapes |= {f"{name}.scale": ((), np.float32) for name in self._computed if small is np.int8}
        for name, (shape, kind) in shapes.items():
            room = self._room.get(name)
            if room is None or len(room) <= size:
                room = np.empty((size + 1 + (size // 4 if held else 0), *shape), kind)
                if held:
                    room[:held] = self._rows[name][:held]
                self._room[name] = room
            self._rows[name] = room[: size + 1]
            self._rows[name][held:] = NO_NEIGHBOR if kind is np.int32 else 0
        self._moved = np.concatenate([self._moved[:held], np.zeros(size - held, bool)])

    def _put(self, name: str, rows: np.ndarray, values: np.ndarray, size: int, still: float = 0.0) -> np.ndarray:
        """Sets rows [P] of an array, those that moved more than `still`. Returns which did, bool [size].

        `values` are used up: they are what was there.
        """
        array = self._rows[name]
        if array.dtype == np.int8 and values.dtype != np.int8:
            scale = np.maximum(np.abs(values).max(axis=1) / 127, np.finfo(np.float32).tiny)
            small = np.rint(values / scale[:, None]).astype(np.int8)
            return self._put(f"{name}.scale", rows, scale, size, still / 127) | self._put(name, rows, small, size)
        values = np.ascontiguousarray(values, array.dtype)
        mask = np.zeros(size, bool)
        mask[rows] = _swapped(array, rows, values, still)
        if self._undo is not None:
            self._undo.append((name, rows, values, still))
        return mask

    def _leave(self, rows: np.ndarray, x: np.ndarray, size: int) -> np.ndarray:
        """Sets what the head makes of rows [P], or keeps it beside for a query. Returns which moved, bool [size]."""
        if self._undo is None:
            return self._put("out", rows, x, size)
        self._left.append((rows, x))
        return np.zeros(size, bool)

    def _read(self, name: str, at: slice | np.ndarray) -> np.ndarray:
        """Rows of an array, float32."""
        rows = self._rows[name][at]
        if rows.dtype == np.int8:
            return rows * self._rows[f"{name}.scale"][at][..., None]
        return rows.astype(np.float32, copy=False)

    def _scored(self, x: np.ndarray, size: int) -> np.ndarray:  # [B, D] -> [B, size]
        """Products of queries, as the layers leave them, with the first rows."""
        if self.kept == "fp32":
            return x @ self._rows["out"][:size].T
        return np.hstack([x @ self._read("out", part).T for part in row_blocks(size, BLOCK)])

    # Lists.

    def _search(self, rows: np.ndarray, size: int) -> None:
        """Lists of `rows` [P] among the first `size`."""
        unit = self._rows["unit"][None, :size]
        own = unit if len(rows) == size else unit[:, rows]  # the same array halves the work
        names = native.row_top_k(own, unit, self._width)
        self._rows["scores"][rows] = native.pair_scores(own, unit, names)[0]
        self._rows["names"][rows] = names[0]

    def _search_few(self, size: int) -> None:
        """As `_search` of the first `size` by each other, by float32 products where these are few."""
        if size > _FEW:
            return self._search(np.arange(size), size)
        unit, count = self._rows["unit"][:size], min(size, self.spec.listed)
        products = unit @ unit.T
        names = np.sort(np.argpartition(-products, count - 1, axis=1)[:, :count], axis=1)
        scores = np.take_along_axis(products, names, axis=1)
        best = np.argsort(-scores, axis=1, kind="stable")
        self._rows["names"][:size, :count] = np.take_along_axis(names, best, axis=1)
        self._rows["scores"][:size] = -np.inf
        self._rows["scores"][:size, :count] = np.take_along_axis(scores, best, axis=1)

    def _last(self, size: int) -> np.ndarray:
        """Of the first `size` rows, the score that enters each list when it is exceeded."""
        names, scores = self._rows["names"][:size], self._rows["scores"][:size]
        counts = (names >= 0).sum(axis=1)
        last = scores[np.arange(size), counts - 1]
        return np.where(counts >= size, -np.float32(np.inf), last)  # a list of everybody has room

    def _list_new(self, start: int, stop: int) -> None:
        """Lists of rows start..stop - 1, and their places in the lists of those before."""
        last, listed = self._last(start), self._rows["scores"][:start, self.spec.listed - 1].copy()
        unit = self._rows["unit"][:stop]
        products = unit @ unit[start:].T
        rows, scores = self._enter(start, stop, last, products[:start])
        self._moved[rows] |= (scores > listed[rows, None]).any(axis=1)
        for row in range(start, stop):
            self._list_one(row, *self._nearest(unit[row], products[:, row - start], self._width, unit), stop)

    def _list_one(self, row: int, names: np.ndarray, scores: np.ndarray, size: int) -> None:
        lists = np.full((1, self._width), NO_NEIGHBOR, np.int32), np.full((1, self._width), -np.inf, np.float32)
        for name, x, found in zip(("names", "scores"), lists, (names, scores), strict=True):
            x[0, : len(found)] = found
            self._put(name, np.array([row]), x, size)

    @property
    def _width(self) -> int:
        return self.spec.listed + RESERVE

    def _enter(self, start: int, stop: int, last: np.ndarray, products: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Puts rows start..stop - 1 into the lists before them whose `last` [start] they exceed.

        Args:
            products: float32 [start, stop - start], of those before with them.

        Returns:
            Those rows [P], and the scores [P, stop - start], -infinity where one did not enter.
        """
        unit, names, scores = (self._rows[name] for name in ("unit", "names", "scores"))
        slack = 2.0**-23 * unit.shape[1]  # what a float32 product of unit rows may be off
        near = products > (last - slack)[:, None]
        rows = np.unique(np.nonzero(near)[0])
        new = np.where(near[rows], np.arange(start, stop, dtype=np.int32), np.int32(NO_NEIGHBOR))
        found = native.pair_scores(unit[rows][None], unit[None, :stop], new[None])[0].astype(np.float32)
        found = np.where(found > last[rows, None], found, -np.float32(np.inf))
        every, theirs = np.hstack([names[rows], new]), np.hstack([scores[rows], found])
        best = np.argsort(-theirs, axis=1, kind="stable")[:, : names.shape[1]]
        theirs = np.take_along_axis(theirs, best, axis=1)
        every = np.where(theirs > -np.inf, np.take_along_axis(every, best, axis=1), np.int32(NO_NEIGHBOR))
        self._put("names", rows, every, stop)
        self._put("scores", rows, theirs, stop)
        return rows, found

    def _unlist(self, place: np.ndarray, head: str = "") -> None:
        """Renames who stands in lists; `place` [old N + 1] is -1 for who is gone."""
        size, listed = len(self), self.spec.listed
        names, scores = self._rows[f"names{head}"], self._rows[f"scores{head}"]
        renamed = np.where(names >= 0, place[names], np.int32(NO_NEIGHBOR))
        gone = (names >= 0) & (renamed < 0)
        self._moved |= gone[:size, :listed].any(axis=1)
        rows = np.flatnonzero(gone.any(axis=1))
        left = np.argsort(renamed[rows] < 0, axis=1, kind="stable")
        renamed[rows] = np.take_along_axis(renamed[rows], left, axis=1)
        scores[rows] = np.where(renamed[rows] >= 0, np.take_along_axis(scores[rows], left, axis=1), -np.inf)
        names[:] = renamed
        short = np.flatnonzero((renamed[:size] >= 0).sum(axis=1) < min(listed, size))
        if len(short):
            self._search(short, size)

    def _nearest(
        self,
        query: np.ndarray,  # [R]
        products: np.ndarray,  # [n], in float32, with the rows
        count: int,
        rows: np.ndarray,  # [n, R]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The list of `count` rows (fewer where there are no more), as `row_top_k` has it: names and scores."""
        at = np.arange(len(rows), dtype=np.int32)
        if len(rows) > count:
            kth = np.partition(products, len(rows) - count)[len(rows) - count]
            size = max(np.abs(products).max(), np.float32(1))  # of unit rows 1
            at = np.flatnonzero(products >= kth - 2.0**-22 * len(query) * size).astype(np.int32)
        scores = native.pair_scores(query[None, None], rows[None], at[None, None], threads=1)[0, 0]
        best = np.argsort(-scores, kind="stable")[:count]
        return at[best], scores[best].astype(np.float32)

    def _exact(self, asked: dict[str, np.ndarray]) -> np.ndarray:
        """As `_quick`, for one query [1, ...] that joins the gallery and leaves it as it was."""
        size, self._undo, self._left = len(self), [], []
        try:
            row = np.array([size])
            for name, x in asked.items():
                self._put(name, row, x.copy(), size + 1)
            moved = np.zeros(size + 1, bool)
            moved[self._join(asked["unit"][0])] = moved[size] = True
            self._spread(size + 1, moved)
            query, out = self._left[-1][1][-1], self._rows["out"]  # the query is the last row of all
            found = native.row_scores(out, query) if self.kept == "fp32" else self._scored(query[None], size + 1)[0]
            for rows, x in self._left:
                found[rows] = native.row_scores(x, query)
            return found[None, :size]
        finally:
            for name, rows, before, still in reversed(self._undo):
                _swapped(self._rows[name], rows, before, still)
            self._undo, self._left = None, []

    def _join(self, query: np.ndarray) -> np.ndarray:  # [D] -> [P]
        """The list of a query, which stands behind the rows, and its place in theirs. Returns those rows."""
        size, listed, unit = len(self), self.spec.listed, self._rows["unit"]
        scores = native.row_scores(unit, query)
        rows, _ = self._enter(size, size + 1, self._rows["scores"][:size, listed - 1], scores[:size, None])
        self._list_one(size, *self._nearest(query, scores, listed, unit), size + 1)
        return rows

    def _among(self, asked: dict[str, np.ndarray], among: int | np.ndarray) -> np.ndarray:
        """One query [1, ...] with a shortlist."""
        if isinstance(among, (int, np.integer)):
            near = self._rows["unit"][:-1] @ asked["unit"][0]
            count = min(int(among), len(near))
            at = np.sort(np.argpartition(-near, count - 1)[:count]) if count else np.zeros(0, np.int64)
        else:
            at = np.unique(self._positions(among))
        found = np.full(len(self), -np.inf, np.float32)
        found[at] = self.relate(asked, {name: self._rows[name][at] for name in asked})
        return found


def _swapped(array: np.ndarray, rows: np.ndarray, values: np.ndarray, still: float) -> np.ndarray:  # bool [P]
    """`native.swap_rows` of any type."""
    if array.dtype == np.float32:
        return native.swap_rows(array, rows, values, still)
    before = array[rows]
    apart = ~(np.abs(before - values) <= still) if still else before != values
    moved: np.ndarray = apart.any(axis=tuple(range(1, values.ndim)))
    array[rows[moved]], values[moved] = values[moved], before[moved]
    return moved


def unit(x: np.ndarray) -> np.ndarray:  # [N, D] -> [N, D]
    """Rows at L2 norm 1; a row of zeros stays."""
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.float32(1e-12))


def scaled(features: np.ndarray, spec: HeadSpec) -> np.ndarray:  # [N, D] -> [N, D]
    """As `model.nformer.scaled`."""
    if spec.input_scale == "none":
        return features
    return unit(features) * np.float32(1 if spec.input_scale == "unit" else np.sqrt(spec.features))
