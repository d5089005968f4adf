"""A service over a model that needs no framework: an image's features are its mean colors."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from nformer_edge.gallery.gallery import Gallery
from tests.helpers.served import Colors, jpeg

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")


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
