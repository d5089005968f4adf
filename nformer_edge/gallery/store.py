"""A gallery's file: SQLite, so that a write that was acknowledged stays, and one that was not leaves nothing.

A row of ``batches`` holds up to `BATCH` images: their codes, their labels as JSON, and the sha256 of both, which is
compared whenever they are read. A commit is on the disk when it returns (WAL, ``synchronous=FULL``). Deleted bytes are
overwritten (``secure_delete``), and `Store.shrink` leaves no page that was in use before.

``state`` keeps what a gallery computed of its images and can compute again (`gallery.following`).
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import secrets
import sqlite3
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nformer_edge.core.artifact import fsync
from nformer_edge.core.errors import ArtifactError, BackendError, UsageError
from nformer_edge.core.spec import GalleryCode
from nformer_edge.core.values import to_json
from nformer_edge.gallery.codes import Code
from nformer_edge.gallery.held import LABELS, Held

FILE = "gallery.sqlite"
FORMAT_VERSION = 2

#: Images in one row of the file. An image that is removed rewrites its row.
BATCH = 256

#: Seconds that a writer waits for another process's.
WAIT = 5.0

#: Images' own numbers, drawn at random so that those of two galleries differ; whole in JSON's and JavaScript's numbers.
KEYS = 2**52, 2**53

#: Bytes of one row of ``state``.
_PART = 1 << 26

#: Seconds after which a half-made gallery is taken for one whose maker was killed.
_LEFT = 60.0

#: What `os.link` fails with on a file system without links, such as exFAT.
_NO_LINKS = (errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)

#: Types of the arrays in ``state``.
_KINDS = ("<i4", "<i8", "<f4", "|b1")

_TABLES = (
    "CREATE TABLE about (key TEXT PRIMARY KEY, value)",
    "CREATE TABLE batches (batch INTEGER PRIMARY KEY, vectors BLOB, labels TEXT, sha256 TEXT)",
    "CREATE TABLE thumbnails (key INTEGER PRIMARY KEY, image BLOB)",
    "CREATE TABLE log (entry INTEGER PRIMARY KEY, time REAL, action TEXT, ids INTEGER, images INTEGER, note TEXT)",
    "CREATE TABLE state (name TEXT, part INTEGER, data BLOB, PRIMARY KEY (name, part))",
)


@dataclass(frozen=True)
class Entry:
    """What was done to a gallery, or asked of it. It holds numbers alone: no name, so none is left to erase.

    Args:
        time: seconds since 1970.
        action: ``add``, ``remove``, ``search`` ...
        ids: how many ids were added or removed; 0 for a search.
        images: how many images were added, removed or asked with.
        note: the caller's own words, such as a case number; do not put names there.
    """

    time: float
    action: str
    ids: int
    images: int
    note: str = ""


class Store:
    """One gallery's file, open. Its owner serializes calls.

    Args:
        folder: where `FILE` is.
        create: what a new gallery says of itself; None: there must be one.
        code: of a new gallery.
        version: that it must have.

    Raises:
        ArtifactError: if there is none, or it is damaged, of another version or something else.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        create: Mapping[str, object] | None = None,
        code: GalleryCode = "fp32",
        version: int = FORMAT_VERSION,
    ) -> None:
        if not os.fspath(folder).strip():
            raise UsageError("gallery", "an empty path", "a folder", "Is a variable unset? `.` is this folder.")
        self.path = Path(folder) / FILE
        if create is None and not self.path.is_file():
            hint = "Check the path, or add images to make one: nformer-edge gallery add"
            raise ArtifactError(str(folder), "no gallery there", "a folder that `gallery add` made", hint)
        if self.path.is_symlink():
            raise ArtifactError(str(self.path), "a link", "a plain file", "Pass the gallery's own folder.")
        with self._errors():
            if create is not None and not self.path.exists():
                self._make_folder(self.path.parent)
                self._create(create, code)
            self._check_file()
            self._sql = sqlite3.connect(self.path, timeout=WAIT, isolation_level=None, check_same_thread=False)
            for pragma in ("trusted_schema=OFF", "journal_mode=WAL", "synchronous=FULL", "secure_delete=ON"):
                self._sql.execute(f"PRAGMA {pragma}").fetchall()
            self._check(version)
            self._seen = self._version()

    @staticmethod
    def _make_folder(folder: Path) -> None:
        """On the disk with its name: SQLite syncs the folder's content alone."""
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for path in missing:
            fsync(path.parent)

    def _create(self, about: Mapping[str, object], code: GalleryCode) -> None:
        """Under a name of its own until it is whole, so that a file of no bytes is never a new gallery."""
        folder = self.path.parent
        for left in folder.glob(f"{self.path.stem}.*.part*"):  # of processes that were killed here
            with suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > _LEFT:
                    left.unlink()
        handle, name = tempfile.mkstemp(".part", f"{self.path.stem}.", folder)  # for its owner's eyes alone
        os.close(handle)
        part = Path(name)
        self._sql = sqlite3.connect(part, timeout=WAIT, isolation_level=None)
        try:
            with self.writing():
                for table in _TABLES:
                    self._sql.execute(table)
                self.put(**{"kind": "gallery", "format_version": FORMAT_VERSION, "next": 0, "changes": 0, **about})
                self.put_code(Code(code))
                _stamp(self._sql)
        finally:
            self._sql.close()
        with suppress(FileExistsError):  # another process was quicker
            try:
                os.link(part, self.path)
            except OSError as e:
                if e.errno not in _NO_LINKS:
                    raise
                if not self.path.exists():
                    os.rename(part, self.path)
        part.unlink(missing_ok=True)
        fsync(folder)

    def _check_file(self) -> None:
        """Before SQLite opens it, which takes an empty file for a new one, and any log beside a file for its own."""
        with open(self.path, "rb") as file:
            head = file.read(72)
        if not head:
            hint = "It was cut off: restore it from a backup, or remove it to begin a new gallery."
            raise ArtifactError(str(self.path), "an empty file", "a gallery that is whole", hint)
        stamp, log = int.from_bytes(head[68:72], "big"), Path(f"{self.path}-wal")
        if not stamp or not log.exists() or not log.stat().st_size or Path(f"{self.path}-journal").exists():
            return  # a journal beside it is of a making that did not end: SQLite takes it back first
        # A connection that cannot write leaves the log where it is.
        sql = sqlite3.connect(f"{self.path.absolute().as_uri()}?mode=ro", WAIT, uri=True)
        try:
            told = sql.execute("SELECT value FROM about WHERE key = 'stamp'").fetchone()
        finally:
            sql.close()
        if told != (stamp,):
            hint = f"Move {log.name} and {FILE}-shm away: the file, such as a backup, was put in another's place."
            raise ArtifactError(str(self.path), f"the log of another file, {log.name}", "the file's own", hint)

    def _check(self, expected: int) -> None:
        """Another schema may hold triggers and views, which would run."""
        found = [sql for (sql,) in self._sql.execute("SELECT sql FROM sqlite_master WHERE sql NOT NULL ORDER BY rowid")]
        version = self.get("format_version") if _TABLES[0] in found else None
        if isinstance(version, int) and self.get("kind") == "gallery" and version != expected:
            older = f"nformer-edge gallery upgrade {self.path.parent}"
            hint = older if expected == FORMAT_VERSION else "It needs no upgrade."
            hint = hint if version <= FORMAT_VERSION else "Update nformer-edge."
            raise ArtifactError(str(self.path), f"format version {version}", expected, hint)
        if found != [*_TABLES[: 4 if expected == 1 else 5]]:
            hint = "Check the path; restore it from a backup if it was one."
            raise ArtifactError(str(self.path), "other tables", "a gallery's", hint)

    def close(self) -> None:
        """Gives the file back."""
        self._sql.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as e:
            told, where = str(e), str(self.path)
            if "closed database" in told:
                raise BackendError(where, "a gallery that was closed", "an open one", "Open it again.") from e
            if "locked" in told or "busy" in told:
                hint = "Run it again when that is done."
                raise BackendError(where, "another process that writes", "one writer at a time", hint) from e
            if "full" in told or "readonly" in told or "unable to open" in told or "disk I/O" in told:
                hint = "Check the disk's space and the folder's permissions; what was acknowledged is kept."
                raise ArtifactError(where, told, "a file that can be written", hint) from e
            raise ArtifactError(where, told, "a gallery that is whole", "Restore it from a backup.") from e
        except OSError as e:
            raise ArtifactError(str(self.path), e.strerror, "a place to write to", "Choose another folder.") from e

    @contextmanager
    def writing(self) -> Iterator[None]:
        """One transaction: on the disk when the block has ended, or undone whole.

        Raises:
            BackendError: if another process writes for longer than `WAIT` seconds.
        """
        with self._errors():
            self._sql.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._sql.execute("COMMIT")
            except BaseException:
                if self._sql.in_transaction:
                    self._sql.execute("ROLLBACK")
                raise

    @contextmanager
    def reading(self) -> Iterator[None]:
        """One state of the file for all that is read in the block, also within `writing`."""
        with self._errors():
            if self._sql.in_transaction:
                yield
                return
            self._sql.execute("BEGIN")
            try:
                yield
            finally:
                self._sql.execute("COMMIT")

    def _version(self) -> int:
        return int(self._sql.execute("PRAGMA data_version").fetchone()[0])

    def changed(self) -> bool:
        """Whether another process has written since the last call."""
        with self._errors():
            before, self._seen = self._seen, self._version()
        return before != self._seen

    def get(self, key: str) -> object:
        """What the gallery says of itself under `key`, or None."""
        with self._errors():
            row = self._sql.execute("SELECT value FROM about WHERE key = ?", (key,)).fetchone()
        return row[0] if row else None

    def number(self, key: str) -> int:
        """`get`, of a whole number.

        Raises:
            ArtifactError: if it is none.
        """
        value = self.get(key)
        if not isinstance(value, int):
            raise ArtifactError(str(self.path), f"{key} {value!r}", "a whole number", "Restore it from a backup.")
        return value

    def put(self, **values: object) -> None:
        """Sets what `get` gives."""
        self._sql.executemany("INSERT OR REPLACE INTO about VALUES (?, ?)", values.items())

    def code(self, features: int) -> Code:
        """The code of the vectors, of a model with this many features.

        Raises:
            ArtifactError: if it is not what was written.
        """
        name, directions, center, digest = (self.get(key) for key in ("code", "directions", "center", "code_sha256"))
        if digest != _digest(*(x if isinstance(x, bytes) else b"" for x in (directions, center)), str(name).encode()):
            hint = "The file was changed or is damaged: restore it from a backup."
            raise ArtifactError(str(self.path), f"code {name!r}", "the code that was written", hint)
        arrays = [np.frombuffer(x, "<f4") if isinstance(x, bytes) else None for x in (directions, center)]
        return Code(name, None if arrays[0] is None else arrays[0].reshape(-1, features), arrays[1])  # type: ignore[arg-type]

    def put_code(self, code: Code) -> None:
        """Sets it; the batches must follow."""
        arrays = [None if a is None else a.astype("<f4").tobytes() for a in (code.directions, code.center)]
        digest = _digest(*(x or b"" for x in arrays), code.name.encode())
        self.put(code=code.name, directions=arrays[0], center=arrays[1], code_sha256=digest)

    def read(self, code: Code, features: int, after: int = 0) -> list[Held]:
        """The batches with numbers above `after`, each verified.

        Raises:
            ArtifactError: naming a batch whose bytes are not those that were written.
        """
        sql = "SELECT batch, vectors, labels, sha256 FROM batches WHERE batch > ? ORDER BY batch"
        with self._errors():
            rows = self._sql.execute(sql, (after,)).fetchall()
        return [self._batch(code, features, *row) for row in rows]

    def _batch(self, code: Code, features: int, batch: int, vectors: bytes, labels: str, sha256: str) -> Held:
        try:
            if _digest(vectors, labels.encode()) != sha256:
                raise ValueError("other bytes than were written")
            told, width, dtype = json.loads(labels), code.width(features), np.dtype(code.dtype)
            columns: dict[str, np.ndarray] = {"batch": np.full(len(told["ids"]), batch)}
            for name, kind in LABELS.items():
                if name != "batch":
                    values = [np.nan if v is None else v for v in told[name]] if name == "times" else told[name]
                    columns[name] = np.empty(len(told["ids"]), kind)
                    columns[name][:] = values
            rows = len(told["ids"])
            size = rows * width * dtype.itemsize
            columns["codes"] = np.frombuffer(vectors, dtype, rows * width).reshape(rows, width)
            columns["scale"] = np.frombuffer(vectors, np.float32, rows, size)
            if len(vectors) != size + 4 * rows:
                raise ValueError("vectors of another size")
        except (ValueError, TypeError, KeyError, RecursionError) as e:
            raise self._damaged(f"batch {batch}: {e}") from e
        return Held.of(code, columns)

    def _damaged(self, got: str) -> ArtifactError:
        hint = "The file was changed or is damaged: restore it from a backup."
        return ArtifactError(str(self.path), got, "the bytes that were written", hint)

    def append(self, held: Held) -> Held:
        """Writes images in new batches; gives them with their batches' numbers."""
        last = self._sql.execute("SELECT coalesce(max(batch), 0) FROM batches").fetchone()[0]
        batches = last + 1 + np.arange(len(held)) // BATCH
        for batch in np.unique(batches).tolist():
            self.rewrite(batch, held.take(batches == batch))
        return held.with_labels(batch=batches)

    def rewrite(self, batch: int, held: Held) -> None:
        """Puts these images in the place of a batch; none: deletes it."""
        if not len(held):
            self._sql.execute("DELETE FROM batches WHERE batch = ?", (batch,))
            return
        vectors = held["codes"].tobytes() + held["scale"].tobytes()
        labels = json.dumps({name: to_json(held[name]) for name in LABELS if name != "batch"}, separators=(",", ":"))
        values = (batch, vectors, labels, _digest(vectors, labels.encode()))
        self._sql.execute("INSERT OR REPLACE INTO batches VALUES (?, ?, ?, ?)", values)

    def clear(self) -> None:
        """Deletes all batches."""
        self._sql.execute("DELETE FROM batches")

    def put_thumbnails(self, images: Mapping[int, bytes]) -> None:
        """Keeps images' pictures under their keys."""
        self._sql.executemany("INSERT OR REPLACE INTO thumbnails VALUES (?, ?)", images.items())

    def thumbnail(self, key: int) -> bytes | None:
        """An image's picture, or None."""
        with self._errors():
            row = self._sql.execute("SELECT image FROM thumbnails WHERE key = ?", (key,)).fetchone()
        return bytes(row[0]) if row else None

    def drop_thumbnails(self, keys: list[int]) -> None:
        """Deletes images' pictures."""
        self._sql.executemany("DELETE FROM thumbnails WHERE key = ?", ((key,) for key in keys))

    def put_state(self, state: Mapping[str, np.ndarray] | None, fits: str = "") -> None:
        """Keeps arrays of the gallery's images in the transaction at hand; None: keeps none.

        Args:
            fits: what `state` must be asked with, such as a digest of what they were computed from.
        """
        self._sql.execute("PRAGMA secure_delete=OFF").fetchall()  # no feature is among them: `shrink` is soon enough
        self._sql.execute("DELETE FROM state")
        self._sql.execute("PRAGMA secure_delete=ON").fetchall()
        if state is None:
            return
        arrays = {name: np.asarray(array, order="C") for name, array in state.items()}
        about = {name: [array.dtype.str, list(array.shape)] for name, array in arrays.items()}
        told = {"fits": fits, "arrays": about, "sha256": _digest(*(array.tobytes() for array in arrays.values()))}
        insert = "INSERT INTO state VALUES (?, ?, ?)"
        self._sql.execute(insert, ("", 0, json.dumps(told).encode()))
        for name, array in arrays.items():
            data = array.tobytes()
            parts = range(0, len(data), _PART)
            self._sql.executemany(insert, ((name, i, data[at : at + _PART]) for i, at in enumerate(parts)))

    def state(self, fits: str) -> dict[str, np.ndarray] | None:
        """What `put_state` kept with the same words; None where there is nothing, or not what was written."""
        with self.reading():
            rows = self._sql.execute("SELECT name, data FROM state ORDER BY name, part").fetchall()
        parts: dict[str, bytearray] = {}
        try:
            for name, part in rows:
                parts.setdefault(name, bytearray()).extend(part)
            told = json.loads(parts.pop("", b"null"))
            if not told or told["fits"] != fits:
                return None
            data = {name: bytes(parts.pop(name, b"")) for name in told["arrays"]}
            sizes = {name: math.prod(shape) for name, (_, shape) in told["arrays"].items()}
            if _digest(*data.values()) != told["sha256"] or parts:
                return None
            kinds = {name: np.dtype(_KINDS[_KINDS.index(kind)]) for name, (kind, _) in told["arrays"].items()}
            arrays = {name: np.frombuffer(data[name], kinds[name], sizes[name]) for name in data}
            return {name: array.reshape(told["arrays"][name][1]) for name, array in arrays.items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None

    def upgrade(self) -> None:
        """Brings the file of format version 1, as which it was opened, to this version: images get `KEYS`.

        A gallery and its backup get the same ones.
        """
        with self.writing():
            self._sql.execute(_TABLES[4])
            for batch, vectors, labels, sha256 in self._sql.execute("SELECT * FROM batches").fetchall():
                if _digest(vectors, labels.encode()) != sha256:
                    raise self._damaged(f"batch {batch}: other bytes than were written")
                told = json.loads(labels)
                old, count = told["key"], len(told["key"])
                size, scales = len(vectors) // count - 4, len(vectors) - 4 * count
                told["key"] = [
                    _stable(
                        vectors[i * size : (i + 1) * size],
                        vectors[scales + 4 * i : scales + 4 * i + 4],
                        json.dumps([told[name][i] for name in ("ids", "paths", "cameras", "times", "key")]).encode(),
                    )
                    for i in range(count)
                ]
                renamed = zip(told["key"], old, strict=True)
                self._sql.executemany("UPDATE thumbnails SET key = ? WHERE key = ?", renamed)
                text = json.dumps(told, separators=(",", ":"))
                values = (text, _digest(vectors, text.encode()), batch)
                self._sql.execute("UPDATE batches SET labels = ?, sha256 = ? WHERE batch = ?", values)
            self.put(format_version=FORMAT_VERSION, changes=self.number("changes") + 1)

    def log(self, action: str, ids: int, images: int, note: str = "") -> None:
        """Adds to the log, in the transaction at hand."""
        row = (time.time(), action, ids, images, note)
        self._sql.execute("INSERT INTO log (time, action, ids, images, note) VALUES (?, ?, ?, ?, ?)", row)

    def entries(self) -> tuple[Entry, ...]:
        """The log, oldest first."""
        with self._errors():
            rows = self._sql.execute("SELECT time, action, ids, images, note FROM log ORDER BY entry").fetchall()
        return tuple(Entry(*row) for row in rows)

    def shrink(self) -> None:
        """Writes the file anew and empties the log of its pages: no byte of what was deleted is left in either.

        Raises:
            BackendError: if another process reads or writes just then.
        """
        with self._errors():
            self._sql.execute("VACUUM")
            if self._sql.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
                raise sqlite3.OperationalError("busy")

    def copy_to(self, folder: str | os.PathLike[str]) -> Path:
        """Writes the gallery as it is at this instant to another folder, whole or not at all; others go on.

        Raises:
            ArtifactError: if there is one already, or the disk is full.
        """
        out = Path(folder) / FILE
        if out.exists():
            raise ArtifactError(str(folder), "a gallery there", "a new folder", "Choose another one.")
        with self._errors():
            self._make_folder(out.parent)
            part = out.with_suffix(".part")
            part.unlink(missing_ok=True)
            self._sql.execute("VACUUM INTO ?", (str(part),))
            copy = sqlite3.connect(part, isolation_level=None)
            _stamp(copy)
            copy.close()
            os.chmod(part, 0o600)
            fsync(part)
            os.replace(part, out)
            fsync(out.parent)
        return out.parent

    @property
    def bytes(self) -> int:
        """Of all its files."""
        return sum(path.stat().st_size for path in self.path.parent.glob(f"{FILE}*"))


def _stamp(sql: sqlite3.Connection) -> None:
    """Says which file this is, in its first page and in a table: they differ where the log of another is beside it."""
    number = secrets.randbelow(2**31 - 1) + 1
    sql.execute(f"PRAGMA application_id = {number}")
    sql.execute("INSERT OR REPLACE INTO about VALUES ('stamp', ?)", (number,))


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _stable(*parts: bytes) -> int:
    """One of `KEYS`, the same for the same bytes."""
    return KEYS[0] + int(_digest(*parts)[:13], 16)
