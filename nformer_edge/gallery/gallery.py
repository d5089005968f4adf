"""The gallery that users live with: images come under a name, are asked for, and are forgotten."""

from __future__ import annotations

import hashlib
import io
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from nformer_edge.backends.runner import Runner
from nformer_edge.core.errors import ArtifactError, DataError, UsageError
from nformer_edge.core.features import UNKNOWN, Features, check_features, check_range, labels_of
from nformer_edge.core.preprocess import load_image
from nformer_edge.core.spec import GalleryCode, check_at_least, check_choice, to_dict
from nformer_edge.core.values import JSON, Table, to_json
from nformer_edge.data.readers import read_dataset
from nformer_edge.data.records import Dataset, ImageRecord
from nformer_edge.gallery.codes import CODES, Code, CodeScore, best_scored, measure_codes
from nformer_edge.gallery.embed import embed_images, made_by
from nformer_edge.gallery.held import Held, label_columns
from nformer_edge.gallery.images import Images, Source, image_sources
from nformer_edge.gallery.live import LiveHead
from nformer_edge.gallery.protocols import JOINT, PER_QUERY, QUICK
from nformer_edge.gallery.results import Audit, Changed, Compacted, GalleryStats
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

#: Images that are queries once, to measure codes with.
QUERIES = 1000

_DAY = 24 * 3600.0


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
        code: GalleryCode = "fp32",
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
            self._read_about(self._store)
        self._live: LiveHead | None = None
        self._whole_passes = False
        self._live_held, self._live_lock = _empty(Code(code), self._features), threading.Lock()
        self._next = self._changes = 0
        if self._store:
            self._load()
            held_code = self._store.code(self._features).name
            asked = {"thumbnails": thumbnails, "audit": audit, "code": code not in ("fp32", held_code)}
            for setting in [name for name, wanted in asked.items() if wanted and not self._about.get(name)]:
                hint = "Leave it out, or make a new gallery and merge this one into it."
                raise UsageError(setting, "a gallery that was made without it", "a new gallery", hint)
        else:
            self._held = _empty(Code(code), self._features)

    @property
    def _features(self) -> int:
        """D."""
        size = self._about["features"]
        if not isinstance(size, int):
            raise ArtifactError("gallery", f"features {size!r}", "a whole number", "Restore it from a backup.")
        return size

    def _read_about(self, store: Store) -> None:
        """What the gallery says of itself, which must be of this model."""
        self._about = {key: store.get(key) for key in (*_IDENTITY, "thumbnails", "audit")}
        if (runner := self._runner) is None:
            return
        made = {key: str(self._about[key]) for key in ("model", "checkpoint", "precision")}
        none = Features(np.empty((0, self._features), np.float32), **made)  # type: ignore[arg-type]
        hint = "Open the model that it was made with, or embed its images again: nformer-edge gallery migrate"
        check_model(runner, none, "gallery", hint)
        if self._about["preprocess"] != _about(runner)["preprocess"]:
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
        pictures: Images | None = None,
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
            pictures: of features, the images that they were computed from, for thumbnails.

        Raises:
            Error: as `Model.embed`; for labels that are not one an image; for rows that are not finite, all zeros, of
                another size or of another model.
        """
        runner = self._require_model("add")
        shown = pictures if isinstance(images, Features) else images
        sources = None if shown is None else image_sources(shown, boxes)
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
        names = None if ids is None else [_id(name) for name in _each("ids", ids, count)]
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
        wanted = {_id(name) for name in ([ids] if isinstance(ids, (str, int)) else ids)}
        if not wanted and keep_days is None:
            raise UsageError("remove", "no id and no age", "ids, or keep_days", "Name what to remove.")
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
        exact: bool = True,
        shortlist: int | None = None,
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
            images_per_person: that the gallery has, where the caller knows; by the ids if None. The head's gates and
                ``auto`` go by it; another number than in the last search computes the head's layers anew.
            exact: the head lets the query change the gallery, as a whole pass over both would; False is quicker
                (`live.LiveHead.ask`).
            shortlist: the head relates the query with so many images alone, the nearest ones.
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
        live = self._live_head(runner) if use and not together else None
        if live is not None:
            protocol = PER_QUERY if exact and shortlist is None else QUICK
            nearest = None if shortlist is None else top_matches(query, held, shortlist, allowed)[0]
            scores = self._live_scores(live, held, query, exact, nearest, images_per_person)
            found = best_scored(scores, top if shortlist is None else min(top, shortlist), allowed, held["ids"])
        elif use:
            protocol = JOINT if together else PER_QUERY
            found = search_related(runner, query, held.features, top, together, allowed)
        else:
            found = top_matches(query, held, top, allowed)
        if self._about["audit"]:
            with self._changing("search", note) as done:
                done(self._held, len(query), 0)
        searched = len(held) if allowed is None else int(allowed.sum())
        return rank(runner, query, held, found, searched, threshold, protocol, decision)

    def compact(
        self,
        code: GalleryCode | None = None,
        *,
        max_map_drop: float | None = None,
        held_out: str | os.PathLike[str] | None = None,
    ) -> Compacted:
        """Writes the gallery's files anew: without a byte of what was removed, small batches joined.

        Args:
            code: keep features so from now on (`gallery.codes`); what a smaller code drops does not come back.
            max_map_drop: choose the smallest code that loses no more points of mAP than this.
            held_out: a feature store of this model with query and gallery, of people to measure with; if None this
                gallery's ids, each image a query once (at most `QUERIES`).

        Raises:
            UsageError: for a code and a budget at once.
            DataError: if no two images have the same id, or features are of another model.
            BackendError: if another process reads or writes just then; run it again.
        """
        if code is not None and max_map_drop is not None:
            raise UsageError("code", "a code and a budget", "one of them", "Leave one out.")
        before, scores = self._store.bytes if self._store else 0, tuple[CodeScore, ...]()
        with self._changing("compact") as done:
            held = self._held
            if max_map_drop is not None:
                check_at_least("max_map_drop", max_map_drop, 0)
                scores = measure_codes(*self._measured_with(held_out))
                allowed = scores[0].mAP - max_map_drop / 100
                code = min((s for s in scores if s.mAP >= allowed), key=lambda s: s.bytes_per_image).code
            if code is not None and code != held.code.name:
                features = held.features.features
                fitted = Code.fit(code, features)
                held = Held.of(fitted, held.labels | fitted.encode(features))
            if self._store:
                held = self._rewritten(self._store, held)
            done(held, len(held), len(set(held["ids"].tolist())))
        if self._store:
            with self._lock:
                self._store.shrink()
        after = self._store.bytes if self._store else 0
        return Compacted(len(held), held.code.name, held.bytes_per_image, before, after, scores)

    def _measured_with(self, held_out: str | os.PathLike[str] | None) -> tuple[Features, Features]:
        """Query and gallery to measure codes with, people numbered."""
        if held_out is not None:
            pair = Features.load(held_out, "query"), Features.load(held_out, "gallery")
            for features in pair:
                made = {key: str(self._about[key]) for key in ("model", "checkpoint", "precision")}
                if features.model and not features.shares_model(*made.values()):
                    raise DataError(
                        str(held_out), "features of another model", "this gallery's", "Embed the images again."
                    )
            return pair
        held = self._held
        numbers = np.unique(held["ids"].astype(str), return_inverse=True)[1] + 1
        alone = np.arange(len(held), dtype=np.int64)  # each image its own camera: all but itself can be its match
        gallery = replace(held.features, pids=numbers, camids=alone)
        chosen = np.sort(np.random.default_rng(0).permutation(len(held))[:QUERIES])
        return gallery.take(chosen), gallery

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

    def people(self) -> dict[str, int]:
        """Of each id how many images, in the order of their names."""
        return dict(sorted(Counter(self._current()["ids"].tolist()).items()))

    def thumbnail(self, key: int) -> bytes | None:
        """The picture, a JPEG, of the image that `Match.key` names; None where none was kept."""
        with self._lock:
            return self._store.thumbnail(key) if self._store else None

    def audit(self) -> Audit:
        """The log: what was added and removed and, if so chosen when it was made, each search."""
        with self._lock:
            return Audit(self._store.entries() if self._store else tuple(self._log))

    def backup(self, to: str | os.PathLike[str]) -> Changed:
        """Writes the gallery as it is now to another folder, whole or not at all, while others read and write.

        What is removed later stays in a backup: restoring it brings it back.

        Raises:
            ArtifactError: if there is one already, or the disk is full.
        """
        held = self._current()
        store = self._require_store("backup")
        with self._lock:
            folder = store.copy_to(to)
        return Changed("backup", len(held), len(set(held["ids"].tolist())), len(held), str(folder))

    def merge(self, other: Gallery | str | os.PathLike[str]) -> Changed:
        """Adds all images of another gallery of the same model, with their labels and pictures.

        Raises:
            DataError: if it is of another model or preprocessing.
        """
        theirs = other if isinstance(other, Gallery) else Gallery(None, other)
        same = self._store and theirs._store and os.path.samefile(self._store.path, theirs._store.path)
        if theirs is self or same:
            raise UsageError("merge", "the gallery itself", "another gallery", "Name another folder.")
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

    def migrate(self, runner: Runner, *, batch: int = 32) -> Changed:
        """Embeds the kept thumbnails with another model, which the gallery is then for.

        A thumbnail is smaller than the image was: features differ a little from those of the image itself.

        Args:
            runner: the other model, open.
            batch: images run at once.

        Raises:
            DataError: if an image has no thumbnail; the gallery is then as it was.
        """
        store = self._require_store("migrate")
        with self._changing("migrate") as done:
            held, pictures = self._held, list[Image.Image]()
            for key, name in zip(held["key"].tolist(), held["ids"].tolist(), strict=True):
                picture = store.thumbnail(key)
                if picture is None:
                    hint = "Remove it, or add all images to a new gallery."
                    raise DataError(f"image of {name!r}", "no thumbnail", "one of each image", hint)
                pictures.append(Image.open(io.BytesIO(picture), formats=["JPEG"]))
            about = _about(runner)
            code = held.code if held.code.directions is None else Code()
            held = _empty(code, runner.spec.backbone.features) if not pictures else held
            if pictures:
                features = embed_images(runner, pictures, batch=batch).features
                held = Held.of(code, held.labels | code.encode(features))
            store.put(**about)
            changed = done(self._rewritten(store, held), len(held), len(set(held["ids"].tolist())))
        self._about, self._runner, self._live = {**self._about, **about}, runner, None
        return changed

    # How values change.

    def _rewritten(self, store: Store, held: Held) -> Held:
        """The file's batches and code, written anew."""
        store.put_code(held.code)
        store.clear()
        self._changes += 1
        store.put(changes=self._changes)
        return store.append(held)

    def _live_head(self, runner: Runner) -> LiveHead | None:
        """The head's live form; None where the model has none, and whole passes answer."""
        with self._live_lock:
            if self._live is None and not self._whole_passes:
                try:
                    self._live = LiveHead.open(runner)
                except ArtifactError:
                    self._whole_passes = True
            return self._live

    def _live_scores(
        self, live: LiveHead, held: Held, query: Features, exact: bool, nearest: np.ndarray | None, images: int | None
    ) -> np.ndarray:
        """float32 [Q, N], after the live head has followed the gallery to what it is now."""
        with self._live_lock:
            before = self._live_held
            if before is not held:
                self._live_held = _empty(Code(), self._features)  # if it fails half way: it is built anew
                _follow(live, before, held)
                self._live_held = held
            live.tell(held.told_images if images is None else images)
            if nearest is None:
                return live.ask(query.features, exact)
            rows = zip(query.features[:, None], nearest, strict=True)
            return np.concatenate([live.ask(row, among=among) for row, among in rows])

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
            if fresh:
                self._read_about(store)
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


def _id(name: object) -> str:
    """An id as text.

    Raises:
        DataError: for what is neither text nor a whole number, or empty text.
    """
    if isinstance(name, (str, int, np.integer)) and not isinstance(name, bool) and str(name):
        return str(name)
    got = "an empty name" if name == "" else f"{type(name).__name__} {name!r:.60}"
    raise DataError("ids", got, "text or a whole number, one an image or one for all", "Pass a list, or leave ids out.")


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


def _follow(live: LiveHead, before: Held, held: Held) -> None:
    """Brings a live head from what the gallery was to what it is. Images keep their keys and their order."""
    gone = np.flatnonzero(~np.isin(before["key"], held["key"]))
    fresh = held.take(np.flatnonzero(~np.isin(held["key"], before["key"])))
    if before.code is not held.code or len(gone) + len(fresh) > len(held) // 2:
        live.build(held.features.features)
        return
    if len(gone):
        live.remove(gone)
    if len(fresh):
        live.add(fresh.features.features)
    if live.grown:
        live.rebuild()


def add_data(
    gallery: Gallery,
    data: Dataset | str | os.PathLike[str],
    *,
    name: str | None = None,
    ids_from: Literal["labels", "folder", "file"] = "labels",
    camera: int | None = None,
    time: Time | None = None,
    batch: int = 32,
) -> Changed:
    """Adds a folder of images, a dataset (its gallery, or else all of it) or a feature store to a gallery.

    Args:
        name: the id of all of them.
        ids_from: where else ids come from: ``labels``, the dataset's (the folder's name where a folder is a person), or
            else the paths; ``folder``, the names of the folders that images lie in; ``file``, their names without the
            ending.
        camera: of all of them; the dataset's if None.
        time: when they were seen; now if None.

    Raises:
        Error: as `Gallery.add`.
    """
    images: Images | Features
    if not isinstance(data, Dataset) and os.fspath(data).endswith(".npz"):
        images = features = Features.load(data)
        paths, cameras, labels = features.paths, features.camids.tolist(), features.names
    else:
        dataset = data if isinstance(data, Dataset) else read_dataset(data, whole=True)
        records = dataset.gallery or dataset.train
        paths, cameras = tuple(r.path for r in records), [r.camid for r in records]
        labels = tuple(str(r.pid) if r.pid != UNKNOWN else r.path for r in records)
        images = [*paths]
        if folders := _people_folders(dataset, records):
            labels = tuple(folders.get(r.pid, label) for r, label in zip(records, labels, strict=True))
    ids: Sequence[str] = labels
    if ids_from != "labels":
        if name is not None:
            raise UsageError("ids_from", f"{ids_from}, and the id {name!r}", "one of them", "Leave out the other.")
        check_choice("ids_from", ids_from, ("labels", "folder", "file"))
        ids = [Path(path).parent.name if ids_from == "folder" else Path(path).stem for path in paths]
    return gallery.add(images, ids if name is None else name, cameras if camera is None else camera, time, batch=batch)


def _people_folders(dataset: Dataset, records: Sequence[ImageRecord]) -> dict[int, str]:
    """Each person's folder where a folder is a person: its name is who it is, and the number is the reader's own."""
    names: dict[int, set[str]] = {}
    for record in records:
        if record.pid != UNKNOWN:
            folder = Path(record.path).parent
            names.setdefault(record.pid, set()).add("" if folder == Path(dataset.root) else folder.name)
    found = {pid: next(iter(held)) for pid, held in names.items() if len(held) == 1}
    apart = len(found) == len(names) == len(set(found.values())) and "" not in found.values()
    return found if apart else {}


def _thumbnail(source: Source) -> bytes:
    image = source if isinstance(source, Image.Image) else load_image(source)
    image = image.copy()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return file.getvalue()
