"""A service over a model that needs no framework: an image's features are its mean colors."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest

from nformer_edge.gallery.gallery import Gallery
from tests.helpers.served import Colors, jpeg

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")
ROOT = Path(__file__).parents[4]


@pytest.fixture
def colors() -> Colors:
    return Colors()


@pytest.fixture
def served(colors, tmp_path):
    """Runs ``work(client, service)`` against an app with these settings, as a server would."""
    from nformer_edge.gallery.service.app import create_app
    from nformer_edge.gallery.service.settings import Settings

    def run(work, gallery=None, **settings):
        gallery = gallery or Gallery(colors.runner, tmp_path / "people", thumbnails=True, audit=True)
        app = create_app(colors, gallery, Settings(**settings))

        async def whole():
            async with app.router.lifespan_context(app):
                transport = httpx.ASGITransport(app, raise_app_exceptions=False)
                async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
                    return await work(client, SimpleNamespace(app=app, gallery=gallery, state=app.state.service))

        return asyncio.run(whole())

    return run


@pytest.fixture
def send():
    """Posts one image."""

    def post(client, path, body=None, kind="image/jpeg", **parameters):
        headers = {"Content-Type": kind, **parameters.pop("headers", {})}
        return client.post(path, content=jpeg() if body is None else body, params=parameters, headers=headers)

    return post


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def started(tmp_path):
    """A running service: its process and port."""
    port = free_port()
    command = [sys.executable, "-m", "tests.helpers.served", str(port), str(tmp_path / "people")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=1)
                break
            except OSError:
                assert process.poll() is None
                time.sleep(0.1)
        yield process, port
    finally:
        process.kill()
        process.wait()
