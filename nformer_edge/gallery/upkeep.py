"""What is done to a gallery as a whole: its files written anew, two made one, another model or version."""

from __future__ import annotations

import io
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from nformer_edge.backends.runner import Runner
from nformer_edge.core.errors import DataError, UsageError
from nformer_edge.core.features import Features
from nformer_edge.core.spec import GalleryCode, check_at_least
from nformer_edge.gallery.codes import Code, CodeScore, measure_codes
from nformer_edge.gallery.embed import embed_images
from nformer_edge.gallery.held import Held
from nformer_edge.gallery.kept import IDENTITY, Kept, empty, identity
from nformer_edge.gallery.results import Changed, Compacted
from nformer_edge.gallery.store import Store

#: Images that are queries once, to measure codes with.
QUERIES = 1000


def compact(
    kept: Kept, code: GalleryCode | None, max_map_drop: float | None, held_out: str | os.PathLike[str] | None
) -> Compacted:
    """See `gallery.Gallery.compact`."""
    if code is not None and max_map_drop is not None:
        raise UsageError("code", "a code and a budget", "one of them", "Leave one out.")
    before, scores = kept.store.bytes if kept.store else 0, tuple[CodeScore, ...]()
    with kept.changing("compact") as done:
        held = kept.here
        if max_map_drop is not None:
            check_at_least("max_map_drop", max_map_drop, 0)
            scores = measure_codes(*_measured_with(kept, held_out))
            allowed = scores[0].mAP - max_map_drop / 100
            code = min((s for s in scores if s.mAP >= allowed), key=lambda s: s.bytes_per_image).code
        if code is not None and code != held.code.name:
            features = held.features.features
            fitted = Code.fit(code, features)
            held = Held.of(fitted, held.labels | fitted.encode(features))
        if kept.store:
            held = kept.rewritten(kept.store, held)
        done(held, len(held), len(set(held["ids"].tolist())))
    if kept.store:
        with kept.lock:
            kept.store.shrink()
    after = kept.store.bytes if kept.store else 0
    return Compacted(len(held), held.code.name, held.bytes_per_image, before, after, scores)


def _measured_with(kept: Kept, held_out: str | os.PathLike[str] | None) -> tuple[Features, Features]:
    """Query and gallery to measure codes with, people numbered."""
    if held_out is not None:
        query, gallery = Features.load(held_out, "query"), Features.load(held_out, "gallery")
        for features in (query, gallery):
            kept.check_model(features, str(held_out), "Embed the images again.")
        return query, gallery
    held = kept.here
    numbers = np.unique(held["ids"].astype(str), return_inverse=True)[1] + 1
    alone = np.arange(len(held), dtype=np.int64)  # each image its own camera: all but itself can be its match
    gallery = replace(held.features, pids=numbers, camids=alone)
    chosen = np.sort(np.random.default_rng(0).permutation(len(held))[:QUERIES])
    return gallery.take(chosen), gallery


def merge(kept: Kept, theirs: Kept) -> Changed:
    """See `gallery.Gallery.merge`."""
    same = kept.store and theirs.store and os.path.samefile(kept.store.path, theirs.store.path)
    if theirs is kept or same:
        raise UsageError("merge", "the gallery itself", "another gallery", "Name another folder.")
    for key in IDENTITY:
        if key != "name" and theirs.about[key] != kept.about[key]:
            hint = "Embed its images again with this gallery's model: nformer-edge gallery migrate"
            raise DataError("gallery", f"another {key}", f"{str(kept.about[key])[:12]}, as here", hint)
    whole = theirs.held()
    with kept.changing("merge") as done:
        here = {*zip(kept.here["key"].tolist(), kept.here["ids"].tolist(), strict=True)}
        images = zip(whole["key"].tolist(), whole["ids"].tolist(), strict=True)
        new = whole.take(np.array([image not in here for image in images], bool))
        held = kept.appended(kept.encoded(new.features.features, new.labels))
        if kept.store and theirs.store and kept.about["thumbnails"]:
            pictures = {key: theirs.store.thumbnail(key) for key in new["key"].tolist()}
            kept.store.put_thumbnails({key: picture for key, picture in pictures.items() if picture})
        return done(held, len(new), len(set(new["ids"].tolist())), len(whole) - len(new))


def migrate(kept: Kept, runner: Runner, batch: int) -> Changed:
    """See `gallery.Gallery.migrate`."""
    store = kept.require_store("migrate")
    with kept.changing("migrate") as done:
        held, pictures = kept.here, list[Image.Image]()
        for key, name in zip(held["key"].tolist(), held["ids"].tolist(), strict=True):
            picture = store.thumbnail(key)
            if picture is None:
                hint = "Remove it, or add all images to a new gallery."
                raise DataError(f"image of {name!r}", "no thumbnail", "one of each image", hint)
            pictures.append(Image.open(io.BytesIO(picture), formats=["JPEG"]))
        code = held.code if held.code.directions is None else Code()
        held = empty(code, runner.spec.backbone.features) if not pictures else held
        if pictures:
            features = embed_images(runner, pictures, batch=batch).features
            held = Held.of(code, held.labels | code.encode(features))
        store.put(**identity(runner))
        changed = done(kept.rewritten(store, held), len(held), len(set(held["ids"].tolist())))
    kept.about, kept.runner = {**kept.about, **identity(runner)}, runner
    return changed


def upgrade(path: str | os.PathLike[str]) -> Changed:
    """Brings a gallery of format version 1 to this version, whole or not at all; images and answers stay.

    Raises:
        ArtifactError: if there is none, it has another version, or it is damaged.
    """
    store = Store(path, version=1)
    try:
        store.upgrade()
    finally:
        store.close()
    kept = Kept(None, path, "fp32", thumbnails=False, audit=False, create=False)
    try:
        held = kept.held()
        return Changed("upgrade", len(held), len(set(held["ids"].tolist())), len(held), str(Path(path)))
    finally:
        kept.require_store("upgrade").close()
