"""The gallery that users live with: images come under a name, are asked for, and are forgotten."""

from __future__ import annotations

import io
import os
import time
import typing
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from nformer_edge.backends.runner import Runner
from nformer_edge.core.errors import DataError, UsageError
from nformer_edge.core.features import Features, check_features, check_range
from nformer_edge.core.preprocess import load_image
from nformer_edge.core.spec import GalleryCode, HeadState, check_at_least, check_choice, check_flags, check_whole
from nformer_edge.core.values import JSON, Table, to_json
from nformer_edge.gallery import upkeep
from nformer_edge.gallery.codes import best_scored
from nformer_edge.gallery.embed import embed_images, made_by
from nformer_edge.gallery.following import Following
from nformer_edge.gallery.held import Time, Where, each, ids_of, label_columns, new_id, seen_by
from nformer_edge.gallery.images import Images, Source, image_sources
from nformer_edge.gallery.kept import Kept
from nformer_edge.gallery.protocols import JOINT, PER_QUERY, QUICK
from nformer_edge.gallery.results import Audit, Changed, Compacted, GalleryStats
from nformer_edge.gallery.search import (
    HeadUse,
    Matches,
    Protocol,
    check_model,
    check_threshold,
    features_of,
    head_use,
    rank,
    search_related,
    top_matches,
)
from nformer_edge.gallery.store import KEYS
from nformer_edge.metrics.distance import unit_rows

#: The longer side of a thumbnail, in pixels.
THUMBNAIL = 256

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
        create: make a gallery where the folder has none; without a `runner` none is made.
        head_state: how the head's rows are kept in memory, ``fp32``, ``fp16`` or ``int8``: smaller ones take longer to
            search (docs/gallery.md).

    Raises:
        ArtifactError: for a file that is damaged or of another version; where there is none and none is made.
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
        create: bool = True,
        head_state: HeadState = "fp32",
    ) -> None:
        check_choice("head_state", head_state, typing.get_args(HeadState))
        check_flags(thumbnails=thumbnails, audit=audit, create=create)
        self._kept = Kept(runner, path, code, thumbnails=thumbnails, audit=audit, create=create)
        self._head = Following(self._kept, head_state)

    def __enter__(self) -> Gallery:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the file back, after the head's state was kept (`following`); one in memory is not changed."""
        self._head.close()
        if self._kept.store:
            self._kept.store.close()

    def __len__(self) -> int:
        return len(self._kept.held())

    def __str__(self) -> str:
        return str(self.stats())

    def to_json(self) -> Table:
        """What the gallery holds, in numbers. `Features.save` keeps the images' features themselves."""
        return self.stats().to_json()

    @property
    def features(self) -> Features:
        """Everything in the gallery: features, ids, cameras and paths."""
        held = self._kept.held().features
        return made_by(self._kept.runner, held) if self._kept.runner else held

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
        kept, runner = self._kept, self._kept.require_model("add")
        shown = pictures if isinstance(images, Features) else images
        sources = None if shown is None else image_sources(shown, boxes)
        count = len(images) if isinstance(images, Features) else len(sources or [])
        if sources is not None and len(sources) != count:
            raise DataError("pictures", len(sources), f"{count}, one a row of features", "Pass them in that order.")
        camids, seen = seen_by(count, cameras, times)  # labels first: embedding takes its time
        try:
            metas = [to_json(value) for value in each("meta", meta, count)]
        except TypeError as e:
            raise DataError("meta", str(e), "text, numbers, lists and mappings of them", "Convert it.") from e
        names = None if ids is None else [new_id(name) for name in each("ids", ids, count)]
        new = images if isinstance(images, Features) else embed_images(runner, sources or [], batch=batch)
        check_model(runner, new, "images")
        check_features(new.features, "images", kept.features)
        check_range(new.features, "images")
        with kept.changing("add") as done:
            numbers = range(kept.next, kept.next + count)
            given = names or [new_id(name or number) for name, number in zip(new.names, numbers, strict=True)]
            labeled = replace(new, camids=new.camids if camids is None else camids, ids=tuple(given))
            keys = np.random.default_rng().integers(*KEYS, count)
            held = kept.appended(kept.encoded(new.features, label_columns(labeled, seen, metas, keys)))
            if kept.store and kept.about["thumbnails"] and sources is not None:
                kept.store.put_thumbnails(dict(zip(keys.tolist(), map(_thumbnail, sources), strict=True)))
            return done(held, count, len(set(given)))

    def remove(self, ids: str | int | Sequence[str | int] = (), *, keep_days: float | None = None) -> Changed:
        """Removes all images of these ids, or all that are older; `compact` then takes them out of the files.

        Args:
            ids: their names.
            keep_days: remove what was seen longer ago than this; images without a time stay.

        Raises:
            DataError: for an id that is not there, with the nearest one. Nothing is removed then.
        """
        wanted = ids_of(ids)
        if not wanted and keep_days is None:
            raise UsageError("remove", "no id and no age", "ids, or keep_days", "Name what to remove.")
        if keep_days is not None:
            check_at_least("keep_days", keep_days, 0)
        with self._kept.changing("remove") as done:
            held, store = self._kept.here, self._kept.store
            names = held["ids"].tolist()
            for name in sorted(wanted - set(names)):
                near = get_close_matches(name, set(names), n=1)
                hint = f"Nothing was removed. The most similar id is {near[0]!r}." if near else "Nothing was removed."
                raise DataError("ids", repr(name), "an id of the gallery", hint)
            gone = np.array([name in wanted for name in names], bool)
            if keep_days is not None:
                gone |= held["times"] < time.time() - keep_days * _DAY
            kept = held.take(~gone)
            if store and gone.any():
                for number in np.unique(held["batch"][gone]).tolist():
                    store.rewrite(number, kept.take(kept["batch"] == number))
                store.drop_thumbnails(held["key"][gone].tolist())
                self._kept.no_longer(store)
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
        runner = self._kept.require_model("search")
        check_threshold(threshold)
        check_flags(one_person=one_person, exact=exact, together=together)
        check_whole("top", top, 1)
        if shortlist is not None:
            check_whole("shortlist", shortlist, 1)
        where = Where.of(cameras, exclude_camera, since, until)
        held = self._kept.held()
        if not len(held):
            raise DataError("gallery", "zero images", "at least one", "Add images first.")
        query = features_of(runner, images, "queries", boxes, batch=batch)
        if one_person and len(query) > 1:
            mean = unit_rows(query.features, "queries").mean(axis=0, keepdims=True)
            shown = dict.fromkeys(path or name for path, name in zip(query.paths, query.names, strict=True))
            paths = (", ".join(filter(None, shown)),)
            query = replace(query.take(np.array([0])).with_features(mean), paths=paths)
        passed = where.allowed(held["cameras"], held["times"])
        allowed = None if passed.all() else passed
        use, decision = head_use(runner, head, held, images_per_person)
        protocol: Protocol | None = None
        if use and not together and self._head.available:
            protocol = PER_QUERY if exact and shortlist is None else QUICK
            nearest = None if shortlist is None else top_matches(query, held, shortlist, allowed)[0]
            scores = self._head.scores(held, query, exact, nearest, images_per_person)
            found = best_scored(scores, top if shortlist is None else min(top, shortlist), allowed, held["ids"])
        elif use:
            protocol = JOINT if together else PER_QUERY
            told = held.told_images if images_per_person is None else images_per_person
            found = search_related(runner, query, held.features, top, together, allowed, told)
        else:
            found = top_matches(query, held, top, allowed)
        if self._kept.about["audit"]:
            with self._kept.changing("search", note) as done:
                done(self._kept.here, len(query), 0)
        return rank(runner, query, held, found, int(passed.sum()), threshold, protocol, decision)

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
        return upkeep.compact(self._kept, code, max_map_drop, held_out)

    def stats(self) -> GalleryStats:
        """What the gallery holds, in numbers."""
        kept, held = self._kept, self._kept.held()
        cameras, times = np.unique(held["cameras"][held["cameras"] >= 0]), held["times"][~np.isnan(held["times"])]
        return GalleryStats(
            len(held),
            len(set(held["ids"].tolist())),
            len(cameras),
            kept.features,
            held.code.name,
            held.bytes_per_image,
            held.bytes_per_image * len(held) / 2**20,
            kept.store.bytes / 2**20 if kept.store else None,
            float(times.min()) if len(times) else None,
            float(times.max()) if len(times) else None,
            bool(kept.about["thumbnails"]),
            bool(kept.about["audit"]),
            str(kept.about["name"]),
            kept.path,
            self._head.failure,
        )

    def people(self) -> dict[str, int]:
        """Of each id how many images, in the order of their names."""
        return dict(sorted(Counter(self._kept.held()["ids"].tolist()).items()))

    def thumbnail(self, key: int) -> bytes | None:
        """The picture, a JPEG, of the image that `Match.key` names; None where none was kept."""
        with self._kept.lock:
            return self._kept.store.thumbnail(key) if self._kept.store else None

    def audit(self) -> Audit:
        """The log: what was added and removed and, if so chosen when it was made, each search."""
        return Audit(self._kept.log)

    def backup(self, to: str | os.PathLike[str]) -> Changed:
        """Writes the gallery as it is now to another folder, whole or not at all, while others read and write.

        What is removed later stays in a backup: restoring it brings it back.

        Raises:
            ArtifactError: if there is one already, or the disk is full.
        """
        held, store = self._kept.held(), self._kept.require_store("backup")
        with self._kept.lock:
            folder = store.copy_to(to)
        return Changed("backup", len(held), len(set(held["ids"].tolist())), len(held), str(folder))

    def merge(self, other: Gallery | str | os.PathLike[str]) -> Changed:
        """Adds the images of another gallery of the same model, with their labels and pictures.

        Images that are there already, such as those of a backup of this gallery, are not added again.

        Raises:
            DataError: if it is of another model or preprocessing.
        """
        if isinstance(other, Gallery):
            return upkeep.merge(self._kept, other._kept)
        with Gallery(None, other) as theirs:
            return upkeep.merge(self._kept, theirs._kept)

    def migrate(self, runner: Runner, *, batch: int = 32) -> Changed:
        """Embeds the kept thumbnails with another model, which the gallery is then for.

        A thumbnail is smaller than the image was: features differ a little from those of the image itself.

        Args:
            runner: the other model, open.
            batch: images run at once.

        Raises:
            DataError: if an image has no thumbnail; the gallery is then as it was.
        """
        changed = upkeep.migrate(self._kept, runner, batch)
        self._head.forget()
        return changed


def _thumbnail(source: Source) -> bytes:
    image = source if isinstance(source, Image.Image) else load_image(source)
    image = image.copy()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return file.getvalue()
