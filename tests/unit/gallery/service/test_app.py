"""The API: each endpoint, who may ask it, what it refuses, and what its answers never hold."""

from __future__ import annotations

import asyncio
import io
import threading
from pathlib import Path

import pytest
from PIL import Image

from nformer_edge.core.errors import BackendError, DataError
from tests.helpers.served import jpeg

ROOT = Path(__file__).parents[4]
RED, GREEN, BLUE = (220, 20, 20), (20, 220, 20), (20, 20, 220)


async def enrolled(client, send, **people):
    for name, color in people.items():
        answer = await send(client, "/v1/images", jpeg(color), id=name, camera=len(name))
        assert answer.status_code == 201, answer.text
    return answer.json()


def test_enroll_search_list_forget(served, send):
    async def work(client, service):
        assert await enrolled(client, send, ann=RED, bert=GREEN, ann2=BLUE) == {"images": 1, "total": 3}
        found = (await send(client, "/v1/search", jpeg(RED), threshold=0.9, note="case 7")).json()
        assert found["matches"][0]["id"] == "ann"
        assert [m["accepted"] for m in found["matches"]] == [True, False, False]
        assert (found["searched"], found["threshold"], found["matches"][0]["camera"]) == (3, 0.9, 3)
        listed = (await client.get("/v1/people")).json()
        assert listed["people"] == [{"id": name, "images": 1} for name in ("ann", "ann2", "bert")]
        assert (await client.get("/v1/people", params={"after": "ann", "limit": 1})).json()["people"][0]["id"] == "ann2"
        gone = await client.delete("/v1/images", params={"id": "ann"})
        assert gone.json() == {"images": 1, "total": 2}
        assert (await client.delete("/v1/images", params={"id": "ann"})).status_code == 404
        left = (await send(client, "/v1/search", jpeg(RED))).json()
        assert "ann" not in [m["id"] for m in left["matches"]]
        log = (await client.get("/v1/audit")).json()
        assert [entry["action"] for entry in log][:3] == ["search", "compact", "remove"]
        assert "case 7" in [entry["note"] for entry in log]

    served(work)


def test_an_id_that_is_no_utf_8_is_answered_with(served, send):
    async def work(client, service):
        await enrolled(client, send, ann=RED)
        service.gallery.add(service.gallery.features, ids="caf\udce9")
        assert [m["id"] for m in (await send(client, "/v1/search")).json()["matches"]] == ["ann", "caf\udce9"]
        assert (await client.get("/v1/people")).json()["people"][1] == {"id": "caf\udce9", "images": 1}
        assert (await client.get("/v1/people?after=caf%E9")).status_code == 422
        assert (await client.get("/v1/people?after=caf%C3%A9")).status_code == 200
        for asked in ({"top": 2.5}, {"top": True}):
            assert (await send(client, "/v1/search", **asked)).status_code == 422
        kinds = (await client.get("/openapi.json")).json()["components"]["schemas"]
        assert kinds["Found"]["properties"]["id"]["type"] == "string"

    served(work)


def test_an_id_is_as_long_as_a_gallery_takes_and_a_longer_one_can_be_listed_and_forgotten(served, send):
    async def work(client, service):
        assert (await send(client, "/v1/images", id="é" * 256)).status_code == 201
        refused = await send(client, "/v1/images", id="é" * 257)
        assert refused.status_code == 422
        assert "at most 512 bytes" in refused.json()["detail"][0]["msg"]
        long = "é" * 600
        assert (await client.get("/v1/people", params={"after": long})).json()["people"] == []
        assert (await client.delete("/v1/images", params={"id": long})).status_code == 404

    served(work)


def test_a_camera_has_any_number_that_a_gallery_takes(served, send):
    async def work(client, service):
        far = 2**63 - 1
        await send(client, "/v1/images", id="ann", camera=far)
        await send(client, "/v1/images", id="ben", camera=2**31)
        found = (await send(client, "/v1/search", camera=[far])).json()
        assert [(m["id"], m["camera"]) for m in found["matches"]] == [("ann", far)]
        assert len((await send(client, "/v1/search", exclude_camera=far)).json()["matches"]) == 1

    served(work)


def test_filters_reach_the_search(served, send):
    async def work(client, service):
        for day, camera in ((1, 1), (2, 2), (3, 3)):
            await send(client, "/v1/images", id=f"day {day}", camera=camera, time=f"2026-01-0{day}T00:00:00Z")

        async def ids(**asked):
            answer = (await send(client, "/v1/search", **asked)).json()
            return sorted(match["id"][-1] for match in answer["matches"])

        assert await ids() == ["1", "2", "3"]
        assert await ids(camera=[1, 3]) == ["1", "3"]
        assert await ids(exclude_camera=1) == ["2", "3"]
        assert await ids(since="2026-01-02", until="2026-01-02T12:00:00+00:00") == ["2"]
        assert await ids(since=1767312000, until="1767355200.5") == ["2"]  # the same in seconds since 1970
        assert await ids(camera=9) == []
        assert (await send(client, "/v1/search", exclude_camera=[1, 2])).status_code == 422  # not the last one alone
        assert (await client.delete("/v1/images", params={"id": ["day 1", "day 2"]})).status_code == 422
        assert len(service.gallery) == 3

    served(work)


def test_a_match_has_its_picture_and_no_other_does(served, send):
    async def work(client, service):
        await enrolled(client, send, ann=RED, bert=GREEN)
        key = (await send(client, "/v1/search", jpeg(GREEN))).json()["matches"][0]["key"]
        picture = await client.get(f"/v1/images/{key}")
        assert picture.headers["content-type"] == "image/jpeg"
        red, green, blue = Image.open(io.BytesIO(picture.content)).getpixel((3, 3))
        assert green > 200 > 40 > max(red, blue)
        assert (await client.get("/v1/images/77")).status_code == 404

    served(work)


def test_health_readiness_metrics_description_and_page(served, send):
    async def work(client, service):
        await enrolled(client, send, ann=RED)
        assert (await client.get("/health")).json() == {"state": "alive"}
        assert (await client.get("/ready")).json() == {"state": "ready"}
        metrics = (await client.get("/v1/metrics")).text
        assert 'nformer_requests_total{route="/v1/images",status="201"} 1.0' in metrics
        assert "nformer_gallery_images 1.0" in metrics
        assert "process_resident_memory_bytes" in metrics
        told = (await client.get("/openapi.json")).json()
        assert set(told["paths"]["/v1/images"]) == {"post", "delete"}
        page = await client.get("/")
        assert "script-src 'sha256-" in page.headers["content-security-policy"]
        assert "http://" not in page.text
        assert "https://" not in page.text
        about = (await client.get("/v1/about")).json()
        assert (about["purpose"], about["keep_days"]) == ("find lost visitors", 30)
        service.state.stopping = True
        assert (await client.get("/ready")).status_code == 503

    served(work, purpose="find lost visitors", keep_days=30)


ENDPOINTS = (
    ("read", "POST", "/v1/search"),
    ("read", "GET", "/v1/people"),
    ("read", "GET", "/v1/about"),
    ("read", "GET", "/v1/metrics"),
    ("read", "GET", "/v1/images/0"),
    ("write", "POST", "/v1/images?id=ann"),
    ("write", "DELETE", "/v1/images?id=ann"),
    ("admin", "GET", "/v1/audit"),
    ("", "GET", "/health"),
    ("", "GET", "/ready"),
    ("", "GET", "/"),
    ("", "GET", "/openapi.json"),
)
RANKS = ("", "read", "write", "admin")


def test_roles_by_endpoints(served, tmp_path):
    tokens = {role: role * 8 + "0123456789012345678901234567" for role in RANKS[1:]} | {"stranger": "s" * 40}
    file = tmp_path / "tokens"
    file.write_text("".join(f"{role} {token}\n" for role, token in tokens.items() if role in RANKS))
    file.chmod(0o600)

    async def work(client, service):
        known = {(method.upper(), path) for path, ways in service.app.openapi()["paths"].items() for method in ways}
        shape = {(method, path.partition("?")[0].replace("/0", "/{key}")) for _, method, path in ENDPOINTS}
        assert known <= shape
        table = []
        for needed, method, path in ENDPOINTS:
            told = {}
            for holder, token in ({"nobody": ""} | tokens).items():
                headers = {"Content-Type": "image/jpeg"} | ({"Authorization": f"Bearer {token}"} if token else {})
                body = jpeg() if method == "POST" else None
                status = (await client.request(method, path, content=body, headers=headers)).status_code
                if needed and holder not in RANKS:
                    assert status == 401, (path, holder, status)
                elif needed and RANKS.index(holder) < RANKS.index(needed):
                    assert status == 403, (path, holder, status)
                else:
                    assert status in (200, 201, 404, 409), (path, holder, status)
                told[holder] = str(status) if status in (401, 403) else "yes"
            assert told.pop("stranger") == told["nobody"]
            shown = path.partition("?")[0].replace("/0", "/KEY")
            table.append(f"| `{method} {shown}` | " + " | ".join(told.values()) + " |\n")
        assert "".join(table) in (ROOT / "docs" / "serve.md").read_text()
        again = {"Authorization": f"Bearer {tokens['read']}"}
        file.write_text("admin " + "n" * 40)
        service.state.reload()
        assert (await client.get("/v1/about", headers=again)).status_code == 401

    served(work, tokens=str(file), host="0.0.0.0")


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"", "image/jpeg", 422),
        (b"no image", "image/jpeg", 422),
        (jpeg()[:400], "image/jpeg", 422),
        (jpeg(kind="GIF"), "image/png", 422),
        (jpeg(), "text/plain", 415),
        (jpeg(), "multipart/form-data; boundary=x", 415),
        (jpeg(size=(2000, 1000), kind="PNG"), "image/png", 413),
        (b"\xff" * 300_000, "image/jpeg", 413),
        (b'{"id": NaN}', "application/octet-stream", 422),
        (b"%PDF-1.4 /etc/passwd", "application/octet-stream", 422),
    ],
)
def test_a_hostile_body_is_refused_and_the_next_request_is_served(served, send, body, kind, status):
    async def work(client, service):
        refused = await send(client, "/v1/images", body, kind, id="ann")
        assert refused.status_code == status, refused.text
        assert set(refused.json()) == {"detail"}
        assert len(service.gallery) == 0
        assert service.state.in_flight == 0
        assert (await send(client, "/v1/images", id="ann")).status_code == 201

    served(work, megapixels=1, body_mib=0.25)


@pytest.mark.parametrize(
    "asked",
    [
        *({"top": 0}, {"top": 101}, {"threshold": "nan"}, {"since": "soon"}, {"since": "2026"}, {"until": 2026}),
        *({"camera": -1}, {"camera": 2**63}, {"no": 1}),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_where_it_stands(served, send, asked):
    async def work(client, service):
        await enrolled(client, send, ann=RED)
        refused = await send(client, "/v1/search", **asked)
        assert refused.status_code == 422
        (wrong,) = refused.json()["detail"]
        assert next(iter(asked)) in wrong["loc"]

    served(work)


def test_a_full_queue_is_refused_with_a_time_to_come_back_and_nothing_is_lost(served, send, colors):
    gate = threading.Event()
    colors.before = gate.wait

    async def work(client, service):
        waiting = [asyncio.create_task(send(client, "/v1/images", id=f"{i}")) for i in range(4)]
        while service.state.in_flight < 4 or not colors.batches:
            await asyncio.sleep(0.01)
        refused = await send(client, "/v1/images", id="late")
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        gate.set()
        assert [answer.status_code for answer in await asyncio.gather(*waiting)] == [201] * 4
        assert service.gallery.people() == {str(i): 1 for i in range(4)}

    served(work, queue=4)


def test_images_of_several_callers_are_embedded_together_and_each_gets_its_own(served, send, colors):
    gate = threading.Event()
    colors.before = gate.wait

    async def work(client, service):
        first = asyncio.create_task(send(client, "/v1/images", jpeg(RED), id="red"))
        while not colors.batches:
            await asyncio.sleep(0.01)
        more = [asyncio.create_task(send(client, "/v1/images", jpeg(c), id=f"{c}")) for c in (GREEN, BLUE, RED)]
        while service.state.embedding._waiting.qsize() < 3:
            await asyncio.sleep(0.01)
        gate.set()
        await asyncio.gather(first, *more)
        assert colors.batches == [1, 3]
        for color in (GREEN, BLUE):
            assert (await send(client, "/v1/search", jpeg(color))).json()["matches"][0]["id"] == str(color)

    served(work)


def test_one_callers_image_that_fails_harms_no_other(served, send, colors, monkeypatch):
    embed = colors.embed

    def fails(images, batch, decoders):
        if any(image[0, 0, 0] < 100 for image in images):
            raise DataError("/home/ann/secret.jpg", "NaN", "finite numbers", "Leave it out.")
        return embed(images, batch, decoders)

    monkeypatch.setattr(colors, "embed", fails)

    async def work(client, service):
        bodies = [jpeg(RED), jpeg(BLUE), jpeg(RED)]
        answers = await asyncio.gather(*(send(client, "/v1/images", b, id=f"{i}") for i, b in enumerate(bodies)))
        assert [answer.status_code for answer in answers] == [201, 422, 201]
        assert "secret" not in answers[1].text

    served(work)


def test_images_of_several_callers_are_added_in_one_change_and_one_that_fails_harms_no_other(served, send, monkeypatch):
    gate, sizes = threading.Event(), []

    async def work(client, service):
        add = service.gallery.add

        def waits(features, ids, *more, **named):
            sizes.append(len(ids))
            gate.wait()
            if "bad" in ids:
                raise DataError("ids", "bad", "another", "Leave it out.")
            return add(features, ids, *more, **named)

        monkeypatch.setattr(service.gallery, "add", waits)
        first = asyncio.create_task(send(client, "/v1/images", id="first"))
        while not sizes:
            await asyncio.sleep(0.01)
        more = [asyncio.create_task(send(client, "/v1/images", id=name)) for name in ("ann", "bad", "bo")]
        while service.state.adding._waiting.qsize() < 3:
            await asyncio.sleep(0.01)
        gate.set()
        answers = await asyncio.gather(first, *more)
        assert [answer.status_code for answer in answers] == [201, 201, 422, 201]
        assert sizes == [1, 3, 1, 1, 1]
        assert service.gallery.people() == {"ann": 1, "bo": 1, "first": 1}

    served(work)


def test_what_is_not_done_in_time_is_refused_and_not_added(served, send, colors):
    gate = threading.Event()
    colors.before = gate.wait

    async def work(client, service):
        late = await send(client, "/v1/images", id="ann")
        assert (late.status_code, late.headers["retry-after"]) == (503, "1")
        gate.set()
        assert service.gallery.people() == {}

    served(work, deadline_s=0.05)


def test_a_caller_above_the_rate_is_told_when_to_come_back(served):
    async def work(client, service):
        statuses = [(await client.get("/v1/about")).status_code for _ in range(6)]
        assert statuses[:2] == [200, 200]
        assert statuses[-1] == 429

    served(work, rate=1e-3 + 1)


def test_another_sites_page_is_refused(served, send):
    async def work(client, service):
        for site in ("cross-site", "same-site"):
            assert (await client.get("/v1/people", headers={"Sec-Fetch-Site": site})).status_code == 403
        assert (await client.get("/v1/people", headers={"Host": "evil.example"})).status_code == 400

    served(work)


def test_what_fails_inside_is_answered_without_its_message(served, send, monkeypatch):
    async def work(client, service):
        await enrolled(client, send, ann=RED)
        for error, status in ((RuntimeError("/srv/people"), 500), (BackendError("/srv/people", "busy"), 503)):

            def broken(*_, error=error, **__):
                raise error

            monkeypatch.setattr(service.gallery, "search", broken)
            answer = await send(client, "/v1/search")
            assert answer.status_code == status
            assert "/srv" not in answer.text
            assert "Traceback" not in answer.text

    served(work)


def test_a_note_is_asked_for_where_the_settings_say_so(served, send):
    async def work(client, service):
        await enrolled(client, send, ann=RED)
        assert (await send(client, "/v1/search")).status_code == 422
        assert (await send(client, "/v1/search", note="case 12")).status_code == 200

    served(work, require_note=True)


def test_what_is_forgotten_leaves_the_files_at_once(served, send, tmp_path):
    async def work(client, service):
        await enrolled(client, send, verylongname=RED, bert=GREEN)
        await client.delete("/v1/images", params={"id": "verylongname"})
        held = b"".join(path.read_bytes() for path in (tmp_path / "people").iterdir())
        assert b"verylongname" not in held
        assert b"bert" in held

    served(work)


def test_what_was_seen_too_long_ago_is_removed(served, send):
    async def work(client, service):
        await send(client, "/v1/images", id="old", time="2020-01-01")
        await send(client, "/v1/images", id="new")
        service.state.remove((), keep_days=30)
        assert service.gallery.people() == {"new": 1}

    served(work)
