"""The row of signed folders: whatever is changed and hashed again is refused where a signature is required."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torture.artifacts import Kind, Workshop, copy, tree
from torture.cases import DONE, Case, attempt, here
from torture.corruption import Made, rehashed

ROW = "signed, edited and hashed again"

#: Kinds of folders that are signed, as a signature calls them; when they were signed, and since when it must be.
_KINDS = {"bundle": "bundle", "engine FP32": "engine", "engine INT8": "engine"}
_OLDER, _NEWER, _SINCE = 1_500_000_000, 1_700_000_000, "2020-01-01T00:00:00Z"


def _key(folder: Path, name: str) -> tuple[Path, Path]:
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key, (private, public) = Ed25519PrivateKey.generate(), (folder / f"{name}.pem", folder / f"{name}.pub.pem")
    private.write_bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo))
    return private, public


def _sign(folder: Path, kind: Kind, key: Path, at: int) -> None:
    from nformer_edge.core.signature import sign_folder

    with patch("nformer_edge.core.signature.time.time", lambda: at):
        sign_folder(folder, _KINDS[kind.name], key)


def _edited(path: Path, rng: random.Random) -> str:
    """One field of the signature changed or removed."""
    data = json.loads(path.read_text())
    field = rng.choice(sorted(data))
    if rng.random() < 0.2:
        del data[field]
    elif isinstance(data[field], int):
        data[field] += rng.choice((-1, 1, 10**6))
    elif field in ("manifest", "signature"):
        at = rng.randrange(len(data[field]))
        data[field] = f"{data[field][:at]}{int(data[field][at], 16) ^ 1:x}{data[field][at + 1 :]}"
    else:
        data[field] += "x"
    path.write_text(json.dumps(data))
    return f"{field} of the signature"


def rows(shop: Workshop, kinds: list[Kind], each: int) -> dict[str, Callable[[], Made]]:
    """Makes the row's cases and planted faults; `each` cases a kind."""

    def make() -> Made:
        home = shop.root / "signed"
        home.mkdir()
        os.environ["XDG_STATE_HOME"] = str(home / "state")
        (private, public), (theirs, _) = _key(home, "ours"), _key(home, "theirs")
        chosen = [k for k in kinds if k.name in _KINDS]
        for kind in chosen:
            for source, at, name in (
                (kind.place, _NEWER, "new"),
                (kind.place, _OLDER, "older"),
                (kind.other, _NEWER, "other"),
            ):
                _sign(copy(source, home / f"{kind.name} {name}"), kind, private, at)
        asks = ("--require-signed", public, "--signed-since", _SINCE)

        def change(kind: Kind, path: Path, rng: random.Random) -> str:
            what = rng.choice(
                ("edited", "edited", "edited", "unsigned", "another key", "older", "another's", "signature")
            )
            if what in ("edited", "another key"):
                detail = rehashed(path, rng)
                while tree(path) == tree(home / f"{kind.name} new"):
                    detail = rehashed(path, rng)
                if what == "another key":
                    _sign(path, kind, theirs, _NEWER)
                return f"{detail}, {what}"
            if what == "unsigned":
                (path / "signature.json").unlink()
            elif what == "older":
                copy(home / f"{kind.name} older", path)
            elif what == "another's":
                shutil.copyfile(home / f"{kind.name} other" / "signature.json", path / "signature.json")
            else:
                return _edited(path / "signature.json", rng)
            return what

        def case(kind: Kind, seed: int, door: Any = None) -> Case:
            def run(work: Path) -> tuple[str | None, str]:
                path = copy(home / f"{kind.name} new", work / "signed")
                what = change(kind, path, random.Random(f"signed {kind.name} {seed}"))
                body = partial(door or shop.search, path, shop.images, *(() if door else asks))
                outcome = attempt(body) if door else here(body)
                found = outcome.wrong(400) or ("taken" if outcome.status == DONE else None)
                return found and f"{what}: {found}", outcome.status

            return Case(kind.name, run)

        for kind in chosen:  # the sound one is taken
            sound = attempt(partial(shop.search, home / f"{kind.name} new", shop.images, *asks))
            assert sound.status == DONE, sound
        cases = [case(kind, i) for kind in chosen for i in range(each)]
        return cases, [case(chosen[0], 0, door=lambda path, images: (0, None))]

    return {ROW: make}
