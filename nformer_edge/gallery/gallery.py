"""The gallery that users live with: images come under a name, are asked for, and are forgotten."""

from __future__ import annotations

import hashlib
import io
import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from nformer_edge.backends.runner import Runner
from nformer_edge.core.errors import ArtifactError, DataError, UsageError
from nformer_edge.core.features import Features, check_features, check_range, labels_of
from nformer_edge.core.preprocess import load_image
from nformer_edge.core.spec import check_at_least, check_choice, to_dict
from nformer_edge.core.values import JSON, Result, Table, to_json
from nformer_edge.gallery.codes import CODES, Code, CodeName
from nformer_edge.gallery.embed import embed_images, made_by
from nformer_edge.gallery.held import Held, label_columns
from nformer_edge.gallery.images import Images, Source, image_sources
from nformer_edge.gallery.protocols import JOINT, PER_QUERY
from nformer_edge.gallery.search import (
    HeadUse,
    Matches,
    Protocol,
    Time,
    allowed_images,
    check_model,
    check_threshold,
    head_use,
    rank,
    search_related,
    seconds_of,
    top_matches,
)
from nformer_edge.gallery.store import Entry, Store
from nformer_edge.metrics.distance import unit_rows

#: The longer side of a thumbnail, in pixels.
THUMBNAIL = 256

_DAY = 24 * 3600.0


@dataclass(frozen=True)
class GalleryStats(Result):
    """What a gallery holds.

    Args:
        images: how many.
        ids: different ids.
        cameras: different cameras that are known.
        features: numbers an image, D.
        code: how they are kept (`gallery.codes`).
        bytes_per_image: of memory, labels excluded.
        memory_mib: of all images, labels excluded.
        disk_mib: of the gallery's files; null for one in memory.
        oldest: when the first image was seen, seconds since 1970; null where no time is known.
        newest: likewise the last.
        thumbnails: whether pictures are kept.
        audit: whether searches are logged.
        model: architecture and image size.
        path: the gallery's folder, or "".
    """

    kind: ClassVar[str] = "gallery"
    version: ClassVar[int] = 2

    images: int
    ids: int
    cameras: int
    features: int
    code: str
    bytes_per_image: int
    memory_mib: float
    disk_mib: float | None
    oldest: float | None
    newest: float | None
    thumbnails: bool
    audit: bool
    model: str
    path: str

    def __str__(self) -> str:
        cameras = f", {self.cameras:,} cameras" if self.cameras else ""
        size = (
            f"{self.features} numbers as {self.code}, {self.bytes_per_image} bytes an image, {self.memory_mib:.1f} MiB"
        )
        disk = "" if self.disk_mib is None else f"\n{self.path}: {self.disk_mib:.1f} MiB on disk"
        seen = (
            "" if self.oldest is None or self.newest is None else f", seen {_date(self.oldest)} to {_date(self.newest)}"
        )
        return f"{self.images:,} images of {self.ids:,} ids{cameras}{seen}: {size}, model {self.model}{disk}"


@dataclass(frozen=True)
class Changed(Result):
    """What was done to a gallery.

    Args:
        action: ``add``, ``remove``, ``merge``, ``migrate``, ``compact`` or ``backup``.
        images: how many were added, removed, taken over, embedded again, or are kept.
        ids: how many ids these have.
        total: images in the gallery now.
        path: the gallery's folder, of a backup the new one; "" for a gallery in memory.
    """

    kind: ClassVar[str] = "gallery-changed"

    action: str
    images: int
    ids: int
    total: int
    path: str

    def __str__(self) -> str:
        said = f"{self.action}: {self.images:,} images of {self.ids:,} ids, {self.total:,} images in the gallery now"
        forgotten = "\n`gallery compact` takes what was removed out of the gallery's files"
        return said + (forgotten if self.action == "remove" and self.path else "")


@dataclass(frozen=True)
class Audit(Result):
    """What was done to a gallery and asked of it, oldest first. No entry holds a name.

    Args:
        entries: one a call.
    """

    kind: ClassVar[str] = "gallery-audit"

    entries: tuple[Entry, ...]

    def __str__(self) -> str:
        lines = [f"{'time (UTC)':20}  {'action':8}  {'images':>8}  {'ids':>6}  note"]
        lines += [f"{_date(e.time):20}  {e.action:8}  {e.images:8,}  {e.ids:6,}  {e.note}" for e in self.entries]
        return "\n".join(lines)


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


class Gallery:
    """Images to search, in memory or kept in a folder; see `Model.gallery`. Images stay in the order of adding.

    Several threads may call one gallery: a search takes the gallery as it is when it begins, and changes go one after
    the other. So may several processes: each sees what another has written at its next call.

    Args:
        runner: an open model; None: what needs no model can be done.
        path: a folder; None: in memory.
        code: of a new gallery: how features are kept, ``fp32``, ``fp16`` or ``int8``; `compact` knows more.
        thumbnails: of a new gallery: keep each image, at most `THUMBNAIL` pixels high, so that `migrate` can embed it
            with another model.
        audit: of a new gallery: log each search.

    Raises:
        ArtifactError: for a file that is damaged or of another version; where there is none and no `runner`.
        DataError: for a gallery of another model or preprocessing.
    """

    def __init__(
        self,
        runner: Runner | None,
        path: str | os.PathLike[str] | None = None,
        *,
        code: CodeName = "fp32",
        thumbnails: bool = False,
        audit: bool = False,
    ) -> None:
        if code not in CODES[:3]:
            check_choice("code", code, CODES)
            raise UsageError("code", code, " | ".join(CODES[:3]), "Add images first; `compact` then learns this code.")
        self._runner, self._lock, self._log = runner, threading.RLock(), list[Entry]()
        about = None if runner is None else {**_about(runner), "thumbnails": thumbnails, "audit": audit}
        self._store = None if path is None else Store(path, about, code)
        if self._store is None and about is None:
            raise UsageError("gallery", "neither a model nor a path", "one of them", "Pass the gallery's folder.")
        self._about = about or {}
        if self._store:
            self._about = {key: self._store.get(key) for key in (*_IDENTITY, "thumbnails", "audit")}
        if runner is not None:
            self._check_identity(runner)
        self._next = self._changes = 0
        if self._store:
            self._load()
        else:
            self._held = _empty(Code(code), self._features)

    @property
    def _features(self) -> int:
        """D."""
        size = self._about["features"]
        if not isinstance(size, int):
            raise ArtifactError("gallery", f"features {size!r}", "a whole number", "Restore it from a backup.")
        return size

    def _check_identity(self, runner: Runner) -> None:
        made = {key: str(self._about[key]) for key in ("model", "checkpoint", "precision")}
        check_model(runner, Features(np.empty((0, self._features), np.float32), **made), "gallery")  # type: ignore[arg-type]
        if self._about["preprocess"] != _about(runner)["preprocess"]:
            hint = "Open the model that it was made with, or embed its images again: nformer-edge gallery migrate"
            raise DataError("gallery", "images brought to the model in another way", "this model's preprocessing", hint)

    def __enter__(self) -> Gallery:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the file back; a gallery in memory is not changed."""
        if self._store:
            self._store.close()

    def __len__(self) -> int:
        return len(self._current())

    def __str__(self) -> str:
        return str(self.stats())

    def to_json(self) -> Table:
        """What the gallery holds, in numbers. `Features.save` keeps the images' features themselves."""
        return self.stats().to_json()

    @property
    def features(self) -> Features:
        """Everything in the gallery: features, ids, cameras and paths."""
        held = self._current().features
        return made_by(self._runner, held) if self._runner else held

    def add(
        self,
        images: Images | Features,
        ids: str | Sequence[str | int] | None = None,
        cameras: int | Sequence[int] | None = None,
        times: Time | Sequence[Time] | None = None,
        meta: JSON | Sequence[JSON] = None,
        *,
        boxes: ArrayLike | None = None,
        batch: int = 32,
    ) -> Changed:
        """Adds images, all or none. When it returns, those of a gallery in a folder are on the disk.

        Args:
            images: as for `Model.embed`, or features that this model gave, such as `Features.load` reads.
            ids: a name an image, or one for all of them; an id may have several images. If None: the person's number
                where it is known, or else the path, or else a running number.
            cameras: a number an image, or one for all of them; those of `images`, or unknown, if None.
            times: when they were seen, one an image or one for all: seconds since 1970, a `datetime`, or ISO text
                (UTC where no zone is named). If None: now.
            meta: your own JSON data, a list of one an image, or one table for all; matches give them back.
            boxes: of people in `images`, one frame.
            batch: images run at once.

        Raises:
            Error: as `Model.embed`; for labels that are not one an image; for rows that are not finite, all zeros, of
                another size or of another model.
        """
        runner = self._require_model("add")
        sources = None if isinstance(images, Features) else image_sources(images, boxes)
        new = images if isinstance(images, Features) else embed_images(runner, sources or [], batch=batch)
        check_model(runner, new, "images")
        check_features(new.features, "images", self._features)
        check_range(new.features, "images")
        count = len(new)
        camids = new.camids if cameras is None else labels_of("cameras", _each("cameras", cameras, count))
        seen = np.array(
            [seconds_of("times", t) for t in _each("times", time.time() if times is None else times, count)]
        )
        metas = [to_json(value) for value in _each("meta", meta, count)]
        names = None if ids is None else [str(name) for name in _each("ids", ids, count)]
        for name in names or ():
            if not name:
                raise DataError("ids", "an empty name", "a name an image", "Leave ids out to number the images.")
        with self._changing("add") as done:
            numbers = range(self._next, self._next + count)
            given = names or [name or str(number) for name, number in zip(new.names, numbers, strict=True)]
            labeled = replace(new, camids=camids, ids=tuple(given))
            held = self._encoded(new.features, label_columns(labeled, seen, metas, self._next))
            self._next += count
            if self._store:
                held = self._store.append(held)
                self._store.put(next=self._next)
                if self._about["thumbnails"] and sources is not None:
                    self._store.put_thumbnails(dict(zip(held["key"].tolist(), map(_thumbnail, sources), strict=True)))
            return done(self._held.extended(held), count, len(set(given)))

    def remove(self, ids: str | int | Sequence[str | int] = (), *, keep_days: float | None = None) -> Changed:
        """Removes all images of these ids, or all that are older; `compact` then takes them out of the files.

        Args:
            ids: their names.
            keep_days: remove what was seen longer ago than this; images without a time stay.

        Raises:
            DataError: for an id that is not there, with the nearest one. Nothing is removed then.
        """
        wanted = {str(name) for name in ([ids] if isinstance(ids, (str, int)) else ids)}
        if keep_days is not None and not keep_days >= 0:
            raise UsageError("keep_days", keep_days, "0 or more", "Name the days that images are kept.")
        with self._changing("remove") as done:
            held = self._held
            names = held["ids"].tolist()
            for name in sorted(wanted - set(names)):
                near = get_close_matches(name, set(names), n=1)
                hint = f"Did you mean {near[0]!r}?" if near else "`gallery.features.ids` lists them."
                raise DataError("ids", repr(name), "an id of the gallery", hint)
            gone = np.array([name in wanted for name in names], bool)
            if keep_days is not None:
                gone |= held["times"] < time.time() - keep_days * _DAY
            kept = held.take(~gone)
            if self._store:
                for number in np.unique(held["batch"][gone]).tolist():
                    self._store.rewrite(number, kept.take(kept["batch"] == number))
                self._store.drop_thumbnails(held["key"][gone].tolist())
                self._changes += 1
                self._store.put(changes=self._changes)
            return done(kept, int(gone.sum()), len({name for name, out in zip(names, gone, strict=True) if out}))

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
        one_person: bool = False,
        boxes: ArrayLike | None = None,
        head: HeadUse = "auto",
        images_per_person: int | None = None,
        together: bool = False,
        batch: int = 32,
        note: str = "",
    ) -> Matches:
        """Ranks the gallery for each query; ties by id.

        Args:
            images: queries, as for `add`.
            top: matches a query.
            cameras: only images of these cameras are ranked.
            since: only images seen then or later, as `times` of `add`.
            until: only images seen then or earlier.
            exclude_camera: images of this camera are not ranked, such as the query's own.
            threshold: cosine from which a match counts, as `report.threshold` recommends; None: all count.
            one_person: all `images` show one person: one query, the mean of their features at L2 norm 1.
            boxes: of people in `images`, one frame.
            head: let the NFormer head see each query with the gallery first. ``auto``: where the model's own
                measurement says that it does no harm (`search.head_decision`).
            images_per_person: that the gallery has, where the caller knows; for ``auto``.
            together: all queries and the gallery in one pass of the head.
            batch: images run at once.
            note: for the log of a gallery that logs its searches, such as a case number.

        Raises:
            Error: as `Model.embed`; for an empty gallery, features of another model or a filter that cannot be read.
        """
        runner = self._require_model("search")
        check_threshold(threshold)
        check_at_least("top", top, 1)
        held = self._current()
        if not len(held):
            raise DataError("gallery", "zero images", "at least one", "Add images first.")
        query = images if isinstance(images, Features) else embed_images(runner, images, boxes, batch=batch)
        check_model(runner, query, "queries")
        if one_person and len(query) > 1:
            mean = unit_rows(query.features, "queries").mean(axis=0, keepdims=True)
            query = query.take(np.array([0])).with_features(mean)
        allowed = allowed_images(held, cameras, since, until, exclude_camera)
        use, decision = head_use(runner, head, held, images_per_person)
        protocol: Protocol | None = None
        if use:
            protocol = JOINT if together else PER_QUERY
            found = search_related(runner, query, held.features, top, together, allowed)
        else:
            found = top_matches(query, held, top, allowed)
        if self._about["audit"]:
            with self._changing("search", note) as done:
                done(self._held, len(query), 0)
        searched = len(held) if allowed is None else int(allowed.sum())
        return rank(runner, query, held, found, searched, threshold, protocol, decision)

    def compact(self, code: CodeName | None = None) -> Changed:
        """Writes the gallery's files anew: without a byte of what was removed, small batches joined.

        Args:
            code: keep features so from now on (`gallery.codes`); what a smaller code drops does not come back.

        Raises:
            BackendError: if another process reads or writes just then; run it again.
        """
        with self._changing("compact") as done:
            held = self._held
            if code is not None and code != held.code.name:
                features = held.features.features
                fitted = Code.fit(code, features)
                held = Held.of(fitted, held.labels | fitted.encode(features))
            if self._store:
                self._store.put_code(held.code)
                self._store.clear()
                held = self._store.append(held)
                self._changes += 1
                self._store.put(changes=self._changes)
            changed = done(held, len(held), len(set(held["ids"].tolist())))
        if self._store:
            with self._lock:
                self._store.shrink()
        return changed

    def stats(self) -> GalleryStats:
        """What the gallery holds, in numbers."""
        held = self._current()
        cameras, times = np.unique(held["cameras"][held["cameras"] >= 0]), held["times"][~np.isnan(held["times"])]
        return GalleryStats(
            len(held),
            len(set(held["ids"].tolist())),
            len(cameras),
            self._features,
            held.code.name,
            held.bytes_per_image,
            held.bytes_per_image * len(held) / 2**20,
            self._store.bytes / 2**20 if self._store else None,
            float(times.min()) if len(times) else None,
            float(times.max()) if len(times) else None,
            bool(self._about["thumbnails"]),
            bool(self._about["audit"]),
            str(self._about["name"]),
            str(self._store.path.parent) if self._store else "",
        )

    def audit(self) -> Audit:
        """The log: what was added and removed and, if so chosen when it was made, each search."""
        with self._lock:
            return Audit(self._store.entries() if self._store else tuple(self._log))

    def backup(self, path: str | os.PathLike[str]) -> Changed:
        """Writes the gallery as it is now to another folder, whole or not at all, while others read and write.

        What is removed later stays in a backup: restoring it brings it back.

        Raises:
            ArtifactError: if there is one already, or the disk is full.
        """
        held = self._current()
        store = self._require_store("backup")
        with self._lock:
            folder = store.copy_to(path)
        return Changed("backup", len(held), len(set(held["ids"].tolist())), len(held), str(folder))

    def merge(self, other: Gallery | str | os.PathLike[str]) -> Changed:
        """Adds all images of another gallery of the same model, with their labels and pictures.

        Raises:
            DataError: if it is of another model or preprocessing.
        """
        theirs = other if isinstance(other, Gallery) else Gallery(None, other)
        for key in _IDENTITY:
            if key != "name" and theirs._about[key] != self._about[key]:
                hint = "Embed its images again with this gallery's model: nformer-edge gallery migrate"
                raise DataError("gallery", f"another {key}", f"{str(self._about[key])[:12]}, as here", hint)
        new = theirs._current()
        with self._changing("merge") as done:
            keys = new["key"].tolist()
            labels = new.labels | {"key": np.arange(self._next, self._next + len(new))}
            held = self._encoded(new.features.features, labels)
            self._next += len(new)
            if self._store:
                held = self._store.append(held)
                self._store.put(next=self._next)
                if theirs._store and self._about["thumbnails"]:
                    pictures = {
                        mine: theirs._store.thumbnail(key) for mine, key in zip(held["key"].tolist(), keys, strict=True)
                    }
                    self._store.put_thumbnails({key: picture for key, picture in pictures.items() if picture})
            return done(self._held.extended(held), len(held), len(set(new["ids"].tolist())))

    # How values change.

    def _require_model(self, what: str) -> Runner:
        if self._runner is None:
            hint = "Open it by the model: ne.open(model).gallery(path)."
            raise UsageError("gallery", f"no model to {what} with", "an open one", hint)
        return self._runner

    def _require_store(self, what: str) -> Store:
        if self._store is None:
            raise UsageError("gallery", f"a gallery in memory to {what}", "one in a folder", "Give it a path.")
        return self._store

    def _encoded(self, features: np.ndarray, labels: dict[str, np.ndarray]) -> Held:
        code = self._held.code
        return Held.of(code, {**code.encode(features), **labels})

    def _current(self) -> Held:
        """What the gallery holds, with what other processes wrote. Who writes just then is not waited for."""
        if self._store and self._lock.acquire(blocking=False):
            try:
                if self._store.changed():
                    self._load()
            finally:
                self._lock.release()
        return self._held

    def _load(self) -> None:
        """Reads what is new; all of it, where images were removed."""
        store = self._require_store("read")
        with store.reading():
            changes, self._next = store.number("changes"), store.number("next")
            fresh = not hasattr(self, "_held") or changes != self._changes
            held = _empty(store.code(self._features), self._features) if fresh else self._held
            last = int(held["batch"][-1]) if len(held) else 0
            for more in store.read(held.code, self._features, last):
                held = held.extended(more)
        self._held, self._changes = held, changes

    @contextmanager
    def _changing(self, action: str, note: str = "") -> Iterator[_Done]:
        """One change: on the disk, in the log and seen by searches when the block ends; or, if it fails, not at all."""
        with self._lock:
            before = self._next, self._changes
            done = _Done(action, str(self._store.path.parent) if self._store else "")
            try:
                if self._store is None:
                    yield done
                    self._log.append(Entry(time.time(), action, done.ids, done.images, note))
                else:
                    with self._store.writing():
                        if self._store.changed():
                            self._load()
                        before = self._next, self._changes
                        yield done
                        self._store.log(action, done.ids, done.images, note)
            except BaseException:
                self._next, self._changes = before
                raise
            if done.held is not None:
                self._held = done.held


class _Done:
    """What a change came to."""

    def __init__(self, action: str, path: str) -> None:
        self.action, self.path = action, path
        self.held: Held | None = None
        self.images = self.ids = 0

    def __call__(self, held: Held, images: int, ids: int) -> Changed:
        self.held, self.images, self.ids = held, images, ids
        return Changed(self.action, images, ids, len(held), self.path)


#: What must be the same for features to be compared, and the model's name.
_IDENTITY = ("model", "checkpoint", "precision", "preprocess", "features", "name")


def _about(runner: Runner) -> dict[str, object]:
    """What a gallery of this model says of itself."""
    preprocess = json.dumps(to_dict(runner.spec.preprocess), sort_keys=True).encode()
    made = runner.sha256, runner.checkpoint, runner.precision["backbone"], hashlib.sha256(preprocess).hexdigest()
    return dict(zip(_IDENTITY, (*made, runner.spec.backbone.features, runner.name), strict=True))


def _empty(code: Code, features: int) -> Held:
    none = Features(np.empty((0, features), np.float32))
    return Held.of(code, {**code.encode(none.features), **label_columns(none)})


def _each(name: str, values: object, count: int) -> list[object]:
    """One value an image: those given, or the one for all.

    Raises:
        DataError: for another number of them.
    """
    if isinstance(values, (str, bytes, dict)) or not isinstance(values, (Sequence, np.ndarray)) or np.ndim(values) == 0:  # type: ignore[arg-type]
        return [values] * count
    if len(values) != count:
        hint = f"Pass one of the {name} for each image, or one for all."
        raise DataError(name, f"{len(values)} for {count} images", f"{count}", hint)
    return [*values]


def _thumbnail(source: Source) -> bytes:
    image = source if isinstance(source, Image.Image) else load_image(source)
    image = image.copy()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return file.getvalue()
