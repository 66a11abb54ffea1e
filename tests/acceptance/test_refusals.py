"""Streams that are refused do not stay open."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from contextlib import closing

import pytest

from pg_eventstream.servers.processes import Process
from pg_eventstream.servers.pushpin import Pushpin
from tests.support.database import Database
from tests.support.origin import behind_a_proxy, signature


@pytest.fixture(autouse=True)
def proxied(database: Database) -> Iterator[None]:
    with behind_a_proxy:
        yield


# Through a real proxy


def request(url: str, method: str, path: str, **headers: str) -> tuple[int, str]:
    """Status and body of a response that ends."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
    try:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def test_only_streams_that_are_granted_stay_open(
    app: Process, app_port: int, pushpin: Pushpin, channel: str
) -> None:
    path = f"/events/?channel={channel}"
    assert request(pushpin.url, "HEAD", path) == (200, "")
    assert request(pushpin.url, "POST", path)[0] == 405
    assert request(pushpin.url, "GET", path, **{"Last-Event-ID": "error"})[0] == 400
    for bad in ("/events/", "/events/?channel=a%0D%0Ab", f"{path}&lastEventId=nonsense"):
        status, body = request(pushpin.url, "GET", bad)
        assert (status, '"condition": "bad-request"' in body) == (200, True)
    assert request(pushpin.url, "GET", "/events/next-nonsense")[0] == 403

    directly = f"http://127.0.0.1:{app_port}"
    for headers in (
        {},
        {"Grip-Sig": "x"},
        {"Grip-Sig": signature("a key of somebody else, but long")},
    ):
        # Not a configured proxy: such a client gets a direct stream and no instructions.
        link = http.client.HTTPConnection(directly.removeprefix("http://"), timeout=20)
        link.request("GET", path, headers=headers)
        with closing(link), link.getresponse() as response:
            assert response.status == 200
            assert [name for name in response.headers if name.lower().startswith("grip")] == []
            assert b"event: stream-open\n" in iter(response.readline, b"")
    # Headers of the proxy are not forwarded if a client sends them.
    status, body = request(pushpin.url, "HEAD", path, **{"Grip-Last": f"events-{channel}"})
    assert status == 200
