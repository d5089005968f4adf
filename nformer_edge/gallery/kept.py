"""What a gallery holds, in memory or in a folder, and how that changes: whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from nformer_edge.backends.runner import Runner
from nformer_edge.core.errors import ArtifactError, DataError, UsageError
from nformer_edge.core.features import Features
from nformer_edge.core.spec import GalleryCode, check_choice, to_dict
from nformer_edge.gallery.codes import CODES, Code
from nformer_edge.gallery.held import Held, label_columns
from nformer_edge.gallery.results import Changed
from nformer_edge.gallery.search import check_model
from nformer_edge.gallery.store import Entry, Store

#: What must be the same for features to be compared, and the model's name.
IDENTITY = ("model", "checkpoint", "precision", "preprocess", "features", "name")


class Kept:
    """See `gallery.Gallery`, whose arguments these are."""

    def __init__(
        self,
        runner: Runner | None,
        path: str | os.PathLike[str] | None,
        code: GalleryCode,
        *,
        thumbnails: bool,
        audit: bool,
        create: bool,
    ) -> None:
        if code not in CODES[:3]:
            check_choice("code", code, CODES)
            raise UsageError("code", code, " | ".join(CODES[:3]), "Add images first; `compact` then learns this code.")
        self.runner, self.lock, self._log = runner, threading.RLock(), list[Entry]()
        about = None if runner is None else {**identity(runner), "thumbnails": thumbnails, "audit": audit}
        self.store = None if path is None else Store(path, about if create else None, code)
        if self.store is None and about is None:
            raise UsageError("gallery", "neither a model nor a path", "one of them", "Pass the gallery's folder.")
        self.about: Mapping[str, object] = about or {}
        self.next = self._changes = 0
        self._held: Held | None = None
        if self.store is None:
            self._held = empty(Code(code), self.features)
            return
        self._load(self.store)
        held_code = self.store.code(self.features).name
        asked = {"thumbnails": thumbnails, "audit": audit, "code": code not in ("fp32", held_code)}
        for setting in [name for name, wanted in asked.items() if wanted and not self.about.get(name)]:
            hint = "Leave it out, or make a new gallery and merge this one into it."
            raise UsageError(setting, "a gallery that was made without it", "a new gallery", hint)

    @property
    def features(self) -> int:
        """D."""
        size = self.about["features"]
        if not isinstance(size, int):
            raise ArtifactError("gallery", f"features {size!r}", "a whole number", "Restore it from a backup.")
        return size

    @property
    def path(self) -> str:
        """The gallery's folder, or ""."""
        return str(self.store.path.parent) if self.store else ""

    @property
    def log(self) -> tuple[Entry, ...]:
        """What was done, oldest first."""
        with self.lock:
            return self.store.entries() if self.store else tuple(self._log)

    def require_model(self, what: str) -> Runner:
        if self.runner is None:
            hint = "Open it by the model: ne.open(model).gallery(path)."
            raise UsageError("gallery", f"no model to {what} with", "an open one", hint)
        return self.runner

    def require_store(self, what: str) -> Store:
        if self.store is None:
            raise UsageError("gallery", f"a gallery in memory to {what}", "one in a folder", "Give it a path.")
        return self.store

    def check_model(self, features: Features, what: str, hint: str) -> None:
        """Refuses features of another model than the gallery's."""
        made = (str(self.about[key]) for key in ("model", "checkpoint", "precision"))
        if features.model and not features.shares_model(*made):
            raise DataError(what, "features of another model", "this gallery's", hint)

    def held(self) -> Held:
        """What is held now, with what other processes wrote. Who writes just then is not waited for."""
        if self.store and self.lock.acquire(blocking=False):
            try:
                self.catch_up(self.store)
            finally:
                self.lock.release()
        return self.here

    @property
    def here(self) -> Held:
        """What is held, as this process knows it."""
        assert self._held is not None
        return self._held

    def catch_up(self, store: Store) -> None:
        """Reads what other processes wrote."""
        if store.changed():
            self._load(store)

    def _load(self, store: Store) -> None:
        """Reads what is new; all of it, where images were removed."""
        with store.reading():
            changes, self.next = store.number("changes"), store.number("next")
            held = self._held
            if held is None or changes != self._changes:
                self._read_about(store)
                held = empty(store.code(self.features), self.features)
            last = int(held["batch"][-1]) if len(held) else 0
            for more in store.read(held.code, self.features, last):
                held = held.extended(more)
        self._held, self._changes = held, changes

    def _read_about(self, store: Store) -> None:
        """What the gallery says of itself, which must be of this model."""
        self.about = {key: store.get(key) for key in (*IDENTITY, "thumbnails", "audit")}
        if (runner := self.runner) is None:
            return
        made = {key: str(self.about[key]) for key in ("model", "checkpoint", "precision")}
        none = Features(np.empty((0, self.features), np.float32), **made)  # type: ignore[arg-type]
        hint = "Open the model that it was made with, or embed its images again: nformer-edge gallery migrate"
        check_model(runner, none, "gallery", hint)
        if self.about["preprocess"] != identity(runner)["preprocess"]:
            raise DataError("gallery", "images brought to the model in another way", "this model's preprocessing", hint)

    def encoded(self, features: np.ndarray, labels: Mapping[str, np.ndarray]) -> Held:
        """Features [N, D] as the gallery keeps them, with their labels."""
        code = self.here.code
        return Held.of(code, {**code.encode(features), **labels})

    def appended(self, new: Held) -> Held:
        """What is held with new images at the end, in the change at hand."""
        self.next += len(new)
        if self.store:
            new = self.store.append(new)
            self.store.put(next=self.next)
        return self.here.extended(new)

    def rewritten(self, store: Store, held: Held) -> Held:
        """The file's batches and code, written anew in the change at hand."""
        store.put_code(held.code)
        store.clear()
        self.no_longer(store)
        return store.append(held)

    def no_longer(self, store: Store) -> None:
        """Says in the change at hand that images are gone or others than they were: all is read anew."""
        self._changes += 1
        store.put(changes=self._changes)
        store.put_state(None)

    @contextmanager
    def changing(self, action: str, note: str = "") -> Iterator[Change]:
        """One change: on the disk, in the log and seen by searches when the block ends; or, if it fails, not at all."""
        with self.lock:
            before = self.next, self._changes
            done = Change(action, self.path)
            try:
                if self.store is None:
                    yield done
                    self._log.append(Entry(time.time(), action, done.ids, done.images, note))
                else:
                    with self.store.writing():
                        self.catch_up(self.store)
                        before = self.next, self._changes
                        yield done
                        self.store.log(action, done.ids, done.images, note)
            except BaseException:
                self.next, self._changes = before
                raise
            if done.held is not None:
                self._held = done.held


class Change:
    """What a change came to."""

    def __init__(self, action: str, path: str) -> None:
        self.action, self.path = action, path
        self.held: Held | None = None
        self.images = self.ids = 0

    def __call__(self, held: Held, images: int, ids: int, already: int = 0) -> Changed:
        self.held, self.images, self.ids = held, images, ids
        return Changed(self.action, images, ids, len(held), self.path, already)


def identity(runner: Runner) -> dict[str, object]:
    """What a gallery of this model says of itself."""
    preprocess = json.dumps(to_dict(runner.spec.preprocess), sort_keys=True).encode()
    made = runner.sha256, runner.checkpoint, runner.precision["backbone"], hashlib.sha256(preprocess).hexdigest()
    return dict(zip(IDENTITY, (*made, runner.spec.backbone.features, runner.name), strict=True))


def empty(code: Code, features: int) -> Held:
    """No image."""
    none = Features(np.empty((0, features), np.float32))
    return Held.of(code, {**code.encode(none.features), **label_columns(none)})
