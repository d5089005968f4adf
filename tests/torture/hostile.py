"""Rows of hostile inputs: numbers, images and other files, names; and too little memory, several processes at once."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import struct
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from torture.artifacts import Kind, Workshop, digest
from torture.cases import DONE, LIMIT_S, Case, Outcome, attempt, command, here

Made = tuple[list[Case], list[Case]]  # cases, and planted faults


# --- numbers ----------------------------------------------------------------------------------------------------------

Change = Callable[[np.ndarray, int, random.Random], Any]


def _row(value: Any) -> Change:
    def change(x: np.ndarray, row: int, rng: random.Random) -> np.ndarray:
        x[row] = value(x[row]) if callable(value) else value
        return x

    return change


def _one(value: float) -> Change:
    def change(x: np.ndarray, row: int, rng: random.Random) -> np.ndarray:
        x[row, rng.randrange(x.shape[1])] = value
        return x

    return change


_NUMBERS: dict[str, Change] = {
    "NaN": _one(np.nan),
    "infinity": _one(np.inf),
    "-infinity": _one(-np.inf),
    "1e38": _one(1e38),
    "all 1e38": _row(1e38),
    "subnormal": _one(1e-40),
    "all subnormal": _row(1e-40),
    "-0": _one(-0.0),
    "zero row": _row(0.0),
    "-0 row": _row(-0.0),
    "times 1e-18": _row(lambda r: r * np.float32(1e-18)),
    "times 1e-30": _row(lambda r: r * np.float32(1e-30)),
    "times 3e19": _row(lambda r: r * np.float32(3e19)),
    "times 1e3": _row(lambda r: r * np.float32(1e3)),
    "complex": lambda x, row, rng: x + 1j,
    "object": lambda x, row, rng: x.astype(object),
    "text": lambda x, row, rng: x.astype(str),
    "big-endian": lambda x, row, rng: x.astype(">f4"),
    "big-endian float64": lambda x, row, rng: x.astype(">f8"),
    "float16": lambda x, row, rng: x.astype(np.float16),
    "no rows": lambda x, row, rng: x[:0],
    "no columns": lambda x, row, rng: x[:, :0],
    "one column less": lambda x, row, rng: x[:, :-1],
    "one axis more": lambda x, row, rng: x[None],
    "one axis": lambda x, row, rng: x[0],
    "a number": lambda x, row, rng: np.float32(1),
    "Fortran order": lambda x, row, rng: np.asfortranarray(x),
    "a list": lambda x, row, rng: x.tolist(),
    "None": lambda x, row, rng: None,
}


def _numbers(shop: Workshop, each: int) -> Made:
    from nformer_edge.core.features import load_features

    bundle = shop.root / "a" / "bundle"
    sets = load_features(shop.root / "a" / "f.npz")
    query = sets["query"].features[:1].astype(np.float64)

    def case(name: str, seed: int, broken: bool = False) -> Case:
        def run(work: Path) -> tuple[str | None, str]:
            rng = random.Random(f"{name} {seed}")
            given = sets["gallery"].features.copy()
            changed = _NUMBERS[name](given, rng.randrange(len(given)), rng)

            def door() -> tuple[int, Any]:
                return _ranked(bundle, shop.query, changed, work / "g.npz", head=seed % 3 == 0)

            outcome = here(door)
            if broken and outcome.status == DONE:
                outcome = Outcome(DONE, outcome.value[::-1], "", outcome.peak_mib, 0.0)
            found = outcome.wrong(400)
            if found is None and outcome.status == DONE and outcome.value is not None and seed % 3:
                found = _misranked(outcome.value, query, np.asarray(changed))
            return found and f"{name}: {found}", outcome.status

        return Case(name, run)

    cases = [case(name, i) for name in _NUMBERS for i in range(each)]
    return cases, [case("-0", 1, broken=True), case("times 1e3", 1, broken=True)]


def _ranked(model: Path, query: Path, features: Any, store: Path, head: bool) -> tuple[int, Any]:
    """The gallery's order for one query, by the command, from a store with these features."""
    import sys

    from nformer_edge.core.errors import Error
    from nformer_edge.core.features import Features, load_features, save_features

    made = load_features(model.parent / "f.npz")["gallery"]
    try:
        save_features(
            store, {"gallery": Features(features, model=made.model, spec=made.spec, checkpoint=made.checkpoint)}
        )
    except Error as e:
        print(f"nformer-edge: error: {e}", file=sys.stderr)
        return e.exit_code, None
    how = [] if head else ["--no-head"]
    code, out = command("search", model, "--query", query, "--gallery", store, "--json", "--threads", 1, *how)
    return code, json.loads(out)["indices"][0] if code == 0 else None


def _misranked(order: list[int], query: np.ndarray, gallery: np.ndarray) -> str | None:
    """Whether an order is that of the cosines in float64, up to float32's rounding."""
    wide = gallery.astype(np.float64)
    wide /= np.abs(wide).max(axis=1, keepdims=True)
    cosines = (wide @ query[0]) / np.linalg.norm(wide, axis=1) / np.linalg.norm(query)
    if len(set(order)) != len(order) or not (np.diff(cosines[order]) < 1e-4).all():
        return f"ranked {order}, by float64 {np.argsort(-cosines)[: len(order)].tolist()}"
    return None


# --- images and files -------------------------------------------------------------------------------------------------


def _png(width: int, height: int, data: bytes = b"", extra: bytes = b"") -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _saved(path: Path, image: Image.Image, form: str, **how: Any) -> None:
    image.save(path, format=form, **how)


def _image_cases() -> dict[str, Callable[[Path, random.Random], None]]:
    def random_image(rng: random.Random, mode: str = "RGB") -> Image.Image:
        pixels = np.random.default_rng(rng.randrange(10**6)).integers(0, 255, (40, 20, 3), dtype=np.uint8)
        return Image.fromarray(pixels).convert(mode)

    def cut(form: str) -> Callable[[Path, random.Random], None]:
        def make(path: Path, rng: random.Random) -> None:
            _saved(path, random_image(rng), form)
            os.truncate(path, rng.randrange(path.stat().st_size))

        return make

    def flip(form: str) -> Callable[[Path, random.Random], None]:
        def make(path: Path, rng: random.Random) -> None:
            _saved(path, random_image(rng), form)
            data = bytearray(path.read_bytes())
            for _ in range(rng.choice((1, 4))):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(data)

        return make

    def bomb(path: Path, rng: random.Random) -> None:
        body = b"Comment\0\0" + zlib.compress(bytes(200 * 2**20))
        extra = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
        path.write_bytes(_png(8, 8, zlib.compress(bytes(8 * 25)), extra))

    def frames(form: str) -> Callable[[Path, random.Random], None]:
        def make(path: Path, rng: random.Random) -> None:
            _saved(
                path, random_image(rng), form, save_all=True, append_images=[random_image(rng)] * rng.randrange(1, 9)
            )

        return make

    found: dict[str, Callable[[Path, random.Random], None]] = {
        "wide": lambda p, r: _saved(p, Image.new("RGB", (r.randrange(60_000, 65_000), 1)), "PNG"),
        "high": lambda p, r: _saved(p, Image.new("RGB", (1, r.randrange(60_000, 65_000))), "PNG"),
        "big": lambda p, r: _saved(p, Image.new("RGB", (7000, 9000)), "PNG", compress_level=1),
        "header of 2^31 pixels": lambda p, r: p.write_bytes(_png(2**31 - 1, r.choice((1, 2**31 - 1)))),
        "header of 10^9 x 1": lambda p, r: p.write_bytes(_png(10**9, 1, zlib.compress(bytes(100)))),
        "no side": lambda p, r: p.write_bytes(_png(0, 5)),
        "no data": lambda p, r: p.write_bytes(_png(16, 32)),
        "text that unpacks to 200 MB": bomb,
        "empty": lambda p, r: p.write_bytes(b""),
        "a folder": lambda p, r: p.mkdir(),
        "a FIFO": lambda p, r: os.mkfifo(p),
        "/dev/zero": lambda p, r: p.symlink_to("/dev/zero"),
        "/dev/tty": lambda p, r: p.symlink_to("/dev/tty"),
        "a link in a circle": lambda p, r: p.symlink_to(p),
        "not readable as an image": lambda p, r: p.write_bytes(bytes(r.randrange(256) for _ in range(999))),
    }
    for form in ("PNG", "JPEG", "WEBP", "BMP"):
        found |= {f"{form} cut short": cut(form), f"{form} flipped": flip(form)}
    for form in ("GIF", "WEBP", "PNG", "TIFF"):
        found[f"animated {form}"] = frames(form)
    for mode, form in (("1", "PNG"), ("L", "PNG"), ("P", "PNG"), ("RGBA", "PNG"), ("CMYK", "JPEG")):
        found[f"{form} {mode}"] = lambda p, r, m=mode, f=form: _saved(p, random_image(r, m), f)
    return found


def _clear(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _files(shop: Workshop, kinds: list[Kind], each: int) -> Made:
    def case(name: str, make: Callable[[Path, random.Random], None], seed: int, door: Any = None) -> Case:
        def run(work: Path) -> tuple[str | None, str]:
            path = work / "hostile.png"
            _clear(path)
            make(path, random.Random(f"{name} {seed}"))
            bundle = shop.root / "a" / "bundle"

            def search() -> tuple[int, Any]:
                return command("search", bundle, "--query", path, "--gallery", shop.images, "--threads", 1)

            outcome = attempt(door or search, 2 if door else LIMIT_S)
            _clear(path)
            found = outcome.wrong(350)
            return found and f"{name}: {found}", outcome.status

        return Case("image", run)

    def special(kind: Kind, name: str, make: Callable[[Path], None]) -> Case:
        def run(work: Path) -> tuple[str | None, str]:
            path = work / f"special{kind.place.suffix}"
            _clear(path)
            make(path)
            outcome = attempt(lambda: kind.door(path, work))
            _clear(path)
            found = outcome.wrong(400)
            if found is None and outcome.status == DONE:
                found = "taken"
            return found and f"{kind.name} as {name}: {found}", outcome.status

        return Case(kind.name, run)

    table = _image_cases()
    cases = [case(name, make, i) for name, make in table.items() for i in range(each)]
    # the calls that take a copy first would themselves wait for a FIFO
    direct = [
        k
        for k in kinds
        if k.name not in ("embed journal", "training state", "CSV list", "budget", "weights", "format 1")
    ]
    for kind in direct:
        cases += [
            special(kind, "a FIFO", os.mkfifo),
            special(kind, "/dev/zero", lambda p: p.symlink_to("/dev/zero")),
            special(kind, "a link in a circle", lambda p: p.symlink_to(p)),
            special(kind, "deep JSON", lambda p: p.write_text("[" * 100_000)),
            special(kind, "a long line", lambda p: p.write_text("x" * 10**6)),
            special(kind, "no file", lambda p: None),
        ]
    hang = case("a FIFO", table["a FIFO"], 0, door=lambda: time.sleep(30) or (0, None))
    gorge = case("big", table["big"], 0, door=lambda: (0, np.ones(1500 * 2**17).sum() and None))
    return cases, [hang, gorge]


# --- names ------------------------------------------------------------------------------------------------------------

_NAMES = {
    "newline": "a\nb",
    "escape": "a\x1b[2J\x1b]0;x\x07b",
    "bell and delete": "\x07\x7f\x08",
    "C1 control": "a\x9b31mb",
    "right to left": "a\u202egnp\u2066b",
    "surrogate": "a\udcffb",
    "leading dash": "-o",
    "two dashes": "--json",
    "space": " a b ",
    "quotes": "a'b\"c`d$(e)",
    "wild cards": "*?[a]{b}",
    "percent and brace": "%s{0}{x!r}",
    "markup": "<script>alert(1)<",
    "emoji": "\U0001f600é",
    "equal sign": "a=b,c;d",
    "backslash": "a\\b",
    "tilde": "~root",
    "240 letters": "x" * 240,
    "255 letters": "y" * 251,
    "300 letters": "z" * 300,
    "3,000 letters": "w" * 3000,
    "zero byte": "a\0b",
    "dots": "...",
    "tab": "a\tb",
}
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def _names(shop: Workshop, each: int) -> Made:
    a = shop.root / "a"

    def doors(folder: Path, name: str) -> dict[str, tuple[tuple[object, ...], Path | None, Path | None]]:
        """A command's arguments, what is copied under the name first, and what the command writes."""
        image, page, store = (folder / f"{name}{end}" for end in (".png", ".html", ".npz"))
        result, model, plain = folder / f"{name}.json", folder / f"{name}.safetensors", folder / name
        bundle, few = a / "bundle", ("--threads", 1)
        return {
            "query": (("search", bundle, "--query", image, "--gallery", shop.images, *few), image, None),
            "gallery": (("search", bundle, "--query", shop.query, "--gallery", folder, *few), image, None),
            "gallery, JSON": (("search", bundle, "--query", image, "--gallery", folder, "--json", *few), image, None),
            "embed": (("embed", bundle, "--data", shop.images, "-o", store, *few), None, store),
            "report": (("report", a / "evaluation.json", "-o", page), None, page),
            "result": (("report", result, "-o", folder / "page.html"), result, None),
            "model": (("search", model, "--query", shop.query, "--gallery", shop.images, *few), model, None),
            "folder": (("search", plain, "--query", shop.query, "--gallery", shop.images, *few), plain, None),
            "build": (("build-engine", bundle, "-o", plain, "--backend", "onnxruntime"), None, plain),
            "no such": (("evaluate", plain, "--data", plain), None, None),
        }

    sources = {".png": shop.query, ".json": a / "evaluation.json", ".safetensors": a / "m.safetensors"}

    def case(what: str, which: str, i: int, steer: bool = False) -> Case:
        def run(work: Path) -> tuple[str | None, str]:
            folder = work / "named"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            name = _NAMES[what] if i == 0 else f"{_NAMES[what]}{i}"
            argv, copied, made = doors(folder, name)[which]
            if copied is not None:
                with suppress(OSError, ValueError):
                    source = sources.get(copied.suffix) or a / "fp32"
                    shutil.copytree(source, copied) if source.is_dir() else shutil.copyfile(source, copied)
            if i % 2 and which not in ("gallery", "gallery, JSON"):  # by its bare name
                argv = tuple(x.name if isinstance(x, Path) and x.parent == folder else x for x in argv)

            def door() -> tuple[int, Any]:
                os.chdir(folder)
                code, out = command(*argv)
                return code, name if steer else out

            outcome = attempt(door)
            found = outcome.wrong(400)
            shown = outcome.said + (outcome.value or "")
            if found is None and (raw := _CONTROL.search(shown)):
                found = f"{raw[0]!r} reaches the terminal"
            if found is None and outcome.status == DONE and made is not None and not made.exists():
                found = "exit code 0, and no such file"
            left = [p.name for p in folder.iterdir() if "nformer-edge-tmp" in p.name]
            return (f"{what} as {which}: {found or left}" if found or left else None), outcome.status

        return Case(which, run)

    places = list(doors(Path("/x"), "x"))
    cases = [case(what, which, i) for what in _NAMES for which in places for i in range(each)]
    return cases, [case("escape", "report", 0, steer=True)]


# --- memory -----------------------------------------------------------------------------------------------------------


def _memory(shop: Workshop, steps: int) -> Made:
    """Address space for so many MiB beyond what is loaded, for work that needs some ten of them."""
    from dataclasses import replace

    from nformer_edge.core.features import load_features, save_features

    bundle, folder = shop.root / "a" / "bundle", shop.root / "big"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (2000, 3000), (40 * i, 90, 200)).save(folder / f"{i}.png", compress_level=1)
    made = load_features(shop.root / "a" / "f.npz")["gallery"]
    rows = np.random.default_rng(0).standard_normal((200_000, 16)).astype(np.float32)
    plain = replace(made, features=rows, pids=np.empty(0), camids=np.empty(0), paths=(), hashes=())
    save_features(folder / "big.npz", {"gallery": plain})
    few = ("--threads", 1, "--json")
    doors: dict[str, tuple[object, ...]] = {
        "big images": ("search", bundle, "--query", folder / "0.png", "--gallery", folder, *few),
        "two decoders": ("search", bundle, "--query", folder / "0.png", "--gallery", folder, "--decoders", 2, *few),
        "all threads": ("search", bundle, "--query", folder / "0.png", "--gallery", shop.images, "--json"),
        "big store": ("search", bundle, "--query", shop.query, "--gallery", folder / "big.npz", "--no-head", *few),
        "checkpoint": ("search", shop.root / "a" / "m.safetensors", "--query", shop.query, "--gallery", folder, *few),
        "embed": ("embed", bundle, "--data", folder, "-o", "OUT", *few),
    }
    sound: dict[str, Any] = {}

    def door(name: str, place: Path) -> tuple[int, Any]:
        out = place / "m.npz"
        code, text = command(*(out if a == "OUT" else a for a in doors[name]))
        if code:
            return code, None
        if name == "embed":
            with np.load(out, allow_pickle=False) as z:
                return code, digest(z["gallery/features"].tobytes())
        return code, json.loads(text)["indices"]

    def case(name: str, mib: float, other: Any = None) -> Case:
        def run(work: Path) -> tuple[str | None, str]:
            (work / "m.npz.journal").unlink(missing_ok=True)
            outcome = attempt(other or (lambda: door(name, work)), address_mib=mib)
            found = outcome.wrong(600)
            if found is None and outcome.status == DONE and outcome.value != sound[name]:
                found = "another result with exit code 0"
            return found and f"{name}, {mib:.1f} MiB: {found}", outcome.status

        return Case(name, run)

    for name in doors:
        sound[name] = attempt(lambda n=name: door(n, folder)).value
    cases = [case(name, 0.1 + 30 * (i / steps) ** 3) for name in doors for i in range(steps)]
    return cases, [case("embed", 20, lambda: (0, np.ones(2**26).sum()))]


# --- processes --------------------------------------------------------------------------------------------------------


def _processes(shop: Workshop, count: int) -> Made:
    def write(path: Path, mark: str, times: int) -> None:
        from nformer_edge.core.artifact import atomic_folder, write_manifest

        for i in range(times):
            with atomic_folder(path, "engine") as folder:
                for name in ("one", "two", "three"):
                    (folder / name).write_text(f"{mark} {i}")
                write_manifest(folder, "engine", {"mark": f"{mark} {i}"})

    def read(path: Path) -> str | None:
        from nformer_edge.core import artifact
        from nformer_edge.core.errors import Error

        try:
            if hasattr(artifact, "open_artifact"):
                opened = artifact.open_artifact(path, "engine")
                files, mark = opened.files, opened.fields["mark"]
            else:
                manifest = artifact.read_manifest(path, "engine")
                files = {n: artifact.read_verified(path, manifest, n) for n in manifest["files"]}
                mark = manifest["mark"]
        except Error as e:
            return f"refused: {e}"
        return None if {v.decode() for v in files.values()} == {mark} else "a mixture of two"

    def writers(path: Path, fault: bool) -> tuple[int, Any]:
        pids = []
        for mark in "ab":
            pid = os.fork()
            if pid == 0:
                try:
                    if fault:
                        _torn()
                    write(path, mark, 4)
                    os._exit(0)
                except BaseException as e:
                    print(f"Traceback (most recent call last): {e!r}", file=__import__("sys").stderr, flush=True)
                    os._exit(1)
            pids.append(pid)
        found = None
        while pids and found is None:
            if path.exists() or fault:
                found = read(path)
            pids = [p for p in pids if os.waitpid(p, os.WNOHANG)[0] == 0]
        for pid in pids:
            os.waitpid(pid, 0)
        return 0, found or read(path)

    def together(threads: bool, fresh: bool, fault: bool = False) -> Case:
        def run(work: Path) -> tuple[str | None, str]:
            out = work / "shared"
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir(parents=True)
            target = out / "engine"
            if not fresh:
                write(target, "first", 1)

            def body() -> tuple[int, Any]:
                if not threads:
                    return writers(target, fault)
                found: list[Any] = []

                def one(mark: str) -> None:
                    try:
                        write(target, mark, 4)
                    except Exception as e:
                        found.append(repr(e))

                pool = [threading.Thread(target=one, args=(m,)) for m in "ab"]
                for t in pool:
                    t.start()
                while any(t.is_alive() for t in pool):
                    if target.exists() and (bad := read(target)):
                        found.append(bad)
                for t in pool:
                    t.join()
                return 0, found[0] if found else read(target)

            outcome = attempt(body)
            found = outcome.wrong(400) or outcome.value
            left = [p.name for p in out.iterdir() if p.name != "engine"]
            how = f"{'threads' if threads else 'processes'}, {'fresh' if fresh else 'replacing'}"
            return (f"{how}: {found or left}" if found or left else None), outcome.status

        return Case("two writers, a reader", run)

    def embeds(number: int) -> Case:
        def run(work: Path) -> tuple[str | None, str]:
            out = work / "embeds"
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir(parents=True)
            argv = ("embed", shop.root / "a" / "bundle", "--data", shop.data, "-o", out / "f.npz", "--batch", 4)

            def body() -> tuple[int, Any]:
                pid = os.fork()
                code, _ = command(*argv, "--threads", 1)
                if pid == 0:
                    os._exit(code)
                _, status = os.waitpid(pid, 0)
                with np.load(out / "f.npz", allow_pickle=False) as z:
                    names = sorted(n for n in z.files if n.endswith("/features"))
                    return code or os.WEXITSTATUS(status), digest(b"".join(z[n].tobytes() for n in names))

            outcome = attempt(body)
            found = outcome.wrong(400)
            if found is None and outcome.value != reference[0]:
                found = f"{outcome.status}, another result: {outcome.said.strip()[-200:]}"
            return found and f"two embeddings into one store: {found}", outcome.status

        return Case("two embeddings", run)

    kind = next(k for k in shop.kinds() if k.name == "embed journal")
    work = shop.root / "sound-embed"
    work.mkdir()
    reference = [attempt(lambda: kind.door(kind.place, work)).value]
    cases = [together(threads=i % 2 == 0, fresh=i % 4 < 2) for i in range(count)]
    cases += [embeds(i) for i in range(count // 10)]
    return cases, [together(threads=False, fresh=False, fault=True)]


def _torn() -> None:
    from nformer_edge.core import artifact

    def put(new: Path, path: Path) -> None:
        shutil.rmtree(path, ignore_errors=True)
        time.sleep(0.05)
        os.rename(new, path)

    artifact._put = put


def rows(shop: Workshop, kinds: list[Kind], sound: dict[str, Outcome]) -> dict[str, Callable[[], Made]]:
    """Makes the cases and planted faults of each row."""
    return {
        "hostile numbers": lambda: _numbers(shop, 18),
        "hostile images and files": lambda: _files(shop, kinds, 16),
        "hostile names": lambda: _names(shop, 3),
        "too little memory": lambda: _memory(shop, 85),
        "several at once": lambda: _processes(shop, 500),
    }
