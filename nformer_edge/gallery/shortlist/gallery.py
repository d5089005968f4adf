"""A gallery whose rows lie in a vector store. Letters as in `shortlist.base`, and M rows on a shortlist."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike
from tqdm import tqdm

from nformer_edge.backends.runner import Runner
from nformer_edge.core.artifact import atomic_write, open_plain
from nformer_edge.core.errors import ArtifactError, BackendError, DataError, Error, UsageError
from nformer_edge.core.features import UNREADABLE, Features, check_features
from nformer_edge.core.spec import check_whole
from nformer_edge.core.terminal import PROGRESS
from nformer_edge.core.values import Result
from nformer_edge.gallery.codes import Code
from nformer_edge.gallery.held import NEVER, Held, Time, Where, each, ids_of, label_columns, new_id, seen_by
from nformer_edge.gallery.images import Images
from nformer_edge.gallery.live import LiveHead
from nformer_edge.gallery.protocols import QUICK
from nformer_edge.gallery.search import HeadUse, Matches, Protocol, check_threshold, features_of, head_use, rank
from nformer_edge.gallery.shortlist.base import BATCH, Rows, Shortlist
from nformer_edge.metrics.distance import row_blocks, unit_rows

#: The longest shortlist: the head takes time by its square.
LONGEST = 4096

#: Rows that are asked for beyond a shortlist: equal rows at its end are then chosen by id.
SPARE = 32

#: Vectors that are looked for in a store's files.
LOOKED_FOR = 4

#: How far a row's norm may be from 1, as a store gives it back.
_ROUNDED = 1e-3


@dataclass(frozen=True)
class Stored(Result):
    """What was put into a store.

    Args:
        images: that were not there.
        known: that were there already, under the same id: nothing was done.
        total: images in the store now.
    """

    kind: ClassVar[str] = "shortlist-stored"

    images: int
    known: int
    total: int

    def __str__(self) -> str:
        return f"added {self.images:,} images, {self.known:,} were there: {self.total:,} now"


@dataclass(frozen=True)
class Forgotten(Result):
    """What was removed from a store.

    Args:
        images: how many.
        total: images in the store now.
        erased: whether the store's files still hold a vector; null where that cannot be seen.
        told: the same in words.
    """

    kind: ClassVar[str] = "shortlist-forgotten"

    images: int
    total: int
    erased: bool | None
    told: str

    def __str__(self) -> str:
        return f"removed {self.images:,} images, {self.total:,} left; {self.told}"


class ShortlistGallery:
    """Images in a `Shortlist`: it gives the M nearest of a query, and the head relates the query with these alone.

    Nothing here grows with the gallery but the store. The head's landmarks are drawn from the first images that are
    added (up to `LONGEST`, evenly spaced): let them be a fair sample. They belong to the rows: a row that another model
    or other landmarks made is refused, whoever put it there.

    The same image under the same id is one row, so an addition that was interrupted is run again. Several threads may
    search; one process adds.

    Args:
        runner: an open model.
        store: where rows are.
        landmarks: a file (.npz) that keeps what the landmarks gave, beside the store; made by the first addition.
        head: whether rows are kept as the head compares them and related by it; ``auto`` as for `Gallery.search`.
        images_per_person: that the gallery has, where the caller knows; the head's gates and ``auto`` go by it.

    Raises:
        ArtifactError: if `landmarks` is damaged, or missing beside a store with rows; for a head without a live form.
    """

    def __init__(
        self,
        runner: Runner,
        store: Shortlist,
        landmarks: str | os.PathLike[str] | None = None,
        *,
        head: HeadUse = "auto",
        images_per_person: int | None = None,
    ) -> None:
        self._runner, self._store = runner, store
        none = np.zeros((0, runner.spec.backbone.features), np.float32)
        use, self._decision = head_use(runner, head, Features(none), images_per_person)
        self._live = LiveHead.open(runner) if use else None
        if self._live is not None:
            self._live.tell(images_per_person)
        self._path = None if landmarks is None else Path(landmarks)
        self._drawn = not use
        if self._live is not None and self._path and self._path.exists():
            self._live.build(none, _read(self._path))
            self._drawn = True
        self._model = self._own()
        if not self._drawn and len(self):
            hint = "Name the file that the first addition wrote, or add all images to a new collection."
            raise ArtifactError(str(self._path or store.name), "rows without landmarks", "both", hint)

    def __len__(self) -> int:
        with self._errors():
            return self._store.count(Where())

    def __enter__(self) -> ShortlistGallery:
        return self

    def __exit__(self, *exception: object) -> None:
        self._store.close()

    def _own(self) -> str:
        """What every row must say of itself: a hash over the model and the landmarks."""
        runner, landmarks = self._runner, self._live.landmarks if self._live is not None else {}
        made = [runner.checkpoint or runner.sha256, runner.precision["backbone"]]
        arrays = [
            [name, hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()] for name, x in landmarks.items()
        ]
        return hashlib.sha256(json.dumps([*made, *sorted(arrays)]).encode()).hexdigest()

    def add(
        self,
        images: Images | Features,
        ids: str | Sequence[str] | None = None,
        cameras: int | Sequence[int] | None = None,
        times: Time | Sequence[Time] | None = None,
        *,
        batch: int = 32,
    ) -> Stored:
        """Adds images. Each batch of `BATCH` is in the store or not; what is there already is passed over.

        Args:
            images: as for `Gallery.add`.
            ids: who they show, one an image or one for all; their `Features.names` if None.
            cameras: likewise; those of `images` if None.
            times: likewise, when they were seen; now if None.
            batch: images that are embedded at once.

        Raises:
            Error: as `Gallery.add`; nothing of a bad row's batch is added.
            BackendError: if the store fails, or does not hold what it took.
        """
        features = features_of(self._runner, images, "images", batch=batch)
        check_features(features.features, "images", self._runner.spec.backbone.features)
        count = len(features)
        names = features.names if ids is None else tuple(map(new_id, each("ids", ids, count)))
        if "" in names:
            raise DataError("ids", "an empty name", "text", "Name every image.")
        camids, seen = seen_by(count, cameras, times)
        camids = features.camids if camids is None else camids
        if count and not self._drawn:
            self._draw(features.features)
        model, added = self._model, 0
        with tqdm(total=count, desc="storing", unit="img", **PROGRESS) as bar:
            for part in row_blocks(count, BATCH):
                at, prepared = range(count)[part], self._prepare(features.features[part])
                keys = [_key(model, names[i], features.features[i]) for i in at]
                paths = tuple(features.paths[i] for i in at)
                columns = tuple(names[i] for i in at), paths, camids[part], seen[part], (model,) * len(at)
                rows = Rows(np.array(keys, np.int64), prepared["unit"], prepared["length"], *columns)
                rows = rows.take(np.unique(rows.keys, return_index=True)[1])
                with self._errors():
                    fresh = rows.take(~self._store.holds(rows.keys))
                    self._store.put(fresh)
                    if not self._store.holds(rows.keys).all():
                        self._distrust("rows missing that it had taken")
                added += len(fresh)
                bar.update(len(at))
        return Stored(added, count - added, len(self))

    def search(
        self,
        images: Images | Features,
        top: int = 10,
        *,
        cameras: int | Sequence[int] | None = None,
        since: Time | None = None,
        until: Time | None = None,
        exclude_camera: int | None = None,
        threshold: float | None = None,
        shortlist: int = 500,
        boxes: ArrayLike | None = None,
        batch: int = 32,
    ) -> Matches:
        """Ranks the shortlist of each query; ties by id. `Matches.indices` and `keys` are the rows' keys.

        Args:
            images: queries, as for `Gallery.search`, as are all arguments but
            shortlist: M, 1 to `LONGEST`.

        Raises:
            Error: as `Gallery.search`.
            DataError: for a row of another model or other landmarks.
            BackendError: if the store fails, or gives what is no row: NaN, an unknown key, less than there is.
        """
        check_threshold(threshold)
        check_whole("top", top, 1)
        check_whole("shortlist", shortlist, 1)
        if not top <= shortlist <= LONGEST:
            raise UsageError("shortlist", shortlist, f"top ({top}) to {LONGEST}", "Choose another length.")
        where = Where.of(cameras, exclude_camera, since, until)
        query = features_of(self._runner, images, "queries", boxes, batch=batch)
        with self._errors():
            searched = self._store.count(where)
        if not self._drawn or not (searched or len(self)):
            raise DataError("gallery", "zero images", "at least one", "Add images first.")
        asked, found = self._prepare(query.features), list[tuple[Rows, np.ndarray]]()
        count, none = min(shortlist + SPARE, searched), Rows.none(self._runner.spec.backbone.features)
        for part in row_blocks(len(query)):
            with self._errors():
                unit = asked["unit"][part]
                answers = self._store.nearest(unit, count, where) if count else [none] * len(unit)
            if len(answers) != len(unit):
                self._distrust(f"{len(answers)} answers to {len(unit)} queries")
            for i, rows in enumerate(answers, part.start):
                one = {name: x[i : i + 1] for name, x in asked.items()}
                found.append(self._ranked(one, self._checked(rows, min(shortlist, searched)), shortlist, top))
        return self._matches(query, found, searched, threshold)

    def remove(self, ids: str | int | Sequence[str | int]) -> Forgotten:
        """Removes all images of these ids, then looks for their vectors in the store's files.

        Only what could be seen in the files before can be said to be gone from them.

        Raises:
            UsageError: for no id.
            DataError: for what is no id, or one that is not there; nothing is removed then.
            BackendError: if the store still finds what it deleted.
        """
        wanted = ids_of(ids)
        if not wanted:
            raise UsageError("remove", "no id", "ids", "Name what to remove.")
        for name in sorted(wanted):
            with self._errors():
                if not len(self._of(name)):
                    raise DataError("ids", repr(name), "an id of the gallery", "Check its spelling.")
        images, gone = 0, list[np.ndarray]()
        for name in sorted(wanted):
            with self._errors():
                while len(rows := self._of(name)):
                    gone += [row for row in rows.unit if len(gone) < LOOKED_FOR and self._seen(row)]
                    self._store.drop(rows.keys)
                    if self._store.holds(rows.keys).any():
                        self._distrust("rows that it had deleted")
                    images += len(rows)
        with self._errors():
            self._store.erase()
            left = sorted({path.name for row in gone for path in self._seen(row)})
        erased = not left if gone else None
        told = {
            True: f"no file of {self._store.name} holds their vectors",
            False: f"their vectors are still in {', '.join(left)}: write the gallery to a new collection to erase them",
            None: f"whether {self._store.name} keeps their vectors in its files cannot be seen from here",
        }[erased]
        return Forgotten(images, len(self), erased, told)

    # The store, which is not believed.

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except Error:
            raise
        except Exception as e:  # whatever its client raises
            got = f"{type(e).__name__}: {str(e).strip()[:200]}"
            raise BackendError(self._store.name, got, "an answer", "Check that it runs, and its log.") from e

    def _distrust(self, got: str) -> None:
        raise BackendError(self._store.name, got, "what was put there", "Check the store, or write it anew.")

    def _of(self, name: str) -> Rows:
        rows = self._store.find([name])
        return rows.take(np.array([found == name for found in rows.ids], bool))

    def _seen(self, row: np.ndarray) -> list[Path]:
        files, trace = self._store.traces(row)
        return [path for path in files if _holds(path, trace)]

    def _checked(self, rows: Rows, least: int) -> Rows:
        """The rows of one answer, if they can be such. An empty answer is none where there are rows."""
        if len(rows) < least:
            self._distrust(f"{len(rows)} rows of {least}")
        if len(rows) and not (rows.keys.min() >= 0 and len(np.unique(rows.keys)) == len(rows)):
            self._distrust("a key below 0 or twice")
        norms = np.linalg.norm(rows.unit.astype(np.float64), axis=1)
        if not (np.abs(norms - 1) <= _ROUNDED).all() or not (np.isfinite(rows.length) & (rows.length > 0)).all():
            self._distrust("a row that is not finite or not of norm 1")
        if set(rows.models) - {self._model}:
            hint = "Open it with the model and the landmarks that it was made with, or embed its images again."
            raise DataError(self._store.name, "rows of another model or other landmarks", "this one's", hint)
        return rows

    # Rows and scores.

    def _draw(self, features: np.ndarray) -> None:
        assert self._live is not None
        at = np.linspace(0, len(features) - 1, min(len(features), LONGEST)).astype(int)
        self._live.build(features[at])
        self._live.settle()
        drawn = self._live.landmarks
        self._live.build(features[:0], drawn)
        self._drawn, self._model = True, self._own()
        if self._path:
            with atomic_write(self._path) as file:
                np.savez(file, **drawn)  # type: ignore[arg-type]

    def _prepare(self, features: np.ndarray) -> dict[str, np.ndarray]:
        if self._live is not None:
            return self._live.prepare(features)
        norms = np.linalg.norm(features.astype(np.float64), axis=1)
        return {"unit": unit_rows(features), "length": norms.astype(np.float32)}

    def _ranked(self, query: Mapping[str, np.ndarray], rows: Rows, count: int, top: int) -> tuple[Rows, np.ndarray]:
        """The `top` rows and their scores, of the `count` nearest."""
        cosines = (rows.unit.astype(np.float64) @ query["unit"][0].astype(np.float64)).astype(np.float32)
        best = _order(cosines, rows)[:count]
        rows, scores = rows.take(best), cosines[best]
        if self._live is not None and len(rows):
            scores = self._live.relate(query, {"unit": rows.unit, "length": rows.length})
        best = _order(scores, rows)[:top]
        return rows.take(best), scores[best]

    def _matches(
        self, query: Features, found: Sequence[tuple[Rows, np.ndarray]], searched: int, threshold: float | None
    ) -> Matches:
        none = Rows.none(self._runner.spec.backbone.features)
        rows = Rows.joined([none, *(rows for rows, _ in found)])
        width = len(found[0][0]) if found else 0
        labels = Features(rows.unit, camids=rows.cameras, paths=rows.paths, ids=rows.ids)
        times = np.where(rows.times <= NEVER, np.nan, rows.times)
        columns = label_columns(labels, times) | {"key": rows.keys}
        held = Held.of(Code(), {**columns, "codes": rows.unit, "scale": rows.length})
        places = np.arange(len(rows)).reshape(len(found), width)
        scores = np.array([s for _, s in found], np.float32).reshape(len(found), width)
        protocol: Protocol | None = QUICK if self._live is not None else None
        made = rank(self._runner, query, held, (places, scores), searched, threshold, protocol, self._decision)
        return replace(made, indices=made.keys)


def _key(model: str, name: str, features: np.ndarray) -> int:
    """63 bits of a hash over what tells an image apart: any two of 10^8 images share one with a chance of 0.05 %."""
    digest = hashlib.sha256(json.dumps([model, name]).encode() + features.astype("<f4").tobytes()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _order(scores: np.ndarray, rows: Rows) -> np.ndarray:
    """Highest first; ties by id, then by key."""
    keys = rows.keys.tolist()
    return np.array(sorted(range(len(rows)), key=lambda i: (-scores[i], rows.ids[i], keys[i])), np.int64)


def _holds(path: Path, trace: bytes) -> bool:
    try:
        with open(path, "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                return False
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return content.find(trace) >= 0
    except FileNotFoundError:  # the store has just replaced it
        return False


def _read(path: Path) -> dict[str, np.ndarray]:
    """Landmarks as `ShortlistGallery` wrote them. Who changed them meets rows of other landmarks."""
    with open_plain(path, "landmarks") as file:
        try:
            with np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)
        except UNREADABLE as e:
            hint = "Restore it, or add all images to a new collection."
            raise ArtifactError(str(path), f"a damaged file ({e})", "landmarks", hint) from e
