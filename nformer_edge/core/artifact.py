"""Files that stages hand on: written whole or not at all, hashed when written, verified before anything opens them."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import stat
import tempfile
import time
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from nformer_edge.core.errors import ArtifactError, UsageError
from nformer_edge.core.filekind import file_kind
from nformer_edge.core.values import JSON, Table, digest_of

MANIFEST = "manifest.json"

#: Beside a manifest that was signed; see `core.signature`.
SIGNATURE = "signature.json"
FORMAT_VERSION = 2

#: Fields of a manifest that this module writes and reads.
OWN_FIELDS = ("kind", "format_version", "files", "sha256")

_TEMPORARY = ".nformer-edge-tmp-"
_REPLACING = ".nformer-edge-replacing-"
_TOGETHER = ".nformer-edge-together-"
_HOST = re.sub(r"\W", "_", platform.node()) or "host"

#: Of Linux's ``renameat2``.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_STALE_SECONDS = 24 * 3600.0
_CHUNK = 1 << 20
_MAX_TEXT = 256 << 20


def sha256_file(path: str | os.PathLike[str]) -> str:
    """The file's sha256 as 64 hexadecimal digits, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def open_plain(path: str | os.PathLike[str], what: str) -> IO[bytes]:
    """Opens a plain file for reading; `what` it should be stands in errors.

    Raises:
        ArtifactError: if it is missing, cannot be read, or is a folder, a FIFO or a device, which might never end.
    """
    where = os.fspath(path)
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            got = "a folder" if stat.S_ISDIR(found.st_mode) else "a device or a FIFO"
            raise ArtifactError(where, got, what, "Pass a plain file.")
        return open(path, "rb")
    except FileNotFoundError as e:
        raise ArtifactError(where, "no such file", what, "Check the path.") from e
    except (OSError, ValueError) as e:  # ValueError: a zero byte in the name
        raise ArtifactError(where, f"an unreadable file ({e})", what, "Check the file.") from e


def read_text(path: str | os.PathLike[str], what: str = "a text file", encoding: str = "utf-8") -> str:
    """The text of a plain file.

    Raises:
        ArtifactError: as `open_plain`; if it is too large or no UTF-8.
    """
    try:
        with open_plain(path, what) as file:
            data = file.read(_MAX_TEXT + 1)
        if len(data) > _MAX_TEXT:
            raise ArtifactError(os.fspath(path), f"more than {_MAX_TEXT >> 20} MiB", what, "Check the path.")
        return data.decode(encoding)
    except UnicodeDecodeError as e:
        hint = "Save it as UTF-8; a spreadsheet calls that CSV UTF-8."
        raise ArtifactError(os.fspath(path), "another encoding, or no text", f"{what} in UTF-8", hint) from e
    except OSError as e:
        raise ArtifactError(os.fspath(path), f"an unreadable file ({e})", what, "Check the disk.") from e


def read_json(path: str | os.PathLike[str], what: str, hint: str) -> JSON:
    """The data of a JSON file.

    Raises:
        ArtifactError: as `read_text`; if it is no JSON, or nested too deep to be read.
    """
    recover(Path(path))
    text = read_text(path, what)
    try:
        return typing.cast(JSON, json.loads(text))
    except (ValueError, RecursionError) as e:
        raise ArtifactError(os.fspath(path), f"no readable JSON ({e})", what, hint) from e


def _temporary(folder: Path, directory: bool = False) -> Path:
    """A new file or folder beside the target, named after this process: another one can tell whether it lives."""
    prefix = f"{_TEMPORARY}{_HOST}-{os.getpid()}-"
    if directory:
        return Path(tempfile.mkdtemp(prefix=prefix, dir=folder))
    descriptor, name = tempfile.mkstemp(prefix=prefix, dir=folder)
    os.close(descriptor)
    return Path(name)


def _sweep(folder: Path) -> None:
    """Removes temporaries of processes that are gone: at once those of this machine, others after a day."""
    for entry in folder.glob(f"{_TEMPORARY}*"):
        try:
            if _is_dead(entry):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        except OSError:
            continue  # another process swept it, or owns it: not ours to report


def _is_dead(entry: Path) -> bool:
    host, _, rest = entry.name.removeprefix(_TEMPORARY).partition("-")
    pid = rest.partition("-")[0]
    if host != _HOST or not pid.isdecimal():
        return time.time() - entry.stat().st_mtime > _STALE_SECONDS
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # somebody else's process
        return False
    return False


def _refuse_zero(path: str | os.PathLike[str]) -> None:
    if "\0" in os.fspath(path):
        raise ArtifactError(
            repr(os.fspath(path)), "a zero byte", "a name that the system can take", "Choose another -o."
        )


def _prepare(path: Path) -> None:
    _refuse_zero(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ArtifactError(str(path.parent), e.strerror, "a folder to write to", "Choose another -o.") from e
    _sweep(path.parent)
    recover(path)


def _write_failed(path: Path, error: OSError, placed: bool) -> ArtifactError:
    """The error in words that are true at this instant. `placed`: whether the new one has its name already."""
    hint = "Free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "Choose a place that can be written to"
    there = f"The earlier {path.name} is untouched." if path.exists() else f"There is no {path.name} now."
    if placed:
        there = f"The new {path.name} is in place, but the disk has not confirmed it."
    got = error.strerror or str(error)
    return ArtifactError(str(path), got, "a complete write", f"{hint} and run again. {there}")


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Opens a temporary file beside `path` for binary writing; it takes the name `path` only if the block succeeds.

    Raises:
        ArtifactError: if the disk is full or the folder cannot be written; the old file is intact.
    """
    path = Path(path)
    _prepare(path)
    temporary: Path | None = None
    placed = False
    try:
        temporary = _temporary(path.parent)
        os.chmod(temporary, 0o644)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        placed = True
        fsync(path.parent)
    except OSError as e:
        raise _write_failed(path, e, placed) from e
    finally:
        if temporary is not None and not placed:
            with suppress(OSError):  # what is left is swept by the next run
                temporary.unlink()


def atomic_write_json(path: str | os.PathLike[str], data: Any) -> None:
    """Writes `data` as indented JSON, atomically. NaN and infinity are refused with ValueError."""
    with atomic_write(path) as file:
        file.write(json.dumps(data, indent=2, allow_nan=False).encode() + b"\n")


def require_new(path: str | os.PathLike[str], kind: str, force: bool) -> None:
    """Asked before minutes are spent: whether a folder of this kind may be made at `path`.

    Raises:
        ArtifactError: if there is one already, unless `force`; if there is anything else, in any case.
    """
    path = Path(path)
    recover(path)
    _require_ours(path, kind)
    if not force and path.exists() and any(path.iterdir()):
        hint = "Choose another -o, or replace it: --force"
        raise ArtifactError(str(path), f"an earlier {kind} there", "a new folder", hint)


def require_suffix(path: str | os.PathLike[str], suffix: str) -> None:
    """Raises UsageError unless what will be written has the suffix that it is opened by later."""
    _refuse_zero(path)
    if Path(path).suffix != suffix:
        hint = f"Name it {Path(path).with_suffix(suffix)}"
        raise UsageError("output", os.fspath(path), f"a file that ends in {suffix}", hint)


def require_new_file(path: str | os.PathLike[str], what: str, force: bool) -> None:
    """Asked before minutes are spent: whether the file `path` may be written. `what`: such as "a checkpoint".

    Raises:
        ArtifactError: if there is one already, unless `force`; if there is a folder, in any case.
    """
    if Path(path).is_dir():
        raise ArtifactError(os.fspath(path), "a folder there", f"a new name for {what}", "Choose another -o.")
    if not force and os.path.lexists(path):
        hint = "Choose another -o, or replace it: --force"
        raise ArtifactError(os.fspath(path), "an earlier file there", f"a new name for {what}", hint)


def _require_ours(path: Path, kind: str) -> None:
    if path.is_symlink() or (path.exists() and not (path.is_dir() and _may_replace(path, kind))):
        raise ArtifactError(
            str(path),
            "something that is not ours to replace",
            f"nothing there, or an earlier {kind}",
            "Choose another -o, or remove it yourself.",
        )


@contextmanager
def working_in(folder: Path, path: Path) -> Iterator[None]:
    """Where writing a file of `folder` fails, the error says what became of `path`, which is made of them."""
    try:
        yield
    except ArtifactError as e:
        if not (isinstance(e.__cause__, OSError) and e.subject.startswith(str(folder))):
            raise
        raise _write_failed(path, e.__cause__, placed=False) from e.__cause__


@contextmanager
def atomic_folder(path: str | os.PathLike[str], kind: str) -> Iterator[Path]:
    """Yields an empty temporary folder; on success it replaces `path`, which may hold an earlier folder of this kind.

    Raises:
        ArtifactError: if `path` holds anything that is not an artifact of `kind`, or the disk is full.
    """
    path = Path(path)
    _require_ours(path, kind)
    _prepare(path)
    temporary, placed = _temporary(path.parent, directory=True), False
    try:
        os.chmod(temporary, 0o755)
        with working_in(temporary, path):
            yield temporary
        for entry in temporary.rglob("*"):
            fsync(entry)
        fsync(temporary)
        _put(temporary, path)
        placed = True
        fsync(path.parent)
    except OSError as e:
        raise _write_failed(path, e, placed) from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put(new: Path, path: Path) -> None:
    """Gives the folder `new` the name `path`. At no instant is there neither the old folder nor the new one."""
    if not path.exists():
        try:
            os.rename(new, path)
            return
        except OSError as e:
            if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise  # else another writer was first
    if _exchange(new, path):
        return  # the caller removes `new`, which is now the old folder
    ready, old = _journal(path)
    os.rename(new, ready)  # from here on the new folder is the one: `recover` completes what a kill interrupts
    fsync(path.parent)
    os.rename(path, old)
    os.rename(ready, path)
    fsync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Exchanges two names in one step (Linux's ``renameat2``); False where system or file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), os.fspath(b))


def _journal(path: Path) -> tuple[Path, Path]:
    """Where a folder waits that is complete, and where the one goes that it replaces."""
    return path.with_name(f"{_REPLACING}new-{path.name}"), path.with_name(f"{_REPLACING}old-{path.name}")


def recover(path: Path) -> None:
    """Completes a replacement of `path` that a killed process had decided and not finished. Else it does nothing."""
    parts = path.name.split(".")
    for end in range(1, len(parts) + 1):
        together = path.parent / f"{_TOGETHER}{'.'.join(parts[:end])}"
        if os.path.isdir(together):
            _give_names(together)
    ready, old = _journal(path)
    if ready.is_dir():
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(path, old)
        os.rename(ready, path)
        fsync(path.parent)
    if path.exists() and old.is_dir():
        shutil.rmtree(old, ignore_errors=True)


def put_together(folder: Path, path: Path) -> None:
    """Gives every file of `folder` its name in the folder above, all or none, and removes `folder`.

    Killed on the way, the rest follows before the next command opens or writes one of them (`recover`).

    Args:
        folder: a complete set of files. An empty one stands for removal: what bears its name goes. Folders inside are
            removed.
        path: the chief of the new files; the names of all begin with its stem.

    Raises:
        ArtifactError: if the disk fails; it says whether the new set or the earlier one is in place.
    """
    ready, placed = path.with_name(f"{_TOGETHER}{path.stem}"), False
    try:
        for entry in folder.iterdir():
            fsync(entry)
        fsync(folder)
        os.rename(folder, ready)  # from here on the new files are the ones
        placed = True
        fsync(path.parent)
        _give_names(ready)
    except OSError as e:
        raise _write_failed(path, e, placed) from e


def _give_names(ready: Path) -> None:
    with suppress(FileNotFoundError):  # another process was first
        for entry in ready.iterdir():
            target = ready.with_name(entry.name)
            if entry.is_file() and entry.stat().st_size:
                os.replace(entry, target)
            elif entry.is_file():
                target.unlink(missing_ok=True)
        fsync(ready.parent)
        fsync(ready)
    shutil.rmtree(ready, ignore_errors=True)


def _may_replace(path: Path, kind: str) -> bool:
    if not any(path.iterdir()):
        return True
    try:
        return json.loads((path / MANIFEST).read_text()).get("kind") == kind
    except (OSError, ValueError, AttributeError):
        return False


def kind_of(folder: str | os.PathLike[str], *known: str) -> str:
    """What a folder's manifest says it is, unverified: one of `known`.

    Raises:
        ArtifactError: if it is something else, or has no readable manifest.
    """
    path = Path(folder)
    recover(path)
    expected = " or ".join(map(with_article, known))
    hint = "Check the path, or make one with `nformer-edge export` or `build-engine`."
    if not (path / MANIFEST).exists():
        got = "a folder without a manifest" if path.is_dir() else "a file" if path.exists() else "no such folder"
        raise ArtifactError(str(path), got, expected, hint)
    data = read_json(path / MANIFEST, "a manifest", hint)
    kind = data.get("kind") if isinstance(data, dict) else None
    if not isinstance(kind, str) or kind not in known:
        raise ArtifactError(str(path), with_article(kind) if kind else "no kind in it", expected, hint)
    return kind


def with_article(name: object) -> str:
    """Such as ``an engine``."""
    return f"{'an' if str(name)[:1] in 'aeiou' else 'a'} {name}"


def write_manifest(folder: str | os.PathLike[str], kind: str, fields: dict[str, Any]) -> None:
    """Hashes every file in `folder` and writes its `manifest.json`: kind, format, `fields`, files with sha256.

    The last field, ``sha256``, is over all others: a manifest is verified like the files that it lists.
    """
    folder = Path(folder)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in (MANIFEST, SIGNATURE))
    entries = {p.relative_to(folder).as_posix(): {"sha256": sha256_file(p), "bytes": p.stat().st_size} for p in files}
    own = {key: value for key, value in fields.items() if key not in OWN_FIELDS}
    manifest = {"kind": kind, "format_version": FORMAT_VERSION, **own, "files": entries}
    atomic_write_json(folder / MANIFEST, {**manifest, "sha256": digest_of(manifest)})


@dataclass(frozen=True)
class Artifact:
    """An artifact's folder, opened once and verified whole: what is used later is what was hashed.

    Args:
        folder: where it was read.
        kind: ``bundle``, ``engine`` ...
        fields: the manifest without `OWN_FIELDS`.
        files: of every file that the manifest lists, its bytes.
        sha256: of the manifest, which lists the files' hashes: it stands for the whole.
    """

    folder: Path
    kind: str
    fields: Table
    files: Mapping[str, bytes]
    sha256: str

    def digest(self, name: str) -> str:
        """The sha256 of one file."""
        return hashlib.sha256(self.files[name]).hexdigest()

    def copy(self, name: str, folder: Path) -> None:
        """Writes one file's verified bytes into `folder`."""
        (folder / name).write_bytes(self.files[name])


def open_artifact(folder: str | os.PathLike[str], kind: str) -> Artifact:
    """Reads and verifies an artifact's folder, each file once.

    Raises:
        ArtifactError: naming the file and what does not match.
    """
    folder = Path(folder)
    while True:  # where a writer replaced the folder meanwhile, half of the old one was read: the new one follows
        before = _identity(folder)
        try:
            manifest, sha256 = _read_manifest(folder, kind)
            files = {str(name): read_verified(folder, manifest, str(name)) for name in manifest["files"]}
        except (OSError, ArtifactError):
            if _identity(folder) == before:
                raise
        else:
            if _identity(folder) == before:
                fields = {key: value for key, value in manifest.items() if key not in OWN_FIELDS}
                return Artifact(folder, kind, fields, files, sha256)


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_ino, found.st_ctime_ns


def read_manifest(folder: str | os.PathLike[str], kind: str, version: int = FORMAT_VERSION) -> dict[str, Any]:
    """Reads and verifies an artifact's folder: the manifest by its own digest, and every file that it lists.

    Nothing else may open a file of the folder before this has returned.

    Raises:
        ArtifactError: naming the file and what does not match; where signatures are required, for one that does not
            hold.
    """
    return _read_manifest(Path(folder), kind, version)[0]


#: What to pass where another folder stands.
_MADE_BY = {
    "bundle": "Pass the folder that `nformer-edge export` wrote.",
    "engine": "Pass the folder that `nformer-edge build-engine` wrote.",
}


def _read_manifest(folder: Path, kind: str, version: int = FORMAT_VERSION) -> tuple[dict[str, Any], str]:
    """A verified manifest, and the sha256 of its file."""
    from nformer_edge.core.signature import require_signature  # it reads and writes by this module

    recover(folder)
    path = folder / MANIFEST
    if not path.is_file():
        got, hint = "no such folder" if not folder.exists() else f"no {MANIFEST} in it", _MADE_BY.get(kind, "")
        hint = hint or f"Pass the folder of {with_article(kind)}."
        if folder.is_file():
            found_kind = file_kind(folder)
            got, hint = found_kind.name, found_kind.hint
        raise ArtifactError(str(folder), got, with_article(kind), hint)
    text = read_text(path, "a manifest")
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    require_signature(folder, kind, sha256)
    try:
        manifest = json.loads(text)
        found, written, files = manifest["kind"], manifest["format_version"], manifest["files"]
        entries = {str(name): (str(e["sha256"]), int(e["bytes"])) for name, e in files.items()}
        digest = digest_of(manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ArtifactError(str(path), f"no readable manifest ({e})", f"a {kind}'s", "Make it again.") from e
    if found != kind:
        hint = _MADE_BY.get(kind, f"Pass the folder of {with_article(kind)}.")
        raise ArtifactError(str(folder), with_article(found), with_article(kind), hint)
    if written != version:
        older = isinstance(written, int) and written < version
        hint = f"nformer-edge upgrade {folder}" if older else f"Update nformer-edge, or make the {kind} again."
        raise ArtifactError(str(folder), f"format version {written}", version, hint)
    if version > 1 and manifest.get("sha256") != digest:
        told, hint = str(manifest.get("sha256")), f"The manifest was changed: copy or make the {kind} again."
        raise ArtifactError(str(path), f"sha256 {digest[:12]}...", f"{told[:12]}... as it says", hint)
    for name, (digest, size) in entries.items():
        _verify(folder, name, digest, size)
    return manifest, sha256


def read_verified(folder: str | os.PathLike[str], manifest: Mapping[str, Any], name: str) -> bytes:
    """The bytes of a file that `manifest` lists, hashed as they were read: what is opened is what was verified.

    Raises:
        ArtifactError: if the manifest does not list `name`, or the file is not what it lists.
    """
    file = Path(folder) / name
    entry = manifest["files"].get(name)
    if entry is None or not file.is_file():
        got = "no such file" if entry else "no such file in the manifest"
        raise ArtifactError(str(file), got, "a file of this artifact", "Make or copy it again.")
    data = file.read_bytes()
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise ArtifactError(
            str(file),
            "other bytes",
            f"sha256 {entry['sha256'][:12]}... as in the manifest",
            "The file was changed: copy or make the folder again.",
        )
    return data


def _verify(folder: Path, name: str, digest: str, size: int) -> None:
    file = folder / name
    inside = not os.path.isabs(name) and ".." not in Path(name).parts
    if not inside or file.is_symlink() or not file.resolve().is_relative_to(folder.resolve()):
        raise ArtifactError(
            f"{folder}: file {name!r}", "a way out of the folder", "a plain file inside", "Do not use it."
        )
    if not file.is_file():
        raise ArtifactError(str(file), "no such file", "the file that the manifest lists", "Copy the folder again.")
    if file.stat().st_nlink > 1:
        raise ArtifactError(str(file), "a hard link", "a plain file", "Copy the folder again.")
    if file.stat().st_size != size:
        raise ArtifactError(str(file), f"{file.stat().st_size} bytes", f"{size} bytes", "Copy the folder again.")
    actual = sha256_file(file)
    if actual != digest:
        raise ArtifactError(
            str(file),
            f"sha256 {actual[:12]}...",
            f"{digest[:12]}... as in the manifest",
            "The file was changed: copy or make the folder again.",
        )
