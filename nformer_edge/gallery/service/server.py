"""The process that serves: it listens, reads its tokens again on SIGHUP, and on SIGTERM finishes what it accepted."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import socket
import time
from types import FrameType
from typing import Any

import h11
import uvicorn
import uvloop
from uvicorn.protocols.http.h11_impl import H11Protocol

from nformer_edge.core.errors import UsageError
from nformer_edge.gallery.gallery import Gallery
from nformer_edge.gallery.model import Model
from nformer_edge.gallery.model import open as open_model
from nformer_edge.gallery.service.app import FULL, HEADERS, Service, create_app
from nformer_edge.gallery.service.settings import Settings, read_tokens

_LOG = logging.getLogger("nformer_edge.service")

#: Connections at once, whatever they do.
_CONNECTIONS = 512

#: Bytes of answers that a caller has not read yet, at which the service stops writing.
_UNREAD = 128 * 1024

_CROWDED = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"

#: `app.FULL` as bytes.
_FULL = b"".join(
    (
        b"HTTP/1.1 429 Too Many Requests\r\n",
        *(name + b": " + value + b"\r\n" for name, value in (*FULL.raw_headers, *HEADERS)),
        b"\r\n",
        bytes(FULL.body),
    )
)

_ASKS = re.compile(rb"(?:POST|DELETE) /v1/[!-~]* HTTP/1\.1\r\n")
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d{1,9})(?=\r\n|$)")
_SPECIAL = re.compile(rb"\r\n(?:transfer-encoding|connection: close|expect|upgrade)")


def serve(
    model: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    settings: Settings | None = None,
    *,
    backend: str = "auto",
    intra_op_threads: int | None = None,
) -> None:
    """Serves a gallery until SIGTERM or SIGINT.

    Args:
        model: checkpoint, bundle or engine.
        folder: the gallery's; one is made where there is none.
        settings: None: the defaults.

    Raises:
        Error: for a model, gallery, address or file of tokens that cannot be used.
    """
    settings = settings or Settings()
    if settings.tokens is not None:
        read_tokens(settings.tokens)
    with (
        listen(settings) as listening,  # first, so that a taken port leaves no gallery behind
        open_model(model, backend=backend, intra_op_threads=intra_op_threads) as opened,
        opened.gallery(folder, thumbnails=settings.thumbnails, audit=settings.audit) as gallery,
    ):
        serve_opened(opened, gallery, settings, listening)


def serve_opened(model: Model, gallery: Gallery, settings: Settings, listening: socket.socket) -> None:
    """`serve`, of what is open."""
    app = create_app(model, gallery, settings)
    uvloop.run(_serve(_Server(_config(app, settings)), listening, app.state.service.reload))


class _Server(uvicorn.Server):
    """Says where it is, once it is there, and comes back from a signal, so that the gallery is closed."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit |= self.should_exit and sig == signal.SIGINT
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and sockets:
            host, port, *_ = sockets[0].getsockname()
            address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
            print(
                f"The page is at {address}/ and the API at {address}/v1 ({address}/openapi.json). Ctrl-C stops.",
                flush=True,
            )


def _config(app: Any, settings: Settings) -> uvicorn.Config:
    """uvicorn's settings. No access log: addresses of requests hold names."""
    seconds = max(1, round(settings.receive_s))
    return uvicorn.Config(
        app, http=_limited(settings.receive_s, app.state.service), ws="none", access_log=False, server_header=False,
        proxy_headers=False, log_level="warning", lifespan="on", timeout_keep_alive=seconds,
        timeout_graceful_shutdown=max(1, round(settings.stop_s)),
    )  # fmt: skip


def listen(settings: Settings) -> socket.socket:
    """A socket at the settings' address; callers that come before the service runs wait.

    Raises:
        UsageError: for an address that is taken or not this machine's.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNREAD)  # of each connection; else megabytes
    try:
        listening.bind((settings.host, settings.port))
        listening.listen()
    except OSError as e:
        listening.close()
        hint = "Choose another --port or --host."
        raise UsageError(f"{settings.host}:{settings.port}", e.strerror, "a free address", hint) from e
    return listening


async def _serve(server: uvicorn.Server, listening: socket.socket, reload: Any) -> None:
    def again() -> None:
        try:
            reload()
            _LOG.warning("tokens were read again")
        except (UsageError, OSError) as e:
            _LOG.error("tokens of before stay: %s", e)

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, again)
    await server.serve(sockets=[listening])


def _whole(data: bytes) -> bool:
    """Whether these bytes are one plain request for the queue, with all of its body."""
    head, _, body = data.partition(b"\r\n\r\n")
    words = head.lower()
    lengths = _LENGTH.findall(words)
    told = int(lengths[0]) if lengths else 0
    plain = words.count(b"content-length") == len(lengths) <= 1 and not _SPECIAL.search(words)
    return plain and told == len(body) and bool(_ASKS.match(data))


def _limited(seconds: float, service: Service) -> type[asyncio.Protocol]:
    """HTTP from so many callers, whose headers come and whose answers go within this time; uvicorn waits for ever.

    Where the queue is full, a request that came in one piece is refused before it is parsed: refusing must not take the
    time of those who were accepted.
    """

    class Limited(H11Protocol):
        late: asyncio.TimerHandle | None = None

        def _arm(self) -> None:
            self.late = self.late or self.loop.call_later(seconds, self.transport.abort)

        def _disarm(self) -> None:
            if self.late:
                self.late.cancel()
                self.late = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._arm()
            if len(self.connections) > _CONNECTIONS:
                transport.write(_CROWDED)
                transport.close()

        def data_received(self, data: bytes) -> None:
            began = time.perf_counter()
            between = self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]
            if service.full and between and not self.flow.write_paused and _whole(data):
                self._unset_keepalive_if_required()
                self._disarm()
                self._arm()
                self.transport.write(_FULL)
                service.answered("other", 429, time.perf_counter() - began)
                return
            super().data_received(data)
            if self.cycle is None or self.cycle.response_complete:
                self._arm()
            elif not self.flow.write_paused:
                self._disarm()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._arm()

        def resume_writing(self) -> None:
            super().resume_writing()
            self._disarm()

        def connection_lost(self, exc: Exception | None) -> None:
            self._disarm()
            super().connection_lost(exc)

    return Limited
