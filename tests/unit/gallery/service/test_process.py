"""The service as a process: misused sockets are closed; stopped or killed, it loses nothing that it acknowledged."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from nformer_edge.gallery.gallery import Gallery
from tests.helpers.galleries import stub
from tests.helpers.served import jpeg

pytest.importorskip("uvicorn")


def enroll(port: int, name: str) -> int:
    """The answer's status; 0: no answer."""
    asked = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/images?id={name}", jpeg(), {"Content-Type": "image/jpeg"}, method="POST"
    )
    try:
        with urllib.request.urlopen(asked, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as e:
        return e.code
    except OSError:
        return 0


def under_load(port: int, end) -> tuple[set[str], set[str]]:
    """Names that were acknowledged, and names that were sent, while `end` stops the service."""
    acknowledged, sent, lock = set(), set(), threading.Lock()

    def caller(number: int) -> None:
        for turn in range(10_000):
            name = f"{number}-{turn}"
            with lock:
                sent.add(name)
            status = enroll(port, name)
            if status == 201:
                with lock:
                    acknowledged.add(name)
            if status == 0:
                return

    callers = [threading.Thread(target=caller, args=(i,)) for i in range(4)]
    for thread in callers:
        thread.start()
    while len(acknowledged) < 20:
        time.sleep(0.05)
    end()
    for thread in callers:
        thread.join()
    return acknowledged, sent


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_or_killed_under_load_it_keeps_what_it_acknowledged_once(started, tmp_path, how):
    process, port = started
    acknowledged, sent = under_load(port, lambda: process.send_signal(how))
    assert process.wait(60) in (0, -how)
    with Gallery(stub(3), tmp_path / "people") as gallery:
        people = gallery.people()
    assert set(people.values()) == {1}
    assert acknowledged <= set(people) <= sent
    if how == signal.SIGTERM:  # what was accepted was finished and answered
        assert set(people) == acknowledged


ABUSES = {
    "nothing": b"",
    "slow headers": b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: ",
    "a body that does not come": b"POST /v1/images?id=a HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/jpeg\r\n"
    b"Content-Length: 500\r\n\r\nabc",
    "a length that is no number": b"POST /v1/images?id=a HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: many\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "endless headers": b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"X-Long: 1234567890\r\n" * 20_000,
}


def resident(process) -> int:
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_sockets_that_misuse_it_are_closed_and_memory_stays(started):
    process, port = started
    assert enroll(port, "first") == 201
    before = resident(process)
    opened = {}
    for name, first in ABUSES.items():
        for number in range(8):
            caller = socket.create_connection(("127.0.0.1", port))
            caller.settimeout(30)
            try:
                caller.sendall(first)
            except OSError:
                pass  # closed already
            opened[name, number] = caller
    huge = socket.create_connection(("127.0.0.1", port))
    huge.sendall(b"POST /v1/images?id=a HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/jpeg\r\n"
                 b"Content-Length: 100000000\r\n\r\n")  # fmt: skip
    sent = 0
    try:
        while sent < 100_000_000:
            sent += huge.send(b"x" * 65_536)
    except OSError:
        pass
    assert sent < 100_000_000
    for name, caller in opened.items():
        try:
            while caller.recv(65_536):
                pass
        except ConnectionError:
            pass
        except TimeoutError:
            pytest.fail(f"{name}: still open")
        finally:
            caller.close()
    assert resident(process) - before < 32 * 2**20
    assert enroll(port, "last") == 201
