"""Rows of the gallery that lives: a call fails, the process is killed, the power goes, a person is erased, and images
come and go in any order.

A gallery's life is a list of changes, each acknowledged when its call returns. Whatever ends it early, the gallery
opens, is whole, and holds what it held after the last acknowledged change or after the one under way.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import shutil
import sqlite3
import tempfile
import threading
from base64 import b85encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from helpers.galleries import gated, nformer, stub
from helpers.galleries import rows as made

from nformer_edge.core.errors import Error
from nformer_edge.gallery import following, store
from nformer_edge.gallery.gallery import Gallery
from nformer_edge.gallery.live import LiveHead
from torture import shim
from torture.cases import DONE, KILLED, Case, attempt
from torture.interruption import Disk, Made, any_of, read_log

#: Largest difference of a score from that of a gallery built anew: what is followed on moves by 1e-6 and more.
ALLOWED = 1e-4

Step = Callable[[Gallery, Path], object]


@dataclass(frozen=True)
class Life:
    """What is done to a gallery.

    Args:
        name: of the kind.
        runner: makes its model.
        code: of its features.
        steps: given the gallery, and a folder beside it that holds another one.
        thumbnails: whether pictures are kept.
        replacing: whether the first steps are done before the case.
    """

    name: str
    runner: Callable[[], Any]
    code: str
    steps: tuple[Step, ...]
    thumbnails: bool = False
    before: int = 0

    def open(self, out: Path) -> Gallery:
        return Gallery(self.runner(), out / "people", code=self.code, thumbnails=self.thumbnails)

    def lay(self, out: Path) -> None:
        """The other gallery, and this one after `before` steps."""
        shutil.rmtree(out, ignore_errors=True)
        with Gallery(stub(), out / "other") as other:
            other.add(made(70, 5), ids=[f"theirs {i}" for i in range(5)], times=7)
        if self.before:
            with self.open(out) as gallery:
                for step in self.steps[: self.before]:
                    step(gallery, out)

    def live(self, out: Path, acknowledge: Callable[[int], object]) -> None:
        with self.open(out) as gallery:
            for i, step in enumerate(self.steps[self.before :], self.before):
                step(gallery, out)
                acknowledge(i)


def _add(seed: int, count: int) -> Step:
    def step(gallery: Gallery, out: Path) -> None:
        names = [f"p{seed} {i % 7}" for i in range(count)]
        pictures = np.random.default_rng(seed).integers(0, 256, (count, 8, 4, 3), np.uint8)
        gallery.add(made(seed, count), ids=names, times=seed, cameras=seed, meta={"n": seed}, pictures=[*pictures])

    return step


def _remove(*ids: str) -> Step:
    return lambda gallery, out: gallery.remove(ids)


def _search(gallery: Gallery, out: Path) -> None:
    """Also keeps the head's state."""
    gallery.search(made(90), head=True, exact=False)
    if renewing := gallery._head._renewing:
        renewing.join()
    gallery._head.close()


#: Changes of every kind: batches written, rewritten and deleted, files written anew, another gallery and a copy.
_STEPS: tuple[Step, ...] = (
    _add(1, 3),
    _add(2, 300),
    _remove("p2 1"),
    _add(3, 1),
    lambda gallery, out: gallery.compact(),
    _remove("p1 0", "p3 0"),
    lambda gallery, out: gallery.merge(out / "other"),
    lambda gallery, out: gallery.backup(out / "copy"),
    lambda gallery, out: gallery.compact("int8"),
    _remove("theirs 3"),
)
LIVES = (
    Life("fp32", stub, "fp32", _STEPS),
    Life("int8 and pictures", stub, "int8", _STEPS[:4] + _STEPS[5:8], thumbnails=True, before=2),
    Life("with its head", gated, "fp32", (_add(1, 40), _search, _add(2, 9), _remove("p1 2"), _search, _STEPS[4])),
)


def snapshot(gallery: Gallery) -> str:
    """What a gallery holds, but for images' own numbers, which every run draws anew."""
    held, digest = gallery._kept.held(), hashlib.sha256()
    digest.update(held.features.features.tobytes())
    for column in ("ids", "cameras", "times", "paths", "meta"):
        digest.update(repr(held[column].tolist()).encode())
    pictures = [gallery.thumbnail(key) for key in held["key"].tolist()]
    digest.update(repr([hashlib.sha256(p).hexdigest() if p else None for p in pictures]).encode())
    return f"{len(held)} images, {digest.hexdigest()[:12]}"


def states(life: Life, out: Path) -> list[str]:
    """What the gallery holds after each step, and nothing at first."""
    life.lay(out)
    found = []

    def note(_: int = 0) -> None:
        with Gallery(None, out / "people") as gallery:
            found.append(snapshot(gallery))

    life.open(out).close()
    note()
    life.live(out, note)
    return ["0 images"] * life.before + found


def judge(life: Life, out: Path, acknowledged: int, known: list[str]) -> str | None:
    """What is wrong after a life that ended when so many of its changes were acknowledged, or None."""
    allowed = known[acknowledged : acknowledged + 2]
    try:
        with life.open(out) as gallery:
            found = snapshot(gallery)
            if found not in allowed and not (acknowledged == life.before == 0 and found.startswith("0 images")):
                return f"{found}, expected {' or '.join(allowed)}"
            gallery.add(made(80), ids="afterwards")
            gallery.search(made(90), head=True)
            gallery.remove("afterwards")
            if snapshot(gallery) != found:
                return "an addition and its removal leave something else"
        with sqlite3.connect(out / "people" / store.FILE) as sql:
            said = sql.execute("PRAGMA integrity_check").fetchone()[0]
        sql.close()
        if (out / "copy" / store.FILE).exists():
            with Gallery(None, out / "copy") as copied:
                if snapshot(copied) not in known:
                    return f"a copy of {snapshot(copied)}"
        return None if said == "ok" else f"SQLite says {said}"
    except Exception as e:
        return f"after {acknowledged} changes: {type(e).__name__}: {e}"


def interrupted(life: Life, known: list[str], mode: int, at: int, error: int = 0, fault: Any = None) -> Case:
    """The n-th call fails or kills."""

    def run(place: Path) -> tuple[str | None, str]:
        out, acks = place / "out", place / "acks"
        life.lay(out)
        acks.write_bytes(b"")

        def body() -> tuple[int, Any]:
            with open(acks, "ab", buffering=0) as told, fault() if fault else nullcontext():
                shim.arm(out / "people", mode, at, error)
                try:
                    life.live(out, lambda _: told.write(b"."))
                except Error as e:
                    shim.off()
                    print(f"error: {e}", file=__import__("sys").stderr)
                    return 2, None
                shim.off()
                return 0, None

        outcome = attempt(body)
        what = {shim.FAIL: errno.errorcode.get(error, ""), shim.SHORT: "short write"}.get(mode, "killed")
        found = outcome.wrong(400, *(() if what != "killed" else (KILLED,)))
        found = found or judge(life, out, life.before + acks.stat().st_size, known)
        return found and f"{what} at call {at}: {found}", outcome.status

    return Case(life.name, run)


def recorded(life: Life, out: Path, fault: Any = None) -> tuple[list[Any], int]:
    """Every call of a whole life that changes something, a folder made at each acknowledgment; and how many calls."""
    life.lay(out)
    shutil.copytree(out, out.with_name("base"))  # numbers are drawn anew in each life: bytes must be of this one
    with tempfile.TemporaryFile() as log:

        def body() -> tuple[int, Any]:
            with fault() if fault else nullcontext():
                shim.arm(out, shim.COUNT, log=log.fileno())
                life.live(out, lambda i: os.mkdir(out / f"done {i}"))
                shim.off()
                return 0, shim.calls()

        outcome = attempt(body, 120)
        assert outcome.status == DONE, (life.name, outcome)
        log.seek(0)
        return read_log(log.read()), outcome.value


def without_power(life: Life, known: list[str], ops: list[Any], root: Path, seed: str, tries: int = 1) -> Case:
    """What was not synced is lost, torn or there in part, at any point of the life."""

    def run(place: Path) -> tuple[str | None, str]:
        rng, out = random.Random(seed), place / "out"
        for _ in range(tries):
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(root.with_name("base"), out)
            disk = Disk(out)
            disk.root = str(root)
            at = rng.randrange(len(ops) + 1)
            for op in ops[:at]:
                disk.apply(op)
            disk.crash(out, rng)
            done = life.before + sum(op[0] == "mkdir" and "/done " in op[1] for op in ops[:at])
            shutil.rmtree(out / "other", ignore_errors=True)
            if found := judge(life, out, done, known):
                return f"after {at} of {len(ops)} calls: {found}", "lost"
        return None, "whole"

    return Case(life.name, run)


# --- erased -----------------------------------------------------------------------------------------------------------


def _windows(data: bytes) -> np.ndarray:
    """Every 8 bytes in a row."""
    parts = [np.frombuffer(data[i : i + (len(data) - i) // 8 * 8], "<u8") for i in range(min(8, len(data)))]
    return np.concatenate(parts) if parts else np.zeros(0, "<u8")


def _left(folder: Path, secret: np.ndarray) -> int:
    """How many of `secret` are in a file of the folder."""
    files = [_windows(path.read_bytes()) for path in folder.rglob("*") if path.is_file()]
    return int(np.isin(secret, np.concatenate(files)).sum())


def erased(seed: int, fault: Any = None) -> Case:
    """People are removed in some way, then `compact`: no 8 bytes of them are in a file of the gallery."""
    rng = random.Random(seed)
    code, size, head = rng.choice(("fp32", "fp16", "int8")), rng.choice((64, 200)), rng.random() < 0.4

    def run(place: Path) -> tuple[str | None, str]:
        folder, count = place / "people", rng.choice((3, 20, 60, 300))
        shutil.rmtree(folder, ignore_errors=True)
        runner = gated(size=size) if head else stub(size)
        # 8 characters of a digest in hexadecimal, 32 bits, are found in another name now and then
        names = [b85encode(hashlib.sha256(f"{seed} {i}".encode()).digest()).decode() for i in range(count)]
        pictures = np.random.default_rng(seed).integers(0, 256, (count, 16, 8, 3), np.uint8)
        gone = sorted(rng.sample(range(count), rng.randrange(1, min(count, 40))))
        with fault() if fault else nullcontext():
            gallery = Gallery(runner, folder, code=code, thumbnails=True)
            meta = [{"of": name[::-1]} for name in names]
            seen = [1.0 if i in gone else 4e9 for i in range(count)]
            gallery.add(made(seed, count, size), ids=names, meta=meta, times=seen, pictures=[*pictures])
            held, secret = gallery._kept.here, list[np.ndarray]()
            for i in gone:
                picture = gallery.thumbnail(int(held["key"][i])) or b""
                texts = names[i].encode(), names[i][::-1].encode(), held["codes"][i].tobytes(), picture[-60:-2]
                secret += map(_windows, texts)
            if head:
                gallery.search(made(1, 1, size), head=True, exact=False)
                secret.append(_windows(gallery._head._live.landmarks["center"].tobytes()))
                gallery.close()
                gallery = Gallery(runner, folder)
            found = np.concatenate(secret)
            if _left(folder, found) < len(found) * 0.9:
                return "nothing to erase", "vacuous"
            reader = Gallery(None, folder)
            if rng.random() < 0.5:
                gallery.remove([names[i] for i in gone])
            else:
                gallery.remove(keep_days=1)
            if rng.random() < 0.3:
                gallery.add(made(seed + 1, 3, size))
            gallery.compact()
            left = _left(folder, found)
            kept = len(gallery), len(reader)
            gallery.close()
            reader.close()
        left = max(left, _left(folder, found))
        if left:
            return f"{left} of {len(found)} pieces of {len(gone)} removed images are left", "left"
        return (None if kept[0] == kept[1] else f"{kept} images"), "gone"

    return Case(f"{code}, with its head" if head else code, run)


# --- in any order -----------------------------------------------------------------------------------------------------


class _Later:
    """A thread that runs when it is told to, in this one: what it does falls between any two calls."""

    waiting: _Later | None = None

    def __init__(self, target: Callable[..., None], args: tuple[Any, ...], daemon: bool) -> None:
        self.work, _Later.waiting = (target, args), None

    def start(self) -> None:
        _Later.waiting = self

    def join(self) -> None:
        if _Later.waiting is self:
            self.work[0](*self.work[1])
            _Later.waiting = None


def interleaved(seed: int, fault: Any = None) -> Case:
    """Images come and go, files are written anew, the gallery is opened again: answers are those of one built anew."""
    rule = ("gated", "gated", "features", "affinity")[seed % 4]

    def run(place: Path) -> tuple[str | None, str]:
        rng, folder, worst, asked = random.Random(seed), place / "people", 0.0, 0
        shutil.rmtree(folder, ignore_errors=True)
        runner = gated(landmarks=8) if rule == "gated" else nformer(rule, landmarks=rng.choice((6, 12)))
        following.threading = SimpleNamespace(Thread=_Later, Lock=threading.Lock, current_thread=lambda: _Later.waiting)
        with fault() if fault else nullcontext():
            gallery, turn = Gallery(runner, folder), 0
            gallery.add(made(seed, rng.randrange(2, 60)))
            for turn in range(1, 25):
                what = rng.choice(
                    ("add", "add", "add", "one", "remove", "remove", "ask", "ask", "ask", "compact", "open")
                )
                if what in ("add", "one"):
                    gallery.add(made(1000 * seed + turn, 1 if what == "one" else rng.randrange(2, 25)))
                elif what == "remove" and len(gallery) > 3:
                    ids = gallery.features.ids
                    gallery.remove(sorted({*rng.sample(ids, rng.randrange(1, max(2, len(ids) // rng.choice((2, 8)))))}))
                elif what == "compact":
                    gallery.compact()
                elif what == "open":
                    gallery.close()
                    gallery = Gallery(runner, folder)
                elif what == "ask" and len(gallery):
                    if (later := _Later.waiting) and rng.random() < 0.5:
                        later.join()
                    worst, asked = max(worst, _difference(gallery, runner, rng, seed + turn)), asked + 1
            worst = max(worst, _difference(gallery, runner, rng, seed))
            _Later.waiting = None
            gallery.close()
        bound = next((f"within {b:.0e}" for b in (1e-6, 1e-5, 1e-4) if worst <= b), "further")
        return (None if worst <= ALLOWED else f"a score differs by {worst:.2g}, seed {seed}"), bound

    return Case(rule, run)


def _difference(gallery: Gallery, runner: Any, rng: random.Random, seed: int) -> float:
    """The largest of a search's scores against those of a head that is built anew with the same landmarks."""
    query, exact = made(seed + 7_000_000, 2), rng.random() < 0.5
    held = gallery._kept.held()
    answer = gallery.search(query, top=len(held), head=True, exact=exact)
    anew = LiveHead.open(runner)
    anew.build(held.features.features, gallery._head._live.landmarks)
    scores = np.take_along_axis(anew.ask(query.features, exact), answer.indices, axis=1)
    return float(np.abs(scores - answer.scores).max())


# --- planted ----------------------------------------------------------------------------------------------------------


@contextmanager
def _changed(owner: Any, **names: Any) -> Iterator[None]:
    before = {name: getattr(owner, name) for name in names}
    for name, value in names.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def _unsynced() -> Any:
    """A store that does not wait for the disk."""
    real = store.Store.writing

    def writing(self: store.Store) -> Any:
        self._sql.execute("PRAGMA synchronous=OFF").fetchall()
        return real(self)

    return _changed(store.Store, writing=writing)


def _piecemeal() -> Any:
    """A store whose changes are not transactions."""

    @contextmanager
    def writing(self: store.Store) -> Iterator[None]:
        yield

    return _changed(store.Store, writing=writing)


def _deaf() -> Any:
    """A store that says nothing of what failed."""

    @contextmanager
    def writing(self: store.Store) -> Iterator[None]:
        with suppress(sqlite3.Error, Error, OSError):
            self._sql.execute("BEGIN IMMEDIATE")
            yield
            self._sql.execute("COMMIT")

    return _changed(store.Store, writing=writing)


def _not_overwritten() -> Any:
    """Deleted bytes stay, and files are not written anew."""
    real = store.Store.__init__

    def init(self: store.Store, *args: Any, **settings: Any) -> None:
        real(self, *args, **settings)
        self._sql.execute("PRAGMA secure_delete=OFF").fetchall()

    return _changed(store.Store, __init__=init, shrink=lambda self: None)


def _pictures_stay() -> Any:
    return _changed(store.Store, drop_thumbnails=lambda self, keys: None)


def _head_stays() -> Any:
    real = store.Store.put_state
    return _changed(store.Store, put_state=lambda self, state, fits="": state and real(self, state, fits))


def _unmoved() -> Any:
    """A head that does not follow a removal on."""
    real = LiveHead.remove

    def remove(self: LiveHead, positions: np.ndarray) -> None:
        real(self, positions)
        self._moved[:] = False

    return _changed(LiveHead, remove=remove)


def _unheard() -> Any:
    """A head whose rows do not move when an image enters their lists."""
    real = LiveHead._enter

    def enter(self: LiveHead, *args: Any) -> Any:
        rows, scores = real(self, *args)
        return rows[:0], scores[:0]

    return _changed(LiveHead, _enter=enter)


# --- rows -------------------------------------------------------------------------------------------------------------


def rows(root: Path) -> dict[str, Callable[[], Made]]:
    """Makes the cases and planted faults of each row."""
    following.KEPT_FROM = 1
    told: dict[str, tuple[list[str], list[Any], int, Path]] = {}

    def lives() -> Iterator[tuple[Life, list[str], list[Any], int, Path]]:
        for life in LIVES:
            out = root / "gallery" / life.name.replace(" ", "-") / "out"
            if life.name not in told:
                told[life.name] = (states(life, out), *recorded(life, out), out)
            yield life, *told[life.name]

    def fails() -> Made:
        cases = []
        codes = errno.EIO, errno.ENOSPC, errno.EINTR
        for life, known, _, calls, _ in lives():
            for at in _spread(calls, 400):
                cases.append(interrupted(life, known, shim.SHORT if at % 7 == 0 else shim.FAIL, at, codes[at % 3]))
        life, known, _, calls, _ = next(lives())
        return cases, [any_of([interrupted(life, known, shim.FAIL, at, errno.EIO, _deaf) for at in range(20, 60)])]

    def kills() -> Made:
        cases = []
        for life, known, _, calls, _ in lives():
            cases += [interrupted(life, known, shim.KILL_BEFORE, at) for at in _spread(calls, 400)]
        _, (life, known, _, calls, _), _ = lives()
        places = _spread(calls, 160)
        return cases, [any_of([interrupted(life, known, shim.KILL_BEFORE, at, fault=_piecemeal) for at in places])]

    def power() -> Made:
        cases = []
        for life, known, ops, _, out in lives():
            cases += [without_power(life, known, ops, out, f"{life.name} {i}") for i in range(400)]
        life, known, _, _, _ = next(lives())
        out = root / "gallery" / "unsynced" / "out"
        return cases, [without_power(life, known, recorded(life, out, _unsynced)[0], out, "planted", 60)]

    def erasures() -> Made:
        planted = [(_not_overwritten, "fp32"), (_pictures_stay, "fp32"), (_head_stays, "with its head")]
        faults = [
            any_of([c for c in (erased(i, fault) for i in range(40)) if kind in c.kind]) for fault, kind in planted
        ]
        return [erased(i) for i in range(500)], faults

    def orders() -> Made:
        planted = [any_of([interleaved(i, fault) for i in range(12)]) for fault in (_unmoved, _unheard)]
        return [interleaved(i) for i in range(500)], planted

    return {
        "gallery: n-th system call fails": fails,
        "gallery: killed at a call": kills,
        "gallery: power lost": power,
        "gallery: no byte of a removed person": erasures,
        "gallery: any order of changes, against a rebuild": orders,
    }


def _spread(calls: int, count: int) -> list[int]:
    """At most `count` places from 1 to `calls`."""
    return sorted({1 + i * calls // min(count, calls) for i in range(min(count, calls))})
