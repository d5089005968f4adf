"""Rows of interruption: a system call fails, the process is killed, the disk is full, the power goes.

After each case the output is the old artifact or the new one, opened and verified; messages say what is true; the next
run sweeps what the dead one left.
"""

from __future__ import annotations

import csv
import errno
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from torture import shim
from torture.artifacts import Workshop, copy, direct, tree
from torture.cases import DONE, KILLED, REFUSED, Case, Outcome, attempt, command

Made = tuple[list[Case], list[Case]]  # cases, and planted faults
OLD, NEW, NONE = "old", "new", "none"


@dataclass(frozen=True)
class Writer:
    """A command that writes.

    Args:
        name: of the command.
        run: writes it, given its path.
        target: name of what it writes.
        old: what stands there before.
        is_new: whether what stands there is whole and what this command writes. It raises where it is damaged.
        fresh: whether it may also write where nothing stands.
        together: whether the files beside the target are written with it, as one.
    """

    name: str
    run: Callable[[Path], tuple[int, Any]]
    target: str
    old: Path
    is_new: Callable[[Path], bool]
    fresh: bool = True
    together: bool = False

    def lay(self, out: Path, replacing: bool) -> None:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        if self.together:
            for file in self._files(self.old) if replacing else ():
                shutil.copyfile(file, out / file.name)
        elif replacing:
            copy(self.old, out / self.target)

    def _files(self, path: Path) -> list[Path]:
        return sorted(p for p in path.parent.iterdir() if p.is_file()) if self.together else [path]

    def _holds(self, path: Path) -> list[tuple[str, str]]:
        return [(p.name, tree(p)) for p in self._files(path)]

    def state(self, out: Path) -> str:
        """OLD, NEW or NONE; anything else is damage, in words."""
        path = out / self.target
        try:
            if self.together or not path.exists():
                _recover(path)
            if not (self._files(path) if self.together else path.exists()):
                return NONE
            if self._holds(path) == self._holds(self.old):
                return OLD
            return NEW if self.is_new(path) else "whole, but neither the old one nor the new one"
        except Exception as e:
            return f"damaged: {type(e).__name__}: {e}"


def _recover(path: Path) -> None:
    from nformer_edge.core import artifact

    artifact.recover(path)


def writers(shop: Workshop) -> list[Writer]:
    """Every command that writes, with its computing done once, here: what it writes and how is its own."""
    from nformer_edge.compress.compress import Compression
    from nformer_edge.core.artifact import read_manifest
    from nformer_edge.core.features import load_features
    from nformer_edge.model.checkpoint import load_checkpoint
    from nformer_edge.training.history import History

    a, b = shop.root / "a", shop.root / "b"
    bundle, table, int8 = a / "bundle", a / "calibration.json", shop.root / "int8"
    how, few = ("--backend", "onnxruntime"), ("--threads", 1)
    _remember(shop)
    quantized = ("build-engine", bundle, "--int8", "--calib-data", table, *how, "-o")
    shop.must(*quantized, int8)
    shop.must("export", a / "m.safetensors", "-o", shop.root / "exported")
    shop.must("upgrade", copy(a / "format1", shop.root / "upgraded"))
    training = ("--config", a / "train.toml", "-o")
    for folder in (a, b):
        shop.must("report", folder / "evaluation.json", "-o", folder / "page.html")
        shop.must("search", folder / "bundle", "--query", shop.query, "--gallery", shop.images, "-o",
                  folder / "matches.json")  # fmt: skip
        shop.must("prepare", folder / "bundle", "--precision", "fp32", "-o", folder / "graphs")
    shop.must("make-data", "-o", b / "drawn", "--seed", 1)
    (b / "set").mkdir()
    shop.must("train", "--features", b / "f.npz", *training, b / "set" / "h.safetensors")
    shutil.copyfile(b / "m.safetensors", b / "set" / "h.head.best.safetensors")  # an earlier run with held-out people
    (b / "compressed").mkdir()
    shop.must(*shop.compressing(b), "-o", b / "compressed" / "s.safetensors")

    def runs(*argv: object) -> Callable[[Path], tuple[int, str]]:
        return lambda path: command(*argv, path)

    def folder_of(kind: str, like: Path | None = None) -> Callable[[Path], bool]:
        def check(path: Path) -> bool:
            read_manifest(path, kind)
            graphs = [p.name for p in like.glob("*.onnx")] if like else []
            return all(tree(path / name) == tree(like / name) for name in graphs)

        return check

    def store(path: Path) -> bool:
        found, wanted = load_features(path), load_features(a / "f.npz")
        return all(np.allclose(found[s].features, wanted[s].features, atol=1e-3) for s in found)

    def checkpoint(path: Path) -> bool:
        return bool(load_checkpoint(path))

    def training_set(path: Path) -> bool:
        """All files of one run, and none of another."""
        history = History.from_json(json.loads(path.with_name("h.training.json").read_text()))
        epochs = list(csv.DictReader(path.with_name("h.training.csv").read_text().splitlines()))
        names = {"h.safetensors", "h.training.json", "h.training.csv", "h.head.last.safetensors"}
        last = path.with_name("h.head.last.safetensors")
        seconds = {str(epoch.seconds) for epoch in history.stages["head"].epochs}
        return (
            {p.name for p in path.parent.iterdir() if p.is_file()} == names
            and history.sha256 == load_checkpoint(path).sha256
            and {row["seconds"] for row in epochs} == seconds
            and load_checkpoint(last).extra["features"] == history.identity.features
        )

    def compressed_set(path: Path) -> bool:
        """All files of one run, and none of another."""
        record = Compression.from_json(json.loads(path.with_name("s.compression.json").read_text()))
        epochs = list(csv.DictReader(path.with_name("s.training.csv").read_text().splitlines()))
        return (
            {p.name for p in path.parent.iterdir() if p.is_file()}
            == {"s.safetensors", "s.compression.json", "s.training.csv"}
            and record.sha256 == load_checkpoint(path).sha256
            and {row["seconds"] for row in epochs} == {str(epoch.seconds) for epoch in record.steps[0].epochs}
        )

    def result(kind: str) -> Callable[[Path], bool]:
        return lambda path: json.loads(path.read_text())["kind"] == kind

    def gallery(path: Path) -> tuple[int, Any]:
        return direct(lambda: load_features(a / "f.npz")["gallery"].save(path))

    rows = (
        ("export", runs("export", a / "m.safetensors", "--force", "-o"), b / "bundle", folder_of("bundle", bundle)),
        ("build FP32", runs("build-engine", bundle, *how, "--force", "-o"), b / "fp32",
         folder_of("engine", a / "fp32")),
        ("build INT8", runs(*quantized[:-1], "--force", "-o"), b / "int8", folder_of("engine", int8)),
        ("prepare", runs("prepare", bundle, "--precision", "fp32", "--force", "-o"), b / "graphs", folder_of("graphs")),
        ("embed", runs("embed", bundle, "--data", shop.data, "--batch", 4, *few, "-o"), b / "f.npz", store),
        ("save a gallery", gallery, b / "f.npz", store),
        ("evaluate", runs("evaluate", bundle, "--data", shop.data, *few, "-o"), b / "evaluation.json",
         result("evaluation")),
        ("search", runs("search", bundle, "--query", shop.query, "--gallery", shop.images, *few, "-o"),
         b / "matches.json", result("matches")),
        ("report", runs("report", a / "evaluation.json", "-o"), b / "page.html",
         lambda path: tree(path) == tree(a / "page.html")),
        ("make-data", runs("make-data", "--force", "-o"), b / "drawn", folder_of("dataset")),
        ("import", lambda path: command(*shop.importing(a / "weights.pth", path), "--force"), b / "m.safetensors",
         checkpoint),
    )  # fmt: skip
    upgraded = Writer("upgrade", runs("upgrade"), "format1", a / "format1", folder_of("bundle", bundle), fresh=False)
    train = runs("train", "--features", a / "f.npz", "--force", *training)
    trained = Writer("train", train, "h.safetensors", b / "set" / "h.safetensors", training_set, together=True)
    compress = runs(*shop.compressing(a), "--force", "-o")
    student = Writer("compress", compress, "s.safetensors", b / "compressed" / "s.safetensors", compressed_set,
                     together=True)  # fmt: skip
    return [*(Writer(name, run, old.name, old, is_new) for name, run, old, is_new in rows), trained, student, upgraded]


def _remember(shop: Workshop) -> None:
    """Tracing, placing Q/DQ nodes and drawing are done once; each case then takes the time of its writes."""
    from dataclasses import replace

    from nformer_edge.data import generate
    from nformer_edge.exporting import export
    from nformer_edge.quantize import placement_cpu

    for name in ("trace_backbone", "trace_head", "_golden", "_exact"):
        _once(export, name)
    _once(placement_cpu, "place_for_cpu")
    small = generate.GenerateSpec.tiny()
    small = replace(small, train_ids=2, test_ids=2, cameras=2, seen_by=2, images=2, distractors=1, junk=1)
    generate.GenerateSpec = lambda seed=0, **_: replace(small, seed=seed)
    drawn: dict[Any, list[Any]] = {}
    draw = generate.draw_images
    generate.draw_images = lambda spec: iter(drawn.setdefault(spec, list(draw(spec))))


def _key(value: Any) -> str:
    if hasattr(value, "parameters"):
        return str(sum(p.detach().sum().item() for p in value.parameters()))
    return getattr(value, "sha256", "") or repr(value)  # a checkpoint


def _once(module: Any, name: str) -> None:
    real, known = getattr(module, name), {}

    def call(*args: Any, **settings: Any) -> Any:
        key = str([_key(a) for a in args])
        if key not in known:
            known[key] = real(*args, **settings)
        return deepcopy(known[key])

    for other in list(sys.modules.values()):  # whoever imported it by name
        if getattr(other, "__name__", "").startswith("nformer_edge") and getattr(other, name, None) is real:
            setattr(other, name, call)


def count(writer: Writer, out: Path, replacing: bool) -> tuple[int, dict[int, int]]:
    """Calls below the output's folder in a sound run, and the bytes that the n-th of them writes."""

    def run() -> tuple[int, Any]:
        with tempfile.TemporaryFile() as log:
            shim.arm(out, shim.COUNT, log=log.fileno())
            code, _ = writer.run(out / writer.target)
            found = shim.calls()
            shim.off()
            log.seek(0)
            return code, (found, {int(op[2]): len(op[4]) for op in read_log(log.read()) if op[0] == "write"})

    writer.lay(out, replacing)
    outcome = attempt(run, 300)
    assert outcome.status == DONE, (writer.name, outcome)
    assert writer.state(out) == NEW, (writer.name, writer.state(out))
    return outcome.value


def judge(writer: Writer, out: Path, outcome: Outcome, replacing: bool, killed: bool = False) -> str | None:
    """What is wrong after an interrupted run, or None."""
    before = OLD if replacing else NONE
    if bad := outcome.wrong(400, *((KILLED,) if killed else ())):
        return bad
    found = writer.state(out)
    if found not in (before, NEW):
        return f"{found} after {outcome.status}"
    if outcome.status == DONE and found != NEW:
        return f"exit code 0, and {found}"
    if outcome.status == REFUSED:
        name = writer.target
        sentences = {OLD: f"The earlier {name} is untouched", NONE: f"There is no {name} now"}
        for true, words in (sentences | {NEW: f"The new {name} is in place"}).items():
            if words in outcome.said and found != true:
                return f"the message says {words!r}, but it is {found}"
    _next_run(out / writer.target)
    unfinished = out / f"{Path(writer.target).stem}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)  # as the next training begins, without --resume
    left = [p.name for p in out.rglob("*") if "nformer-edge-" in p.name]
    if left:
        return f"the next run leaves {left[0]}"
    return None if writer.state(out) == found else f"{found} before the next run, {writer.state(out)} after it"


def _next_run(path: Path) -> None:
    """What the next run of a command does first."""
    from nformer_edge.core import artifact

    artifact._prepare(path)
    _recover(path)


def _case(writer: Writer, mode: int, at: int, error: int, replacing: bool, room: int = 0, fault: Any = None) -> Case:
    what = {shim.FAIL: errno.errorcode.get(error, ""), shim.SHORT: "short", shim.KILL_BEFORE: "killed before",
            shim.KILL_AFTER: "killed after", shim.FULL: f"full after {room} bytes,"}[mode]  # fmt: skip

    def run(place: Path) -> tuple[str | None, str]:
        out = place / "out"
        writer.lay(out, replacing)

        def body() -> tuple[int, Any]:
            if fault is not None:
                fault()
            shim.arm(out, mode, at, error, room)
            result = writer.run(out / writer.target)
            shim.off()
            return result

        outcome = attempt(body)
        found = judge(writer, out, outcome, replacing, killed=mode in (shim.KILL_BEFORE, shim.KILL_AFTER))
        where = f"{what} at call {at}" if mode != shim.FULL else what
        return (f"{where}, {'replacing' if replacing else 'fresh'}: {found}" if found else None), outcome.status

    return Case(writer.name, run)


# --- power ------------------------------------------------------------------------------------------------------------


def read_log(data: bytes) -> list[tuple[str, str, str, int, bytes]]:
    """What the library recorded: call, path, second path, offset or size, bytes."""
    ops, at = [], 0
    while at < len(data):
        end = data.index(b"\n", at)
        call, a, b, offset, size = data[at:end].decode().split("\t")
        held = data[end + 1 : end + 1 + int(size)] if call == "write" else b""
        ops.append((call, a, b, int(offset), held))
        at = end + 1 + len(held)
    return ops


@dataclass
class Inode:
    """A file's or folder's durable state, and what was done to it since."""

    folder: bool
    data: bytes = b""
    names: dict[str, int] = field(default_factory=dict)
    waiting: list[tuple[int, bytes | None]] = field(default_factory=list)


class Disk:
    """A file system as POSIX promises it: what was not synced may be lost, torn or done in part.

    A rename or exchange happens wholly or not at all; fsync of a file keeps its bytes, of a folder its names.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.nodes, self.now = str(root), {0: Inode(True)}, {0: {}}
        self.pending: list[list[tuple[int, str, int | None]]] = []
        self._load(root, 0)

    def _load(self, path: Path, node: int) -> None:
        for child in sorted(path.iterdir()):
            new = len(self.nodes)
            self.nodes[new] = Inode(child.is_dir(), b"" if child.is_dir() else child.read_bytes())
            self.nodes[node].names[child.name] = new
            self.now[node][child.name] = new
            if child.is_dir():
                self.now[new] = {}
                self._load(child, new)

    def _find(self, path: str) -> tuple[int, str]:
        parts = [p for p in path[len(self.root) :].split("/") if p]
        node = 0
        for part in parts[:-1]:
            node = self.now[node][part]
        return node, parts[-1] if parts else ""

    def _node(self, path: str) -> int:
        parent, name = self._find(path)
        return self.now[parent][name] if name else 0

    def _change(self, *changes: tuple[int, str, int | None]) -> None:
        for parent, name, node in changes:
            if node is None:
                self.now[parent].pop(name, None)
            else:
                self.now[parent][name] = node
        self.pending.append(list(changes))

    def apply(self, op: tuple[str, str, str, int, bytes]) -> None:
        call, a, b, offset, data = op
        if call in ("create", "mkdir"):
            new = len(self.nodes)
            self.nodes[new] = Inode(call == "mkdir")
            self.now[new] = {}
            self._change((*self._find(a), new))
        elif call == "write":
            self.nodes[self._node(a)].waiting.append((offset, data))
        elif call == "truncate":
            self.nodes[self._node(a)].waiting.append((offset, None))
        elif call == "link":
            self._change((*self._find(b), self._node(a)))
        elif call in ("unlink", "rmdir"):
            self._change((*self._find(a), None))
        elif call in ("rename", "exchange"):
            mine, theirs = self._find(a), self._find(b)
            ours = self.now[mine[0]][mine[1]]
            other = self.now[theirs[0]].get(theirs[1]) if call == "exchange" else None
            self._change((*mine, other), (*theirs, ours))
        elif call == "fsync":
            node = self._node(a)
            inode = self.nodes[node]
            inode.data, inode.waiting = _written(inode.data, inode.waiting), []
            if inode.folder:
                mine = [p for p in self.pending if any(parent == node for parent, _, _ in p)]
                for change in mine:
                    self._keep(change, {n: self.nodes[n].names for n in self.nodes})
                self.pending = [p for p in self.pending if not any(p is m for m in mine)]

    @staticmethod
    def _keep(change: list[tuple[int, str, int | None]], names: dict[int, dict[str, int]]) -> None:
        for parent, name, node in change:
            if node is None:
                names[parent].pop(name, None)
            else:
                names[parent][name] = node

    def crash(self, out: Path, rng: random.Random) -> None:
        """Writes into `out` what could be there after the power went."""
        names = {n: dict(inode.names) for n, inode in self.nodes.items()}
        how = rng.choice(("none", "all", "prefix", "some"))
        kept = {"none": [], "all": self.pending, "prefix": self.pending[: rng.randrange(len(self.pending) + 1)]}.get(
            how, [c for c in self.pending if rng.random() < 0.5]
        )
        for change in kept:
            self._keep(change, names)
        shutil.rmtree(out, ignore_errors=True)
        self._lay(0, out, names, rng)

    def lay_all(self, out: Path) -> None:
        """Writes into `out` what is there now, synced or not."""
        shutil.rmtree(out)
        self._lay(0, out, self.now, None)

    def _lay(self, node: int, path: Path, names: dict[int, dict[str, int]], rng: random.Random | None) -> None:
        inode = self.nodes[node]
        if inode.folder:
            path.mkdir(parents=True)
            for name, child in names[node].items():
                self._lay(child, path / name, names, rng)
            return
        if rng is None:
            path.write_bytes(_written(inode.data, inode.waiting))
            return
        how, chosen = rng.choice(("none", "all", "some", "torn")), []
        for offset, data in inode.waiting:
            if how == "all" or (how != "none" and rng.random() < 0.5):
                chosen.append((offset, data[: rng.randrange(len(data) + 1)] if data and how == "torn" else data))
        path.write_bytes(_written(inode.data, chosen))


def _written(data: bytes, waiting: list[tuple[int, bytes | None]]) -> bytes:
    found = bytearray(data)
    for offset, piece in waiting:
        if piece is None:
            del found[offset:]
            found.extend(bytes(offset - len(found)))
        else:
            found.extend(bytes(max(0, offset - len(found))))
            found[offset : offset + len(piece)] = piece
    return bytes(found)


def record(writer: Writer, out: Path, replacing: bool, fault: Any = None) -> list[tuple[str, str, str, int, bytes]]:
    """Every call of a sound run that changes something below the output's folder."""
    writer.lay(out, replacing)
    with tempfile.TemporaryFile() as log:

        def run() -> tuple[int, Any]:
            if fault is not None:
                fault()
            shim.arm(out, shim.COUNT, log=log.fileno())
            code, _ = writer.run(out / writer.target)
            shim.off()
            return code, None

        assert attempt(run, 300).status == DONE
        log.seek(0)
        return read_log(log.read())


def _power(writer: Writer, ops: list[Any], recorded: Path, replacing: bool, seed: str, tries: int = 1) -> Case:
    def run(place: Path) -> tuple[str | None, str]:
        rng, out = random.Random(seed), place / "out"
        for _ in range(tries):
            writer.lay(recorded.parent / f"lay{os.getpid()}" / "out", replacing)
            disk = Disk(recorded.parent / f"lay{os.getpid()}" / "out")
            disk.root = str(recorded)
            at = rng.randrange(len(ops) + 1)
            for op in ops[:at]:
                disk.apply(op)
            disk.crash(out, rng)
            found = writer.state(out)
            if found not in (OLD if replacing else NONE, NEW):
                return f"after {at} of {len(ops)} calls, {'replacing' if replacing else 'fresh'}: {found}", "lost"
        return None, found

    return Case(writer.name, run)


def _stopped(writer: Writer, ops: list[Any], recorded: Path, replacing: bool, at: int) -> Case:
    """The files as they are after `at` calls: what a kill leaves, on a system that goes on."""

    def run(place: Path) -> tuple[str | None, str]:
        out = place / "out"
        writer.lay(out, replacing)
        disk = Disk(out)
        disk.root = str(recorded)
        for op in ops[:at]:
            disk.apply(op)
        disk.lay_all(out)
        found = judge(writer, out, Outcome(KILLED), replacing, killed=True)
        return found and f"after {at} of {len(ops)} calls, {'replacing' if replacing else 'fresh'}: {found}", KILLED

    return Case(writer.name, run)


# --- planted ----------------------------------------------------------------------------------------------------------


def _no_sync() -> None:
    os.fsync = lambda descriptor: None


def _in_place() -> None:
    """A writer that opens the target itself, and moves an old folder away before it has a new one."""
    from nformer_edge.core import artifact
    from nformer_edge.report.html import page

    @contextmanager
    def write(path: Any) -> Iterator[Any]:
        with open(path, "wb") as file:
            yield file

    page.atomic_write = write

    def put(new: Path, path: Path) -> None:
        if path.exists():
            shutil.rmtree(path)
        os.rename(new, path)

    artifact._put = put


def _deaf() -> None:
    """A command that says nothing of a failed write."""
    from nformer_edge import cli

    real = cli.main

    def main(argv: Any) -> int:
        real(argv)
        return 0

    cli.main = main


def rows(shop: Workshop, root: Path) -> dict[str, Callable[[], Made]]:
    """Makes the cases and planted faults of each row."""
    known: list[Writer] = []

    def layouts() -> Iterator[tuple[Writer, bool, Path]]:
        known.extend(() if known else writers(shop))
        for writer in known:
            for replacing in (True, False) if writer.fresh else (True,):
                yield writer, replacing, root / "count" / writer.name.replace(" ", "-") / str(replacing) / "out"

    def by_name(name: str) -> Writer:
        return next(writer for writer, _, _ in layouts() if writer.name == name)

    def fails() -> Made:
        cases = []
        for writer, replacing, out in layouts():
            calls, written = count(writer, out, replacing)
            codes = (errno.EIO, errno.ENOSPC, errno.EINTR)
            cases += [_case(writer, shim.FAIL, at, codes[at % 3], replacing) for at in range(1, calls + 1)]
            cases += [_case(writer, shim.SHORT, at, 0, replacing) for at in written]
        page = by_name("report")
        return cases, [_case(page, shim.FAIL, at, errno.EIO, True, fault=_deaf) for at in (3, 4)]

    def kills() -> Made:
        """Before every call and after the last; and what stands after every call that changes something."""
        cases = []
        for writer, replacing, out in layouts():
            calls = count(writer, out, replacing)[0]  # killed after a call is killed before the next one
            cases += [_case(writer, shim.KILL_BEFORE, at, 0, replacing) for at in range(1, calls + 1)]
            cases.append(_case(writer, shim.KILL_AFTER, calls, 0, replacing))
            ops = record(writer, out, replacing)
            cases += [_stopped(writer, ops, out, replacing, at) for at in range(1, len(ops))]
        page, build = by_name("report"), by_name("build FP32")
        last = count(build, root / "count" / "planted" / "out", True)[0]
        middle = [_case(build, shim.KILL_BEFORE, at, 0, True, fault=_in_place) for at in range(1, last + 8)]
        return cases, [_case(page, shim.KILL_AFTER, 1, 0, True, fault=_in_place), any_of(middle)]

    def fulls() -> Made:
        cases = []
        for writer, replacing, out in layouts():
            size = sum(count(writer, out, replacing)[1].values())
            cases += [_case(writer, shim.FULL, 0, 0, replacing, room=size * i // 20) for i in range(20)]
        page = by_name("report")
        return cases, [_case(page, shim.FULL, 0, 0, True, room=100, fault=fault) for fault in (_deaf, _in_place)]

    def power() -> Made:
        cases = []
        for writer, replacing, out in layouts():
            ops = record(writer, out, replacing)
            cases += [_power(writer, ops, out, replacing, f"{writer.name} {i}") for i in range(300)]
        faults = []
        for name in ("report", "build FP32"):
            out = root / "unsynced" / name / "out"
            ops = record(by_name(name), out, True, _no_sync)
            faults.append(_power(by_name(name), ops, out, True, "planted", 40))
        return cases, faults

    return {"n-th system call fails": fails, "killed at every call": kills, "disk full": fulls, "power lost": power}


def any_of(cases: list[Case]) -> Case:
    """One planted fault that shows in one of several places."""

    def run(place: Path) -> tuple[str | None, str]:
        for case in cases:
            found, status = case.run(place)
            if found:
                return found, status
        return None, "missed"

    return Case(cases[0].kind, run)
