"""A service under load: capacity, then an open loop at 0.5, 1, 2 and 4 times as much; and embedding together or alone.

    python benchmarks/serve.py engine images/ --seconds 10

Requests arrive at fixed times, whether or not earlier ones are answered; goodput is what was accepted and answered.
Server and callers share this machine's cores. Each image is enrolled under its own id, and the gallery is counted at
the end: nothing lost, nothing doubled.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import numpy as np

import nformer_edge as ne
from nformer_edge.gallery.gallery import Gallery
from nformer_edge.gallery.images import image_files

LOADS = (0.5, 1.0, 2.0, 4.0)


def embedding(model: str, files: list[str], seconds: float, batch: int) -> dict[str, float]:
    """Images a second, one at a time and `batch` together, by turns."""
    from nformer_edge.core.preprocess import load_image

    images = [load_image(path) for path in files[:batch]]
    rates: dict[int, list[float]] = {1: [], batch: []}
    with ne.open(model) as opened:
        for size in rates:
            opened.embed(images[:size], batch=size, decoders=1)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            for size, seen in rates.items():
                began = time.perf_counter()
                for i in range(0, len(images), size):
                    opened.embed(images[i : i + size], batch=size, decoders=1)
                seen.append(len(images) / (time.perf_counter() - began))
    alone, together = (float(np.median(seen)) for seen in rates.values())
    return {"alone_per_s": alone, "together_per_s": together, "ratio": together / alone}


class Load:
    """Callers of one service."""

    def __init__(self, client: httpx.AsyncClient, bodies: list[bytes]) -> None:
        self.client, self.bodies, self.sent = client, bodies, 0
        self.acknowledged: set[str] = set()

    async def one(self) -> tuple[int, float, bool]:
        """Status (0: none), latency in ms, and whether a refusal said when to come back."""
        name, body = f"i{self.sent}", self.bodies[self.sent % len(self.bodies)]
        self.sent += 1
        began = time.perf_counter()
        try:
            answer = await self.client.post(
                "/v1/images", params={"id": name}, content=body, headers={"Content-Type": "application/octet-stream"}
            )
        except httpx.HTTPError:
            return 0, 0.0, False
        if answer.status_code == 201:
            self.acknowledged.add(name)
        return answer.status_code, 1e3 * (time.perf_counter() - began), "retry-after" in answer.headers

    async def capacity(self, seconds: float, callers: int = 32) -> float:
        """Answers a second of callers that always ask again."""
        end, done = time.perf_counter() + seconds, 0

        async def caller() -> None:
            nonlocal done
            while time.perf_counter() < end:
                status, *_ = await self.one()
                done += status == 201

        await asyncio.gather(*(caller() for _ in range(callers)))
        return done / seconds

    async def open_loop(self, rate: float, seconds: float) -> dict[str, object]:
        """`rate` requests a second, whatever becomes of them."""
        began, tasks = time.perf_counter(), []
        for number in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, began + number / rate - time.perf_counter()))
            tasks.append(asyncio.create_task(self.one()))
        offered = len(tasks) / (time.perf_counter() - began)
        found = await asyncio.gather(*tasks)
        took = time.perf_counter() - began
        latency = [ms for status, ms, _ in found if status == 201]
        refused = [told for status, _, told in found if status in (429, 503)]
        return {
            "offered_per_s": offered,
            "goodput_per_s": len(latency) / took,
            "accepted_p50_ms": float(np.percentile(latency or [np.nan], 50)),
            "accepted_p99_ms": float(np.percentile(latency or [np.nan], 99)),
            "refused": len(refused),
            "refused_without_retry_after": refused.count(False),
            "other": sorted({status for status, *_ in found} - {201, 429, 503}),
        }


async def loaded(port: int, bodies: list[bytes], seconds: float) -> tuple[dict[str, object], set[str]]:
    """Capacity and the four loads, and what was acknowledged."""
    limits = httpx.Limits(max_connections=400, max_keepalive_connections=400)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", limits=limits, timeout=60) as client:
        while True:
            try:
                if (await client.get("/ready")).status_code == 200:
                    break
            except httpx.HTTPError:
                await asyncio.sleep(0.2)
        load = Load(client, bodies)
        await load.capacity(2)
        capacity = await load.capacity(seconds)
        rows = {f"{times:g}": await load.open_loop(times * capacity, seconds) for times in LOADS}
        return {"capacity_per_s": capacity, "loads": rows}, load.acknowledged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine")
    parser.add_argument("images", help="folder of images")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--queue", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1, help="of a forward pass; the rest serves")
    args = parser.parse_args()
    files = image_files(args.images)[:64]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "nformer_edge.cli", "serve", args.engine, "--gallery", folder, "--port", port,
                   "--batch", args.batch, "--queue", args.queue, "--threads", args.threads, "--rate", 1e6]  # fmt: skip
        server = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            bodies = [Path(path).read_bytes() for path in files]
            found, acknowledged = asyncio.run(loaded(port, bodies, args.seconds))
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)
        with Gallery(None, folder) as gallery:
            people = gallery.people()
    found["acknowledged"] = len(acknowledged)
    found["lost"] = len(acknowledged - set(people))
    found["doubled"] = sum(images > 1 for images in people.values())
    found["embedding"] = embedding(args.engine, files, args.seconds, args.batch)
    found["cores"], found["load_average"] = os.cpu_count(), os.getloadavg()[0]
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
