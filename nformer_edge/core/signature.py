"""Who made a bundle or an engine, and when: an Ed25519 signature over its manifest, which lists every file's sha256.

It lies beside the manifest as `SIGNATURE`. Signing and verifying need the package ``cryptography``.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, ClassVar

from nformer_edge.core.artifact import MANIFEST, SIGNATURE, atomic_write, read_json, read_text, sha256_file
from nformer_edge.core.errors import ArtifactError, BackendError, UsageError
from nformer_edge.core.values import Result

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

#: Kinds of folders that are signed. A plugin library is named in the engine's manifest by its sha256.
_SIGNED = ("bundle", "engine")


@dataclass(frozen=True)
class Signature(Result):
    """What stands in `SIGNATURE`.

    Args:
        artifact: kind of the folder.
        manifest: sha256 of its manifest, as bytes.
        signed_at: seconds since 1970 by the clock of the machine that signed.
        signature: Ed25519 over the other fields, hexadecimal.
    """

    kind: ClassVar[str] = "signature"

    artifact: str
    manifest: str
    signed_at: int
    signature: str = ""

    def statement(self) -> bytes:
        """What is signed."""
        return json.dumps(["nformer-edge signature", 1, self.artifact, self.manifest, self.signed_at]).encode()


@dataclass(frozen=True)
class _Required:
    key: Ed25519PublicKey
    fingerprint: str
    since: int


#: What `required` asks for, the innermost last. Every thread goes by it.
_required: list[_Required] = []


@contextmanager
def required(public_key: str | os.PathLike[str] | None, since: str | int | None = None) -> Iterator[None]:
    """Inside, no bundle or engine is opened that this key did not sign, and no checkpoint, in any thread.

    A folder is refused, too, that was signed before `since`, or before one that was opened earlier under the same path
    and key. What was opened last is kept in the user's state folder.

    Args:
        public_key: PEM file of an Ed25519 public key. None asks for nothing.
        since: a time such as ``2026-11-28T12:00:00+00:00``, or seconds since 1970.

    Raises:
        UsageError: for another kind of key or time.
        BackendError: without the package ``cryptography``.
    """
    if public_key is None:
        if since is not None:
            raise UsageError("signed_since", since, "a public key beside it", "Add --require-signed PUBLIC.pem")
        yield
        return
    asked = _Required(*_public_key(public_key), _seconds(since))
    _required.append(asked)
    try:
        yield
    finally:
        _required.remove(asked)


def require_signature(folder: Path, kind: str, manifest: str) -> None:
    """The door: what `required` asks for, before any file of the folder but its manifest has been read.

    Args:
        folder: of the artifact.
        kind: its kind.
        manifest: sha256 of its manifest.

    Raises:
        ArtifactError: for a signature that is missing, another key's, of other files or too old.
    """
    for asked in _required if kind in _SIGNED else ():
        _require(folder, kind, manifest, asked)


def refuse_unsigned(path: str | os.PathLike[str], what: str) -> None:
    """Raises ArtifactError for what carries no signature, where one is required."""
    if _required:
        hint = "Export it, and sign the bundle: nformer-edge export --sign PRIVATE.pem"
        raise ArtifactError(os.fspath(path), f"{what}, which carries no signature", "a signed bundle or engine", hint)


def sign_folder(folder: str | os.PathLike[str], kind: str, private_key: str | os.PathLike[str] | None) -> None:
    """Signs a folder that has its manifest; None does nothing.

    Raises:
        UsageError: for another kind of key.
        BackendError: without the package ``cryptography``.
    """
    if private_key is None:
        return
    unsigned = Signature(kind, sha256_file(Path(folder) / MANIFEST), int(time.time()))
    signed = Signature(
        kind, unsigned.manifest, unsigned.signed_at, _private_key(private_key).sign(unsigned.statement()).hex()
    )
    signed.save(Path(folder) / SIGNATURE)


def check_private_key(path: str | os.PathLike[str] | None) -> None:
    """Raises as `sign_folder` does, before anything is built."""
    if path is not None:
        _private_key(path)


def _require(folder: Path, kind: str, manifest: str, asked: _Required) -> None:
    where, hint = str(folder), "Sign it: --sign PRIVATE.pem of `export`, `build-engine` or `upgrade`."
    if not (folder / SIGNATURE).exists():
        raise ArtifactError(where, f"no {SIGNATURE} in it", f"one by the key {asked.fingerprint[:12]}...", hint)
    found = Signature.from_json(read_json(folder / SIGNATURE, "a signature", hint), str(folder / SIGNATURE))
    if not _verifies(found, asked.key):
        got = "a signature that this key did not make"
        raise ArtifactError(
            where, got, f"one by the key {asked.fingerprint[:12]}...", "Do not use it, or name its key."
        )
    if (found.artifact, found.manifest) != (kind, manifest):
        got, expected = (
            "another manifest than was signed",
            f"sha256 {found.manifest[:12]}... of a signed {found.artifact}",
        )
        raise ArtifactError(where, got, expected, "Do not use it: copy the folder again.")
    last = _last_opened(folder, asked)
    newest = max(asked.since, last)
    if found.signed_at < newest:
        why = "as was opened here before" if last == newest else "as asked for"
        again = "To go back to it on purpose, sign it again."
        raise ArtifactError(where, f"signed {_time(found.signed_at)}", f"{_time(newest)} or later, {why}", again)
    _remember(folder, asked, found.signed_at)


def _verifies(found: Signature, key: Ed25519PublicKey) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(bytes.fromhex(found.signature), found.statement())
    except (InvalidSignature, ValueError):
        return False
    return True


def _memory(folder: Path, asked: _Required) -> Path:
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    name = hashlib.sha256(
        f"{asked.fingerprint} {os.path.realpath(folder)}".encode(errors="surrogateescape")
    ).hexdigest()
    return Path(state) / "nformer-edge" / "signed" / name


def _last_opened(folder: Path, asked: _Required) -> int:
    try:
        return int(_memory(folder, asked).read_text())
    except (OSError, ValueError):
        return 0


def _remember(folder: Path, asked: _Required, signed_at: int) -> None:
    if signed_at > _last_opened(folder, asked):
        with suppress(ArtifactError), atomic_write(_memory(folder, asked)) as file:
            file.write(str(signed_at).encode())


def _public_key(path: str | os.PathLike[str]) -> tuple[Ed25519PublicKey, str]:
    """The key, and the sha256 of its 32 bytes."""
    serialization = _serialization()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    expected, hint = "a PEM file with an Ed25519 public key", "openssl pkey -in PRIVATE.pem -pubout -out PUBLIC.pem"
    try:
        key = serialization.load_pem_public_key(_pem(path, expected))
    except ValueError as e:
        raise UsageError(os.fspath(path), "no public key", expected, hint) from e
    if not isinstance(key, Ed25519PublicKey):
        raise UsageError(os.fspath(path), f"a key of type {type(key).__name__}", expected, hint)
    return key, hashlib.sha256(key.public_bytes_raw()).hexdigest()


def _private_key(path: str | os.PathLike[str]) -> Ed25519PrivateKey:
    serialization = _serialization()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    expected, hint = "a PEM file with an Ed25519 private key", "openssl genpkey -algorithm ed25519 -out PRIVATE.pem"
    try:
        key = serialization.load_pem_private_key(_pem(path, expected), password=None)
    except (ValueError, TypeError) as e:  # TypeError: it is encrypted
        raise UsageError(os.fspath(path), "no private key that opens without a password", expected, hint) from e
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError(os.fspath(path), f"a key of type {type(key).__name__}", expected, hint)
    return key


def _pem(path: str | os.PathLike[str], expected: str) -> bytes:
    try:
        return read_text(path, expected).encode()
    except ArtifactError as e:
        raise UsageError(e.subject, e.got, e.expected, e.hint) from e


def _serialization() -> ModuleType:
    try:
        from cryptography.hazmat.primitives import serialization
    except ImportError as e:
        hint = "pip install 'nformer-edge[sign]'"
        raise BackendError("signatures", f"no package {e.name}", "cryptography", hint) from e
    return serialization


def _seconds(since: str | int | None) -> int:
    if since is None or isinstance(since, int):
        return since or 0
    try:
        found = datetime.fromisoformat(since.replace("Z", "+00:00"))
    except ValueError as e:
        raise UsageError("signed_since", since, "a time", "Such as 2026-11-28T12:00:00+00:00") from e
    return int((found if found.tzinfo else found.replace(tzinfo=timezone.utc)).timestamp())


def _time(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat()
