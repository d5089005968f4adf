"""A service under steady load for as long as you say: its memory must stay. ``python -m tests.torture.soak``

Memory is read every second; the first third is the warm-up. The line through the medians of the rest, by tenths, may
rise by no more than `ALLOWED_MIB` in all. ``--leak 4096`` plants a leak of so many bytes a batch: it must be caught.
Callers ask ``--rate`` times a second in all, so that the machine is left to others.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tests.helpers.served import jpeg

ALLOWED_MIB = 8.0


def tenths_mib(memory_mib: Sequence[float]) -> list[float]:
    """Medians of ten parts."""
    return [float(np.median(part)) for part in np.array_split(np.asarray(memory_mib), 10)]


def rise_mib(memory_mib: Sequence[float]) -> float:
    """By how much memory rises after the warm-up: of a line through the medians of ten parts (Theil and Sen)."""
    medians = np.array(tenths_mib(memory_mib[len(memory_mib) // 3 :]))
    i, j = np.triu_indices(10, 1)
    return float(9 * np.median((medians[j] - medians[i]) / (j - i)))


def soak(minutes: float, leak: int = 0, rate: float = 20, callers: int = 4) -> dict[str, object]:
    """Loads a service that forgets as much as it enrolls, and judges its memory."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = Path(__file__).parents[2]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.helpers.served", str(port), folder, "--leak", str(leak)]
        process = subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        answers: dict[str, int] = {}
        memory: list[float] = []
        stop, lock = threading.Event(), threading.Lock()

        def ask(method: str, path: str, body: bytes | None = None) -> None:
            kind = {"Content-Type": "image/jpeg"}
            asked = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, kind, method=method)
            try:
                with urllib.request.urlopen(asked, timeout=30) as answer:
                    answer.read()
                    status = str(answer.status)
            except OSError as e:
                status = str(getattr(e, "code", type(e).__name__))
            with lock:
                answers[status] = answers.get(status, 0) + 1
            time.sleep(callers / rate)

        def call(number: int) -> None:
            turn = 0
            while not stop.is_set():
                color = (turn % 256, 40 * number, 90)
                ask("POST", f"/v1/images?id={number}", jpeg(color))
                for _ in range(8):
                    ask("POST", "/v1/search?top=5", jpeg(color))
                ask("DELETE", f"/v1/images?id={number}")
                turn += 1

        try:
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=1)
                    break
                except OSError:
                    time.sleep(0.2)
            threads = [threading.Thread(target=call, args=(i,)) for i in range(callers)]
            for thread in threads:
                thread.start()
            end = time.monotonic() + 60 * minutes
            while time.monotonic() < end and process.poll() is None:
                pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
                memory.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
                time.sleep(1)
            stop.set()
            for thread in threads:
                thread.join()
            ended = process.poll()
        finally:
            process.terminate()
            process.wait(60)
    rise = rise_mib(memory)
    failed = sum(count for status, count in answers.items() if not status.startswith("2"))
    flat = rise <= ALLOWED_MIB
    return {
        "minutes": minutes, "leak_bytes": leak, "rate": rate, "answers": answers, "tenths_mib": tenths_mib(memory),
        "rise_mib": rise, "allowed_mib": ALLOWED_MIB, "passed": flat and not failed and ended is None,
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--leak", type=int, default=0, help="bytes a batch")
    parser.add_argument("--rate", type=float, default=20, help="requests a second")
    found = soak(**vars(parser.parse_args()))
    print(json.dumps(found, indent=2))
    sys.exit(0 if found["passed"] else 1)
