"""The live head of a gallery whose images come and go: it follows them, is kept with them, and is renewed unnoticed."""

from __future__ import annotations

import hashlib
import threading
import time
from contextlib import suppress

import numpy as np

from nformer_edge.core.errors import ArtifactError, BackendError, DataError
from nformer_edge.core.features import Features
from nformer_edge.core.spec import HeadState
from nformer_edge.gallery.held import Held
from nformer_edge.gallery.kept import Kept
from nformer_edge.gallery.live import LiveHead

#: Images from which the head's state is kept on the disk: what relating them takes grows with their square.
KEPT_FROM = 4096

#: Seconds from a failed renewal to the next one, at the earliest; each failure in a row doubles them.
RETRY_SECONDS = 30.0


class Following:
    """The live head over what a gallery holds.

    Where landmarks are outdated (`LiveHead.outdated`), another thread builds a second head, searches go on with the
    first, and the next one finds the second in its place. Both stand in memory until then. Where that fails, searches
    go on with the first one, `failure` says why, and a change after `RETRY_SECONDS` and more begins it again.

    Args:
        kept: the gallery's images.
        head_state: see `LiveHead`.
    """

    def __init__(self, kept: Kept, head_state: HeadState = "fp32") -> None:
        self._kept, self._head_state, self._lock = kept, head_state, threading.Lock()
        self._live: LiveHead | None = None
        self._seen: Held | None = None  # what `_live` knows; None: nothing, or it failed half way
        self._saved: Held | None = None
        self._whole_passes = False
        self._renewing: threading.Thread | None = None
        self._failures, self._retry_at = 0, 0.0
        self.failure: str | None = None  # of the last renewal

    @property
    def available(self) -> bool:
        """Whether the model has a live form of its head; whole passes answer where it has none."""
        with self._lock:
            if self._live is None and not self._whole_passes:
                try:
                    self._live = self._open()
                except ArtifactError:
                    self._whole_passes = True
            return self._live is not None

    def scores(
        self, held: Held, query: Features, exact: bool, nearest: np.ndarray | None, images: int | None = None
    ) -> np.ndarray:
        """`LiveHead.ask`, float32 [Q, N], after the head has followed the gallery to what it is now.

        Args:
            nearest: [Q, M], a shortlist a query; None: all.
            images: a person, which the head is told (`LiveHead.tell`); as the ids have it if None.
        """
        with self._lock:
            live = self._live = self._followed(held)
            live.tell(held.told_images if images is None else images)
            try:
                if nearest is None:
                    return live.ask(query.features, exact)
                rows = zip(query.features[:, None], nearest, strict=True)
                return np.concatenate([live.ask(row, among=among) for row, among in rows])
            except KeyboardInterrupt:  # rows may stand exchanged, and not noted, so that nothing takes them back
                self._seen = None
                raise

    def forget(self) -> None:
        """Starts anew with the next search, as for another model."""
        with self._lock:
            self._live = self._seen = self._saved = self._renewing = None
            self._whole_passes = False
            self._failures, self._retry_at, self.failure = 0, 0.0, None

    def close(self) -> None:
        """Waits for a head that is being built, and keeps the state on the disk, unless another process writes."""
        renewing = self._renewing
        if renewing:
            renewing.join()
        with suppress(BackendError, ArtifactError), self._lock:
            self._save()

    def _open(self) -> LiveHead:
        return LiveHead.open(self._kept.require_model("search"), kept=self._head_state)

    def _followed(self, held: Held) -> LiveHead:
        live, before = self._live or self._open(), self._seen
        if before is held:
            return live
        self._seen = None
        if before is None:
            before = self._restored(live, held)
        if before is None or before.code is not held.code:
            live.build(held.features.features)
        else:
            _follow(live, before, held)
        self._seen = held
        if live.outdated and self._renewing is None and time.monotonic() >= self._retry_at:
            self._renewing = threading.Thread(target=self._renew, args=(held,), daemon=True)
            self._renewing.start()
        return live

    def _renew(self, held: Held) -> None:
        fresh, failure = None, None
        try:
            fresh = self._open()
            fresh.build(held.features.features)
            fresh.tell(held.told_images)
            fresh.settle()
        except Exception as error:  # a thread's own: nobody else sees it, so `stats` shows it
            fresh, failure = None, f"{type(error).__name__}: {error}".removesuffix(": ")
        with self._lock:
            if self._renewing is not threading.current_thread():
                return
            self._renewing, self.failure = None, failure
            if fresh is None:
                self._failures += 1
                self._retry_at = time.monotonic() + RETRY_SECONDS * 2 ** (self._failures - 1)
            else:
                self._live, self._seen, self._failures = fresh, held, 0

    def _restored(self, live: LiveHead, held: Held) -> Held | None:
        """Takes up the state on the disk. Returns the images that it was of, the first ones of `held`."""
        store = self._kept.store
        if store is None or len(held) < KEPT_FROM:
            return None
        with self._kept.lock:
            state = store.state(self._model(live))
        if state is None:
            return None
        count, digest = len(state.get("gave", ())), state.pop("rows", np.zeros(0, "<i8")).tobytes()
        first = held.first(count)
        if digest != _digest(first):
            return None
        try:
            live.restore(first.features.features, state)
        except DataError:
            return None
        self._saved = first
        return first

    def _save(self) -> None:
        """Never with a share of an image that is gone, and never over what another process has changed."""
        store, live, seen = self._kept.store, self._live, self._seen
        if store is None or live is None or seen is None or seen is self._saved or live.lost or len(seen) < KEPT_FROM:
            return
        with self._kept.lock, store.writing():
            self._kept.catch_up(store)
            if np.array_equal(self._kept.here["key"][: len(seen)], seen["key"]):
                state = {**live.state(), "rows": np.frombuffer(_digest(seen), "<i8")}
                store.put_state(state, self._model(live))
        self._saved = seen

    def _model(self, live: LiveHead) -> str:
        """What lists and landmarks follow from besides the images."""
        runner = self._kept.require_model("search")
        return f"{runner.sha256} {runner.precision['backbone']} {live.seed}"


def _digest(held: Held) -> bytes:
    """sha256 of images' own numbers and of their features as they are kept."""
    digest = hashlib.sha256()
    for name in ("key", "codes", "scale"):
        digest.update(np.ascontiguousarray(held[name]).data)
    return digest.digest()


def _follow(live: LiveHead, before: Held, held: Held) -> None:
    """Brings a live head from what the gallery was to what it is. Images keep their numbers and their order."""
    old, new = before["key"], held["key"]
    if len(new) >= len(old) and np.array_equal(new[: len(old)], old):
        gone, fresh = np.zeros(0, np.int64), held.take(np.arange(len(old), len(new)))
    else:
        gone = np.flatnonzero(~np.isin(old, new))
        fresh = held.take(np.flatnonzero(~np.isin(new, old)))
    if len(gone) + len(fresh) > len(held) // 2:
        live.build(held.features.features)
        return
    if len(gone):
        live.remove(gone)
    if len(fresh):
        live.add(fresh.features.features)
