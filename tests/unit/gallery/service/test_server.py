"""The queue is full: what is refused before it is parsed, and what takes the long way to the same answer."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("uvicorn")
from uvicorn.server import ServerState

from nformer_edge.gallery.gallery import Gallery
from nformer_edge.gallery.service.app import create_app
from nformer_edge.gallery.service.server import _config, _whole
from nformer_edge.gallery.service.settings import Settings
from tests.helpers.served import Colors

HEAD = b"POST /v1/search?top=1 HTTP/1.1\r\nHost: localhost\r\n"
WHOLE = HEAD + b"Content-Length: 3\r\n\r\nabc"


class Written(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()

    def write(self, data) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return False

    def close(self) -> None: ...

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


def refused(*pieces: bytes) -> tuple[bytes, int]:
    """What a caller of a full service reads, and how many answers the service counted."""

    async def asked() -> tuple[bytes, int]:
        settings = Settings(queue=1)
        with Gallery(Colors().runner) as gallery:
            app = create_app(Colors(), gallery, settings)
            app.state.service.in_flight = 1
            config = _config(app, settings)
            config.load()
            protocol, transport = config.http_protocol_class(config, ServerState(), {}), Written()
            protocol.connection_made(transport)
            for piece in pieces:
                protocol.data_received(piece)
                await asyncio.sleep(0.01)
            protocol.connection_lost(None)
            counted = app.state.service.registry.get_sample_value(
                "nformer_requests_total", {"route": "other", "status": "429"}
            )
            return bytes(transport.written), int(counted or 0)

    return asyncio.run(asked())


def lines(answer: bytes) -> set[bytes]:
    return {line for line in answer.lower().split(b"\r\n") if not line.startswith((b"date:", b"server:"))}


@pytest.mark.parametrize(
    "pieces",
    [(WHOLE,), (WHOLE[:-1], b"c"), (HEAD[:5], WHOLE[5:]), (HEAD + b"\r\n",), (b"DELETE" + WHOLE[4:],)],
    ids=["whole", "its body in two parts", "its head in two parts", "no body", "delete"],
)
def test_a_full_queue_gives_one_answer_however_the_request_comes(pieces: tuple[bytes, ...]) -> None:
    short, count = refused(WHOLE)
    assert (count, short.count(b"429 Too Many Requests")) == (1, 1)
    assert b"retry-after: 1\r\n" in short.lower()
    assert short.endswith(b'\r\n\r\n{"detail":"the queue is full"}')
    answer, count = refused(*pieces)
    assert lines(answer) == lines(short)
    assert count == 1


def test_a_connection_that_was_refused_is_asked_on() -> None:
    answer, count = refused(WHOLE, WHOLE, WHOLE[:-1], b"c", WHOLE)
    assert (answer.count(b"429 Too Many Requests"), count) == (4, 4)


@pytest.mark.parametrize(
    "data",
    [
        WHOLE + b"d", WHOLE[:-1], WHOLE + WHOLE, WHOLE.replace(b"POST", b"GET"), WHOLE.replace(b"1.1", b"1.0"),
        WHOLE.replace(b"/v1", b"/v2"), HEAD + b"Connection: close\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n",
        HEAD + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc", HEAD + b"Content-Length: -3\r\n\r\n",
        HEAD + b"Content-Length : 3\r\n\r\nabc", HEAD + b"Expect: 100-continue\r\nContent-Length: 3\r\n\r\nabc", b"",
    ],
)  # fmt: skip
def test_what_is_not_one_whole_plain_request_is_parsed(data: bytes) -> None:
    assert _whole(WHOLE)
    assert not _whole(data)
