"""Responses of the endpoint are for one user: no cache keeps any of them.

Event streams among them declare that they are UTF-8.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.core.exceptions import BadRequest, PermissionDenied, SuspiciousOperation
from django.http import Http404, HttpRequest, HttpResponse
from django.test import AsyncClient, Client, override_settings

from pg_eventstream.channelmanager import DefaultChannelManager
from pg_eventstream.grip import links
from tests.project import settings
from tests.support.database import Database
from tests.support.origin import behind_a_proxy, signature

WANTED = "private, no-cache, no-store, no-transform"
PROJECT = {
    "MIDDLEWARE": ["tests.endpoint.test_caching.caches_all_but_private", *settings.MIDDLEWARE],
    "ROOT_URLCONF": "tests.project.drf_urls",
    "INSTALLED_APPS": [*settings.INSTALLED_APPS, "django.contrib.staticfiles", "rest_framework"],
    "STATIC_URL": "/static/",
    "EVENTSTREAM_CHANNELMANAGER_CLASS": "tests.endpoint.test_caching.Raising",
    "TEMPLATES": settings.TEMPLATES,
}
RAISED: dict[str, type[Exception]] = {
    "404": Http404,
    "403": PermissionDenied,
    "400": BadRequest,
    "suspicious": SuspiciousOperation,
}
_cache: dict[str, HttpResponse] = {}
# 204 has no content; DRF responds with a page or a stream.
TYPES = (None, "text/event-stream; charset=utf-8", "text/html; charset=utf-8", "text/plain")


def caches_all_but_private(
    get_response: Callable[[HttpRequest], HttpResponse],
) -> Callable[[HttpRequest], HttpResponse]:
    """Django's UpdateCacheMiddleware before 5.2.9, but for all methods and statuses."""

    def middleware(request: HttpRequest) -> HttpResponse:
        key = f"{request.method} {request.get_full_path()}"
        if key not in _cache:
            response = get_response(request)
            if "private" in response.headers.get("Cache-Control", ""):
                return response
            _cache[key] = response
        return _cache[key]

    return middleware


class Raising(DefaultChannelManager):
    """Refuses by an exception that the query names, and members' channels in the ordinary way."""

    def get_user_for_request(self, request: HttpRequest) -> Any:
        if "raise" in request.GET:
            raise RAISED[request.GET["raise"]]("no")
        return super().get_user_for_request(request)

    def can_read_channel(self, user: Any, channel: str) -> bool:
        return not channel.startswith("secret")


@pytest.fixture(autouse=True)
def project(database: Database) -> Iterator[None]:
    _cache.clear()
    with behind_a_proxy, override_settings(**PROJECT):
        yield


def link(*channels: str) -> str:
    return f"{links.NEXT}{links.sign(links.Session(channels, 'anonymous'))}"


LAST = {"Grip-Last": "events-c; last-id=0"}
EVENT_SOURCE = {"Accept": "text/event-stream"}
JSON = {"Accept": "application/json"}
HTML = {"Accept": "text/html"}
PREFLIGHT = {"Origin": "https://a.example", "Access-Control-Request-Method": "GET"}

#: Method, URL, headers, and the status of the response.
PROXIED = [
    ("GET", "/plain/?channel=c", {}, 200),
    ("HEAD", "/plain/?channel=c", {}, 200),
    ("GET", "/plain/?channel=c&lastEventId=c:9", {}, 200),  # a reset
    ("GET", "/plain/", {}, 200),  # bad-request
    ("GET", "/plain/?channel=secret", {}, 200),  # forbidden
    ("GET", "/plain/?channel=c&lastEventId=error", {}, 400),
    ("OPTIONS", "/plain/", PREFLIGHT, 204),
    ("POST", "/plain/?channel=c", {}, 405),
    ("DELETE", "/plain/", {}, 405),
    *(("GET", f"/plain/?channel=c&raise={name}", {}, status) for name, status in
      [("404", 404), ("403", 403), ("400", 400), ("suspicious", 400)]),
    ("GET", "/plain/LINK c", LAST, 200),
    ("HEAD", "/plain/LINK c", LAST, 200),
    ("GET", "/plain/LINK secret", {"Grip-Last": "events-secret; last-id=0"}, 200),  # ends
    ("GET", "/plain/LINK c", {}, 403),
    ("GET", f"/plain/{links.NEXT}forged", LAST, 403),
    ("POST", "/plain/LINK c", LAST, 405),
    ("GET", "/function/", EVENT_SOURCE, 200),
    ("HEAD", "/function/", EVENT_SOURCE, 200),
    ("GET", "/function/", HTML, 200),  # the page
    ("GET", "/function/", JSON, 406),
    ("GET", "/function/?channels=c", EVENT_SOURCE, 400),
    ("POST", "/function/", EVENT_SOURCE, 405),
    ("OPTIONS", "/function/", EVENT_SOURCE, 200),
    ("OPTIONS", "/function/", PREFLIGHT, 204),
    ("GET", "/members/?channels=c", EVENT_SOURCE, 401),
    ("GET", "/members/?channels=c", {**EVENT_SOURCE, "Authorization": "Token no"}, 401),
    ("GET", "/members/?channels=c", HTML, 401),
    ("GET", "/nobody/?channels=c", EVENT_SOURCE, 403),
    ("GET", "/events/?channels=secret", EVENT_SOURCE, 200),  # forbidden
    *(("GET", f"/events/?channels=c&raise={name}", EVENT_SOURCE, status) for name, status in
      [("404", 404), ("403", 403), ("400", 400), ("suspicious", 400)]),
    ("GET", "/direct/", EVENT_SOURCE, 200),
    ("GET", "/view/", EVENT_SOURCE, 200),
    ("POST", "/view/", EVENT_SOURCE, 405),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path", "headers", "status"), PROXIED)
def test_no_cache_keeps_an_answer_through_the_proxy(
    method: str, path: str, headers: dict[str, str], status: int
) -> None:
    base, mark, channel = path.partition("LINK ")
    path = f"{base}{link(channel)}" if mark else path
    for _ in range(2):
        response = Client().generic(method, path, headers={"Grip-Sig": signature(), **headers})
        assert response.status_code == status, response.content
        assert response["Cache-Control"] == WANTED
        assert response.get("Content-Type") in TYPES
    assert _cache == {}


def test_throttled_request_is_no_answer_for_the_next(database: Database) -> None:
    headers = {"Grip-Sig": signature(), **EVENT_SOURCE}
    answers = [Client().get("/throttled/?channels=once", headers=headers) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 429]
    assert [answer["Cache-Control"] for answer in answers] == [WANTED] * 2


DIRECT = [
    ("GET", "/plain/?channel=c", {}, 200),
    ("HEAD", "/plain/?channel=c", {}, 200),
    ("GET", "/plain/?channel=secret", {}, 200),
    ("GET", "/plain/LINK c", LAST, 501),
    ("GET", "/plain/?channel=c&raise=404", {}, 404),
    ("GET", "/function/", EVENT_SOURCE, 200),
    ("GET", "/members/?channels=c", EVENT_SOURCE, 401),
]


@pytest.mark.parametrize(("method", "path", "headers", "status"), DIRECT)
def test_no_cache_keeps_an_answer_of_this_process(
    method: str, path: str, headers: dict[str, str], status: int
) -> None:
    base, mark, channel = path.partition("LINK ")
    path = f"{base}{link(channel)}" if mark else path

    async def ask() -> Any:
        response = await AsyncClient().generic(method, path, headers=headers)
        response.close()
        return response

    with override_settings(GRIP_URL=None, MIDDLEWARE=PROJECT["MIDDLEWARE"][:1]):
        response = asyncio.run(ask())
    assert response.status_code == status
    assert response["Cache-Control"] == WANTED
    assert response.get("Content-Type") in TYPES
    assert _cache == {}


def test_process_that_cannot_stream_says_so_to_every_client() -> None:
    with override_settings(GRIP_URL=None):
        response = Client().get("/plain/?channel=c")
    assert (response.status_code, response["Cache-Control"]) == (501, WANTED)


def test_refusal_by_exception_rolls_back_as_ever(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    from django.db import connection

    from tests.project.app.models import Counter

    monkeypatch.setitem(connection.settings_dict, "ATOMIC_REQUESTS", True)

    def count(self: Raising, request: HttpRequest) -> None:
        Counter.objects.create(name="asked")
        raise PermissionDenied

    monkeypatch.setattr(Raising, "get_user_for_request", count)
    response = Client().get("/plain/?channel=c", headers={"Grip-Sig": signature()})
    assert response.status_code == 403
    assert not Counter.objects.exists()
