"""One case: a function in a process that is watched, with limits; and a row of them."""

from __future__ import annotations

import ctypes
import io
import math
import os
import pickle
import resource
import select
import signal
import sys
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Seconds that a case may take, and MiB that it may need above the sound run.
LIMIT_S, LIMIT_MIB = 20.0, 1024.0

#: Seconds after which a worker that says nothing is killed: a case, and what judges it.
HANG_S = 3 * LIMIT_S

#: How a case ended. The first two are right; KILLED is where the case is to be killed.
DONE, REFUSED, INTERNAL, TRACE, CRASH, HANG, KILLED = "done", "refused", "internal", "trace", "crash", "hang", "killed"

#: Cases after which a worker is renewed, so that nothing adds up in it.
RENEW = 200


@dataclass(frozen=True)
class Outcome:
    """How a case ended, what it computed and said, its peak memory and its time."""

    status: str
    value: Any = None
    said: str = ""
    peak_mib: float = 0.0
    seconds: float = 0.0

    def wrong(self, sound_mib: float, *allowed: str) -> str | None:
        """What is wrong whatever the result is: the end, the time, the memory. `allowed`: further ends."""
        if self.status not in (DONE, REFUSED, *allowed):
            return f"{self.status} ({self.said.strip()[-300:].splitlines()[-1:]})"
        if self.seconds > LIMIT_S:
            return HANG
        if self.peak_mib > sound_mib + LIMIT_MIB:
            return f"{self.peak_mib:.0f} MiB, {sound_mib:.0f} MiB when sound"
        return None


#: What a case runs: an exit code and what identifies the result.
Body = Callable[[], "tuple[int, Any]"]


def command(*argv: object) -> tuple[int, str]:
    """Runs a command in this process: exit code and standard output."""
    from nformer_edge import cli

    with redirect_stdout(io.StringIO()) as out:
        try:
            code = cli.main([os.fspath(a) if isinstance(a, os.PathLike) else str(a) for a in argv])
        except SystemExit as e:  # argparse leaves this way
            code = int(e.code or 0)
    return code, out.getvalue()


def attempt(body: Body, limit_s: float = LIMIT_S, address_mib: float = 0) -> Outcome:
    """Runs `body` in a child with a process group of its own, all of which is killed at its end or after `limit_s`.

    Args:
        address_mib: MiB of addresses that it may take beyond those of this process; 0 for no limit.
    """
    start, said, result = time.monotonic(), os.memfd_create("said"), os.memfd_create("result")
    child = os.fork()
    if child == 0:
        _child(body, said, result, address_mib)
    with suppress(PermissionError, ProcessLookupError):
        os.setpgid(child, child)  # whoever of the two comes first
    watch = os.pidfd_open(child)
    ended: object = []
    while not ended and (left := start + limit_s - _clock(child)) > 0:
        ended = select.select([watch], [], [], left)[0]
    os.close(watch)
    hung, seconds = not ended, _clock(child) - start
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    text, data = _read(said).decode(errors="replace"), _read(result)
    rest = text, usage.ru_maxrss / 1024, seconds
    if hung:
        return Outcome(HANG, None, *rest)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return Outcome(KILLED if number == signal.SIGKILL else CRASH, number, *rest)
    if not data:
        return Outcome(CRASH, os.WEXITSTATUS(status), *rest)
    code, value = pickle.loads(data)
    return Outcome(_status(code, text), value, *rest)


def _child(body: Body, said: int, result: int, address_mib: float) -> None:
    code, value = -1, None
    try:
        with suppress(PermissionError):
            os.setpgid(0, 0)
        _die_with_parent()
        os.dup2(said, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if address_mib:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = int(pages * resource.getpagesize() + address_mib * 2**20)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        code, value = body()
    except BaseException:
        traceback.print_exc()
    try:
        sys.stderr.flush()
        os.write(result, pickle.dumps((code, value)))
    finally:
        os._exit(0)


def _clock(pid: int | str) -> float:
    """Seconds, without those in which the process was ready and got no CPU: a busy machine is no hang."""
    return time.monotonic() - int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _read(descriptor: int) -> bytes:
    with open(descriptor, "rb") as file:
        file.seek(0)
        return file.read()


def here(body: Body) -> Outcome:
    """Runs `body` in this worker: ten times as fast. `run_row` watches over crash and hang."""
    start, said = _clock("self"), os.memfd_create("said")
    sys.stderr.flush()
    kept, code, value = os.dup(2), -1, None
    os.dup2(said, 2)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory begins anew
    try:
        code, value = body()
    except Exception:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) / 1024
    text = _read(said).decode(errors="replace")
    return Outcome(_status(code, text), value, text, peak, _clock("self") - start)


def _status(code: int, said: str) -> str:
    if code == -1 or "Traceback (most recent call last)" in said:
        return TRACE
    if code == 0:
        return DONE
    if code == 3 or "internal error" in said:
        return INTERNAL
    return REFUSED if "error:" in said else TRACE


@dataclass(frozen=True)
class Case:
    """One case of a row.

    Args:
        kind: of artifact or command.
        run: given a folder of its own worker: the violation in words, or None; and how the case ended.
    """

    kind: str
    run: Callable[[Path], tuple[str | None, str]]


@dataclass
class Row:
    """One row of the table.

    Args:
        name: what is done to the product.
        cases: how many ran.
        violations: each in one line.
        caught: of the faults planted for this row, how many the checker caught, and of how many.
        kinds: cases by kind of artifact or command.
        outcomes: cases by how they ended.
        seconds: that the row took.
        cpu_seconds: of all its processes.
    """

    name: str
    cases: int = 0
    violations: list[str] = field(default_factory=list)
    caught: tuple[int, int] = (0, 0)
    kinds: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    @property
    def upper(self) -> float:
        """Upper end of the exact one-sided 95 % interval (Clopper and Pearson) of the rate of violations."""
        return upper_bound(len(self.violations), self.cases)

    @property
    def lost(self) -> bool:
        return bool(self.violations) or self.caught[0] < self.caught[1]


def upper_bound(violations: int, cases: int) -> float:
    """The rate at which so few violations in so many cases have a probability of 5 %; by bisection."""
    if violations >= cases:
        return 1.0
    low, high = violations / cases, 1.0
    for _ in range(60):
        rate = (low + high) / 2
        logs = [
            math.lgamma(cases + 1) - math.lgamma(i + 1) - math.lgamma(cases - i + 1)
            + i * math.log(rate) + (cases - i) * math.log1p(-rate)
            for i in range(violations + 1)
        ]  # fmt: skip
        low, high = (rate, high) if sum(map(math.exp, logs)) > 0.05 else (low, rate)
    return high


def run_row(name: str, cases: Sequence[Case], faults: Sequence[Case], folder: Path, workers: int = 1) -> Row:
    """Runs a row's cases, then its planted faults, each of which must be a violation."""
    start, spent, row = time.monotonic(), _spent(), Row(name, len(cases))
    for case, (violation, status) in zip(cases, _spread(cases, folder, workers), strict=True):
        row.kinds[case.kind] += 1
        row.outcomes[status] += 1
        if violation:
            row.violations.append(f"{case.kind}: {violation}")
    planted = _spread(faults, folder, workers)
    row.caught = sum(violation is not None for violation, _ in planted), len(faults)
    row.seconds, row.cpu_seconds = time.monotonic() - start, _spent() - spent
    return row


def _spent() -> float:
    """CPU seconds of the processes that ended so far."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@dataclass
class _Worker:
    """A forked process that runs its share of the cases, one after the other, in its own folder."""

    child: int
    reader: int
    left: deque[int]
    since: float


def _spread(cases: Sequence[Case], folder: Path, workers: int) -> list[tuple[str | None, str]]:
    """What each case found, in order.

    A worker that dies, or says nothing for longer than any case may take, has met a crash or a hang: that case is a
    violation, and another worker takes over the rest.
    """
    found: dict[int, tuple[str | None, str]] = {}
    size = max(1, min(RENEW, -(-len(cases) // workers)))
    waiting = deque(deque(range(i, min(i + size, len(cases)))) for i in range(0, len(cases), size))
    running: list[_Worker] = []
    while waiting or running:
        while waiting and len(running) < workers:
            running.append(_start(cases, waiting.popleft(), folder))
        ready, _, _ = select.select([w.reader for w in running], [], [], 1.0)
        for worker in running[:]:
            packet = os.read(worker.reader, 4096) if worker.reader in ready else None
            if packet:
                found[worker.left.popleft()] = pickle.loads(packet)
                worker.since = time.monotonic()
            elif packet is not None or time.monotonic() - worker.since > HANG_S:
                running.remove(worker)
                status = CRASH if packet is not None else HANG
                _end(worker)
                if worker.left:
                    number = worker.left.popleft()
                    found[number] = f"case {number}: {status}", status
                if worker.left:
                    waiting.append(worker.left)
    return [found[i] for i in range(len(cases))]


def _start(cases: Sequence[Case], share: deque[int], folder: Path) -> _Worker:
    reader, writer = os.pipe2(os.O_DIRECT)  # a packet a case
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            _die_with_parent()
            place = folder / str(os.getpid())
            place.mkdir(parents=True)
            for number in share:
                try:
                    violation, status = cases[number].run(place)
                except BaseException:
                    violation, status = f"the checker itself failed: {traceback.format_exc()}", "checker"
                os.write(writer, pickle.dumps((violation and violation[-900:], status)))
        finally:
            os._exit(0)
    os.close(writer)
    return _Worker(child, reader, share, time.monotonic())


def _end(worker: _Worker) -> None:
    with suppress(ProcessLookupError):
        os.kill(worker.child, signal.SIGKILL)
    os.waitpid(worker.child, 0)
    os.close(worker.reader)
