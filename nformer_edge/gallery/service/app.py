"""The API: images in, ranked names out. What it answers holds no path, no trace and no caller's image."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import logging
import math
import os
import re
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from datetime import datetime, timezone
from functools import partial
from importlib.resources import files
from typing import Annotated, Any, NamedTuple, TypeVar
from urllib.parse import unquote_to_bytes

import numpy as np
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from PIL import Image
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SkipValidation
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nformer_edge import __version__
from nformer_edge.core.errors import ArtifactError, BackendError, DataError, UsageError
from nformer_edge.core.features import Features
from nformer_edge.core.preprocess import FORMATS, MAX_SIDE, as_seen, resize
from nformer_edge.gallery.embed import made_by
from nformer_edge.gallery.gallery import THUMBNAIL, Gallery
from nformer_edge.gallery.held import MAX_ID, new_id, seconds_of
from nformer_edge.gallery.model import Model
from nformer_edge.gallery.results import Changed
from nformer_edge.gallery.service.batching import Batcher
from nformer_edge.gallery.service.settings import ROLES, Role, Settings, read_tokens

T = TypeVar("T")

_LOG = logging.getLogger("nformer_edge.service")

#: Seconds between two looks at what must be removed or erased.
_HOUSEKEEPING = 10.0


class Decoded(NamedTuple):
    """An image: uint8 [height, width, 3] in the model's size; and a small picture, where the gallery keeps them."""

    pixels: np.ndarray
    picture: Image.Image | None


class New(NamedTuple):
    """An image to add: float32 [1, D], and its labels."""

    picture: Image.Image | None
    features: np.ndarray
    id: str
    camera: int | None
    time: datetime | None


class Service:
    """What the requests share: an open model, a gallery, the queue, and the measurements.

    Raises:
        UsageError: for a file of tokens that cannot be used.
    """

    def __init__(self, model: Model, gallery: Gallery, settings: Settings) -> None:
        self.model, self.gallery, self.settings = model, gallery, settings
        self.tokens: dict[bytes, Role] = {}
        self.reload()
        self.thumbnails = gallery.stats().thumbnails
        self.in_flight = 0
        self.stopping = False
        self.erase_at = math.inf
        self._buckets: dict[bytes, tuple[float, float]] = {}
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter("nformer_requests", "Answers.", ["route", "status"], registry=self.registry)
        self.seconds = Histogram(
            "nformer_request_seconds", "From request to answer.", ["route"], registry=self.registry
        )
        sizes = Histogram("nformer_batch_images", "Images embedded at once.", registry=self.registry,
                          buckets=(1, 2, 4, 8, 16, 32, 64))  # fmt: skip
        for name, told, value in (
            ("nformer_in_flight", "Requests that are worked on or wait.", lambda: self.in_flight),
            ("nformer_gallery_images", "Images in the gallery.", lambda: len(self.gallery)),
        ):
            Gauge(name, told, registry=self.registry).set_function(value)
        self.embedding = Batcher(self._embedded, settings.batch, sizes.observe)
        self.adding = Batcher(self._added, settings.batch)
        self.pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), "work")

    def reload(self) -> None:
        """Reads the tokens again; a file that cannot be used leaves those of before."""
        if self.settings.tokens is not None:
            self.tokens = read_tokens(self.settings.tokens)

    @property
    def full(self) -> bool:
        """Whether the queue takes nobody more."""
        return self.in_flight >= self.settings.queue

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Counts an answer."""
        self.requests.labels(route, status).inc()
        self.seconds.labels(route).observe(seconds)

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place in the queue."""
        if self.full:
            raise _busy(429, "the queue is full")
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    async def run(self, function: Callable[..., T], *args: Any, **more: Any) -> T:
        """A call in a thread of its own; once begun it ends, also when the caller is gone."""
        work = asyncio.get_running_loop().run_in_executor(self.pool, partial(function, *args, **more))
        return await asyncio.shield(work)

    async def in_time(self, work: Awaitable[T]) -> T:
        """What is ready within the deadline."""
        try:
            return await asyncio.wait_for(work, self.settings.deadline_s)
        except asyncio.TimeoutError:
            raise _busy(503, "not done in time") from None

    def allow(self, caller: bytes) -> None:
        """Takes one request from the caller's allowance."""
        rate, now = self.settings.rate, time.monotonic()
        left, then = self._buckets.get(caller, (2 * rate, now))
        left = min(max(2 * rate, 1.0), left + rate * (now - then))
        if left < 1:
            raise _busy(429, "too many requests of one caller", (1 - left) / rate)
        self._buckets[caller] = left - 1, now

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Opens the queue; at the end finishes what was accepted."""
        async with self.embedding, self.adding:
            keeper = asyncio.create_task(self._keep_house())
            try:
                yield
            finally:
                self.stopping = True
                keeper.cancel()
                await asyncio.gather(keeper, return_exceptions=True)
        self.pool.shutdown()
        if self.erase_at < math.inf:
            self.erase()

    async def _keep_house(self) -> None:
        while True:
            try:
                if self.settings.keep_days is not None:
                    await self.run(self.remove, (), keep_days=self.settings.keep_days)
                if time.monotonic() >= self.erase_at:
                    await self.run(self.erase)
            except Exception:
                _LOG.exception("retention")
            await asyncio.sleep(_HOUSEKEEPING)

    def decoded(self, body: bytes) -> Decoded:
        """Of an image file what the queue holds: the whole image may be a hundred times as large."""
        image = decode(body, self.settings.megapixels)
        pixels = resize(image, self.model.runner.spec.preprocess)
        if not self.thumbnails:
            return Decoded(pixels, None)
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        return Decoded(pixels, image)

    def _embedded(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        return np.split(self.model.embed(images, batch=len(images), decoders=1).features, len(images))

    def features(self, rows: Sequence[np.ndarray]) -> Features:
        """What `embedding` gave for some images, each float32 [1, D]."""
        return made_by(self.model.runner, Features(np.concatenate(rows)))

    def _added(self, images: Sequence[New]) -> list[Changed]:
        """In one change of the gallery, so that all wait for the disk once."""
        now = time.time()
        done = self.gallery.add(
            self.features([new.features for new in images]),
            [new.id for new in images],
            [-1 if new.camera is None else new.camera for new in images],
            [now if new.time is None else new.time for new in images],
            pictures=[new.picture for new in images if new.picture] or None,
        )
        return [done] * len(images)

    def remove(self, ids: str | tuple[()], keep_days: float | None = None) -> Changed:
        """Removes, and erases now or within the time that the settings give."""
        done = self.gallery.remove(ids, keep_days=keep_days)
        if done.images:
            self.erase_at = min(self.erase_at, time.monotonic() + 60 * self.settings.erase_minutes)
            if not self.settings.erase_minutes:
                self.erase()
        return done

    def erase(self) -> None:
        """Takes what was removed out of the files. Another process that reads just then makes it wait for a turn."""
        try:
            self.gallery.compact()
            self.erase_at = math.inf
        except BackendError:
            self.erase_at = time.monotonic()


def _busy(status: int, detail: str, seconds: float = 1.0) -> HTTPException:
    return HTTPException(status, detail, {"Retry-After": str(max(1, math.ceil(seconds)))})


async def _service(request: Request) -> Service:
    return request.app.state.service


#: For endpoints. Their dependencies ask `request.app.state`: FastAPI resolves a dependency anew wherever it stands.
At = Annotated[Service, Depends(_service)]
_BEARER = HTTPBearer(auto_error=False, description="A token of the service's file; not needed where it has none.")


def _may(role: Role) -> Callable[..., Awaitable[None]]:
    """Lets callers of this role or a higher one through."""

    async def check(request: Request, given: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]) -> None:
        service: Service = request.app.state.service
        if request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            raise HTTPException(403, "a page of another site asked")
        caller = b""
        if service.settings.tokens is not None:
            caller = hashlib.sha256(given.credentials.encode() if given else b"").digest()
            found = service.tokens.get(caller)
            if found is None:
                raise HTTPException(401, "no valid token", {"WWW-Authenticate": "Bearer"})
            if ROLES.index(found) < ROLES.index(role):
                raise HTTPException(403, f"needs the role {role}")
        service.allow(caller)
        try:
            unquote_to_bytes(request.url.query).decode()
        except UnicodeDecodeError:
            raise HTTPException(422, "the address is not UTF-8: it would name another id") from None
        names = [name for name, _ in request.query_params.multi_items() if name != "camera"]
        if len(set(names)) < len(names):  # only the last one would count
            raise HTTPException(422, "a name stands twice in the address; only camera may")

    return check


async def _body(request: Request, limit: int) -> bytes:
    taken = bytearray()
    async for part in request.stream():
        taken += part
        if len(taken) > limit:
            break
    return bytes(taken)


async def _picture(request: Request) -> AsyncIterator[Decoded]:
    """The request's body, decoded, and a place in the queue until it is answered."""
    service: Service = request.app.state.service
    with service.place():
        yield await service.run(service.decoded, await _image_file(request, service.settings))


async def _image_file(request: Request, settings: Settings) -> bytes:
    """The request's body."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in _KINDS:
        raise HTTPException(415, f"Content-Type names no image; send one of {', '.join(_KINDS)}")
    limit = int(settings.body_mib * 2**20)
    told = request.headers.get("content-length", "0")
    close = {"Connection": "close"}
    try:
        body = b"" if int(told) > limit else await asyncio.wait_for(_body(request, limit), settings.receive_s)
    except asyncio.TimeoutError:
        raise HTTPException(408, "the body did not arrive in time", close) from None
    if int(told) > limit or len(body) > limit:
        raise HTTPException(413, f"the body is larger than {settings.body_mib:g} MiB", close)
    return body


def decode(body: bytes, megapixels: float) -> Image.Image:
    """An image file's pixels, RGB, upright.

    Raises:
        HTTPException: 413 for more pixels, which are not decoded; 422 for what is no whole image.
    """
    try:
        with Image.open(io.BytesIO(body), formats=FORMATS) as image:
            if image.width * image.height > megapixels * 1e6 or max(image.size) > MAX_SIDE:
                raise HTTPException(413, f"the image has more than {megapixels:g} megapixels")
            return as_seen(image, "image")
    except Image.DecompressionBombError:
        raise HTTPException(413, f"the image has more than {megapixels:g} megapixels") from None
    except (DataError, OSError, ValueError, SyntaxError, struct.error):
        raise HTTPException(422, "the body is not a whole image of a known kind") from None


_KINDS = ("application/octet-stream", "image/jpeg", "image/png", "image/bmp", "image/webp", "image/tiff")
_BODY = {
    "requestBody": {
        "required": True,
        "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in _KINDS},
    }
}

_NAMED = f"What the person is called here; at most {MAX_ID} bytes in UTF-8."


def _new_id(name: str) -> str:
    try:
        return new_id(name)
    except DataError as e:
        raise ValueError(e.expected) from None


def _when(value: object) -> object:
    """A number as the gallery takes it, which a year alone is not; what else it is pydantic reads."""
    if not isinstance(value, str) or not value.strip().lstrip("+-").replace(".", "", 1).isdecimal():
        return value
    try:
        return datetime.fromtimestamp(seconds_of("time", value), timezone.utc)
    except (UsageError, OverflowError, ValueError, OSError) as e:
        raise ValueError(getattr(e, "hint", "seconds since 1970 or ISO 8601 text")) from None


Picture = Annotated[Decoded, Depends(_picture)]
When = Annotated[datetime, BeforeValidator(_when)]
NewId = Annotated[str, AfterValidator(_new_id), Field(min_length=1, max_length=MAX_ID, description=_NAMED)]
Camera = Annotated[int, Field(ge=0, lt=2**63)]


class Strict(BaseModel):
    """What a request may ask for; anything else is refused."""

    model_config = ConfigDict(extra="forbid")


class Search(Strict):
    """How to rank."""

    top: int = Field(10, ge=1, le=100)
    camera: list[Camera] = Field([], max_length=64, description="Only images of these cameras.")
    exclude_camera: Camera | None = None
    since: When | None = Field(None, description="Only images seen then or later; UTC where no zone is named.")
    until: When | None = None
    threshold: float | None = Field(None, ge=-1, le=1, allow_inf_nan=False)
    note: str = Field("", max_length=200, description="For the log, such as a case number; no names.")


class Enroll(Strict):
    """Whose image it is."""

    id: NewId
    camera: Camera | None = None
    time: When | None = Field(None, description="When it was seen; now if not given.")


class Escaped(JSONResponse):
    """An answer in ASCII, where the bytes of an id that is no UTF-8, as file names are, stand as lone surrogates."""

    def render(self, content: object) -> bytes:
        return json.dumps(content, separators=(",", ":")).encode()


#: Of an answer: whatever the gallery holds.
AnyName = Annotated[str, SkipValidation]


class Found(BaseModel):
    """One image of the gallery."""

    rank: int
    id: AnyName
    score: float
    accepted: bool
    camera: int | None
    time: float | None
    key: int


class Ranked(BaseModel):
    """What a search found, best first."""

    matches: list[Found]
    searched: int
    threshold: float | None
    protocol: str | None
    decision: str


class Kept(BaseModel):
    """What a change came to."""

    images: int
    total: int


class Person(BaseModel):
    """An id and its images."""

    id: AnyName
    images: int


class People(BaseModel):
    """A page of ids, in the order of their names."""

    people: list[Person]
    ids: int
    images: int


class About(BaseModel):
    """What the service is for and does."""

    purpose: str
    model: str
    version: str
    threshold: float | None
    require_note: bool
    keep_days: float | None
    erase_minutes: float
    audit: bool
    thumbnails: bool


class Entry(BaseModel):
    """What was done."""

    time: float
    action: str
    ids: int
    images: int
    note: str


class State(BaseModel):
    """How the service is."""

    state: str


class Problem(BaseModel):
    """Why a request was refused, in a fixed sentence."""

    detail: str


class Wrong(BaseModel):
    """A value that cannot be used, and where it stands."""

    loc: list[str | int]
    msg: str
    type: str


class Invalid(BaseModel):
    """Why a request was refused."""

    detail: str | list[Wrong]


def _answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Invalid if status == 422 else Problem} for status in (400, *statuses)}


_ROLE = (401, 403, 429, 422)
_IMAGE = (*_ROLE, 408, 413, 415, 503)
Read, Write, Admin = (Depends(_may(role)) for role in ROLES)
api = APIRouter(prefix="/v1")


@api.post("/search", dependencies=[Read], openapi_extra=_BODY, responses=_answers(*_IMAGE, 409),
          response_class=Escaped)  # fmt: skip
async def search(asked: Annotated[Search, Query()], service: At, image: Picture) -> Ranked:
    """Ranks the gallery for one image, the body."""
    if service.settings.require_note and not asked.note.strip():
        raise HTTPException(422, "a note is required")
    if not len(service.gallery):
        raise HTTPException(409, "the gallery is empty")
    query = service.features([await service.in_time(service.embedding.one(image.pixels))])
    threshold = service.settings.threshold if asked.threshold is None else asked.threshold
    found = await service.run(
        service.gallery.search, query, asked.top, cameras=asked.camera or None, since=asked.since, until=asked.until,
        exclude_camera=asked.exclude_camera, threshold=threshold, head=service.settings.head, note=asked.note,
    )  # fmt: skip
    matches = [
        Found(rank=m.rank, id=m.id, score=m.score, accepted=bool(counts), camera=None if m.camera < 0 else m.camera,
              time=m.time, key=m.key)
        for m, counts in zip(found[0], found.accepted[0].tolist(), strict=True)
    ]  # fmt: skip
    return Ranked(matches=matches, searched=found.searched, threshold=threshold, protocol=found.protocol,
                  decision=found.decision)  # fmt: skip


@api.post("/images", dependencies=[Write], openapi_extra=_BODY, responses=_answers(*_IMAGE), status_code=201)
async def enroll(asked: Annotated[Enroll, Query()], service: At, image: Picture) -> Kept:
    """Adds one image, the body. When it is answered, the image is on the disk."""
    features = await service.in_time(service.embedding.one(image.pixels))
    done = await service.adding.one(New(image.picture, features, asked.id, asked.camera, asked.time))
    return Kept(images=1, total=done.total)


@api.delete("/images", dependencies=[Write], responses=_answers(*_ROLE, 404, 503))
async def remove(id: Annotated[str, Query(min_length=1)], service: At) -> Kept:
    """Forgets all images of an id."""
    try:
        with service.place():
            done = await service.run(service.remove, id)
    except DataError:
        raise HTTPException(404, "no such id") from None
    return Kept(images=done.images, total=done.total)


@api.get("/images/{key}", dependencies=[Read], responses=_answers(*_ROLE, 404) | {200: {"content": {"image/jpeg": {}}}},
         response_class=Response)  # fmt: skip
async def thumbnail(key: Annotated[int, Field(ge=0, lt=2**63)], service: At) -> Response:
    """A small picture of a match, where the gallery keeps them."""
    picture = await service.run(service.gallery.thumbnail, key)
    if picture is None:
        raise HTTPException(404, "no such picture")
    return Response(picture, media_type="image/jpeg")


@api.get("/people", dependencies=[Read], responses=_answers(*_ROLE), response_class=Escaped)
async def people(
    service: At,
    after: Annotated[str, Query(description="The last id of the page before.")] = "",
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> People:
    """Lists ids."""
    counts = await service.run(service.gallery.people)
    page = [Person(id=name, images=images) for name, images in counts.items() if name > after][:limit]
    return People(people=page, ids=len(counts), images=sum(counts.values()))


@api.get("/about", dependencies=[Read], responses=_answers(*_ROLE))
async def about(service: At) -> About:
    """What the gallery is for, and how long it keeps what."""
    stats, s = await service.run(service.gallery.stats), service.settings
    return About(
        purpose=s.purpose, model=stats.model, version=__version__, threshold=s.threshold, require_note=s.require_note,
        keep_days=s.keep_days, erase_minutes=s.erase_minutes, audit=stats.audit, thumbnails=stats.thumbnails,
    )  # fmt: skip


@api.get("/audit", dependencies=[Admin], responses=_answers(*_ROLE))
async def audit(service: At, limit: Annotated[int, Query(ge=1, le=10_000)] = 1000) -> list[Entry]:
    """The gallery's log, newest first."""
    entries = (await service.run(service.gallery.audit)).entries
    return [Entry(**vars(entry)) for entry in entries[: -limit - 1 : -1]]


@api.get("/metrics", dependencies=[Read], responses=_answers(*_ROLE) | {200: {"content": {"text/plain": {}}}},
         response_class=Response)  # fmt: skip
async def metrics(service: At) -> Response:
    """Measurements, for Prometheus."""
    text = await service.run(generate_latest, service.registry)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


open_to_all = APIRouter()


@open_to_all.get("/health")
async def health() -> State:
    """Answers while the process lives."""
    return State(state="alive")


@open_to_all.get("/ready", responses={503: {"model": Problem}})
async def ready(service: At) -> State:
    """Whether requests are taken."""
    if service.stopping or not (service.embedding.running and service.adding.running):
        raise _busy(503, "not ready")
    return State(state="ready")


@open_to_all.get("/", include_in_schema=False)
async def page() -> HTMLResponse:
    """The page to look with."""
    return HTMLResponse(_PAGE, headers={"Content-Security-Policy": _POLICY})


_PAGE = files("nformer_edge.gallery.service").joinpath("page.html").read_text("utf-8")


def _policy(html: str) -> str:
    """Lets the page's own script and style run, and nothing else."""
    rules = ["default-src 'none'", "connect-src 'self'", "img-src blob: data:", "base-uri 'none'", "form-action 'none'",
             "frame-ancestors 'none'"]  # fmt: skip
    for tag in ("script", "style"):
        inside = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in inside]
        rules.append(f"{tag}-src " + " ".join(f"'sha256-{digest}'" for digest in hashes))
    return "; ".join(rules)


_POLICY = _policy(_PAGE)


HEADERS = (
    (b"cache-control", b"no-store"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)
FULL = JSONResponse({"detail": "the queue is full"}, 429, {"Retry-After": "1"})


class Measured:
    """Counts and times answers, and forbids keeping them. What a full queue refuses costs no more than that."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, status = time.perf_counter(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *HEADERS]
            await send(message)

        try:
            if scope["method"] in ("POST", "DELETE") and self.service.full:
                await FULL(scope, receive, answer)
            else:
                await self.app(scope, receive, answer)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.service.answered(route, status, time.perf_counter() - began)


async def _refused(request: Request, error: AnyHTTPException) -> JSONResponse:
    return JSONResponse({"detail": str(error.detail)}, error.status_code, error.headers)


async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    told = [{"loc": [*e["loc"]], "msg": e["msg"], "type": e["type"]} for e in error.errors()]
    return JSONResponse({"detail": told}, 422)


async def _unusable(request: Request, error: Exception) -> JSONResponse:
    """What our own code refused: its message may name files and people, so it goes to the log alone."""
    _LOG.warning("%s", error)
    told = (
        (503, "the gallery is busy or cannot be written")
        if isinstance(error, (BackendError, ArtifactError))
        else (422, "the image or a value cannot be used")
    )
    return JSONResponse({"detail": told[1]}, told[0], {"Retry-After": "1"} if told[0] == 503 else None)


async def _broken(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": "internal error"}, 500)


def create_app(model: Model, gallery: Gallery, settings: Settings) -> FastAPI:
    """The ASGI application over an open model and gallery.

    Raises:
        UsageError: for a file of tokens that cannot be used.
    """
    service = Service(model, gallery, settings)
    app = FastAPI(
        title="nformer-edge", version=__version__, description=settings.purpose, docs_url=None, redoc_url=None,
        lifespan=service.lifespan, separate_input_output_schemas=False,
    )  # fmt: skip
    app.state.service = service
    app.include_router(open_to_all)
    app.include_router(api)
    handlers: tuple[tuple[Any, Any], ...] = (
        (AnyHTTPException, _refused), (RequestValidationError, _invalid), (UsageError, _unusable),
        (DataError, _unusable), (BackendError, _unusable), (ArtifactError, _unusable), (Exception, _broken),
    )  # fmt: skip
    for kind, handler in handlers:
        app.add_exception_handler(kind, handler)
    if settings.loopback:  # or else another site's name, pointed here, would read it with this machine's browser
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]"])
    app.add_middleware(Measured, service=service)
    return app
