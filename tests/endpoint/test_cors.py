"""Pages of other origins: which may read, and which may not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from django.conf import settings
from django.test import Client, override_settings

from pg_eventstream import send_event
from tests.support.database import Database
from tests.support.origin import Origin, behind_a_proxy, signature
from tests.support.rounds import sequence

PAGE = "https://app.example"
NAMED = {"EVENTSTREAM_ALLOW_ORIGINS": [PAGE, "http://localhost:3000"]}
STREAM = "/events/?channel=c"


@pytest.fixture(autouse=True)
def proxied() -> Iterator[None]:
    with behind_a_proxy:
        yield


def ask(origin: str | None, path: str = STREAM, method: str = "GET", **headers: str) -> Any:
    """The endpoint's response to a request from a page of this origin."""
    headers["Grip-Sig"] = signature()
    if origin is not None:
        headers["Origin"] = origin
    return Client().generic(method, path, headers=headers)


def ask_first(origin: str, **headers: str) -> Any:
    """The browser's preflight before a page may send additional headers."""
    headers["Access-Control-Request-Method"] = "GET"
    return ask(origin, method="OPTIONS", **headers)


def allowed(response: Any) -> dict[str, str]:
    """The CORS headers of the response, without their common prefix."""
    headers = {name.lower(): value for name, value in response.headers.items()}
    prefix = "access-control-"
    return {n.removeprefix(prefix): v for n, v in headers.items() if n.startswith(prefix)}


def depends_on_origin(response: Any) -> bool:
    """Whether caches must keep the responses to different origins apart."""
    return "origin" in response.headers.get("Vary", "").lower().split(", ")


@pytest.mark.parametrize(
    "setting",
    [
        {"EVENTSTREAM_ALLOW_ORIGIN": PAGE},
        {"EVENTSTREAM_ALLOW_ORIGIN": [PAGE]},
        {"EVENTSTREAM_ALLOW_ORIGINS": PAGE},
        {"EVENTSTREAM_ALLOW_ORIGINS": ("https://other.example", PAGE)},
        {"EVENTSTREAM_ALLOW_ORIGINS": ["https://APP.example"]},
        {"EVENTSTREAM_ALLOW_ORIGIN": "https://a.example", "EVENTSTREAM_ALLOW_ORIGINS": [PAGE]},
        {"EVENTSTREAM_ALLOW_ORIGIN": PAGE, "EVENTSTREAM_ALLOW_ORIGINS": ["https://a.example"]},
    ],
)
def test_page_of_a_named_origin_may_read(database: Database, setting: dict[str, Any]) -> None:
    with override_settings(**setting):
        response = ask(PAGE)
        assert allowed(response) == {"allow-origin": PAGE}
        assert response["Grip-Hold"] == "stream"
        assert allowed(ask("https://evil.example")) == {}


@override_settings(**NAMED, EVENTSTREAM_ALLOW_CREDENTIALS=True)
def test_page_of_an_origin_that_only_looks_alike_may_not_read(database: Database) -> None:
    for origin in (
        *("http://app.example", "https://app.example:8443", "https://app.example:443"),
        *("https://app.example.evil.example", "https://evilapp.example", "https://x.app.example"),
        *("https://app.example@evil.example", "https://app.example/", f"{PAGE}, {PAGE}"),
        *("http://localhost", "http://localhost:30001", "null", "*", "app.example", "", "\u00fc"),
    ):
        response = ask(origin)
        assert allowed(response) == {}
        assert depends_on_origin(response)
        assert allowed(ask_first(origin)) == {}


@override_settings(**NAMED)
def test_address_of_the_server_and_the_referer_do_not_count(database: Database) -> None:
    for origin in (None, "https://evil.example"):
        response = ask(origin, Host="app.example", Referer=f"{PAGE}/page")
        assert allowed(response) == {}
    response = ask(PAGE, Host="streams.example", Referer="https://evil.example/")
    assert allowed(response) == {"allow-origin": PAGE}


@override_settings(EVENTSTREAM_ALLOW_ORIGIN="*")
def test_any_page_may_read_what_is_open_to_all(database: Database) -> None:
    for origin in (PAGE, "null", None):
        response = ask(origin)
        assert allowed(response) == {"allow-origin": "*"}
        assert not depends_on_origin(response)


@pytest.mark.parametrize("origins", ["*", [PAGE, "*"]])
def test_credentials_are_never_allowed_to_any_page(database: Database, origins: object) -> None:
    with override_settings(EVENTSTREAM_ALLOW_ORIGINS=origins, EVENTSTREAM_ALLOW_CREDENTIALS=True):
        for origin in (PAGE, "https://evil.example"):
            assert allowed(ask(origin)) == {"allow-origin": "*"}
            assert "allow-credentials" not in allowed(ask_first(origin))


@override_settings(**NAMED, EVENTSTREAM_ALLOW_CREDENTIALS=True)
def test_credentials_are_allowed_to_pages_of_named_origins(database: Database) -> None:
    assert allowed(ask(PAGE)) == {"allow-origin": PAGE, "allow-credentials": "true"}
    assert allowed(ask_first(PAGE))["allow-credentials"] == "true"
    assert allowed(ask("https://evil.example")) == {}
    with override_settings(EVENTSTREAM_ALLOW_CREDENTIALS=False):
        assert allowed(ask(PAGE)) == {"allow-origin": PAGE}


@override_settings(**NAMED)
def test_every_answer_says_who_may_read_it(database: Database) -> None:
    send_event("c", "message", 1)
    sequence(database)
    link = Origin().open("c").next_link
    for path, status in (
        ("/events/", 200),  # bad-request
        ("/events/?channel=c&lastEventId=c:0", 200),
        ("/events/?channel=c&lastEventId=error", 400),
        (link, 403),
        (f"{link}x", 403),
    ):
        response = ask(PAGE, path)
        assert response.status_code == status
        assert allowed(response) == {"allow-origin": PAGE}
        # A cache must not use it for another page, nor for a request without an Origin.
        for other in (PAGE, "https://evil.example", None):
            assert depends_on_origin(ask(other, path))
    assert allowed(Client().get(STREAM, headers={"Origin": PAGE})) == {"allow-origin": PAGE}  # 501
    assert allowed(ask(PAGE, method="HEAD")) == {"allow-origin": PAGE}


@override_settings(**NAMED)
def test_preflight_allows_what_clients_send() -> None:
    response = ask_first(PAGE)
    assert (response.status_code, response.content) == (204, b"")
    assert response["Allow"] == "GET, HEAD, OPTIONS"
    assert depends_on_origin(response)
    assert not any(name.startswith("Grip-") for name in response.headers)
    assert (
        allowed(response).items()
        >= {
            "allow-origin": PAGE,
            "allow-methods": "GET, HEAD",
            "allow-headers": "Last-Event-ID, Cache-Control",
        }.items()
    )
    for more in ("Authorization, X-Tenant", ["Authorization", "X-Tenant"]):
        with override_settings(EVENTSTREAM_ALLOW_HEADERS=more):
            headers = allowed(ask_first(PAGE))["allow-headers"]
        assert headers == "Last-Event-ID, Cache-Control, Authorization, X-Tenant"


@override_settings(**NAMED)
def test_preflight_is_answered_without_a_proxy() -> None:
    headers = {"Origin": PAGE, "Access-Control-Request-Method": "GET"}
    response = Client().options(STREAM, headers=headers)
    assert response.status_code == 204
    assert allowed(response)["allow-origin"] == PAGE


def test_without_settings_nothing_is_added(database: Database) -> None:
    nothing: list[dict[str, Any]] = [
        {},
        {"EVENTSTREAM_ALLOW_ORIGIN": ""},
        {"EVENTSTREAM_ALLOW_ORIGINS": []},
        {"EVENTSTREAM_ALLOW_CREDENTIALS": True, "EVENTSTREAM_ALLOW_HEADERS": "X-Tenant"},
    ]
    for setting in nothing:
        with override_settings(**setting):
            for response in (ask(PAGE), ask(None), ask_first(PAGE)):
                assert allowed(response) == {}
                assert not depends_on_origin(response)
            response = ask(None, method="OPTIONS")
            assert (response.status_code, response["Allow"]) == (204, "GET, HEAD, OPTIONS")


@override_settings(
    INSTALLED_APPS=[*settings.INSTALLED_APPS, "corsheaders"],
    MIDDLEWARE=["corsheaders.middleware.CorsMiddleware", *settings.MIDDLEWARE],
    CORS_ALLOWED_ORIGINS=[PAGE],
    CORS_ALLOW_CREDENTIALS=True,
    CORS_ALLOW_HEADERS=["last-event-id"],
    CORS_EXPOSE_HEADERS=["x-shown"],
)
def test_django_cors_headers_does_it_instead(database: Database) -> None:
    for path in (STREAM, "/events/"):
        assert allowed(ask(PAGE, path)) == {
            "allow-origin": PAGE,
            "allow-credentials": "true",
            "expose-headers": "x-shown",
        }
    assert allowed(ask_first(PAGE))["allow-headers"] == "last-event-id"
    refused = ask("https://evil.example")
    assert allowed(refused) == {}
    assert depends_on_origin(refused)
