"""Pages of other origins, through a proxy and in a browser."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler

import pytest

from pg_eventstream.servers.processes import Process
from pg_eventstream.servers.pushpin import Pushpin
from tests.support.browser import Browser
from tests.support.http_service import HttpService, respond
from tests.support.origin import behind_a_proxy


@pytest.fixture(autouse=True)
def proxied() -> Iterator[None]:
    with behind_a_proxy:
        yield


# Through a real proxy


class EmptyPages(HttpService):
    def answer(self, request: BaseHTTPRequestHandler) -> None:
        respond(request, 200, content_type="text/html")


@pytest.fixture
def pages() -> Iterator[int]:
    """The port of a server of empty pages; localhost is another origin."""
    with EmptyPages() as server:
        yield server.port


@pytest.fixture
def cross_origin(pages: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """The origin that the application allows; request it before the application."""
    origin = f"http://127.0.0.1:{pages}"
    chosen = {"EVENTSTREAM_ALLOW_ORIGINS": [origin], "EVENTSTREAM_ALLOW_CREDENTIALS": True}
    monkeypatch.setenv("PG_EVENTSTREAM_TEST_SETTINGS", json.dumps(chosen))
    return origin


@contextmanager
def answer_of(
    pushpin: Pushpin, path: str, method: str = "GET", headers: Mapping[str, str] | None = None
) -> Iterator[http.client.HTTPResponse]:
    connection = http.client.HTTPConnection(pushpin.url.removeprefix("http://"), timeout=20)
    try:
        connection.request(method, path, headers=headers or {})
        yield connection.getresponse()
    finally:
        connection.close()


def test_proxy_passes_on_what_is_allowed(
    cross_origin: str, app: Process, pushpin: Pushpin, channel: str
) -> None:
    path = f"/events/?channel={channel}"
    headers = {"Origin": cross_origin}
    with answer_of(pushpin, path, headers=headers) as held:
        assert held.getheader("Content-Type") == "text/event-stream; charset=utf-8"
        assert held.getheader("Access-Control-Allow-Origin") == cross_origin
        assert held.getheader("Access-Control-Allow-Credentials") == "true"
        assert "Origin" in held.getheader("Vary", "")
    with answer_of(pushpin, path, headers={"Origin": "https://evil.example"}) as held:
        assert held.getheader("Access-Control-Allow-Origin") is None
        assert "Origin" in held.getheader("Vary", "")
    with answer_of(
        pushpin, path, "OPTIONS", {**headers, "Access-Control-Request-Method": "GET"}
    ) as preflight:
        assert (preflight.status, preflight.read()) == (204, b"")
        assert preflight.getheader("Access-Control-Allow-Methods") == "GET, HEAD"
        assert preflight.getheader("Access-Control-Allow-Origin") == cross_origin


READ_WITH_EVENTSOURCE = """([url]) => new Promise((resolve) => {
    const events = new EventSource(url, { withCredentials: true });
    events.addEventListener("stream-open", () => { events.close(); resolve("open"); });
    events.onerror = () => { events.close(); resolve("refused"); };
})"""
# Headers for which a browser sends a preflight.
READ_WITH_FETCH = """async ([url, lastEventId]) => {
    const headers = { "Last-Event-ID": lastEventId, "Cache-Control": "no-store" };
    try {
        const response = await fetch(url, { headers, credentials: "include" });
        const { value } = await response.body.getReader().read();
        return new TextDecoder().decode(value).includes("event: stream-open") ? "open" : "odd";
    } catch (e) {
        return "refused";
    }
}"""


def test_browser_lets_pages_of_the_allowed_origin_read_and_no_others(
    cross_origin: str, app: Process, pages: int, pushpin: Pushpin, browser: Browser, channel: str
) -> None:
    url = f"{pushpin.url}/events/?channel={channel}"
    for origin, outcome in (
        (cross_origin, "open"),
        (f"http://localhost:{pages}", "refused"),
    ):
        page = browser.new_page()
        page.goto(origin)
        for script in (READ_WITH_EVENTSOURCE, READ_WITH_FETCH):
            assert page.evaluate(script, [url, f"{channel}:0"]) == outcome
        page.close()
