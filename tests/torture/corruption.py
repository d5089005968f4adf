"""Rows of corruption: what is on the disk is cut, flipped, zeroed, swapped, edited, or edited and hashed again."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from torture.artifacts import Kind, tree
from torture.cases import DONE, Case, Outcome, attempt, here

MANIFEST = "manifest.json"
Change = Callable[[Path, random.Random], str]
Made = tuple[list[Case], list[Case]]  # cases, and planted faults


def _target(path: Path, rng: random.Random) -> Path:
    """A file of the artifact; small ones as often as big ones."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return rng.choice([file for file in files if file.stat().st_size])


def _place(size: int, rng: random.Random) -> int:
    """Any place, the first and last 300 bytes as often as all the rest."""
    where, near = rng.random(), rng.randrange(min(size, 300))
    return rng.randrange(size) if where < 0.5 else near if where < 0.75 else size - 1 - near


def truncated(path: Path, rng: random.Random) -> str:
    file = _target(path, rng)
    at = _place(file.stat().st_size, rng)
    os.truncate(file, at)
    return f"{file.name} cut at {at}"


def flipped(path: Path, rng: random.Random) -> str:
    file = _target(path, rng)
    data = bytearray(file.read_bytes())
    places = [_place(len(data), rng) for _ in range(rng.choice((1, 1, 1, 2, 8)))]
    for at in places:
        data[at] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    return f"{file.name} flipped at {places}"


def zeroed(path: Path, rng: random.Random) -> str:
    file = _target(path, rng)
    data = bytearray(file.read_bytes())
    at, run = _place(len(data), rng), rng.choice((1, 8, 512, 4096))
    data[at : at + run] = bytes(len(data[at : at + run]))
    file.write_bytes(data)
    return f"{file.name} zeroed at {at}, {run} bytes"


# --- fields -----------------------------------------------------------------------------------------------------------

_OTHERS = (None, True, 0, -1, 1, 10**6, 10**30, 0.5, 1e308, "", "x", "../x", "\x1b[2J", [], {}, [1], [[]], {"a": 1})


def _paths(data: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    found = []
    for key, value in items:
        found += [(*here, key), *_paths(value, (*here, key))]
    return found


def edit(data: Any, rng: random.Random) -> tuple[Any, str]:
    """One field changed, removed, added, retyped or duplicated. Returns the data and what was done."""
    paths = _paths(data)
    if not paths:
        return {"x": 1}, "replaced"
    top = [p for p in paths if len(p) <= 2]
    path = rng.choice(top if rng.random() < 0.5 else paths)
    parent = data
    for key in path[:-1]:
        parent = parent[key]
    key, what = path[-1], rng.choice(("changed", "removed", "added", "retyped", "duplicated"))
    value = parent[key]
    if what == "removed":
        del parent[key]
    elif what == "added":
        parent.insert(0, 1) if isinstance(parent, list) else parent.update({f"x{key}": value})
    elif what == "duplicated":
        parent.append(value) if isinstance(parent, list) else parent.update({key: [value, value]})
    elif what == "changed" and isinstance(value, bool):
        parent[key] = not value
    elif what == "changed" and isinstance(value, (int, float)):
        parent[key] = rng.choice((value + 1, -value, value * 1.0001, value * 10, 0))
    elif what == "changed" and isinstance(value, str) and value:
        at = rng.randrange(len(value))
        parent[key] = value[:at] + chr(33 + rng.randrange(90)) + value[at + 1 :]
    else:
        parent[key] = rng.choice(_OTHERS)
    return data, f"{'.'.join(map(str, path))} {what}"


def _edit_text(text: str, rng: random.Random) -> tuple[str, str]:
    """TOML and CSV: a line changed, removed, added or duplicated."""
    lines = text.splitlines()
    at, what = rng.randrange(len(lines)), rng.choice(("changed", "removed", "added", "duplicated", "retyped"))
    if what == "removed":
        del lines[at]
    elif what == "duplicated":
        lines.insert(at, lines[at])
    elif what == "added":
        lines.insert(at, rng.choice(("x = 1", "a,b,c,d", "[x]", "", "\x00", "é,1,1,query", '"')))
    else:
        line = lines[at]
        start, _, value = line.partition("=") if "=" in line else line.rpartition(",")
        new = rng.choice(("true", "-1", "1e400", '"x"', "[1, 2]", "nan", "", str(10**25), value + "0"))
        lines[at] = f"{start}={new}" if "=" in line else f"{start},{new}"
    return "\n".join(lines) + "\n", f"line {at} {what}"


def _json_of(path: Path, rng: random.Random) -> Path:
    if path.is_file():
        return path
    return rng.choice(
        [p for p in sorted(path.rglob("*.json")) if p.name == MANIFEST or rng.random() < 0.2] or [path / MANIFEST]
    )


def field(path: Path, rng: random.Random, rehash: bool = False) -> str:
    """A field of the artifact's text, wherever its format keeps it."""
    if path.suffix == ".journal":
        return _line_field(path, rng, rehash)
    if path.is_dir() or _begins(path, b"{"):
        file = _json_of(path, rng)
        data, what = edit(json.loads(file.read_text()), rng)
        text = json.dumps(data)
        if rng.random() < 0.05 and not rehash:
            text, what = '{"kind": 1, ' + text[1:], "a key twice"
        file.write_text(text)
        if rehash:
            reseal(path)
        return f"{file.name}: {what}"
    if path.suffix == ".pth":
        return _pickle_field(path, rng)
    if _begins(path, b"PK"):
        return _npz_field(path, rng, rehash)
    try:
        text = path.read_text()
    except UnicodeDecodeError:
        return _tensor_field(path, rng, rehash)
    text, what = _edit_text(text, rng)
    path.write_text(text)
    return what


def _line_field(path: Path, rng: random.Random, rehash: bool) -> str:
    """A journal: an entry of one of its lines."""
    lines = path.read_text().splitlines()
    at = rng.randrange(len(lines))
    entry, what = edit(json.loads(lines[at]), rng)
    if rehash and isinstance(entry, dict) and "value" in entry:
        both = [entry.get("key"), entry["value"]]
        entry["sha256"] = hashlib.sha256(json.dumps(both, sort_keys=True).encode()).hexdigest()
    lines[at] = json.dumps(entry)
    path.write_text("\n".join(lines) + "\n")
    return f"line {at}: {what}"


def _begins(path: Path, start: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(start)) == start


def _tensor_field(path: Path, rng: random.Random, rehash: bool) -> str:
    """The header of a .safetensors file."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    texts = header["__metadata__"]
    name = rng.choice(sorted(texts))
    if rng.random() < 0.6 and texts[name][:1] == "{":
        inner, what = edit(json.loads(texts[name]), rng)
        texts[name] = json.dumps(inner)
    else:
        header, what = edit(header, rng)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    if rehash:
        _reseal_tensors(path)
    return f"header: {name} {what}"


def _pickle_field(path: Path, rng: random.Random) -> str:
    """A tensor of published weights."""
    import torch

    state = torch.load(path, weights_only=True)
    name, what = rng.choice(sorted(state)), rng.choice(("changed", "removed", "added", "retyped", "duplicated"))
    found = state[name]
    if what == "removed":
        del state[name]
    elif what == "added":
        state[f"x{name}"] = found
    elif what == "duplicated":
        state[name] = torch.stack([found, found])
    elif what == "retyped":
        state[name] = rng.choice((found.to(torch.complex64), found.long(), 1, "x", [found], None, torch.zeros(0)))
    else:
        state[name] = found * rng.choice((0, -1, 2, 1e30, float("nan")))
    torch.save(state, path)
    return f"{name} {what}"


def _npz_field(path: Path, rng: random.Random, rehash: bool) -> str:
    from nformer_edge.core.features import _digest

    with np.load(path, allow_pickle=False) as z:
        arrays = {name: z[name] for name in z.files}
    name, what = rng.choice(sorted(arrays)), rng.choice(("changed", "removed", "added", "retyped", "duplicated"))
    found = arrays[name]
    if what == "removed":
        del arrays[name]
    elif what == "added":
        arrays[f"x{name}"] = found
    elif what == "duplicated":
        arrays[name] = np.stack([found, found])
    elif what == "retyped":
        arrays[name] = rng.choice((np.zeros(3), np.array("x"), np.array([]), np.zeros((2, 2), complex), np.array(-1)))
    elif found.size and found.dtype.kind in "if":
        changed = found.copy()
        changed.reshape(-1)[rng.randrange(found.size)] = (
            rng.choice((0, 1, -1, 3e38, 1e-40)) if found.dtype.kind == "f" else 7
        )
        arrays[name] = changed
    else:
        arrays[name] = np.char.add(found, "x") if found.dtype.kind == "U" else found
    if rehash:
        arrays["sha256"] = np.array(_digest(arrays))
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    path.write_bytes(buffer.getvalue())
    return f"{name} {what}"


# --- hashed again -----------------------------------------------------------------------------------------------------


def reseal(path: Path) -> None:
    """Makes every digest of a folder or JSON file hold again: what somebody does who knows the format."""
    from nformer_edge.core.values import digest_of

    file = path / MANIFEST if path.is_dir() else path
    try:
        data = json.loads(file.read_text())
        for name, entry in data["files"].items() if path.is_dir() else ():
            if (path / name).is_file():
                content = (path / name).read_bytes()
                entry |= {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        if "sha256" in data:
            data["sha256"] = digest_of(data)
        file.write_text(json.dumps(data))
    except (ValueError, KeyError, TypeError, AttributeError):
        return  # the edit left nothing to hash


def _reseal_tensors(path: Path) -> None:
    from safetensors import safe_open

    from nformer_edge.model import tensorfile

    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata())
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except Exception:
        return
    metadata["sha256"] = tensorfile._digest(tensors, metadata)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size]) | {"__metadata__": metadata}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def rehashed(path: Path, rng: random.Random) -> str:
    """A field edited, or bytes of a file flipped, and every digest made to hold again."""
    if path.is_dir() and rng.random() < 0.5:
        what = rng.choice((flipped, zeroed, truncated))(path, rng)
        reseal(path)
        return what
    return field(path, rng, rehash=True)


# --- rows -------------------------------------------------------------------------------------------------------------


def judge(outcome: Outcome, sound: Outcome, strict: bool) -> str | None:
    """The violation in words, or None. `strict`: the result must be the sound one."""
    found = outcome.wrong(sound.peak_mib)
    if found is None and strict and outcome.status == DONE and outcome.value != sound.value:
        return "another result with exit code 0"
    return found


_sound_tree = cache(tree)


def _case(kind: Kind, change: Change, seed: str, strict: bool, sound: Outcome, door: Any = None) -> Case:
    def run(work: Path) -> tuple[str | None, str]:
        rng, path = random.Random(seed), kind.copied(work)
        what = change(path, rng)
        while (changed := tree(path)) == _sound_tree(kind.place):  # what changes nothing is no case
            path = kind.copied(work)
            what = change(path, rng)
        same = changed == _sound_tree(kind.other)  # another sound one, whole: a new input
        outcome = attempt(lambda: door(path, work), 2) if door else here(lambda: kind.door(path, work))
        found = judge(outcome, sound, strict and not same)
        return (f"{what}: {found}" if found else None), outcome.status

    return Case(kind.name, run)


def swapped_with(other: Path) -> Change:
    def change(path: Path, rng: random.Random) -> str:
        names = sorted(p.name for p in other.iterdir() if p.is_file())
        differ = [n for n in names if (path / n).read_bytes() != (other / n).read_bytes()]
        chosen = rng.sample(differ, rng.randrange(1, len(differ))) if len(differ) > 1 else differ
        for name in chosen:
            (path / name).write_bytes((other / name).read_bytes())
        return f"{', '.join(chosen)} from another"

    return change


def _spliced(other: Path) -> Change:
    """A single file: its first bytes, and the other's last ones."""

    def change(path: Path, rng: random.Random) -> str:
        ours, theirs = path.read_bytes(), other.read_bytes()
        at = _place(min(len(ours), len(theirs)), rng)
        path.write_bytes(ours[:at] + theirs[at:])
        return f"the other's bytes from {at}"

    return change


#: Each row, by what it does to an artifact of a kind.
CHANGES: dict[str, Callable[[Kind], Change]] = {
    "cut short": lambda k: truncated,
    "bits flipped": lambda k: flipped,
    "runs of bytes zeroed": lambda k: zeroed,
    "files swapped or spliced": lambda k: swapped_with(k.other) if k.folder else _spliced(k.other),
    "fields edited": lambda k: field,
    "edited and hashed again": lambda k: rehashed,
}


def rows(kinds: list[Kind], sound: dict[str, Outcome], each: int) -> dict[str, Callable[[], Made]]:
    """Makes the cases and planted faults of each row; `each` cases a kind."""

    def make(name: str) -> Made:
        change, strict = CHANGES[name], name != "edited and hashed again"
        cases = [
            _case(k, change(k), f"{name} {k.name} {i}", strict and k.sealed, sound[k.name])
            for k in kinds
            for i in range(each)
        ]
        return cases, _faults(next(k for k in kinds if k.name == "bundle"), change, name, strict, sound)

    return {name: partial(make, name) for name in CHANGES}


def _faults(kind: Kind, change: Any, name: str, strict: bool, sound: dict[str, Outcome]) -> list[Case]:
    """Doors broken on purpose: each raises, fails, crashes, hangs or gorges; one takes whatever it gets."""

    def hungry(path: Path, work: Path) -> tuple[int, Any]:
        return 0, np.ones(1500 * 2**17)[0] and sound[kind.name].value

    doors: list[Callable[[Path, Path], tuple[int, Any]]] = [
        lambda path, work: (_ for _ in ()).throw(KeyError("planted")),
        lambda path, work: (3, None),
        lambda path, work: os.kill(os.getpid(), 11) or (0, None),
        lambda path, work: time.sleep(30) or (0, None),
        hungry,
    ]
    if strict:
        doors.append(lambda path, work: (0, sum(p.stat().st_size for p in path.iterdir())))
    return [_case(kind, change(kind), f"{name} fault {i}", strict, sound[kind.name], d) for i, d in enumerate(doors)]
