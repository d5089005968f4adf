"""A service under load: its peak, an open loop at 0.5, 1, 2 and 4 times as much, and callers together or one by one.

    python benchmarks/serve.py images/ --engine engine --seconds 10

Requests leave at fixed times, whether or not earlier ones are answered; a latency runs from the time at which its
request was due. Goodput is what was accepted and answered. With ``--pin`` the callers have one core and the service
another. Each image is enrolled under its own id, and the gallery is counted at the end: nothing lost, nothing doubled.
Without ``--engine`` the model sleeps for `--sleep` seconds a batch: that measures the queue and not the machine.
``--parts`` measures nothing but the CPU time of the parts of a request.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from nformer_edge.gallery.gallery import Gallery
from nformer_edge.gallery.images import image_files

LOADS = (0.5, 1.0, 2.0, 4.0)
ROOT = Path(__file__).parents[1]


class Connection(asyncio.Protocol):
    """One request after another."""

    def __init__(self) -> None:
        self.used, self.got = time.monotonic(), bytearray()
        self.answer: asyncio.Future[tuple[int, bool]] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def ask(self, request: bytes) -> asyncio.Future[tuple[int, bool]]:
        """Status (0: no answer), and whether it says when to come back."""
        self.answer, self.got = asyncio.get_running_loop().create_future(), bytearray()
        self.transport.write(request)
        return self.answer

    def data_received(self, data: bytes) -> None:
        self.got += data
        head, whole, body = self.got.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: (\d+)", head)
        if whole and length and len(body) >= int(length[1]):
            self._done(int(head[9:12]), b"retry-after" in head.lower())

    def connection_lost(self, exc: Exception | None) -> None:
        self._done(0, False)

    def _done(self, status: int, told: bool) -> None:
        self.used = time.monotonic()
        if self.answer and not self.answer.done():
            self.answer.set_result((status, told))


@dataclass
class Callers:
    """Those who enroll: what they send, and what was acknowledged."""

    port: int
    bodies: list[bytes]
    sent: int = 0
    acknowledged: set[str] = field(default_factory=set)
    idle: list[Connection] = field(default_factory=list)

    @staticmethod
    def request(name: str, body: bytes) -> bytes:
        """Enrolls an image."""
        head = (
            f"POST /v1/images?id={name} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/octet-stream\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    async def one(self, due: float) -> tuple[int, float, bool]:
        """Status, milliseconds since it was due, and whether a refusal said when to come back."""
        name, body = f"i{self.sent}", self.bodies[self.sent % len(self.bodies)]
        self.sent += 1
        while self.idle and (self.idle[-1].transport.is_closing() or time.monotonic() - self.idle[-1].used > 1):
            self.idle.pop().transport.close()
        if self.idle:
            connection = self.idle.pop()
        else:
            _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", self.port)
        status, told = await connection.ask(self.request(name, body))
        if status == 201:
            self.acknowledged.add(name)
        self.idle.append(connection)
        return status, 1e3 * (time.perf_counter() - due), told

    async def closed_loop(self, seconds: float, callers: int) -> float:
        """Answers a second of callers that always ask again."""
        end, done = time.perf_counter() + seconds, 0

        async def caller() -> None:
            nonlocal done
            while (now := time.perf_counter()) < end:
                status, *_ = await self.one(now)
                done += status == 201

        began = time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(callers)))
        return done / (time.perf_counter() - began)

    async def open_loop(self, rate: float, seconds: float) -> dict[str, object]:
        """`rate` requests a second, whatever becomes of them."""
        began, tasks, late = time.perf_counter(), [], []
        for number in range(int(rate * seconds)):
            due = began + number / rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            late.append(1e3 * (time.perf_counter() - due))
            tasks.append(asyncio.create_task(self.one(due)))
        offered = len(tasks) / (time.perf_counter() - began)
        found = await asyncio.gather(*tasks)
        latency = [ms for status, ms, _ in found if status == 201]
        refused = [(ms, told) for status, ms, told in found if status in (429, 503)]
        return {
            "offered_per_s": offered,
            "late_p99_ms": float(np.percentile(late, 99)),
            "goodput_per_s": len(latency) / (time.perf_counter() - began),
            "accepted_p50_ms": float(np.percentile(latency or [np.nan], 50)),
            "accepted_p99_ms": float(np.percentile(latency or [np.nan], 99)),
            "refused": len(refused),
            "refused_p99_ms": float(np.percentile([ms for ms, _ in refused] or [np.nan], 99)),
            "refused_without_retry_after": [told for _, told in refused].count(False),
            "other": sorted({status for status, *_ in found} - {201, 429, 503}),
        }


@contextmanager
def service(args: argparse.Namespace, folder: str, batch: int) -> Iterator[tuple[int, int]]:
    """A running service: its port and process id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    if args.engine:
        command = [sys.executable, "-m", "nformer_edge.cli", "serve", args.engine, "--gallery", folder, "--port", port,
                   "--batch", batch, "--queue", args.queue, "--threads", args.threads, "--rate", 1e6]  # fmt: skip
    else:
        command = [sys.executable, "-m", "tests.helpers.served", port, folder, "--seconds", args.sleep, "--batch",
                   batch, "--queue", args.queue]  # fmt: skip
    process = subprocess.Popen([*map(str, command)], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout
    cores = sorted(os.sched_getaffinity(0))
    if args.pin:
        for core, pid in zip(cores, (process.pid, 0), strict=False):
            os.sched_setaffinity(pid, {core})
    try:
        if b"http://" not in process.stdout.readline():
            raise SystemExit("the service did not start")
        yield port, process.pid
    finally:
        os.sched_setaffinity(0, cores)
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def cpu_seconds(pid: int) -> float:
    """Of a process, so far."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


async def overloaded(port: int, pid: int, bodies: list[bytes], args: argparse.Namespace) -> tuple[dict, Callers]:
    """The peak, and each load in turn, `rounds` times."""
    callers = Callers(port, bodies)
    await callers.closed_loop(2, args.queue)
    rounds = []
    for _ in range(args.rounds):
        peak = await callers.closed_loop(args.seconds, args.queue)
        if not peak:
            raise SystemExit("no request was answered: the machine is too busy to measure")
        loads = {}
        for times in LOADS:
            began, used = time.perf_counter(), cpu_seconds(pid)
            own = time.process_time()
            loads[f"{times:g}"] = await callers.open_loop(times * peak, args.seconds)
            took = time.perf_counter() - began
            loads[f"{times:g}"] |= {"service_cpu": (cpu_seconds(pid) - used) / took,
                                    "callers_cpu": (time.process_time() - own) / took}  # fmt: skip
        best = max(peak, *(load["goodput_per_s"] for load in loads.values()))
        rounds.append({"peak_per_s": peak, "loads": loads, "kept_at_4": loads["4"]["goodput_per_s"] / best})
    return {"rounds": rounds, "kept_at_4": float(np.median([one["kept_at_4"] for one in rounds]))}, callers


def together(args: argparse.Namespace, bodies: list[bytes]) -> dict[str, float]:
    """Images a second and CPU time an image: of one caller, of many one by one, of many together."""
    rates = {}
    for name, batch, callers in (("one_caller", 1, 1), ("one_by_one", 1, 32), ("together", args.batch, 32)):
        with tempfile.TemporaryDirectory() as folder, service(args, folder, batch) as (port, pid):
            asked = Callers(port, bodies)
            asyncio.run(asked.closed_loop(1, callers))
            asked.idle.clear()
            done, used = len(asked.acknowledged), cpu_seconds(pid)
            rates[f"{name}_per_s"] = asyncio.run(asked.closed_loop(args.seconds, callers))
            rates[f"{name}_cpu_ms"] = 1e3 * (cpu_seconds(pid) - used) / (len(asked.acknowledged) - done)
    rates["ratio"] = rates["together_per_s"] / rates["one_by_one_per_s"]
    return rates


class Caller(asyncio.Transport):
    """Takes the answers of a service in this process."""

    def __init__(self) -> None:
        super().__init__()
        self.answers = bytearray()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.answers += data

    def is_closing(self) -> bool:
        return False

    def resume_reading(self) -> None: ...

    def close(self) -> None: ...


def parts(args: argparse.Namespace, bodies: list[bytes], batch: int) -> dict[str, float]:
    """Milliseconds of CPU time an image of each part, `batch` images at once; of 30 repetitions the least."""
    from uvicorn.server import ServerState

    from nformer_edge.gallery.model import open as open_model
    from nformer_edge.gallery.service import app as service_app
    from nformer_edge.gallery.service.server import _config
    from nformer_edge.gallery.service.settings import Settings

    def least(work: Callable[[], object], images: int = batch) -> float:
        times = []
        for _ in range(30):
            began = time.process_time()
            work()
            times.append(time.process_time() - began)
        return 1e3 * min(times) / images

    async def answered(app: Any, settings: Settings) -> float:
        config, transport = _config(app, settings), Caller()
        config.load()
        protocol = config.http_protocol_class(config, ServerState(), {})
        protocol.connection_made(transport)
        asked = Callers(0, bodies[:batch])
        times = []
        for _ in range(30):
            requests = [asked.request(f"i{i}", body) for i, body in enumerate(asked.bodies)]
            transport.answers.clear()
            began = time.process_time()
            for number, request in enumerate(requests, 1):
                protocol.data_received(request)
                while transport.answers.count(b"201 Created") < number or not transport.answers.endswith(b"}"):
                    await asyncio.sleep(0)
            times.append(time.process_time() - began)
        protocol.connection_lost(None)
        return 1e3 * min(times) / batch

    settings = Settings(batch=batch, rate=1e6)
    with (
        tempfile.TemporaryDirectory() as folder,
        open_model(args.engine, intra_op_threads=args.threads) as model,
        model.gallery(folder) as gallery,
    ):
        app = service_app.create_app(model, gallery, settings)
        service = app.state.service
        found = {"decode and resize": least(lambda: [service.decoded(body) for body in bodies], len(bodies))}
        decoded = [service.decoded(body) for body in bodies[:batch]]
        pixels, forward = [image.pixels for image in decoded], model.runner.embed
        whole = least(lambda: service._embedded(pixels))
        features = service._embedded(pixels)
        rows = np.concatenate(features)
        model.runner.embed = lambda images: rows  # type: ignore[method-assign]
        found["forward pass"] = whole - least(lambda: service._embedded(pixels))
        found["what is around it"] = whole - found["forward pass"]
        model.runner.embed = forward  # type: ignore[method-assign]
        new = [service_app.New(None, row, f"n{i}", None, None) for i, row in enumerate(features)]
        found["addition to the gallery"] = least(lambda: service._added(new))

        async def at_once(value: object) -> object:
            return value

        service.run = lambda *_: at_once(decoded[0])
        service.embedding.one = lambda _: at_once(features[0])
        (done,) = service._added(new[:1])
        service.adding.one = lambda _: at_once(done)
        found["HTTP, routing, validation"] = uvloop.run(answered(app, settings))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", help="folder of images")
    parser.add_argument("--engine", help="None: a model that sleeps")
    parser.add_argument("--sleep", type=float, default=0.1, help="seconds a batch of the model that sleeps")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--queue", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1, help="of a forward pass")
    parser.add_argument("--pin", action="store_true", help="one core for the callers, another for the service")
    parser.add_argument("--parts", action="store_true", help="CPU time of the parts of a request, with --engine")
    args = parser.parse_args()
    bodies = [Path(path).read_bytes() for path in image_files(args.images)[:64]]
    if args.parts:
        print(json.dumps({f"{batch} at once": parts(args, bodies, batch) for batch in (1, args.batch)}, indent=2))
        return
    with tempfile.TemporaryDirectory() as folder:
        with service(args, folder, args.batch) as (port, pid):
            found, callers = asyncio.run(overloaded(port, pid, bodies, args))
        with Gallery(None, folder) as gallery:
            people = gallery.people()
    found["acknowledged"] = len(callers.acknowledged)
    found["lost"] = len(callers.acknowledged - set(people))
    found["doubled"] = sum(images > 1 for images in people.values())
    if args.engine:
        found["callers"] = together(args, bodies)
    found["cores"], found["load_average"] = os.cpu_count(), os.getloadavg()[0]
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
