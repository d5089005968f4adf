"""The service as a process: misused sockets are closed; stopped or killed, it loses nothing that it acknowledged."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nformer_edge.gallery.gallery import Gallery
from tests.helpers.galleries import stub
from tests.helpers.served import jpeg

pytest.importorskip("uvicorn")
from nformer_edge.core.errors import UsageError
from nformer_edge.gallery.service.server import listen, serve
from nformer_edge.gallery.service.settings import Settings


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
    assert process.wait(60) == (0 if how == signal.SIGTERM else -how)
    assert how == signal.SIGKILL or [p.name for p in (tmp_path / "people").iterdir()] == ["gallery.sqlite"]  # closed
    with Gallery(stub(3), tmp_path / "people") as gallery:
        people = gallery.people()
    assert set(people.values()) == {1}
    assert acknowledged <= set(people) <= sent
    if how == signal.SIGTERM:  # what was accepted was finished and answered
        assert set(people) == acknowledged


HEAD = b"POST /v1/images?id=a HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/jpeg\r\nContent-Length: "

#: What is sent at first, what again and again, and how many seconds apart.
ABUSES: dict[str, tuple[bytes, bytes, float]] = {
    "nothing is sent": (b"", b"", 1),
    "headers, a byte a second": (b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: ", b"x", 1),
    "headers without end": (b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n", b"X-Long: 1234567890\r\n" * 50, 0),
    "a body that does not come": (HEAD + b"500\r\n\r\nabc", b"", 1),
    "a body, a byte a second": (HEAD + b"500\r\n\r\n", b"x", 1),
    "100 MB, as it says": (HEAD + b"100000000\r\n\r\n", b"x" * 65_536, 0),
    "100 MB in parts, without a length": (HEAD[:-16] + b"Transfer-Encoding: chunked\r\n\r\n",
                                          b"10000\r\n" + b"x" * 65_536 + b"\r\n", 0),
    "100 MB to a path that is not there": (b"POST /no" + HEAD[15:] + b"100000000\r\n\r\n", b"x" * 65_536, 0),
    "a length that is no number": (HEAD + b"many\r\n\r\n", b"", 1),
    "a length below zero": (HEAD + b"-5\r\n\r\n", b"", 1),
    "two lengths": (HEAD + b"5\r\nContent-Length: 6\r\n\r\nabcdef", b"", 1),
    "a shorter length than the body": (HEAD + b"5\r\n\r\n" + b"x" * 5000, b"", 1),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"", 1),
    "answers that nobody reads": (b"", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 500, 0),
}  # fmt: skip


def abuse(port: int, first: bytes, again: bytes, pause_s: float, most: int = 100_000_000) -> tuple[float, int]:
    """Seconds until the service closes, and bytes it took; NaN: not within 30 s."""
    began, sent = time.monotonic(), 0
    with socket.socket() as caller:
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        caller.connect(("127.0.0.1", port))
        caller.settimeout(0.05)
        data = first
        while time.monotonic() < began + 30:
            try:
                sent += caller.send(data) if data else 0
            except TimeoutError:
                pass
            except OSError:
                return time.monotonic() - began, sent
            data = again if sent < most else b""
            if data and not pause_s:
                continue
            caller.settimeout(pause_s or 1)
            try:
                if not caller.recv(65_536):
                    return time.monotonic() - began, sent
            except TimeoutError:
                pass
            except OSError:
                return time.monotonic() - began, sent
    return float("nan"), sent


def resident_mib(process) -> float:
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.optional
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_sockets_that_misuse_it_are_closed_within_5_s_and_memory_stays(started):
    process, port = started
    assert enroll(port, "first") == 201
    before, rows = resident_mib(process), []
    for name, (first, again, pause_s) in ABUSES.items():
        with ThreadPoolExecutor(8) as callers:
            found = list(callers.map(lambda _: abuse(port, first, again, pause_s), range(8)))  # noqa: B023
        rows.append((name, max(s for s, _ in found), max(sent for _, sent in found), resident_mib(process) - before))
    print("\n| 8 callers at once | closed after s | bytes taken of one | memory, MiB |\n|---|---|---|---|")
    for name, seconds, sent, grown in rows:
        print(f"| {name} | {seconds:.1f} | {sent:,} | {grown:+.1f} |")
    assert enroll(port, "last") == 201
    assert all(seconds <= 5 for _, seconds, *_ in rows)
    assert all(grown <= 32 for *_, grown in rows)


def test_a_port_that_is_taken_is_refused_before_a_gallery_is_made(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UsageError, match="a free address"):
            serve("no model", tmp_path / "people", Settings(port=taken.getsockname()[1]))
    assert not (tmp_path / "people").exists()


def test_two_services_cannot_take_one_port_while_neither_is_ready():
    with listen(Settings(port=0)) as first, pytest.raises(UsageError, match="a free address"):
        listen(Settings(port=first.getsockname()[1]))
